"""The process of `bench peers` for this package: its loader, with depth in metres, as the other loaders deliver it."""

import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mde_dist.data.sampler import GlobalSampler
from mde_dist.tools.benchmarking.peer_loaders import harness
from mde_dist.tools.benchmarking.pinned import Answer, Measure
from mde_dist.tools.benchmarking.reading import opened


@contextlib.contextmanager
def metres(
    place: str,
    split: str,
    cache: list[Any],
    window: int,
    seed: int,
    pairs: int,
    batch: int,
    ahead: int,
    threads: int,
    converted: bool = True,
    check: str | None = None,
) -> Iterator[Measure]:
    """Over the first `pairs` samples; with `check`, writes the proof into this file instead of measuring. `converted`:
    whether depth is turned into metres, or left in millimetres, as training takes it to its device."""
    import torch

    from mde_dist.data.loader import Batch, DataLoader

    def delivered(batches: Iterator[Batch]) -> harness.Batches:
        for one in batches:
            depth = one.depth.numpy()
            if converted:
                np.copyto(buffer, depth)  # half the time of one division from whole numbers to floats
                depth = np.divide(buffer, thousand, out=buffer)
            yield one.image, depth

    with opened(place, split, cache) as shards:
        buffer, thousand = np.empty((batch, *shards.size), np.float32), np.float32(1000)
        order = GlobalSampler(pairs, min(pairs, shards.block), window, seed)
        draws = (order.at(np.arange(first, first + batch)) for first in itertools.count(0, batch))
        with DataLoader(shards, draws, batch, torch.device("cpu"), threads, ahead, replace=True) as batches:

            def measure(seconds: float) -> Answer:
                if check is not None:
                    return harness.prove(delivered(batches), pairs, Path(check))
                return harness.measure(delivered(batches), batch, seconds, ahead + 1)

            yield measure
