"""Interface of everything a loader reads: the pairs of one split, by their number. Shards are one kind, a source folder
is another."""

import queue
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Self

import numpy as np

_LEAVE_AFTER = 12.0  # seconds that leaving waits for threads: longer than the time-out of a server


class DamagedSample(Exception):
    """A sample that cannot be read as it should be; the message names its file, its key and what is wrong."""


class DepthDataset(ABC):
    """The image and depth pairs of one split, readable at random and from several threads. Use it in a `with`."""

    size: tuple[int, int]
    """Height and width of every image and depth map, pixels."""
    location: str
    """Location of the pairs: a directory, a file or a URL."""
    advice: str
    """Advice to the user about damage."""
    remote = False
    """True where the pairs come from a server."""

    def __init__(self) -> None:
        self._closing = threading.Event()
        self.stray: set[int] = set()
        """Samples that were read and whose JPEG has stray bytes, see `images.decode_jpeg`."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @abstractmethod
    def __len__(self) -> int:
        """Pairs in the split."""

    @abstractmethod
    def read_into(self, sample: int, image: np.ndarray, target: np.ndarray) -> None:
        """Read a sample into `image`, uint8 (height, width, 3), and `target`, uint16 millimetres (height, width).

        Both must be contiguous. Raises DamagedSample.
        """

    @abstractmethod
    def meta(self, sample: int) -> dict[str, str]:
        """The sample's own record: scene, source, split; empty where it has none. Raises DamagedSample."""

    @cached_property
    def scenes(self) -> list[str]:
        """The scene of each sample; empty where it names none, or its record is damaged."""
        return [self._scene(sample) for sample in range(len(self))]

    def _scene(self, sample: int) -> str:
        try:
            return str(self.meta(sample).get("scene", ""))
        except DamagedSample:
            return ""

    @abstractmethod
    def key(self, sample: int) -> str:
        """The sample's unique name."""

    @abstractmethod
    def file_of(self, sample: int) -> str:
        """Path or URL of the file that holds the sample."""

    @property
    def block(self) -> int:
        """Samples that lie together and may be damaged together."""
        return 1

    def damaged(self, sample: int, error: object) -> DamagedSample:
        """Error that names a damaged sample and says what is wrong with it."""
        return DamagedSample(f"{self.file_of(sample)}, key {self.key(sample)}: {error}")

    @abstractmethod
    def close(self) -> None:
        """Let go of all files."""

    def in_order(self) -> Iterator[tuple[int, list[int]]]:
        """The stages in which all is read once: (the sample where it ends, the numbers of the files to prefetch)."""
        return iter(())

    @abstractmethod
    def prefetch(self, file: int) -> None:
        """Have a file on this machine's disks before it is read. Raises UserError."""

    def join_workers(self, threads: Sequence[threading.Thread], work: queue.SimpleQueue) -> None:
        """End threads that read from here what a queue tells them; None in it is their end.

        What they are fetching from a server is given up. A read that hangs in the system cannot be ended: its thread is
        left to die with the process.
        """
        self._closing.set()
        for _ in threads:
            work.put(None)
        end = time.monotonic() + _LEAVE_AFTER
        for thread in threads:
            thread.join(max(0.0, end - time.monotonic()))
        self._closing.clear()
