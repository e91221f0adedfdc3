"""Files that are whole or not there: written under a temporary name, flushed to the disk, renamed. And their locks."""

import fcntl
import hashlib
import os
import re
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, BinaryIO

from .console import say
from .errors import UserError

UNSEALED = "0" * 64
"""Stands where `sealed` puts a sha256."""


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path` that takes its name when the block ends well, and vanishes otherwise."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
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
        raise UserError(f"{what}: cannot be written ({error.strerror or error}){hint and '; ' + hint}") from None


class Taken(UserError):
    """Another process holds the lock."""


@contextmanager
def locked(path: Path, taken: str, shared: bool = False, wait: bool = False) -> Iterator[None]:
    """Hold the lock file at `path`, which is made if need be, with its folder; the system frees it when we die.

    `shared`: others may hold it likewise. `wait`: until it is free. Raises Taken with the text `taken` and the one who
    holds it alone, and OSError.
    """
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+", encoding="utf-8", errors="replace") as file:
            _take(file, taken, shared, wait)
            if not is_at(file, path):  # whoever held it before has removed it, or its folder
                continue
            file.truncate(0)
            file.write("" if shared else f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
            try:
                yield
            finally:
                with suppress(OSError):
                    if not shared and is_at(file, path):  # its folder may have been renamed
                        path.unlink()
                    fcntl.flock(file, fcntl.LOCK_UN)  # closing is not enough where a child has inherited the descriptor
            return


def _take(file: IO[str], taken: str, shared: bool, wait: bool) -> None:
    """Raises Taken or OSError."""
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = f"{taken} ({file.read().strip()})".removesuffix(" ()")
        if not wait:
            raise Taken(holder) from None
        say(f"{holder}; waiting for it")
        fcntl.flock(file, kind)


def is_at(file: IO, path: Path) -> bool:
    """True while an open file is still the one of that name."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def sync_directory(path: Path) -> None:
    """Make renames in a directory last through a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


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
    for place in range(1, len(parts), 2):  # the numbers
        digits = str(parts[place]).lstrip("0")
        parts[place] = len(digits), digits
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
    place = data.find(seal.encode()) if isinstance(seal, str) and len(seal) == len(UNSEALED) else -1
    if place < 0:
        return False
    digest = hashlib.sha256(memoryview(data)[:place])
    digest.update(UNSEALED.encode())
    digest.update(memoryview(data)[place + len(UNSEALED) :])
    return digest.hexdigest() == seal
