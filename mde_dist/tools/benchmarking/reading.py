"""Cases of `bench loader`: decode from memory, read from the disk, or both through the DataLoader.

Each function returns a case of harness.interleave: seconds to measure for -> figures.
"""

import contextlib
import itertools
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mde_dist.data.dataset import DamagedSample
from mde_dist.data.loader import DataLoader
from mde_dist.data.shards import ShardDataset, decode_pair
from mde_dist.tools.benchmarking.harness import on_cores, wait_for
from mde_dist.training.config import Config
from mde_dist.training.data_stream import training_order
from mde_dist.utils.errors import UserError

Figures = dict[str, Any]

_IN_MEMORY = 64_000_000  # bytes of payload that the bare loop goes round: more than a core's cache holds


def read_pair(shards: ShardDataset, sample: int) -> tuple[memoryview, memoryview]:
    """Payloads of a depth map and its image. Raises UserError where they are damaged."""
    try:
        return shards.read_encoded(sample)
    except DamagedSample as error:
        raise UserError(f"damaged sample: {error}; {shards.advice}") from None


def decode_only(config: Config, shards: ShardDataset, core: int) -> Callable[[float], Figures]:
    """The bare decoders over bytes in memory, into one buffer, on one core -> rate, pair_bytes."""
    order, pairs, taken = training_order(config, shards), list[tuple[memoryview, memoryview]](), 0
    for position in range(len(shards)):
        pairs.append(read_pair(shards, int(order.at(np.array([position]))[1][0])))
        taken += sum(map(len, pairs[-1]))
        if taken > _IN_MEMORY:
            break
    image, depth = np.empty((*shards.size, 3), np.uint8), np.empty(shards.size, np.uint16)
    endless, codec = itertools.cycle(pairs), shards.manifest.codec

    def measure(seconds: float) -> Figures:
        with on_cores([core]):
            start, done = time.perf_counter(), 0
            while not done or time.perf_counter() - start < seconds:
                for encoded, jpeg in itertools.islice(endless, 8):
                    decode_pair(jpeg, encoded, codec, image, depth)
                done += 8
            return {"rate": done / (time.perf_counter() - start), "pair_bytes": taken / len(pairs)}

    return measure


@contextlib.contextmanager
def load(
    config: Config, shards: ShardDataset, device: torch.device, cores: list[int]
) -> Iterator[Callable[[float], Figures]]:
    """The DataLoader of training with a thread on each core: order, reads, decoding, batches on the device.

    The case gives rate, cores_busy.
    """
    batch = max(1, config.train.batch_size // config.train.grad_accum_steps)
    order, ahead = training_order(config, shards), config.data.prefetch_batches
    draws = (order.at(np.arange(first, first + batch)) for first in itertools.count(0, batch))
    with contextlib.ExitStack() as opened:
        with on_cores(cores):  # which its threads inherit
            timeout = config.data.read_timeout
            loader = DataLoader(shards, draws, batch, device, len(cores), ahead, replace=True, timeout=timeout)
            opened.enter_context(loader)

        def measure(seconds: float) -> Figures:
            with on_cores(cores):
                for _ in range(ahead + 1):  # decoded before the clock
                    next(loader)
                wait_for(device)
                start, cpu, done = time.perf_counter(), time.process_time(), 0
                while not done or time.perf_counter() - start < seconds:
                    done += len(next(loader).sample)
                wait_for(device)
                spent = time.perf_counter() - start
                return {"rate": done / spent, "cores_busy": (time.process_time() - cpu) / spent}

        yield measure


def read_only(config: Config, shards: ShardDataset, threads: int) -> Callable[[float], Figures]:
    """Checked reads in the order of training, several at a time, without decoding -> cold, warm: pairs/s.

    `cold`: pages of the files were dropped before; None where they could not be. `warm`: they were just read.
    """
    order, epochs = training_order(config, shards), itertools.count()

    def read_for(seconds: float, samples: list[int]) -> tuple[int, int, float]:
        """Read each pair once, as far as time allows -> pairs, bytes, pairs/s."""
        start, rest = time.perf_counter(), iter(samples)

        def read_some(_: int) -> list[int]:
            sizes = list[int]()
            while not sizes or time.perf_counter() - start < seconds:
                sample = next(rest, None)  # of a list's iterator, which threads may share
                if sample is None:
                    break
                sizes.append(sum(map(len, read_pair(shards, sample))))
            return sizes

        with ThreadPoolExecutor(threads) as pool:
            sizes = [size for found in pool.map(read_some, range(threads)) for size in found]
        return len(sizes), sum(sizes), len(sizes) / (time.perf_counter() - start)

    def measure(seconds: float) -> Figures:
        first = next(epochs) * len(shards)  # another epoch is another order
        samples = order.at(np.arange(first, first + min(len(shards), 20_000)))[1].tolist()
        drop_pages(shards, samples)
        before = _fetched_bytes()
        pairs, size, cold = read_for(seconds / 2, samples)
        fetched = None if before is None else (_fetched_bytes() or 0) - before
        _, _, warm = read_for(seconds / 2, samples[:pairs])
        return {"cold": cold if fetched is not None and fetched > size / 2 else None, "warm": warm}

    return measure


def drop_pages(shards: ShardDataset, samples: list[int]) -> None:
    """Ask the system to drop from memory the files that hold these samples."""
    for number in shards.shards_of(np.array([[sample, sample + 1] for sample in samples])):
        with shards.local(shards.info.shards[number]).open("rb") as file:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _fetched_bytes() -> int | None:
    """Bytes that this process had fetched from storage so far; None where the system does not say."""
    try:
        fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text("utf-8").splitlines())
        return int(fields["read_bytes"])
    except (OSError, ValueError, KeyError):
        return None
