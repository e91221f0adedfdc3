"""Files that are whole or not there: written under a temporary name, flushed to the disk, renamed."""

import codecs
import errno
import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from mde_dist.utils.console import note_once
from mde_dist.utils.errors import UserError

UNSEALED = "0" * 64
"""Stands where `sealed` puts a sha256."""
UNSUPPORTED = {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, 524}
"""Errors by which a file system says that it lacks a call; the last is the kernel's own ENOTSUPP, which some show."""


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path` that takes its name when the block ends well, and vanishes otherwise."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            sync(file.fileno(), path)
        temporary.replace(path)
        sync_directory(path.parent)
    finally:
        with suppress(OSError):  # gone, or not to be removed: neither is a reason
            temporary.unlink()


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write a whole file, text as UTF-8, or leave what was there."""
    with atomic_file(path) as file:
        # the bytes of a path that are no text here, as under LC_ALL=C, are written as they are
        file.write(data.encode(errors="surrogateescape") if isinstance(data, str) else data)


@contextmanager
def writing(what: str | Path, hint: str = "") -> Iterator[None]:
    """A disk that does not take it is one line: raises UserError in place of OSError. `hint`: what that means."""
    try:
        yield
    except OSError as error:
        why = error.strerror or str(error)
        if isinstance(error, FileExistsError) and leads_nowhere(Path(error.filename or what)):
            why = f"{error.filename or what} is a link that leads nowhere"
        raise UserError(f"{what}: cannot be written ({why}){hint and '; ' + hint}") from None


_MARKS = {codecs.BOM_UTF8: "utf-8", codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be"}


def decode_text(data: bytes) -> str:
    """The text of a file: UTF-8, or UTF-16 as Windows writes it, with or without the mark of its kind in front.

    UTF-16 without a mark is known by ASCII letters, of which every second byte is 0. Raises UnicodeError.
    """
    for mark, encoding in _MARKS.items():
        if data.startswith(mark):
            return data[len(mark) :].decode(encoding)
    even, odd = data[::2].count(0), data[1::2].count(0)
    if len(data) % 2 == 0 and max(even, odd) > max(len(data) // 8, 4 * min(even, odd)):
        return data.decode("utf-16-be" if even > odd else "utf-16-le")
    return data.decode()


def sync_directory(path: Path) -> bool:
    """Make renames in a directory last through a power cut. Returns and raises as `sync`."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except PermissionError as error:  # it may be written and not be read
        _note_unsynced(path, error)
        return False
    try:
        return sync(handle, path)
    finally:
        os.close(handle)


def sync(handle: int, path: Path) -> bool:
    """Have what was written to an open file or directory reach the disk. Raises OSError.

    Returns False, and says so once, where its file system (CIFS, VirtualBox and FUSE for directories) cannot be asked
    to: then only a power cut can undo it.
    """
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        _note_unsynced(path, error)
        return False
    return True


def _note_unsynced(path: Path, error: OSError) -> None:
    what = f"{path}: its file system cannot be told to flush it to the disk ({error.strerror})"
    note_once("sync", f"{what}; a power cut may undo what was written last")


def leads_nowhere(path: Path) -> bool:
    """True for a link whose target is not there or cannot be reached: of git-annex without its content, of a disk that
    was moved."""
    return path.is_symlink() and not os.path.exists(path)  # noqa: PTH110  Path's raises where it may not look


def was_folder(path: Path) -> bool:
    """True for a link that leads nowhere and may have led to a folder: it has no suffix and is none of git-annex, whose
    links stand for files."""
    return not path.suffix and leads_nowhere(path) and "/annex/objects/" not in str(path.readlink())


def refuse_dead_links(paths: Iterable[Path]) -> None:
    """Raises UserError where one of the paths leads nowhere: what it stands for would be left out in silence."""
    dead = [path for path in paths if leads_nowhere(path)]
    if dead:
        more = f", and so do {len(dead) - 1:,} more" if len(dead) > 1 else ""
        raise UserError(f"{dead[0]} is a link that leads nowhere{more}; fetch what it stands for, or remove it")


def natural_order(name: str) -> tuple[list[object], str]:
    """Sort key of names in which numbers count: 2 before 10. Names that differ only in leading zeros stay apart."""
    parts: list[object] = list(re.split(r"(\d+)", name))
    for index in range(1, len(parts), 2):  # the numbers
        digits = str(parts[index]).lstrip("0")
        parts[index] = len(digits), digits
    return parts, name


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sealed(data: bytes) -> bytes:
    """Data with its own sha256 in place of the first UNSEALED in it, for `is_sealed`."""
    return data.replace(UNSEALED.encode(), hashlib.sha256(data).hexdigest().encode(), 1)


def is_sealed(data: bytes, seal: object) -> bool:
    """True where data is as `sealed` made it. `seal`: the sha256 that it states; None = it states none."""
    if seal is None:
        return True
    offset = data.find(seal.encode()) if isinstance(seal, str) and len(seal) == len(UNSEALED) else -1
    if offset < 0:
        return False
    digest = hashlib.sha256(memoryview(data)[:offset])
    digest.update(UNSEALED.encode())
    digest.update(memoryview(data)[offset + len(UNSEALED) :])
    return digest.hexdigest() == seal
