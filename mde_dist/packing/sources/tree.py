"""Files by name, in a folder or in a ZIP as it was downloaded: what layouts and readers see of a disk."""

import lzma
import os
import stat
import struct
import threading
import zipfile
import zlib
from functools import lru_cache
from pathlib import Path
from typing import Protocol
from unicodedata import normalize

from mde_dist.utils.errors import UserError
from mde_dist.utils.folders import Listing, left_behind, list_folder, locate
from mde_dist.utils.io import leads_nowhere, refuse_dead_links, was_folder

MAX_FILE = 64 * 2**20
"""Bytes of the largest file that is read whole; the largest picture of a data set is far below."""

_FOLDERS, _FILES, _LEFT_BEHIND = range(3)  # what a ZIP's folder holds
_ZIP_DAMAGE = (
    OSError,
    EOFError,
    ValueError,
    RuntimeError,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    struct.error,
)


class Unreadable(Exception):
    """A file that cannot be read; the message says why, without its name."""


class Tree(Protocol):
    """Files by name: relative, with '/', as lists of files have them. Travels to other processes."""

    @property
    def root(self) -> Path:
        """Path that the names start from, for the user to find them."""

    def is_file(self, name: str) -> bool: ...

    def read(self, name: str) -> bytes:
        """Read a whole file. Raises Unreadable, also where it claims more than MAX_FILE bytes."""

    def stamp(self, name: str) -> list[int]:
        """Values that change when the file does. Raises OSError."""

    def files(self, folder: str) -> list[str]:
        """Names of the files directly in a folder, sorted; none where there is no such folder.

        Links that lead nowhere are among them: what they stood for is not to be missed in silence. Raises UserError
        where the folder cannot be listed.
        """

    def folders(self, folder: str) -> list[str]:
        """Names of the folders directly in a folder, sorted. Raises UserError where the folder cannot be listed."""

    def left_behind(self, folder: str) -> list[str]:
        """Names in a folder that are in neither list, see `folders.left_behind`. Raises UserError likewise."""

    def below(self, folder: str) -> "Tree":
        """The part of the tree below a folder."""


class FolderTree:
    """A folder of the disk. Links are followed, wherever they lead; names are found in either Unicode form."""

    def __init__(self, root: Path):
        self.root = root

    def is_file(self, name: str) -> bool:
        return os.path.isfile(locate(self.root, name))  # noqa: PTH113  False for impossible names, where Path's raises

    def read(self, name: str) -> bytes:
        path = locate(self.root, name)
        try:
            with path.open("rb") as file:
                status = os.fstat(file.fileno())
                if not stat.S_ISREG(status.st_mode):
                    raise Unreadable("not a regular file")
                check_size(status.st_size)
                return file.read(status.st_size)  # it reserves what it is asked for
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or str(error)
            raise Unreadable("a link that leads nowhere" if leads_nowhere(path) else why) from None

    def stamp(self, name: str) -> list[int]:
        status = locate(self.root, name).stat()
        return [status.st_size, status.st_mtime_ns]

    def files(self, folder: str) -> list[str]:
        return self._list(folder).files

    def folders(self, folder: str) -> list[str]:
        return self._list(folder).folders

    def left_behind(self, folder: str) -> list[str]:
        return self._list(folder).left_behind

    def _list(self, folder: str) -> Listing:
        try:
            return list_folder(locate(self.root, folder))
        except (FileNotFoundError, NotADirectoryError, ValueError):
            return Listing()
        except OSError as error:
            raise UserError(f"{self.root / folder} cannot be listed ({error.strerror or error})") from None

    def below(self, folder: str) -> "FolderTree":
        return FolderTree(self.root / folder) if folder else self


def is_named(tree: Tree, name: str) -> bool:
    """True for a file of the tree, and for a link of its name that leads nowhere."""
    return tree.is_file(name) or leads_nowhere(tree.root / name)


def whole_folders(tree: Tree, folder: str) -> list[str]:
    """The folders of a folder whose folders are splits or scenes. Raises UserError where a link leads nowhere that may
    be one of them: its pairs would be missed in silence."""
    names = (tree.root / folder / name for name in tree.files(folder))
    refuse_dead_links(path for path in names if was_folder(path))
    return tree.folders(folder)


