"""Pictures of held-out images for the page: how they are predicted over training."""

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image

from mde_dist.evaluation.metrics import PROTOCOLS, valid_pairs
from mde_dist.reporting.axes import Axis, linear
from mde_dist.reporting.history import Run
from mde_dist.training.snapshots import ValidationSnapshots
from mde_dist.utils.visualization import DEPTH_COLORS, ERROR_COLORS, Panel, color_bar, colorize, colorize_error

MOST_TIMES = 12
"""Predictions over training per run: the first, the best, the last, and evenly spaced ones between."""
_QUALITY = 82


@dataclass(frozen=True)
class Scale:
    """Metres that the colours mean, the same for all pictures beside each other."""

    low: float
    high: float
    worst: float
    """Errors from 0 to this."""

    @cached_property
    def depth_axis(self) -> Axis:
        return linear(self.low, self.high, most=6)

    @cached_property
    def error_axis(self) -> Axis:
        return linear(0.0, self.worst, most=4)


def scale_of(truths: np.ndarray, predictions: Sequence[np.ndarray]) -> Scale:
    """Scale from nearly all depths, and nearly all errors of `predictions`; each like `truths` (count, h, w),
    metres."""
    valid = truths > 0
    if not valid.any():
        return Scale(0.0, 10.0, 1.0)
    low, high = (float(edge) for edge in np.percentile(truths[valid], (1, 99)))
    errors = [np.percentile(np.abs(prediction - truths)[valid], 97) for prediction in predictions]
    return Scale(low, max(high, low + 0.1), max(0.05, float(max(errors, default=1.0))))


@dataclass(frozen=True)
class ImageTile:
    """A picture with what it shows."""

    uri: str
    label: str
    alt: str
    width: int
    height: int


def tile(pixels: np.ndarray, label: str, alt: str) -> ImageTile:
    """`pixels`: RGB uint8 (height, width, 3)."""
    return ImageTile(data_uri(pixels), label, alt, pixels.shape[1], pixels.shape[0])


def data_uri(pixels: np.ndarray) -> str:
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, format="WEBP", quality=_QUALITY, method=4)
    return f"data:image/webp;base64,{base64.b64encode(data.getvalue()).decode()}"


def bars() -> Mapping[str, str]:
    """The colours of depth and of errors from left to right."""
    return {name: data_uri(color_bar(colors)) for name, colors in (("depth", DEPTH_COLORS), ("error", ERROR_COLORS))}


@dataclass(frozen=True)
class Snapshot:
    """Predictions of the images after some training of one run."""

    samples: int
    predictions: Sequence[ImageTile]
    errors: Sequence[ImageTile]
    words: str
    """Scores of the evaluation at that moment, in words."""


@dataclass(frozen=True)
class SnapshotSeries:
    """The same held-out images predicted by one run or several, over training."""

    keys: Sequence[str]
    images: Sequence[ImageTile]
    truths: Sequence[ImageTile]
    scale: Scale
    runs: Sequence[tuple[int, Run, Sequence[Snapshot]]]
    """Place on the page, run, what there is of it by samples seen."""

    @property
    def times(self) -> list[int]:
        """Samples seen at which a picture of any run changes."""
        return sorted({moment.samples for _, _, moments in self.runs for moment in moments})

    def words(self, samples: int) -> str:
        """Description of the snapshots that are shown at one of the times, with their scores."""
        shown = [(run.name, moments[_until(moments, samples)]) for _, run, moments in self.runs]
        parts = [
            (f"{name} " if len(shown) > 1 else "")
            + f"after {moment.samples:,} samples"
            + (f": {moment.words}" if moment.words else "")
            for name, moment in shown
        ]
        return "; ".join(parts)

    def data(self) -> dict[str, Any]:
        """For the slider: the words of each time, and of each run which moment is shown then and the moments' pictures,
        image by image: source, text alternative and caption of prediction and error."""
        several = len(self.runs) > 1
        runs = []
        for _, run, moments in self.runs:
            who = f"{run.name}: " if several else ""
            pictures = [
                {
                    name: [[tile.uri, tile.alt, who + tile.label] for tile in tiles]
                    for name, tiles in (("prediction", moment.predictions), ("error", moment.errors))
                }
                for moment in moments
            ]
            runs.append({"at": [_until(moments, samples) for samples in self.times], "moments": pictures})
        return {"words": [self.words(samples) for samples in self.times], "runs": runs}


