"""Whole files of remote shards on this node's disk: one directory for all processes of the node.

`<sha256>` is a whole file, `<sha256>.part` one on its way, held locked by whoever downloads it. Names by content: data
sets and runs may share the directory. A crash leaves at most a part, which the next download resumes.
"""

import contextlib
import hashlib
import io
import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from mde_dist.data.config import PATIENCE
from mde_dist.data.storage.remote import Cancelled, RangeError, Remote, RetryPolicy, with_retries
from mde_dist.utils.console import say
from mde_dist.utils.errors import RankError, UserError
from mde_dist.utils.io import sha256_of, sync, sync_directory
from mde_dist.utils.locks import POLL, Lock, is_at


@dataclass(frozen=True)
class FileInfo:
    """A file of a directory of shards."""

    name: str
    bytes: int
    sha256: str
    waited_for_by_loader: ClassVar[bool] = False
    """The loader reports a file that does not come; of others the cache does."""


_POLL = 0.1  # seconds between looks at a lock that somebody else holds


class Cache:
    """A directory of whole files. Threads may share it, and processes the directory."""

    def __init__(self, directory: Path, limit: int, patience: float = PATIENCE):
        """`limit`: bytes; `patience`: seconds without a new byte after which a server is given up. Raises UserError."""
        self.directory, self.limit, self._patience = directory, limit, patience
        try:
            directory.mkdir(parents=True, exist_ok=True)
            (directory / ".lock").open("ab").close()
        except OSError as error:
            raise self._unusable(error) from None

    def find(self, wanted: FileInfo) -> Path | None:
        """The whole file if it is there, from now on the most recently used one. Raises UserError."""
        path = self._path(wanted)
        try:
            if path.stat().st_size != wanted.bytes:  # somebody damaged it: the next download replaces it
                return None
            now = time.time_ns()  # the kernel's own "now" is too coarse to tell the order of two uses
            os.utime(path, ns=(now, now))
        except OSError:
            return None
        return path

    def fetch(self, remote: Remote, wanted: FileInfo, closing: threading.Event) -> Path:
        """The whole file, downloaded if need be, by one caller while the others wait.

        It may be evicted at any time: where opening it fails, call again; once open it stays readable. Raises
        UserError, and Cancelled soon after `closing` is set (a silent server is waited for up to its time-out).
        """
        path = self._path(wanted)
        if wanted.bytes > self.limit:
            raise UserError(
                f"{remote.url(wanted.name)}: {wanted.bytes} bytes do not fit in a cache of {self.limit}; "
                "raise data.cache_gb"
            )
        part = path.with_name(f"{path.name}.part")
        # of a shard that does not come the loader speaks, once it is waited for
        aloud = not wanted.waited_for_by_loader
        patience = RetryPolicy(remote, wanted.name, self._patience, closing, aloud)
        try:
            while self.find(wanted) is None:
                with _locked(part, closing, patience) as file:
                    if not is_at(file, part):  # whoever held the lock before us renamed or evicted it
                        continue
                    if self.find(wanted) is not None:
                        with contextlib.suppress(OSError):
                            part.unlink()
                        continue
                    with _locked(self.directory / ".lock", closing):
                        self._make_room(wanted)
                    self._download(file, remote, wanted, patience)
                    with _locked(self.directory / ".lock", closing):
                        self._make_room(wanted)  # again: other downloads may have begun, and come first
                        part.rename(path)
                    sync_directory(self.directory)
                    break
        except OSError as error:
            raise self._unusable(error) from None
        return path

    def renew(self, remote: Remote, wanted: FileInfo, closing: threading.Event) -> None:
        """Fetch a file anew where the one that is there is damaged. Who has that one open goes on with it.

        Raises UserError and Cancelled as `fetch` does.
        """
        path = self._path(wanted)
        part = path.with_name(f"{path.name}.part")
        try:
            with _locked(part, closing) as file:  # one looks, the others wait
                whole = _is_whole(path, wanted)
                if not whole and path.exists():  # nobody has evicted it
                    say(f"note: {path} is a damaged copy of {remote.url(wanted.name)}; it is fetched anew")
                    path.unlink(missing_ok=True)
                if whole and is_at(file, part):
                    part.unlink()
        except OSError as error:
            raise self._unusable(error) from None
        if not whole:
            self.fetch(remote, wanted, closing)

    def _path(self, wanted: FileInfo) -> Path:
        if not re.fullmatch(r"[0-9a-f]{64}", wanted.sha256):
            raise UserError(f"{wanted.name}: {wanted.sha256!r} is no SHA-256; the manifest is damaged")
        return self.directory / wanted.sha256

    def _download(self, file: io.FileIO, remote: Remote, wanted: FileInfo, patience: RetryPolicy) -> None:
        """Make the part whole, going on from what it has. Raises UserError, Cancelled or OSError."""
        for _ in range(2):  # what is there may be no start of this file: then once more from nothing
            file.seek(0)
            digest = hashlib.file_digest(file, "sha256")
            size = file.tell()
            chunks = with_retries(remote, wanted.name, size, patience)
            with contextlib.suppress(RangeError):
                while size < wanted.bytes and (chunk := next(chunks, None)):
                    data = memoryview(chunk)[: wanted.bytes - size]  # a server may send on and on
                    size += len(data)
                    digest.update(data)
                    while data:
                        data = data[file.write(data) :]
            if size == wanted.bytes and digest.hexdigest() == wanted.sha256:
                sync(file.fileno(), self._path(wanted))
                return
            file.truncate(0)
        raise RankError(
            f"{remote.url(wanted.name)} is not the file that the manifest names (sha256 {digest.hexdigest()}, expected "
            f"{wanted.sha256}): it was changed or damaged on the server"
        )

    def _make_room(self, wanted: FileInfo) -> None:
        """Unlink files, the least recently used first, until `wanted` fits in. Call it with the cache's lock held.

        Parts that somebody is downloading count and stay; so whole files alone never exceed the limit.
        """
        others = []
        for entry in os.scandir(self.directory):
            if re.fullmatch(r"[0-9a-f]{64}(\.part)?", entry.name) and entry.name != f"{wanted.sha256}.part":
                with contextlib.suppress(FileNotFoundError):
                    status = entry.stat()
                    others.append((status.st_mtime_ns, status.st_size, Path(entry.path)))
        excess = sum(size for _, size, _ in others) + wanted.bytes - self.limit
        for _, size, path in sorted(others):
            if excess <= 0:
                return
            try:
                if path.suffix == ".part" and not _unlink_part(path):
                    continue
                path.unlink(missing_ok=True)
            except OSError:
                continue  # another user's, or held by the file system: others make room
            excess -= size

    def _unusable(self, error: OSError) -> RankError:
        return RankError(
            f"cannot write the cache {self.directory}: {error.strerror or error}; free space there, or name another "
            "directory with data.cache"
        )


