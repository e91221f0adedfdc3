"""Order + shards -> batches: threads of the rank's own process decode ahead of the loop into a ring of buffers.

Threads, not worker processes: the decoders release the interpreter lock, and a batch that crosses a process pays for
every page of it anew. A batch is uint8 image and uint16 depth; floats begin on the device.
"""

import contextlib
import itertools
import math
import mmap
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from mde_dist.data.dataset import DamagedSample, DepthDataset
from mde_dist.utils.errors import RankError

BatchIndices = tuple[np.ndarray, np.ndarray]
"""Epochs and samples of a batch, int64 (batch,) each."""

_SUBSTITUTES = 8  # samples tried in place of a damaged one before giving up
_NAMED = 100  # damaged samples that are remembered by name
_POLL = 0.2  # seconds between two looks at a batch that does not come
_EVERY = 64  # rows
_SAY_AFTER = 10.0  # seconds of waiting before the first word about it; then twice as long each time


class Stopped(Exception):
    """The wait for a batch was ended by the `stop` of the loop."""


@dataclass(frozen=True)
class Batch:
    """One batch on the training device. On the CPU its tensors are overwritten once the next batch is asked for."""

    image: torch.Tensor
    """uint8 (batch, height, width, 3), RGB."""
    depth: torch.Tensor
    """uint16 (batch, height, width), millimetres, 0 = no measurement."""
    epoch: np.ndarray
    """int64 (batch,)."""
    sample: np.ndarray
    """int64 (batch,), index in the split."""
    replaced: int = 0
    """Samples of it that are damaged, so that another one was read instead."""


@dataclass
class _Buffer:
    """A batch buffer and how far it is filled."""

    image: torch.Tensor
    depth: torch.Tensor
    draw: BatchIndices = field(default_factory=lambda: (np.empty(0, np.int64), np.empty(0, np.int64)))
    missing: int = 0
    replaced: int = 0
    ready: threading.Event = field(default_factory=threading.Event)
    error: BaseException | None = None
    copied: torch.cuda.Event | None = None

    def __post_init__(self) -> None:
        self.images, self.depths = self.image.numpy(), self.depth.numpy()  # the same memory, cheaper to index


def _allocate(shape: tuple[int, ...], dtype: torch.dtype, pin: bool) -> torch.Tensor:
    """Host memory to decode into: pinned for a GPU, else in huge pages where the system has them, 5 % of the stream."""
    if pin:
        return torch.empty(shape, dtype=dtype, pin_memory=True)
    memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


