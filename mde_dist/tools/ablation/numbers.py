"""Evaluations of several trainings per row -> what is known about each row, and about its distance from another."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mde_dist.data.config import view_size
from mde_dist.evaluation.bootstrap import interval, means, resamples
from mde_dist.evaluation.compare import why_not
from mde_dist.evaluation.metrics import PROTOCOLS, Protocol
from mde_dist.evaluation.results import check_same_images, load_rows, read_record
from mde_dist.models.depth_model import create_model
from mde_dist.models.flops import training_flops
from mde_dist.tools.ablation.table import Table, Training
from mde_dist.utils.errors import UserError
from mde_dist.utils.jsonl import number, read_records

SEED = 0
"""Seed of the bootstrap's draws: the same images are drawn for all rows."""


@dataclass(frozen=True)
class RowStatistics:
    """The trainings of a row that are finished. Arrays have one number per metric of the protocol."""

    row: str
    seeds: tuple[int, ...]
    each: np.ndarray
    """(seeds, metrics): the mean over the images."""
    resampled: np.ndarray
    """(seeds, resamples, metrics): the mean over the drawn images."""
    cost: dict[str, float]
    """Per training: seconds, images_per_second, million_parameters, gflops (forward and backward, per image)."""

    @property
    def mean(self) -> np.ndarray:
        return self.each.mean(0)

    @property
    def ends(self) -> np.ndarray:
        """(2, metrics): the bootstrap interval over images."""
        return interval(self.resampled.mean(0))

    def difference(self, other: "RowStatistics") -> np.ndarray:
        """(3, metrics): mean and ends of self - other, on the same draws of images, over the seeds that both have."""
        mine, others = self.common(other), other.common(self)
        return np.concatenate([[mine.mean - others.mean], interval(mine.resampled.mean(0) - others.resampled.mean(0))])

    def common(self, other: "RowStatistics") -> "RowStatistics":
        """Statistics over the seeds that the other has, too."""
        indices = [index for index, seed in enumerate(self.seeds) if seed in other.seeds]
        seeds = tuple(self.seeds[index] for index in indices)
        return replace(self, seeds=seeds, each=self.each[indices], resampled=self.resampled[indices])

    def relative(self, other: "RowStatistics", k: int) -> np.ndarray:
        """(3,): the same as a share of the other, for metric `k`, an error that is never 0."""
        mine, others = self.common(other), other.common(self)
        ends = interval(mine.resampled.mean(0)[:, k] / others.resampled.mean(0)[:, k] - 1)
        return np.array([mine.mean[k] / others.mean[k] - 1, *ends])


@dataclass(frozen=True)
class AblationResult:
    """Statistics of all rows that have a finished training, in their order."""

    protocol: Protocol
    fingerprint: dict[str, Any]
    """The fingerprint that all have."""
    figures: dict[str, RowStatistics]


def gather(table: Table) -> AblationResult | None:
    """Collect the statistics of all rows; None where nothing is finished. Raises UserError where two trainings were
    scored on something else."""
    fingerprint: dict[str, Any] | None = None
    figures: dict[str, RowStatistics] = {}
    for row, runs in table.rows.items():
        scored: dict[int, np.ndarray] = {}
        for seed, training in runs.items():
            if not training.finished:
                continue
            name = training.config.evaluate.protocol
            record = read_record(training.scores)
            if fingerprint is not None and record["fingerprints"].get(name) != fingerprint:
                raise UserError(
                    f"{training.name} cannot be compared with the rows before: "
                    f"{why_not(fingerprint, record['fingerprints'].get(name))}"
                )
            images = load_rows(record, name)
            if fingerprint is None:
                fingerprint, known = record["fingerprints"][name], images
            check_same_images(known, images, ("the rows before", training.name))
            scored[seed] = _in_order(images)
        if scored:
            protocol = PROTOCOLS[name]
            figures[row] = figures_of(row, scored, protocol, cost([runs[seed] for seed in scored]))
    return AblationResult(protocol, fingerprint, figures) if fingerprint is not None else None


def figures_of(row: str, scored: Mapping[int, np.ndarray], protocol: Protocol, cost: dict[str, float]) -> RowStatistics:
    """`scored`: by seed, `score` rows of the same images in the same order."""
    tables = list(scored.values())
    images = len(tables[0])
    each = np.stack([means(rows, np.ones((1, images)), protocol)[0] for rows in tables])
    resampled = [np.stack([means(rows, drawn, protocol) for rows in tables]) for drawn in resamples(images, SEED)]
    return RowStatistics(row, tuple(scored), each, np.concatenate(resampled, axis=1), cost)


def _in_order(images: tuple[list[str], np.ndarray]) -> np.ndarray:
    """Keys and `score` rows -> the rows of the images that have a pixel to score, in the order of their keys."""
    keys, rows = images
    rows = rows[np.argsort(keys)]
    return rows[rows[:, 0] > 0]


def cost(trainings: Sequence[Training]) -> dict[str, float]:
    """Cost of training, the mean over some trainings of one row."""
    seconds = float(np.mean([training_seconds(training) for training in trainings]))
    config = trainings[0].config
    found = {"seconds": seconds, "images_per_second": config.train.total_samples / seconds if seconds else 0.0}
    model = create_model(config.model)
    found["million_parameters"] = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    if config.data.size:
        found["gflops"] = training_flops(config.model, view_size(config.data.size, config.augment)) / 1e9
    return found


def training_seconds(training: Training) -> float:
    """Seconds of the steps alone, without evaluations, checkpoints and stops."""
    seconds, before = 0.0, 0
    for record in read_records(training.config.run / "metrics.jsonl"):
        speed = number(record.get("images_per_second"))
        if speed is not None:
            seconds += (record["samples"] - before) / max(speed, 1e-9)
            before = record["samples"]
    return seconds


def hardware_summary(trainings: Sequence[Training]) -> str:
    """Ranks and device of all finished ones, in words."""
    found: dict[str, None] = {}
    for training in trainings:
        if training.finished:
            for record in read_records(training.config.run / "metrics.jsonl"):
                if "start" in record:
                    start = record["start"]
                    ranks, device, precision = (start.get(name, "?") for name in ("ranks", "device", "precision"))
                    found[f"{ranks} x {device}, {precision}"] = None
    return "; ".join(found)
