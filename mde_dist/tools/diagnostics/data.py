"""The shards: are they there, the same everywhere, whole as far as a sample shows, and read fast enough?"""

import contextlib
import io
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mde_dist.data.dataset import DamagedSample
from mde_dist.data.loader import Batch, Stopped
from mde_dist.data.manifest import NAME, command_for
from mde_dist.data.shards import ShardDataset
from mde_dist.distributed.signals import PreemptionHandler
from mde_dist.packing.probe import linspace_indices
from mde_dist.tools.diagnostics.panel import RankSurvey, Row, format_bytes
from mde_dist.training.config import SAMPLE_SHARDS, Config
from mde_dist.training.data_stream import training_order, training_stream
from mde_dist.training.setup import open_splits

SECONDS = 3.0
"""Seconds for which batches are taken from the stream."""
_SAMPLED = 64  # training samples that are read per node; of the split to evaluate on a quarter of that
_NAMED = 5
_REMOTE_SHARDS = 2  # of a server's shards only so many are looked at: whole files are fetched for it
_WARN, _FAIL = 1.0, 0.5  # what the loader gives, as a share of what the step takes


def patience(config: Config) -> float:
    """Seconds after which a look at the shards has failed: longer than a server is waited for."""
    return config.data.remote_timeout + 20


def check_shards(
    panel: RankSurvey, config: Config, opened: contextlib.ExitStack
) -> tuple[ShardDataset, ShardDataset] | None:
    """(training split, split to evaluate on), open until `opened` is left; None where some rank cannot open them."""
    panel.begin("shards")
    splits: list[ShardDataset] = []

    def check() -> list[str] | None:
        if config.data.shards == SAMPLE_SHARDS and not Path(SAMPLE_SHARDS, NAME).is_file():
            return None
        splits.extend(open_splits(config, opened))
        return [split.manifest.sha256 for split in splits]

    answers = panel.query_ranks(check, "pack or copy the shards again", patience(config))
    if panel.failed("shards", answers):
        return None
    missing = [rank for rank, answer in enumerate(answers) if answer.value is None]
    if missing:
        where = "" if len(missing) == panel.world else f" on {panel.named(missing)}"
        found = f"no shards at {SAMPLE_SHARDS} yet{where}; the next checks make do with a batch of noise"
        panel.add(Row("shards", "warn", found, "nothing: the rooms will be rendered and packed first, in a minute"))
        return None
    for name, index in (("training", 0), ("evaluation", 1)):
        hashes = {rank: f"{name} manifest {answer.value[index][:12]}" for rank, answer in enumerate(answers)}
        if len({answer.value[index] for answer in answers}) > 1:
            advice = "the nodes have shards of different packings: copy one directory to all, or share it"
            panel.add(Row("shards", "fail", panel.differing(hashes), advice))
            return None
    train, held_out = splits
    size = sum(shard.bytes for split in splits for shard in split.info.shards)
    panel.add(
        Row(
            "shards",
            "ok",
            f"{train.location}: {len(train):,} to train on, {len(held_out):,} to evaluate on, "
            f"{len(train.info.shards) + len(held_out.info.shards)} shards of {format_bytes(size)} in all, "
            f"{train.size[0]}x{train.size[1]}, manifest {train.manifest.sha256[:12]}"
            + (" on all ranks" if panel.world > 1 else ""),
        )
    )
    return train, held_out


