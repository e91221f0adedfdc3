"""Content of an ordinary WebDataset tar: its samples, the positions of their members, and the faults that it has as a
tar."""

import errno
import os
import stat
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np

from mde_dist.data import depth
from mde_dist.data.checksum import crc32
from mde_dist.data.manifest import INDEX, MEMBERS, TAR_BLOCK
from mde_dist.data.shards import split_name
from mde_dist.utils.folders import left_behind

DEPTH_CODECS = {f"depth.{codec}": codec for codec in depth.CODECS}
"""Extension -> codec of the depth map."""
_MEMBER_OF = {"jpg": "image", "jpeg": "image", "json": "meta"} | dict.fromkeys(DEPTH_CODECS, "depth")


@dataclass
class TarSample:
    """A sample as the tar has it; members may be missing."""

    key: str
    members: dict[str, tarfile.TarInfo] = field(default_factory=dict)
    codec: str = ""
    """Codec of the depth map."""

    def read(self, file: int, member: str) -> bytes:
        """A member's payload from the open tar."""
        info = self.members[member]
        return os.pread(file, info.size, info.offset_data)

    @property
    def missing(self) -> list[str]:
        """Members without which it is no sample."""
        return [member for member in ("image", "depth") if member not in self.members]


@dataclass
class Contents:
    """The samples of a tar in their order."""

    samples: list[TarSample] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    extensions: set[str] = field(default_factory=set)
    """All extensions that occur."""


def scan(path: Path) -> Contents:
    """Read the headers of a tar. What is wrong goes into `problems`; what follows it is found all the same.

    Raises OSError where the file cannot be read.
    """
    contents = Contents()
    by_key: dict[str, TarSample] = {}
    twice: dict[str, str] = {}
    torn: set[str] = set()  # which member belongs to which of two namesakes nobody can tell
    for info in members(path, contents.problems):
        if left_behind(info.name):
            continue
        key, extension = split_name(info.name)
        contents.extensions.add(extension)
        member = _MEMBER_OF.get(extension)
        if member is None:
            continue
        sample = by_key.setdefault(key, TarSample(key))
        if not sample.members:
            contents.samples.append(sample)
        if member in sample.members or contents.samples[-1] is not sample:
            twice[key] = f"key {key}: two samples with this key, the first one counts"
            if contents.samples[-1] is sample:
                twice[key] = f"key {key}: two samples with this key, one behind the other: none counts"
                torn.add(key)
        else:
            sample.members[member] = info
            sample.codec = DEPTH_CODECS.get(extension, sample.codec)
    contents.problems += twice.values()
    contents.samples = [sample for sample in contents.samples if sample.key not in torn]
    contents.problems += [f"key {s.key}: has no {' and no '.join(s.missing)}" for s in contents.samples if s.missing]
    return contents


def members(path: Path, problems: list[str]) -> Iterator[tarfile.TarInfo]:
    """The regular members of a tar. Bad headers are skipped block by block, and noted."""
    status = path.stat()
    size = status.st_size
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "is not a regular file")
    if not size:
        problems.append("empty file")
        return
    end = 0  # of the member before
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:", ignore_zeros=True) as tar:
            while (info := tar.next()) is not None:
                if info.offset < end or info.size < 0:
                    problems.append(f"header at byte {info.offset} is damaged")
                    return
                if not _zeros(file, end, info.offset):
                    problems.append(f"bad header at byte {end}: what it headed is lost")
                end = info.offset_data + -(-info.size // TAR_BLOCK) * TAR_BLOCK
                if info.offset_data + info.size > size:
                    problems.append(f"cut off in mid-member {info.name}")
                    return
                if info.isreg():
                    yield info
            if not _zeros(file, end, size):
                problems.append(f"bad header at byte {end}: what it headed is lost")
            elif size < end + 2 * TAR_BLOCK:
                problems.append("ends without the mark of a whole tar: members are cut off")
    except (tarfile.TarError, ValueError, OverflowError, EOFError) as error:
        problems.append(f"no whole tar: {error}")


def _zeros(file: BinaryIO, start: int, end: int) -> bool:
    """Check that the bytes between two members are padding."""
    while start < end:
        piece = os.pread(file.fileno(), min(end - start, 2**20), start)
        if piece.strip(b"\0"):
            return False
        if not piece:
            return True
        start += len(piece)
    return True


def index_rows(path: Path, samples: Sequence[TarSample]) -> np.ndarray:
    """INDEX rows (shard number 0) of samples that miss nothing, from the bytes as they are. Raises OSError."""
    rows = np.zeros(len(samples), INDEX)
    with path.open("rb") as file:
        for row, sample in zip(rows, samples, strict=True):
            for member in MEMBERS:
                info = sample.members.get(member)
                if info is not None:
                    data = os.pread(file.fileno(), TAR_BLOCK + info.size, info.offset_data - TAR_BLOCK)
                    row[f"{member}_offset"], row[f"{member}_bytes"] = info.offset_data, info.size
                    row[f"{member}_crc"] = crc32(data)
    return rows
