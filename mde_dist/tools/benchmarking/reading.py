"""What a process of `bench loader` does: decode from memory, read from the disk, or both through the Loader.

Each is a context manager that yields what measures for some seconds, see pinned.py. Torch is imported by the last one
only.
"""

import contextlib
import itertools
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from mde_dist.data.config import CacheOptions
from mde_dist.data.manifest import TAR_BLOCK
from mde_dist.data.sampler import GlobalSampler
from mde_dist.data.shards import ShardDataset, decode_pair, open_split
from mde_dist.tools.benchmarking.pinned import Answer, Measure

_IN_MEMORY = 64_000_000  # bytes of payload that the bare loop goes round: more than a core's cache holds
_MEMBERS = ("depth", "image")


def opened(place: str, split: str, cache: list[Any]) -> ShardDataset:
    """`cache`: directory, bytes, patience. Raises UserError."""
    directory, limit, patience = cache
    return open_split(place, split, CacheOptions(Path(directory), limit, patience))


class Members:
    """Where the images and depth maps of a split lie on this machine."""

    def __init__(self, split: ShardDataset):
        self._split = split
        # rows are paged in as they are looked at: the index may be larger than the memory
        self._rows = np.load(split.local(split.info.index), mmap_mode="r")
        self._files: dict[int, int] = {}

    def __enter__(self) -> "Members":
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            os.close(file)

    def places(self, sample: int) -> list[tuple[int, int, int]]:
        """(file, offset, bytes) of its members, with their tar headers."""
        row = self._rows[sample]
        number = int(row["shard"])
        if number not in self._files:
            self._files[number] = os.open(self._split.local(self._split.info.shards[number]), os.O_RDONLY)
        places = [(int(row[f"{member}_offset"]), int(row[f"{member}_bytes"])) for member in _MEMBERS]
        return [(self._files[number], offset - TAR_BLOCK, size + TAR_BLOCK) for offset, size in places]

    def read(self, sample: int) -> list[bytes]:
        """Payloads of depth map and image."""
        return [os.pread(file, size, offset)[TAR_BLOCK:] for file, offset, size in self.places(sample)]

    def forget(self) -> None:
        """Ask the system to drop from memory the files that are open here."""
        if not hasattr(os, "posix_fadvise"):
            return
        for file in self._files.values():
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)


@contextlib.contextmanager
def limit(place: str, split: str, cache: list[Any], window: int, seed: int) -> Iterator[Measure]:
    """The bare decoders over bytes that are in memory, into one buffer: one thread, nothing else."""
    with opened(place, split, cache) as shards, Members(shards) as members:
        order, pairs, taken = GlobalSampler(len(shards), shards.block, window, seed), list[list[bytes]](), 0
        for position in range(len(shards)):
            pairs.append(members.read(int(order.at(np.array([position]))[1][0])))
            taken += sum(map(len, pairs[-1]))
            if taken > _IN_MEMORY:
                break
        image, depth = np.empty((*shards.size, 3), np.uint8), np.empty(shards.size, np.uint16)
        endless, codec = itertools.cycle(pairs), shards.manifest.codec

        def measure(seconds: float) -> Answer:
            start, done = time.perf_counter(), 0
            while (spent := time.perf_counter() - start) < seconds:
                for encoded, jpeg in itertools.islice(endless, 8):
                    decode_pair(jpeg, encoded, codec, image, depth)
                done += 8
            return {"rate": done / spent, "pair_bytes": taken / len(pairs), "memory": peak_resident()}

        yield measure


@contextlib.contextmanager
def disk(place: str, split: str, cache: list[Any], window: int, seed: int, threads: int) -> Iterator[Measure]:
    """The reads of the loader in their order, several at a time, and nothing decoded.

    Measures twice: pages of the files dropped before, and just read. `cold` is None where they could not be dropped.
    """
    with opened(place, split, cache) as shards, Members(shards) as members:
        order, begin = GlobalSampler(len(shards), shards.block, window, seed), itertools.count()

        def read_for(seconds: float, places: list[list[tuple[int, int, int]]]) -> tuple[int, int, float]:
            """-> pairs and bytes read, and the seconds that it took; each pair once, as far as time allows."""
            start = time.perf_counter()

            def some(mine: list[list[tuple[int, int, int]]]) -> tuple[int, int]:
                pairs = size = 0
                for pair in mine:
                    size += sum(len(os.pread(file, length, offset)) for file, offset, length in pair)
                    pairs += 1
                    if time.perf_counter() - start > seconds:
                        break
                return pairs, size

            with ThreadPoolExecutor(threads) as pool:
                found = list(pool.map(some, [places[number::threads] for number in range(threads)]))
            return sum(p for p, _ in found), sum(s for _, s in found), time.perf_counter() - start

        def measure(seconds: float) -> Answer:
            first = next(begin) * len(shards)  # another epoch is another order
            samples = order.at(np.arange(first, first + min(len(shards), 20_000)))[1].tolist()
            places = [members.places(sample) for sample in samples]
            members.forget()
            before = _from_storage()
            pairs, size, spent = read_for(seconds / 2, places)
            fetched = None if before is None else (_from_storage() or 0) - before
            cold = fetched is not None and fetched > size / 2
            again, size_again, warm = read_for(seconds / 2, places[:pairs])
            return {
                "cold": pairs / spent if cold else None,
                "cold_bytes": size / spent if cold else None,
                "warm": again / warm,
                "warm_bytes": size_again / warm,
            }

        yield measure


@contextlib.contextmanager
def loader(
    place: str,
    split: str,
    cache: list[Any],
    window: int,
    seed: int,
    threads: int,
    batch: int,
    ahead: int,
    device: str,
    timeout: float,
) -> Iterator[Measure]:
    """Order, reading, decoding and batches on the training device: the Loader as training has it."""
    import torch

    from mde_dist.data.loader import DataLoader

    def wait() -> None:
        if device.startswith("cuda"):
            torch.cuda.synchronize()

    with opened(place, split, cache) as shards:
        order = GlobalSampler(len(shards), shards.block, window, seed)
        draws = (order.at(np.arange(first, first + batch)) for first in itertools.count(0, batch))
        with DataLoader(
            *(shards, draws, batch, torch.device(device), threads, ahead), replace=True, timeout=timeout
        ) as batches:

            def measure(seconds: float) -> Answer:
                for _ in range(ahead + 1):  # which were decoded before the clock
                    next(batches)
                wait()
                start, cpu, done = time.perf_counter(), time.process_time(), 0
                while not done or time.perf_counter() - start < seconds:
                    done += len(next(batches).sample)
                wait()
                spent, cpu = time.perf_counter() - start, time.process_time() - cpu
                return {"rate": done / spent, "cores_busy": cpu / spent, "memory": peak_resident()}

            yield measure


def _from_storage() -> int | None:
    """Bytes that this process had fetched from storage so far; None where the system does not say."""
    try:
        fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text("utf-8").splitlines())
        return int(fields["read_bytes"])
    except (OSError, ValueError, KeyError):
        return None


def peak_resident() -> int:
    """Bytes of memory that this process had at most; not, as getrusage has it, those of the process that started it."""
    try:
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text("utf-8").splitlines())
        return int(status["VmHWM"].split()[0]) * 1024
    except (OSError, ValueError, KeyError):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