def check_samples(panel: RankSurvey, config: Config, splits: tuple[ShardDataset, ShardDataset]) -> None:
    """Read and decode some samples of every shard, as training will; the ranks of a node share them."""
    panel.begin("samples")

    def check() -> dict[str, list]:
        damaged, read = [], 0
        for split, most in zip(splits, (_SAMPLED, _SAMPLED // 4), strict=True):
            image, depth = np.empty((*split.size, 3), np.uint8), np.empty(split.size, np.uint16)
            ranks = panel.beside
            for sample in _chosen(split, config, most)[ranks.index(panel.rank) :: len(ranks)]:
                read += 1
                try:
                    split.read_into(sample, image, depth)
                    if not depth.any():
                        raise split.damaged(sample, "depth has no valid pixel")
                except DamagedSample as error:
                    damaged.append(str(error))
        return {"damaged": damaged, "read": [read]}

    advice = f"see what is whole with: {command_for('verify', splits[0].location)}"
    answers = panel.query_ranks(check, advice, patience(config))
    if panel.failed("samples", answers):
        return
    read = sum(answer.value["read"][0] for answer in answers)
    bad = {rank: _first(answer.value["damaged"]) for rank, answer in enumerate(answers) if answer.value["damaged"]}
    if bad:
        locations = dict.fromkeys(split.location for split in splits)
        commands = "; ".join(command_for("verify", location) for location in locations)
        advice = f"look at every byte with: {commands} (then --repair leaves out what is damaged)"
        panel.add(Row("samples", "fail", panel.differing(bad), advice))
    else:
        nodes = len(set(panel.nodes))
        panel.add(
            Row("samples", "ok", f"{read} read and decoded{f' on {nodes} nodes' if nodes > 1 else ''}, checksums match")
        )


def _chosen(split: ShardDataset, config: Config, most: int) -> list[int]:
    """Samples evenly spaced over the split; of a server's only those in the shards that training begins with."""
    if not split.remote:
        return linspace_indices(len(split), most)
    _, ranges = next(training_order(config, split).windows(0))
    some = [sample for first, end in ranges[:_REMOTE_SHARDS].tolist() for sample in range(first, end)]
    return [some[index] for index in linspace_indices(len(some), most)]


def _first(texts: Sequence[str]) -> str:
    more = f"\nand {len(texts) - _NAMED} more" if len(texts) > _NAMED else ""
    return "\n".join(texts[:_NAMED]) + more


class _Deadline(PreemptionHandler):
    """Ends a wait for batches."""

    def __init__(self, seconds: float):
        super().__init__()
        self._end = time.monotonic() + seconds

    def __bool__(self) -> bool:
        return time.monotonic() > self._end


@dataclass
class Supply:
    """Measured output of the stream."""

    batch: Batch | None = None
    """The first one of this rank; None where there was none."""
    speeds: list[float] | None = None
    """Images per second, by rank; None where that could not be measured."""


def measure_loader(panel: RankSurvey, config: Config, shards: ShardDataset, samples_seen: int) -> Supply:
    """Take batches of the real stream, from `samples_seen` on, for some seconds. Adds a row only where that fails."""
    panel.begin(f"loader, for {SECONDS:g} s")
    supply = Supply()

    def check() -> float:
        stop = _Deadline(patience(config))
        with (
            contextlib.redirect_stdout(io.StringIO()),  # damage is told of in a row
            training_stream(config, shards, samples_seen, panel.accelerator, stop) as loader,
        ):
            try:
                batch = next(loader)
                # a copy, since the next ones overwrite it
                supply.batch = replace(batch, image=batch.image.clone(), depth=batch.depth.clone())
                start, images = time.perf_counter(), 0
                while time.perf_counter() - start < SECONDS:
                    images += len(next(loader).sample)
            except Stopped:
                raise TimeoutError("no batch came in time") from None
            return images / (time.perf_counter() - start)

    answers = panel.query_ranks(check, f"see what is whole with: {command_for('verify', shards.location)}")
    if not panel.failed("loader", answers):
        supply.speeds = [answer.value for answer in answers]
    return supply


def judge_loader(panel: RankSurvey, config: Config, shards: ShardDataset, speeds: Sequence[float], step: float) -> None:
    """The loaders of each node against what its ranks need, where a step of the global batch takes `step` seconds."""
    texts, shares = dict[int, str](), list[float]()
    for node in dict.fromkeys(panel.nodes):
        ranks = panel.of_node(node)
        have = sum(speeds[rank] for rank in ranks)
        need = config.train.batch_size * len(ranks) / panel.world / step
        shares.append(have / need)
        texts |= {
            rank: f"{have:,.0f} images/s, {have / need:.1f} times the {need:.0f} that the step takes" for rank in ranks
        }
    worst = min(shares)
    size = config.data.size
    tips = [f"more --data.threads than {config.data.threads} (up to the cores of the node / its ranks)"]
    if size and shards.size[0] * shards.size[1] > size[0] * size[1]:
        tips.append(f"shards packed at training size (mde_dist.shard --size {size[0]}x{size[1]})")
    tips.append("shards on a faster disk")
    result = "ok" if worst >= _WARN else "warn" if worst >= _FAIL else "fail"
    advice = "" if result == "ok" else f"the devices would wait {1 - worst:.0%} of the time; try {', '.join(tips)}"
    panel.add(Row("loader", result, panel.differing(texts), advice))  # type: ignore[arg-type]
