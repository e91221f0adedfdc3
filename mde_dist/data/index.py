"""The rows of a split's index, read one at a time from the open file.

Neither an array in memory, which would grow with the data set, nor a mapped one, which kills the process where the file
is cut or its file system goes away: so both are read errors like any other. The ranks of a node share the pages.
"""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mde_dist.data.manifest import INDEX, MEMBERS, TAR_BLOCK, FileInfo, ShardInfo

_ROWS = 2**16  # looked at in one go


class Index:
    """The INDEX rows of a split by sample. Threads may share it."""

    def __init__(self, path: Path, info: FileInfo, shards: Sequence[ShardInfo]):
        """Open and check every byte. Raises OSError, and ValueError where it is not what the manifest names."""
        self._samples = sum(shard.samples for shard in shards)
        self._file = path.open("rb", buffering=0)
        try:
            if hashlib.file_digest(self._file, "sha256").hexdigest() != info.sha256:
                raise ValueError("not the index that the manifest names")
            self._first = self._header()
            if not self._fits(shards):
                raise ValueError("it places samples where the shards have none")
        except BaseException:
            self._file.close()
            raise

    def __getitem__(self, sample: int) -> np.void:
        """Raises OSError or ValueError, also once it is closed."""
        if not 0 <= sample < self._samples:
            raise IndexError(sample)
        data = os.pread(self._file.fileno(), INDEX.itemsize, self._first + sample * INDEX.itemsize)
        if len(data) != INDEX.itemsize:
            raise ValueError("the index was cut")
        return np.frombuffer(data, INDEX)[0]

    def close(self) -> None:
        self._file.close()

    def _header(self) -> int:
        """Offset of the first row, bytes. Raises ValueError."""
        self._file.seek(0)
        try:
            version = np.lib.format.read_magic(self._file)
            shape, _, kind = np.lib.format.read_array_header_1_0(self._file)
        except Exception:  # numpy does not say what a header that is none may raise
            raise ValueError("not an index") from None
        if version != (1, 0) or kind != INDEX or shape != (self._samples,):
            raise ValueError("not an index of this many samples")
        return self._file.tell()

    def _fits(self, shards: Sequence[ShardInfo]) -> bool:
        """Check that every row lies within its shard, and that every shard has its number of rows, in order."""
        ends = np.cumsum([shard.samples for shard in shards])
        sizes = np.array([shard.bytes for shard in shards])
        for start in range(0, self._samples, _ROWS):
            wanted = min(_ROWS, self._samples - start)
            data = os.pread(self._file.fileno(), wanted * INDEX.itemsize, self._first + start * INDEX.itemsize)
            if len(data) != wanted * INDEX.itemsize:
                return False
            rows = np.frombuffer(data, INDEX)
            numbers = np.searchsorted(ends, np.arange(start, start + wanted), side="right")
            if (rows["shard"] != numbers).any() or not _within(rows, sizes[numbers]):
                return False
        return True


def _within(rows: np.ndarray, sizes: np.ndarray) -> bool:
    """Check that all members lie within shards of these sizes; only a record may be missing."""
    for member in MEMBERS:
        offset, size = rows[f"{member}_offset"].astype(np.int64), rows[f"{member}_bytes"].astype(np.int64)
        there = (offset >= TAR_BLOCK) & (offset + size <= sizes) & (size > 0)
        if not (there | ((size == 0) & (member == "meta"))).all():
            return False
    return True