def _until(moments: Sequence[Snapshot], samples: int) -> int:
    """Index of the last moment until then; of the first one where there is none."""
    return max((index for index, moment in enumerate(moments) if moment.samples <= samples), default=0)


def films(runs: Sequence[Run]) -> list[SnapshotSeries]:
    """Runs with the same images share one, so that they can be held against each other."""
    groups: list[list[tuple[int, Run, ValidationSnapshots]]] = []
    for index, run in enumerate(runs):
        if run.snapshots is None:
            continue
        same = next((group for group in groups if _same_images(group[0][2], run.snapshots)), None)
        if same is None:
            groups.append([(index, run, run.snapshots)])
        else:
            same.append((index, run, run.snapshots))
    return [_film(group) for group in groups]


def _same_images(one: ValidationSnapshots, other: ValidationSnapshots) -> bool:
    return one.keys == other.keys and np.array_equal(one.target, other.target)


def _film(group: Sequence[tuple[int, Run, ValidationSnapshots]]) -> SnapshotSeries:
    shown = group[0][2]
    finals = [show.predictions[max(show.predictions)] for _, _, show in group]
    scale = scale_of(shown.target, finals)
    return SnapshotSeries(
        shown.keys,
        [tile(image, "image", f"image {key}") for key, image in zip(shown.keys, shown.image, strict=True)],
        [_truth(truth, key, scale) for key, truth in zip(shown.keys, shown.target, strict=True)],
        scale,
        [(index, run, [_moment(run, show, samples, scale) for samples in times_of(run)]) for index, run, show in group],
    )


def times_of(run: Run) -> list[int]:
    """Samples seen of the predictions that are shown."""
    assert run.snapshots is not None
    known = sorted(run.snapshots.predictions)
    spaced = np.linspace(0, len(known) - 1, min(MOST_TIMES - 1, len(known))).round().astype(int)
    chosen = {known[index] for index in spaced}
    return sorted(chosen | ({run.best.samples} & set(known) if run.best else set()))


def _truth(truth: np.ndarray, key: str, scale: Scale) -> ImageTile:
    return tile(colorize(truth, scale.low, scale.high), "truth", f"true depth of {key}")


def _moment(run: Run, show: ValidationSnapshots, samples: int, scale: Scale) -> Snapshot:
    when = f"after {samples:,} samples"
    scores = [format_score(row) for row in picture_scores(show.predictions[samples], show.target, run.protocol)]
    maps = list(zip(show.predictions[samples], show.target, show.keys, scores, strict=True))
    line = next((line for line in run.evaluations if line.samples == samples), None)
    shown = [f"{name} {line.values[name]:.4f}" for name in ("abs_rel", "delta1") if line and name in line.values]
    return Snapshot(
        samples,
        [
            tile(
                colorize(prediction, scale.low, scale.high),
                f"prediction{said and f', {said}'}",
                f"predicted depth of {key} {when}{said and f', {said}'}",
            )
            for prediction, _, key, said in maps
        ],
        [
            tile(colorize_error(prediction, truth, scale.worst), "error", f"error of the depth of {key} {when}")
            for prediction, truth, key, _ in maps
        ],
        ", ".join(shown),
    )


def picture_scores(predictions: np.ndarray, truths: np.ndarray, protocol: str | None) -> list[float | None]:
    """abs_rel of each picture, (count, h, w) metres, at its own size; None where none of its pixels counts."""
    pairs = valid_pairs(torch.from_numpy(predictions), torch.from_numpy(truths), PROTOCOLS[protocol or "eigen"])
    return [((p - g).abs() / g).mean().item() if len(g) else None for p, g, _ in pairs]


def format_score(value: float | None) -> str:
    return "" if value is None else f"abs_rel {value:.2f}"


def last_panels(film: SnapshotSeries) -> Iterator[Panel]:
    """The last prediction of every run, image by image."""
    for image, key in enumerate(film.keys):
        for _, run, _ in film.runs:
            assert run.snapshots is not None
            show, who = run.snapshots, (f"{run.name}\n" if len(film.runs) > 1 else "")
            prediction, truth = show.predictions[max(show.predictions)][image], show.target[image]
            (value,) = picture_scores(prediction[None], truth[None], run.protocol)
            yield Panel(f"{key}\n{who}{format_score(value)}", show.image[image], truth, prediction)
