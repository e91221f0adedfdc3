"""Read, predict and write images, each beside the others; images of one size go through the model together."""

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial

import numpy as np

from mde_dist.inference.inputs import Frame, Inputs, ReadError
from mde_dist.inference.outputs import Results
from mde_dist.inference.predictor import Predictor
from mde_dist.inference.prefetch import in_order, threads
from mde_dist.utils.console import open_console, say
from mde_dist.utils.progress import progress_bar

_MOST_THREADS = 16
_HELD = 3  # batches' worth of images that wait for others of their size


@dataclass
class Summary:
    """Result of predicting: images, and inputs that could not be read."""

    sizes: Counter[tuple[int, int]]
    """Count of images predicted, by height and width."""
    damage: list[str]
    """A line about each input that could not be read."""
    stray: int = 0
    """JPEGs with stray bytes that were read."""

    @property
    def images(self) -> int:
        return self.sizes.total()


def predict_all(predictor: Predictor, inputs: Inputs, results: Results, every: int) -> Summary:
    """Read, predict and write all, each beside the others. Raises UserError where results cannot be written."""
    summary = Summary(Counter(), [])
    number = min(_MOST_THREADS, os.cpu_count() or 1)
    ahead = predictor.batch_size + number
    expected = inputs.expected(every)
    with (
        threads(number) as pool,
        closing(inputs.frames(every, pool, ahead)) as found,
        progress_bar(open_console(), "predicting", "images") as progress,
    ):
        predicted = estimate_all(predictor, readable(found, summary))
        for size in in_order((partial(results.save, *pair) for pair in predicted), pool, ahead):
            summary.sizes[size] += 1
            done = summary.images + len(summary.damage)
            progress(done, max(expected, done))
    return summary


def readable(found: Iterable[Frame | ReadError], summary: Summary) -> Iterator[Frame]:
    """The frames; what is said of the others, and of stray bytes, is added to the summary."""
    for one in found:
        if isinstance(one, Frame):
            summary.stray += one.stray_bytes
            yield one
        else:
            summary.damage.append(one.what)


def estimate_all(predictor: Predictor, frames: Iterable[Frame]) -> Iterator[tuple[Frame, np.ndarray]]:
    """Each frame with its depth, float32 metres (height, width)."""
    for batch in batches(predictor, frames):
        before = predictor.batch_size
        depths = predictor.predict_batch([frame.image for frame in batch])
        if predictor.batch_size < before:
            say(
                f"{predictor.device}: too little memory for {len(batch)} images at once; on with {predictor.batch_size}"
            )
        yield from zip(batch, depths, strict=True)


def batches(predictor: Predictor, frames: Iterable[Frame]) -> Iterator[list[Frame]]:
    """Frames that the model sees at one size, together. Where sizes are many, few wait for others of theirs."""
    waiting: dict[tuple[int, int], list[Frame]] = {}
    for frame in frames:
        size = predictor.input_size(*frame.image.shape[:2])
        waiting.setdefault(size, []).append(frame)
        if len(waiting[size]) >= predictor.batch_size:
            yield waiting.pop(size)
        elif sum(map(len, waiting.values())) >= _HELD * predictor.batch_size:
            yield waiting.pop(max(waiting, key=lambda size: len(waiting[size])))
    yield from waiting.values()
