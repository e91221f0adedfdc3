"""Content of folders, the same way for every command: links are followed and loops end, numbers in names count, files
that systems leave behind are left out, and a name is found in either of its Unicode forms."""

import os
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path, PurePosixPath
from unicodedata import normalize

from mde_dist.utils.errors import UserError
from mde_dist.utils.io import leads_nowhere, natural_order

_MACOS = ("__macosx", "icon\r")  # beside hidden ones such as .DS_Store and ._NAME
_WINDOWS = ("thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin", "recycler", "system volume information")
_STORAGE = ("lost+found", "@eadir", "@tmp", "#recycle", "#snapshot", "@recycle", "@recently-snapshot")  # ext4, NAS
_LEFT_BEHIND = frozenset((*_MACOS, *_WINDOWS, *_STORAGE))


NOT_UTF8 = "its name is not UTF-8; rename it"


def is_utf8(path: str) -> bool:
    """False for a name whose bytes on the disk are no UTF-8, as older systems wrote them: Python has them escaped."""
    return not any("\udc80" <= letter <= "\udcff" for letter in path)


def left_behind(path: str) -> bool:
    """True for the name, or the path with '/', of what is hidden, or of what systems and tools keep beside the files of
    others: previews, notes, bins."""
    parts = path.split("/")
    return any(part.lower() in _LEFT_BEHIND or (part[:1] == "." and part not in (".", "..")) for part in parts)


@dataclass
class Listing:
    """Names directly in a folder, sorted. Links are what they lead to; those that lead nowhere are files."""

    folders: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    left_behind: list[str] = field(default_factory=list)
    """Files and folders that are in neither list for their names."""


def list_folder(folder: Path) -> Listing:
    """Raises OSError."""
    found = Listing()
    with os.scandir(folder) as entries:
        for entry in entries:
            if left_behind(entry.name):
                found.left_behind.append(entry.name)
            elif _is_folder(entry):
                found.folders.append(entry.name)
            elif _is_file(entry):
                found.files.append(entry.name)
    for names in vars(found).values():
        names.sort()
    return found


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


def _is_file(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file() or (entry.is_symlink() and leads_nowhere(Path(entry.path)))
    except OSError:  # a link in a circle, or into a folder that is closed
        return True


@dataclass
class Below:
    """Paths at any depth of a folder, in natural order."""

    files: list[Path] = field(default_factory=list)
    """Links that lead nowhere are among them: what they stood for is not to be missed in silence."""
    closed: list[Path] = field(default_factory=list)
    """Folders that cannot be listed."""
    left_behind: list[Path] = field(default_factory=list)
    """Files and folders that are in neither list for their names."""


def list_below(folder: Path, without: Path | None = None) -> Below:
    """List all files below a folder, but for those in the folder `without`.

    Linked folders are followed, wherever they lead, but not into a folder that the path has come through already.
    """
    found = Below()
    waiting = [(folder, frozenset([_identity(without)]) if without and without.exists() else frozenset())]
    while waiting:
        path, above = waiting.pop()
        try:
            here = _identity(path)
            if here in above:
                continue
            names = list_folder(path)
        except OSError:
            found.closed.append(path)
            continue
        found.files += (path / name for name in names.files)
        found.left_behind += (path / name for name in names.left_behind)
        waiting += ((path / name, above | {here}) for name in names.folders)
    for paths in vars(found).values():
        paths.sort(key=lambda path: natural_order(path.relative_to(folder).as_posix()))
    return found


def _identity(folder: Path) -> tuple[int, int]:
    """Device and inode. Raises OSError."""
    status = folder.stat()
    return status.st_dev, status.st_ino


def files_below(folder: Path) -> list[Path]:
    """The files of `list_below`. Raises UserError where a folder cannot be listed."""
    below = list_below(folder)
    if below.closed:
        raise UserError(f"{below.closed[0]} cannot be listed; open it to this user, or remove it")
    return below.files


def is_empty(folder: Path) -> bool:
    """True where nothing lies in a folder but what systems leave behind. Raises OSError."""
    return all(left_behind(name) for name in os.listdir(folder))  # noqa: PTH208


def locate(folder: Path, name: str) -> Path:
    """The path of a name below a folder, in the Unicode form that it has on the disk.

    An accented letter is one code point where most people write it (NFC), and two where macOS has stored it (NFD).
    """
    path = folder / name
    if name.isascii() or os.path.lexists(path):
        return path
    path = folder
    for part in PurePosixPath(name).parts:
        if os.path.lexists(path / part):
            path /= part
        else:
            path /= _composed(path).get(normalize("NFC", part), part)
    return path


def _composed(folder: Path) -> dict[str, str]:
    """The names in a folder by their NFC; empty where it cannot be listed."""
    try:
        return _cached_names(folder, folder.stat().st_mtime_ns)
    except OSError:
        return {}


@lru_cache(maxsize=256)
def _cached_names(folder: Path, modified: int) -> dict[str, str]:
    return {normalize("NFC", name): name for name in sorted(os.listdir(folder)) if not name.isascii()}  # noqa: PTH208