class DataLoader:
    """Iterates over the batches of `draws`. Use it in a `with`: leaving it ends its threads.

    With `replace`, a damaged sample (checksum, decode, shape, no valid pixel) is replaced by a whole one about a shard
    further on, the same for every topology, said once, and counted in the batch; without, the first one that cannot be
    decoded ends the iteration with a RankError. So does a read that takes longer than `timeout` seconds while the loop
    waits for it; waits of more than a few seconds are said.
    """

    def __init__(
        self,
        samples: DepthDataset,
        draws: Iterator[BatchIndices],
        batch: int,
        device: torch.device,
        threads: int = 1,
        ahead: int = 2,
        replace: bool = False,
        timeout: float = 300.0,
        stop: Callable[[], bool] = lambda: False,
        say: Callable[[str], None] = print,
    ):
        """`batch`: samples in the largest batch; `threads`: 0 decodes in the loop itself; `ahead`: batches prepared;
        `stop` is asked while the loop waits, and where it is true the wait ends with Stopped."""
        self.damaged: dict[int, str] = {}
        """Sample -> what is wrong with it, where in the shards; the first hundred."""
        self._samples, self._draws, self._device, self._replace = samples, draws, device, replace
        self._timeout, self._stop, self._say = timeout, stop, say
        self._stride = next(s for s in itertools.count(samples.block + 1) if math.gcd(s, len(samples)) == 1)
        pin = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if pin else None
        height, width = samples.size
        self._free = deque(
            _Buffer(
                _allocate((batch, height, width, 3), torch.uint8, pin),
                _allocate((batch, height, width), torch.uint16, pin),
            )
            for _ in range(ahead + 1)
        )
        self._filling: deque[_Buffer] = deque()
        self._held: _Buffer | None = None  # the slot that the loop is using
        self._work: queue.SimpleQueue[tuple[_Buffer, int] | None] = queue.SimpleQueue()
        self._reading: dict[int, tuple[float, int]] = {}  # thread -> since when it reads which sample
        self._lock = threading.Lock()
        self._closed = False
        self._threads = [threading.Thread(target=self._decode, name=f"decode-{i}", daemon=True) for i in range(threads)]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> "DataLoader":
        return self

    def __exit__(self, *_: object) -> None:
        self._closed = True
        self._samples.join_workers(self._threads, self._work)

    def __iter__(self) -> "DataLoader":
        return self

    def __next__(self) -> Batch:
        """The next batch. Raises Stopped, RankError, and whatever went wrong in a thread; StopIteration at the end."""
        if self._held is not None:
            self._free.append(self._held)
            self._held = None
        self._refill()
        if not self._filling:
            raise StopIteration
        slot = self._filling[0]
        if not self._threads:
            for row in range(len(slot.draw[1])):
                self._fill(slot, row)
        self._wait(slot)
        if slot.error is not None:
            raise slot.error
        self._held = self._filling.popleft()
        return self._deliver(slot)

    def _refill(self) -> None:
        """Hand every free slot the next draw."""
        while self._free:
            draw = next(self._draws, None)
            if draw is None:
                return
            slot = self._free.popleft()
            if slot.copied is not None:
                slot.copied.synchronize()  # the device may still be reading the buffer
            slot.draw, slot.missing, slot.replaced = draw, len(draw[1]), 0
            slot.ready.clear()
            self._filling.append(slot)
            if self._threads:
                for row in range(len(draw[1])):
                    self._work.put((slot, row))

    def _wait(self, slot: _Buffer) -> None:
        """Until the slot is filled; says what takes long. Raises Stopped, or RankError past the time-out."""
        say_after = _SAY_AFTER
        while not slot.ready.wait(_POLL):
            if self._stop():
                raise Stopped
            reads = list(self._reading.values())
            if not reads:
                continue
            since, sample = min(reads)
            seconds = time.monotonic() - since
            if seconds > self._timeout:
                raise RankError(
                    f"{self._samples.file_of(sample)}: a read has not come back for {seconds:.0f} s; is its disk or "
                    "server well? (data.read_timeout is how long to wait)"
                )
            if seconds > say_after:
                say_after *= 2
                self._say(f"waiting for {self._samples.file_of(sample)} for {seconds:.0f} s now")

    def _deliver(self, slot: _Buffer) -> Batch:
        epoch, sample = slot.draw
        image, depth = slot.image, slot.depth
        if len(sample) < len(image):
            image, depth = image[: len(sample)], depth[: len(sample)]
        if self._stream is not None:
            image, depth, slot.copied = self._copied(self._stream, image, depth)
        elif self._device.type != "cpu":
            image, depth = image.to(self._device), depth.to(self._device)
        return Batch(image, depth, epoch, sample, slot.replaced)

    def _copied(
        self, stream: torch.cuda.Stream, image: torch.Tensor, depth: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.cuda.Event]:
        """Copies on the GPU, made beside what it computes, and the event after which the host's are free again."""
        with torch.cuda.stream(stream):
            image, depth = image.to(self._device, non_blocking=True), depth.to(self._device, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
        computing = torch.cuda.current_stream(self._device)
        computing.wait_event(copied)
        for tensor in (image, depth):
            tensor.record_stream(computing)  # or its memory would be given away while that stream still reads it
        return image, depth, copied

    def _decode(self) -> None:
        while (task := self._work.get()) is not None:
            if not self._closed:
                self._fill(*task)

    def _fill(self, slot: _Buffer, row: int) -> None:
        replaced = False
        try:
            replaced = self._read(int(slot.draw[1][row]), slot.images[row], slot.depths[row])
        except BaseException as error:  # whatever it is, the loop has to hear of it
            slot.error = error
        with self._lock:
            slot.missing -= 1
            slot.replaced += replaced
            if slot.missing == 0 or slot.error is not None:
                slot.ready.set()

    def _read(self, sample: int, image: np.ndarray, depth: np.ndarray) -> bool:
        """Read a sample, or a whole one instead of it; returns whether it had to be replaced."""
        reader = threading.get_ident()
        try:
            for step in range(_SUBSTITUTES):
                # one shard further on: damage comes by the shard, and neighbours would all be replaced by one sample
                candidate = (sample + step * self._stride) % len(self._samples)
                self._reading[reader] = time.monotonic(), candidate
                try:
                    self._samples.read_into(candidate, image, depth)
                    # a few rows are enough for nearly every map: to look at all of it is 1 % of the stream
                    if self._replace and not depth[::_EVERY].any() and not depth.any():
                        raise self._samples.damaged(candidate, "depth has no valid pixel")
                    return step > 0
                except DamagedSample as error:
                    self._note(candidate, error)
        finally:
            self._reading.pop(reader, None)
        where = self._samples.file_of(sample)
        raise RankError(f"{where}: damaged, and so are the {_SUBSTITUTES - 1} to replace it; {self._samples.advice}")

    def _note(self, sample: int, error: DamagedSample) -> None:
        if not self._replace:
            raise RankError(f"damaged sample: {error}; {self._samples.advice}")
        with self._lock:
            new = sample not in self.damaged and len(self.damaged) < _NAMED
            if new:
                self.damaged[sample] = str(error)
        if new:
            self._say(f"damaged sample, replaced by another: {error}")
