"""Which sample comes when, and to whom: pure integer arithmetic, no I/O, no torch, no table of samples.

Samples 0..n-1 are cut into blocks of about one shard. Per epoch the blocks are permuted, and the samples are shuffled
inside windows of a few permuted blocks: reading stays near-sequential, and both the sample at a position and the way
back to any position cost the same wherever it lies. Blocks are equal but for the last, whatever the sizes of shards:
that makes the position -> sample arithmetic closed. A block touches two shards at most where shards are equal. The
memory is that of the window that is laid out, however many samples there are.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

_U64 = np.uint64
_ROUNDS = 8  # with fewer, places over keys are uneven for a handful of blocks


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


def keyed_permutation(index: np.ndarray, n: int, key: int, inverse: bool = False) -> np.ndarray:
    """The images of `index` (int64, each in 0..n-1) under the key's permutation of 0..n-1, or its inverse: O(1) memory.

    A Feistel network over the smallest even number of bits that holds n; what falls outside 0..n-1 walks on along its
    cycle until it is inside (at most four steps on average).
    """
    if n <= 1:
        return np.zeros_like(index)
    half = _U64(((n - 1).bit_length() + 1) // 2)
    mask = (_U64(1) << half) - _U64(1)
    value = index.astype(_U64)
    outside = np.ones(value.shape, dtype=bool)
    while outside.any():
        left, right = value[outside] >> half, value[outside] & mask
        for round_ in reversed(range(_ROUNDS)) if inverse else range(_ROUNDS):
            if inverse:
                left, right = right ^ (hash64(key, round_, left) & mask), left
            else:
                left, right = right, left ^ (hash64(key, round_, right) & mask)
        value[outside] = (left << half) | right
        outside[outside] = value[outside] >= _U64(n)
    return value.astype(np.int64)


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
        positions = np.asarray(positions, dtype=np.int64)
        epochs, places = np.divmod(positions, self.samples)
        samples = np.empty_like(places)
        for epoch in np.unique(epochs).tolist():
            windows = np.where(epochs == epoch, _epoch(self, epoch).slot_of(places) // self.window, -1)
            for number in np.unique(windows).tolist():
                if number >= 0:
                    window, here = _window(self, epoch, number), windows == number
                    samples[here] = window.samples[places[here] - window.first]
        return epochs, samples

    def windows(self, position: int) -> Iterator[tuple[int, np.ndarray]]:
        """From the window that holds `position` on, without end: (the position where it ends, what it is made of).

        The latter are the sample ranges of its blocks, int64 (blocks, 2), first and end of each.
        """
        for epoch in itertools.count(position // self.samples):
            start, plan = epoch * self.samples, _epoch(self, epoch)
            first = int(plan.slot_of(np.array(max(position - start, 0)))) // self.window
            for slot in range(first * self.window, plan.blocks, self.window):
                slots = np.arange(slot, min(slot + self.window, plan.blocks))
                samples = plan.block_in(slots) * self.block
                end = int(plan.start_of(slots[-1:] + 1)[0])
                yield start + end, np.stack([samples, np.minimum(samples + self.block, self.samples)], axis=1)


class _Epoch:
    """How the blocks lie in one epoch: slot s holds block `block_in(s)`; the last block may be short."""

    def __init__(self, order: GlobalSampler, epoch: int):
        self._size = order.block
        self.blocks = -(-order.samples // order.block)
        self._missing = self.blocks * order.block - order.samples
        self.key = int(hash64(order.seed, epoch))
        last = np.array([self.blocks - 1])
        self._short = int(keyed_permutation(last, self.blocks, self.key ^ 1)[0]) if self._missing else self.blocks

    def block_in(self, slot: np.ndarray) -> np.ndarray:
        return keyed_permutation(slot, self.blocks, self.key ^ 1, inverse=True)

    def start_of(self, slot: np.ndarray) -> np.ndarray:
        """Place in the epoch of the first sample of a slot."""
        return slot * self._size - np.where(slot > self._short, self._missing, 0)

    def slot_of(self, place: np.ndarray) -> np.ndarray:
        behind = place >= (self._short + 1) * self._size - self._missing
        return np.where(behind, place + self._missing, place) // self._size


@lru_cache(maxsize=8)
def _epoch(order: GlobalSampler, epoch: int) -> _Epoch:
    return _Epoch(order, epoch)


@dataclass(frozen=True)
class _Window:
    """A stretch of an epoch, laid out: all that is ever held of the order."""

    first: int
    """Its place in the epoch."""
    samples: np.ndarray
    """int64, in their order."""


@lru_cache(maxsize=4)  # batches come from one window, and from the next where they straddle
def _window(order: GlobalSampler, epoch: int, number: int) -> _Window:
    plan = _epoch(order, epoch)
    slots = np.arange(number * order.window, min((number + 1) * order.window, plan.blocks))
    starts = plan.start_of(slots)
    first, end = int(starts[0]), int(plan.start_of(slots[-1:] + 1)[0])
    shuffled = keyed_permutation(np.arange(end - first), end - first, int(hash64(plan.key, number, 2)))
    slot = np.searchsorted(starts - first, shuffled, side="right") - 1
    return _Window(first, plan.block_in(slots)[slot] * order.block + shuffled - (starts - first)[slot])


def rank_indices(first: int, batch: int, accumulate: int, world: int, step: int, rank: int) -> np.ndarray:
    """Stream positions that `rank` sees in accumulation `step` of the global batch that starts at position `first`.

    Over all ranks and steps these are first .. first+batch-1, each once; batch must divide by accumulate * world.
    """
    size, rest = divmod(batch, accumulate * world)
    if rest or not size:
        raise ValueError(f"a batch of {batch} does not divide by {accumulate} x {world}")
    start = first + (step * world + rank) * size
    return np.arange(start, start + size, dtype=np.int64)
