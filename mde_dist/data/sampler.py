"""Order of the samples, and each rank's part of it: pure integer arithmetic, no I/O, no torch, no table of samples.

Samples 0..n-1 are cut into blocks of about one shard. Per epoch the blocks are permuted, and the samples are shuffled
inside windows of a few permuted blocks: reading stays near-sequential, and the sample at any position costs the same
wherever it lies. A block touches two shards at most where shards are equal. The memory is that of the window that is
laid out and 24 bytes a block, however many samples there are.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

_U64 = np.uint64
_BLOCKS, _WINDOW = 1, 2  # what a key is for


def hash64(*words: int | np.ndarray) -> np.ndarray:
    """Hash integers (or arrays of them, broadcast) into uint64: each word is stirred in by a splitmix64 step.

    Source of the constants: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
    """
    state = np.zeros((), dtype=_U64)
    for word in words:
        if isinstance(word, int):
            word = word & 0xFFFF_FFFF_FFFF_FFFF  # numpy refuses a Python int outside uint64
        with np.errstate(over="ignore"):  # arithmetic modulo 2**64 is meant
            state = (state ^ np.asarray(word).astype(_U64)) + _U64(0x9E37_79B9_7F4A_7C15)
            state = (state ^ (state >> _U64(30))) * _U64(0xBF58_476D_1CE4_E5B9)
            state = (state ^ (state >> _U64(27))) * _U64(0x94D0_49BB_1331_11EB)
            state = state ^ (state >> _U64(31))
    return state


def hash_uniform(*words: int | np.ndarray) -> np.ndarray:
    """Hash integers into float64 numbers in [0, 1)."""
    return (hash64(*words) >> _U64(11)).astype(np.float64) * 2.0**-53


def shuffled(n: int, *key: int) -> np.ndarray:
    """The numbers 0..n-1 in an order that is a pure function of n and the key: sorted by their hashes. int64 (n,)."""
    return np.argsort(hash64(*key, np.arange(n)), kind="stable")  # equal hashes keep their order on every machine


@dataclass(frozen=True)
class GlobalSampler:
    """The endless stream of training samples: position -> (epoch, sample)."""

    samples: int
    """Samples in the split."""
    block: int
    """Samples that stay together when blocks are permuted; best the size of a shard."""
    window: int
    """Permuted blocks that are shuffled into one another."""
    seed: int

    def __post_init__(self) -> None:
        if self.samples < 1 or self.block < 1 or self.window < 1:
            raise ValueError(f"samples, block and window must be positive: {self}")

    def at(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """int64 stream positions (any shape, >= 0) -> (epoch, sample index), both int64 of the same shape."""
        epochs, offsets = np.divmod(np.asarray(positions, dtype=np.int64), self.samples)
        samples = np.empty_like(offsets)
        for epoch in np.unique(epochs).tolist():
            windows = np.where(epochs == epoch, _epoch(self, epoch).slot_of(offsets) // self.window, -1)
            for number in np.unique(windows).tolist():
                if number >= 0:
                    window, here = _window(self, epoch, number), windows == number
                    samples[here] = window.samples[offsets[here] - window.first]
        return epochs, samples

    def windows(self, position: int) -> Iterator[tuple[int, np.ndarray]]:
        """From the window that holds `position` on, without end: (the position where it ends, what it is made of).

        The latter are the sample ranges of its blocks, int64 (blocks, 2), first and end of each.
        """
        for epoch in itertools.count(position // self.samples):
            start, plan = epoch * self.samples, _epoch(self, epoch)
            first = int(plan.slot_of(np.array(max(position - start, 0)))) // self.window * self.window
            for slot in range(first, len(plan.ranges), self.window):
                end = min(slot + self.window, len(plan.ranges))
                yield start + int(plan.starts[end]), plan.ranges[slot:end]


@dataclass(frozen=True)
class _Epoch:
    """Order of the blocks in one epoch."""

    ranges: np.ndarray
    """int64 (blocks, 2): first and end sample of the block at each slot."""
    starts: np.ndarray
    """int64 (blocks + 1,): offset in the epoch of the first sample of each slot, and the end of the last."""

    def slot_of(self, offset: np.ndarray) -> np.ndarray:
        return np.searchsorted(self.starts, offset, side="right") - 1


@lru_cache(maxsize=2)  # a batch may straddle two
def _epoch(sampler: GlobalSampler, epoch: int) -> _Epoch:
    first = shuffled(-(-sampler.samples // sampler.block), sampler.seed, epoch, _BLOCKS) * sampler.block
    ranges = np.stack([first, np.minimum(first + sampler.block, sampler.samples)], axis=1)
    return _Epoch(ranges, np.concatenate([[0], np.cumsum(ranges[:, 1] - ranges[:, 0])]))


@dataclass(frozen=True)
class _Window:
    """A stretch of an epoch, laid out."""

    first: int
    """Offset in the epoch."""
    samples: np.ndarray
    """int64, in their order."""


@lru_cache(maxsize=4)  # batches come from one window, and from the next where they straddle
def _window(sampler: GlobalSampler, epoch: int, number: int) -> _Window:
    plan, slot = _epoch(sampler, epoch), number * sampler.window
    samples = np.concatenate([np.arange(first, end) for first, end in plan.ranges[slot : slot + sampler.window]])
    return _Window(int(plan.starts[slot]), samples[shuffled(len(samples), sampler.seed, epoch, _WINDOW, number)])


def rank_indices(first: int, batch: int, accumulate: int, world: int, step: int, rank: int) -> np.ndarray:
    """Stream positions that `rank` sees in accumulation `step` of the global batch that starts at position `first`.

    Over all ranks and steps these are first .. first+batch-1, each once; batch must divide by accumulate * world.
    """
    size, rest = divmod(batch, accumulate * world)
    if rest or not size:
        raise ValueError(f"a batch of {batch} does not divide by {accumulate} x {world}")
    start = first + (step * world + rank) * size
    return np.arange(start, start + size, dtype=np.int64)
