"""The best and the worst images of a run's last evaluation, predicted again for the page."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from mde_dist.data.config import CacheOptions, eval_shards_of
from mde_dist.data.dataset import DamagedSample
from mde_dist.data.depth import to_metres
from mde_dist.data.shards import ShardDataset, open_split
from mde_dist.evaluation.metrics import PROTOCOLS, image_metrics
from mde_dist.evaluation.results import load_rows
from mde_dist.inference.predictor import Predictor
from mde_dist.models.depth_model import load_model
from mde_dist.models.weights import MODEL, read_state_file
from mde_dist.reporting.history import Run
from mde_dist.reporting.panels import ImageTile, Scale, scale_of, tile
from mde_dist.training.checkpoint import open_model
from mde_dist.utils.errors import UserError
from mde_dist.utils.visualization import colorize, colorize_error

MOST = 4
"""Images of each kind."""
_ROWS = 160
"""Pixels: larger images are shown smaller."""
_PATIENCE = 10.0
"""Seconds that a server of shards is waited for: a report can do without."""


@dataclass(frozen=True)
class Example:
    """An image with its score and its pictures: image, truth, prediction and error."""

    key: str
    scores: Mapping[str, float]
    tiles: Sequence[ImageTile]


@dataclass(frozen=True)
class BestWorst:
    best: Sequence[Example]
    worst: Sequence[Example]
    """The worst one first."""
    scale: Scale
    learned: int | None
    """Samples seen by the weights that predicted them."""


@dataclass(frozen=True)
class ScoredImage:
    sample: int
    """Index in the split."""
    key: str
    scores: Mapping[str, float]
    """Scores by metric."""


@dataclass(frozen=True)
class _Prediction:
    """An image as it was read and predicted; depths in metres."""

    key: str
    scores: Mapping[str, float]
    image: np.ndarray
    truth: np.ndarray
    prediction: np.ndarray


def extremes(run: Run) -> BestWorst:
    """Raises UserError where shards or weights cannot be read, or not those of the evaluation."""
    if run.record is None or run.protocol is None:
        raise UserError("no image was evaluated yet")
    best, worst = ranked(run.record, run.protocol)
    if not best:
        raise UserError("too few images were scored")
    predictor, learned = _predictor(run)
    options = CacheOptions(Path(predictor.config.get("data.cache") or CacheOptions.directory), patience=_PATIENCE)
    split = predictor.config.get("data.eval_split") or "test"
    try:
        with open_split(eval_shards_of(predictor.config), split, options) as shards:
            if shards.manifest.sha256 != run.record["ground_truth"].get("manifest"):
                raise UserError(f"{shards.location} holds other shards than those that were evaluated")
            seen = [list(_predicted(shards, predictor, group)) for group in (best, worst)]
    except DamagedSample as error:
        raise UserError(str(error)) from None
    everything = [case for group in seen for case in group]
    scale = scale_of(
        np.stack([case.truth for case in everything]), [np.stack([case.prediction for case in everything])]
    )
    good, bad = ([_example(case, scale) for case in group] for group in seen)
    return BestWorst(good, bad, scale, learned)


def _predictor(run: Run) -> tuple[Predictor, int | None]:
    """Predictor with the published weights of a run, or those of its newest whole checkpoint, and the samples they saw.
    Raises UserError."""
    published = run.path / MODEL
    path, metadata, tensors = open_model(None, published) if run.finished else open_model(run.path, None)
    learned = run.total if run.finished else read_state_file(path.parent).get("samples_seen")
    return Predictor(load_model(metadata, tensors), metadata, torch.device("cpu"), precision="fp32"), learned


def ranked(record: Mapping[str, Any], protocol: str) -> tuple[list[ScoredImage], list[ScoredImage]]:
    """The best images of an evaluation, and the worst, by abs_rel."""
    keys, rows = load_rows(record, protocol)
    metrics = PROTOCOLS[protocol].metrics
    values = image_metrics(torch.from_numpy(rows), PROTOCOLS[protocol])
    order = [int(index) for index in np.argsort(values[:, metrics.index("abs_rel")].numpy(), kind="stable")]
    scored = [
        ScoredImage(index, keys[index], dict(zip(metrics, values[index].tolist(), strict=True)))
        for index in order
        if rows[index, 0] > 0
    ]
    count = min(MOST, len(scored) // 2)
    return scored[:count], scored[::-1][:count]


def _predicted(shards: ShardDataset, predictor: Predictor, chosen: Sequence[ScoredImage]) -> Iterator[_Prediction]:
    every = -(-shards.size[0] // _ROWS)
    for one in chosen:
        if one.sample >= len(shards) or shards.key(one.sample) != one.key:
            raise UserError(f"{shards.location} has no {one.key} where it was evaluated")
        image, depth = np.empty((*shards.size, 3), np.uint8), np.empty(shards.size, np.uint16)
        shards.read_into(one.sample, image, depth)
        # every so many pixels of a map, not a mean: that would run over holes and edges
        truth, prediction = (metres[::every, ::every] for metres in (to_metres(depth), predictor(image)))
        small = Image.fromarray(image).resize(truth.shape[::-1], Image.Resampling.BOX)
        yield _Prediction(one.key, one.scores, np.asarray(small), truth, prediction)


def _example(image: _Prediction, scale: Scale) -> Example:
    said = f"abs_rel {image.scores['abs_rel']:.2f}"
    shown = (
        ("image", image.image, f"image {image.key}"),
        ("truth", colorize(image.truth, scale.low, scale.high), f"true depth of {image.key}"),
        ("prediction", colorize(image.prediction, scale.low, scale.high), f"predicted depth of {image.key}, {said}"),
        ("error", colorize_error(image.prediction, image.truth, scale.worst), f"error of the depth of {image.key}"),
    )
    return Example(image.key, image.scores, [tile(pixels, label, alt) for label, pixels, alt in shown])
