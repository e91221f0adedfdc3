"""Access to the files of a directory of shards: on this machine, or on a server with a cache on this machine."""

import os
import stat
import threading
from pathlib import Path
from typing import Protocol

from mde_dist.data.config import CacheOptions
from mde_dist.data.manifest import NAME, PACKING, FileInfo, Manifest, command_for, parse_manifest
from mde_dist.data.storage.cache import Cache
from mde_dist.data.storage.remote import Remote, open_remote, read_whole
from mde_dist.utils.errors import UserError
from mde_dist.utils.folders import left_behind
from mde_dist.utils.paths import command_line, with_home
from mde_dist.utils.urls import is_remote

_MAX_MANIFEST = 2**28  # bytes; that of 48,000 samples has 40 KB


class Store(Protocol):
    """The files of a manifest."""

    remote: bool

    def check(self, info: FileInfo) -> None:
        """Refuse what contradicts the manifest and can be seen without reading. Raises UserError."""

    def fetch(self, info: FileInfo, closing: threading.Event) -> Path:
        """The file on this machine's disks, fetched if need be. Raises UserError."""

    def renew(self, info: FileInfo, closing: threading.Event) -> bool:
        """Replace a copy that is not the file of the manifest -> whether there are copies, so that to read again helps.

        Raises UserError.
        """


class LocalStore:
    """A directory."""

    remote = False

    def __init__(self, directory: Path):
        self._directory = directory

    def check(self, info: FileInfo) -> None:
        path = self._directory / info.name
        repair = f"see what is whole with: {command_for('verify', str(self._directory))}"
        try:
            found = path.stat()
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}, but the manifest names it; {repair}") from None
        if not stat.S_ISREG(found.st_mode):
            raise UserError(f"{path} is not a regular file; {repair}")
        if found.st_size != info.bytes:
            raise UserError(f"{path}: {found.st_size} bytes, the manifest says {info.bytes}; {repair}")

    def fetch(self, info: FileInfo, closing: threading.Event) -> Path:
        return self._directory / info.name

    def renew(self, info: FileInfo, closing: threading.Event) -> bool:
        return False


class RemoteStore:
    """A directory on a server; whole files come into the cache and are checked there."""

    remote = True

    def __init__(self, remote: Remote, cache: Cache):
        self._remote, self._cache = remote, cache

    def check(self, info: FileInfo) -> None:
        """Nothing: a file is checked when it is fetched."""

    def fetch(self, info: FileInfo, closing: threading.Event) -> Path:
        return self._cache.find(info) or self._cache.fetch(self._remote, info, closing)

    def renew(self, info: FileInfo, closing: threading.Event) -> bool:
        self._cache.renew(self._remote, info, closing)
        return True


def tars_in(directory: Path) -> list[Path]:
    """The tars directly in a directory, sorted by name; what systems leave behind, such as ._A.tar, is none of them."""
    return sorted(path for path in directory.glob("*.tar") if not left_behind(path.name))


def open_store(location: str | os.PathLike[str], cache: CacheOptions) -> tuple[Manifest, Store]:
    """The manifest of the shards at a directory or URL, and their files. Raises UserError."""
    if is_remote(str(location)):
        remote = open_remote(str(location))
        data = read_whole(remote, NAME, _MAX_MANIFEST, cache.patience)
        manifest = parse_manifest(data, remote.url("").rstrip("/"))
        return manifest, RemoteStore(remote, Cache(with_home(cache.directory), cache.limit, cache.patience))
    directory = Path(location)
    try:
        data = (directory / NAME).read_bytes()
    except FileNotFoundError:
        advice = f"pack a data set into it with: {command_line('shard', '--output', directory, then='--source DIR')}"
        if (directory / PACKING).is_dir():
            advice = "their packing is at work, or was cut off: the command that packs them goes on with it"
        elif tars_in(directory):
            advice = f"index the tars in it with: {command_for('index', str(directory))}"
        raise UserError(f"{directory} holds no shards (no {NAME}); {advice}") from None
    except OSError as error:
        raise UserError(f"{directory / NAME}: {error.strerror}") from None
    return parse_manifest(data, str(directory)), LocalStore(directory)