@contextmanager
def _locked(path: Path, closing: threading.Event, patience: RetryPolicy | None = None) -> Iterator[io.FileIO]:
    """A file, opened to read and append, that no other process or thread has locked. Raises Cancelled or OSError.

    While another one makes it grow, that is news from the server for our patience, too.
    """
    size = 0
    with path.open("a+b", buffering=0) as file:  # unbuffered: nothing of ours may be written once the lock is gone
        lock = Lock(file, path)
        while not lock.take():
            if closing.wait(POLL):
                raise Cancelled
            if patience is not None and os.fstat(file.fileno()).st_size != size:
                grown, size = abs(os.fstat(file.fileno()).st_size - size), os.fstat(file.fileno()).st_size
                patience.progress(grown, ours=False)
        try:
            yield file
        finally:
            lock.release()


def _is_whole(path: Path, wanted: FileInfo) -> bool:
    try:
        return path.stat().st_size == wanted.bytes and sha256_of(path) == wanted.sha256
    except OSError:  # gone, or a disk that cannot read it
        return False


def _unlink_part(part: Path) -> bool:
    """Unlink a part unless somebody is downloading it. Whether it is gone."""
    with contextlib.suppress(FileNotFoundError), part.open("r+b") as file:
        lock = Lock(file, part)
        if not lock.take():
            return False
        try:
            part.unlink()  # with the lock in hand: one who waits for it then finds the name gone, and begins anew
        finally:
            lock.release()
    return True