class ZipTree:
    """The members of a ZIP below a folder of it, without unpacking."""

    def __init__(self, path: Path, folder: str = "", archive: "_Archive | None" = None):
        """Raises UserError where `path` is not a whole ZIP."""
        self._archive = archive or _archive(path)
        self._prefix = f"{folder}/" if folder else ""
        self.root = path / folder

    def is_file(self, name: str) -> bool:
        return self._archive.find(self._prefix + name) is not None

    def read(self, name: str) -> bytes:
        return self._archive.read(self._prefix + name)

    def stamp(self, name: str) -> list[int]:
        info = self._archive.find(self._prefix + name)
        if info is None:
            raise FileNotFoundError(2, "no such member", str(self.root / name))
        return [info.file_size, info.CRC]

    def files(self, folder: str) -> list[str]:
        return sorted(self._archive.folder(self._prefix + folder)[_FILES])

    def folders(self, folder: str) -> list[str]:
        return sorted(self._archive.folder(self._prefix + folder)[_FOLDERS])

    def left_behind(self, folder: str) -> list[str]:
        return sorted(self._archive.folder(self._prefix + folder)[_LEFT_BEHIND])

    def below(self, folder: str) -> "ZipTree":
        inner = (self._prefix + folder).strip("/")
        return ZipTree(self._archive.path, inner, self._archive) if folder else self


def _archive(path: Path) -> "_Archive":
    """The ZIP, opened once in a process however many jobs bring it: its directory takes a second to read."""
    status = path.stat()
    return _cached_archive(path, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=4)
def _cached_archive(path: Path, size: int, modified: int) -> "_Archive":
    return _Archive(path)


class _Archive:
    """An open ZIP: one handle per process, opened when it is needed; reading is safe in threads."""

    def __init__(self, path: Path):
        """Raises UserError where `path` is not a whole ZIP."""
        self.path = path
        self._lock, self._owner = threading.Lock(), 0
        self._members: dict[str, zipfile.ZipInfo] = {}
        self._composed: dict[str, zipfile.ZipInfo] = {}  # by the NFC of their names, those that are not ASCII
        self._folders: dict[str, tuple[set[str], set[str], set[str]]] = {}
        self._open()

    def __reduce__(self) -> tuple[object, ...]:
        return _archive, (self.path,)

    def _open(self) -> zipfile.ZipFile:
        with self._lock:
            if self._owner != os.getpid():  # a forked process must not share the file's position
                try:
                    self._zip = zipfile.ZipFile(self.path)
                except (OSError, ValueError, zipfile.BadZipFile, struct.error, NotImplementedError) as error:
                    why = getattr(error, "strerror", None) or str(error)
                    raise UserError(
                        f"--source {self.path}: no such folder, and not a whole ZIP either ({why}); download it again?"
                    ) from None
                files = [info for info in self._zip.infolist() if not info.is_dir()]
                self._members = {info.filename.replace("\\", "/"): info for info in files}
                others = (name for name in self._members if not name.isascii())
                self._composed = {normalize("NFC", name): self._members[name] for name in others}
                self._owner = os.getpid()
            return self._zip

    def members(self) -> dict[str, zipfile.ZipInfo]:
        self._open()
        return self._members

    def find(self, name: str) -> zipfile.ZipInfo | None:
        """The member of a name, in either Unicode form."""
        return self.members().get(name) or self._composed.get(normalize("NFC", name))

    def read(self, name: str) -> bytes:
        archive, info = self._open(), self.find(name)
        if info is None:
            raise Unreadable("no such member of the ZIP")
        if info.flag_bits & 1:
            raise Unreadable("encrypted; unpack the ZIP first")
        check_size(info.file_size)  # what it claims is what zipfile reads at most
        try:
            with archive.open(info) as file:
                return file.read(info.file_size)
        except _ZIP_DAMAGE as error:
            raise Unreadable(f"damaged in the ZIP: {error}") from None

    def folder(self, name: str) -> tuple[set[str], set[str], set[str]]:
        """Names directly in a folder: of folders, of files, and of what is left out for its name."""
        members = self.members()
        with self._lock:
            if not self._folders:
                for member in members:
                    above, kind, known = member, _FILES, False
                    while above and not known:
                        above, _, last = above.rpartition("/")
                        names = self._folders.setdefault(above, (set(), set(), set()))
                        kind = _LEFT_BEHIND if left_behind(last) else kind
                        known = last in names[kind]
                        names[kind].add(last)
                        kind = _FOLDERS
        return self._folders.get(name.strip("/"), (set(), set(), set()))


def check_size(size: int) -> None:
    """Raises Unreadable where a file claims more than any picture or list has."""
    if size > MAX_FILE:
        raise Unreadable(f"{size:,} bytes, more than the {MAX_FILE:,} that a file of a data set may have")
