"""Order + shards -> batches: threads of the rank's own process decode ahead of the loop into a ring of buffers.

Threads, not worker processes: the decoders release the interpreter lock, and a batch that crosses a process pays for
every page of it anew. A batch is uint8 image and uint16 depth; floats begin on the device.
"""

import queue
import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from ..errors import RankError
from .shards import DamagedSample, ShardSet

Draw = tuple[np.ndarray, np.ndarray]
"""What a batch consists of: (epochs, samples), int64 (batch,)."""

_SUBSTITUTES = 8  # samples tried in place of a damaged one before giving up


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
    """int64 (batch,), place in the split."""


@dataclass
class _Slot:
    """A batch buffer and how far it is filled."""

    image: torch.Tensor
    depth: torch.Tensor
    draw: Draw = field(default_factory=lambda: (np.empty(0, np.int64), np.empty(0, np.int64)))
    missing: int = 0
    ready: threading.Event = field(default_factory=threading.Event)
    error: BaseException | None = None
    copied: torch.cuda.Event | None = None


class Loader:
    """Iterates over the batches of `draws`. Use it in a `with`: leaving it ends its threads.

    A damaged sample is replaced by the next whole one (the same for every topology), noted in `damaged`, and ends the
    run with a RankError past `max_bad_fraction` of the split; with `max_bad_fraction=None` the first one ends it.
    """

    def __init__(
        self,
        shards: ShardSet,
        draws: Iterator[Draw],
        batch: int,
        device: torch.device,
        threads: int = 1,
        ahead: int = 2,
        max_bad_fraction: float | None = None,
    ):
        """`batch`: samples in the largest batch; `threads`: 0 decodes in the loop itself; `ahead`: batches prepared."""
        self.damaged: dict[int, str] = {}
        """Sample -> what is wrong with it, where in the shards."""
        self._shards, self._draws, self._device, self._max_bad_fraction = shards, draws, device, max_bad_fraction
        pin = device.type == "cuda"
        height, width = shards.size
        self._free = deque(
            _Slot(
                torch.empty((batch, height, width, 3), dtype=torch.uint8, pin_memory=pin),
                torch.empty((batch, height, width), dtype=torch.uint16, pin_memory=pin),
            )
            for _ in range(ahead + 1)
        )
        self._filling: deque[_Slot] = deque()
        self._held: _Slot | None = None  # the slot that the loop is using
        self._work: queue.SimpleQueue[tuple[_Slot, int] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._closed = False
        self._threads = [threading.Thread(target=self._decode, name=f"decode-{i}", daemon=True) for i in range(threads)]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *_: object) -> None:
        self._closed = True
        for _thread in self._threads:
            self._work.put(None)
        for thread in self._threads:
            thread.join()

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> Batch:
        if self._held is not None:
            self._free.append(self._held)
            self._held = None
        self._refill()
        if not self._filling:
            raise StopIteration
        slot = self._filling.popleft()
        if not self._threads:
            for row in range(len(slot.draw[1])):
                self._fill(slot, row)
        slot.ready.wait()
        if slot.error is not None:
            raise slot.error
        self._held = slot
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
            slot.draw, slot.missing = draw, len(draw[1])
            slot.ready.clear()
            self._filling.append(slot)
            if self._threads:
                for row in range(len(draw[1])):
                    self._work.put((slot, row))

    def _deliver(self, slot: _Slot) -> Batch:
        epoch, sample = slot.draw
        image, depth = slot.image[: len(sample)], slot.depth[: len(sample)]
        if self._device.type == "cuda":
            image = image.to(self._device, non_blocking=True)
            depth = depth.to(self._device, non_blocking=True)
            slot.copied = torch.cuda.Event()
            slot.copied.record()
        elif self._device.type != "cpu":
            image, depth = image.to(self._device), depth.to(self._device)
        return Batch(image, depth, epoch, sample)

    def _decode(self) -> None:
        while (task := self._work.get()) is not None:
            if not self._closed:
                self._fill(*task)

    def _fill(self, slot: _Slot, row: int) -> None:
        try:
            self._read(int(slot.draw[1][row]), slot.image[row].numpy(), slot.depth[row].numpy())
        except BaseException as error:  # whatever it is, the loop has to hear of it
            slot.error = error
        with self._lock:
            slot.missing -= 1
            if slot.missing == 0 or slot.error is not None:
                slot.ready.set()

    def _read(self, sample: int, image: np.ndarray, depth: np.ndarray) -> None:
        for step in range(_SUBSTITUTES):
            candidate = (sample + step) % len(self._shards)
            try:
                self._shards.read_into(candidate, image, depth)
                return
            except DamagedSample as error:
                self._note(candidate, error)
        raise RankError(f"{_SUBSTITUTES} damaged samples in a row: {self.damaged[sample]}; pack the shards again")

    def _note(self, sample: int, error: DamagedSample) -> None:
        with self._lock:
            self.damaged[sample] = str(error)
            count = len(self.damaged)
        if self._max_bad_fraction is None:
            raise RankError(f"damaged sample: {error}; pack the shards again")
        if count > self._max_bad_fraction * len(self._shards):
            raise RankError(
                f"{count} damaged samples, more than data.max_bad_fraction = {self._max_bad_fraction:g} of "
                f"{len(self._shards)}; the latest: {error}"
            )
