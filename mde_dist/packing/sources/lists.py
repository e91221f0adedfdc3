"""Lists of files: found in the data set or named by --list, read within limits, turned into pairs that stay inside."""

import csv
import itertools
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path, PurePosixPath

from mde_dist.packing.sources.keys import unique_keys
from mde_dist.packing.sources.pairs import Pair
from mde_dist.packing.sources.rows import Row, read_rows
from mde_dist.packing.sources.tree import MAX_FILE, FolderTree, Tree, Unreadable, is_named
from mde_dist.utils.errors import UserError

_FIRST_ROWS = 8  # with which the folder is sought that paths start from


@dataclass(frozen=True)
class FileList:
    """The rows of a list, by columns, and where it came from."""

    path: Path
    rows: list[Row]
    lines: Sequence[int] = ()
    """Number of each row's line in the file."""
    base: str = ""
    """Folder below which the paths lie, see `locate_list`."""
    cut: str = ""
    """Beginning of the paths, of another machine, that was left out."""

    def numbered_rows(self) -> Iterator[tuple[str, Row]]:
        """Each row, and where it stands, in words."""
        numbers = self.lines or itertools.count(1)
        return ((f"{self.path}, row {number}", row) for number, row in zip(numbers, self.rows, strict=False))

    def notes(self, split: str) -> list[str]:
        """A line about what was left out of the paths."""
        return [f"{split}: the paths in {self.path.name} are taken without {self.cut} in front"] if self.cut else []


def find_list(tree: Tree, names: Iterable[str], bases: Sequence[str], given: Path | None = None) -> FileList | None:
    """The list `given`, or else the first of `names` that is there; None where none is.

    `bases`: as of `locate_list`. Raises UserError, also where the first is a link that leads nowhere.
    """
    if given is not None:
        return _parsed(tree, given, _unpacked(given, _read(FolderTree(given.parent), given.name)), bases)
    found = next((name for name in names if is_named(tree, name)), None)
    return None if found is None else _parsed(tree, tree.root / found, _read(tree, found), bases)


def _parsed(tree: Tree, path: Path, data: bytes, bases: Sequence[str]) -> FileList:
    folders = _Bases(tree, bases)
    try:
        rows = read_rows(data, cache(lambda path: _find(folders, [path], len(_parts(path))) is not None))
    except UnicodeError as error:
        raise UserError(f"{path}: not a readable list of files ({error}); save it as UTF-8") from None
    except csv.Error as error:
        raise UserError(f"{path}: not a readable list of files ({error})") from None
    if not rows:
        raise UserError(f"{path} lists no pairs")
    return FileList(path, [row for _, row in rows], [number for number, _ in rows])


def _read(tree: Tree, name: str) -> bytes:
    try:
        return tree.read(name)
    except Unreadable as error:
        raise UserError(f"{tree.root / name}: not a readable list of files ({error})") from None


def _unpacked(path: Path, data: bytes) -> bytes:
    """The bytes of a .gz, up to the limit of a file; others as they are."""
    if path.suffix != ".gz":
        return data
    stream = zlib.decompressobj(wbits=31)  # 31 = with the head of gzip
    try:
        plain = stream.decompress(data, MAX_FILE)
        if stream.unconsumed_tail:
            raise UserError(f"{path}: more than {MAX_FILE:,} bytes when unpacked; that is no list of files")
        if not stream.eof:
            raise zlib.error("it is cut off")
    except zlib.error as error:
        raise UserError(f"{path}: not a readable list of files ({error})") from None
    return plain


def locate_list(tree: Tree, listed: FileList, bases: Sequence[str]) -> FileList:
    """The list with its `base`: one of `bases`, in the tree or in one of its folders, below which the paths lie.

    Where no path is there as it stands, but all begin alike, as those of another machine do, the smallest part of that
    beginning is left out with which a file is found. The base is the first one where none is.
    """
    starts = [_common([row[column] for row in listed.rows if len(row) > column]) for column in range(3)]
    firsts = [[row[column] for row in listed.rows[:_FIRST_ROWS] if len(row) > column] for column in range(3)]
    base, cut = _find(_Bases(tree, bases), firsts[0], len(starts[0])) or (bases[0], 0)
    cuts = [cut]
    for paths, start in zip(firsts[1:], starts[1:], strict=True):
        cuts.append((_find(_Bases(tree, [base], deeper=False), paths, len(start)) or (base, 0))[1])
    if not any(cuts):
        return replace(listed, base=base)
    tails = ("/".join(_parts(path)[cut:]) for row in listed.rows for path, cut in zip(row, cuts, strict=False))
    rows = [[*itertools.islice(tails, len(row[:3])), *row[3:]] for row in listed.rows]
    left_out = dict.fromkeys("/".join(start[:cut]) for start, cut in zip(starts, cuts, strict=True) if cut)
    return replace(listed, rows=rows, base=base, cut=" and ".join(left_out))


class _Bases:
    """Folders of a tree from which paths may start: those named, and `deeper` the same in each folder of the tree."""

    def __init__(self, tree: Tree, bases: Sequence[str], deeper: bool = True):
        self._tree, self._bases, self._deeper = tree, bases, deeper

    @cached_property
    def _inner(self) -> list[str]:
        folders = self._tree.folders("") if self._deeper else []
        return [str(PurePosixPath(folder, base)) for folder in folders for base in self._bases]

    def of(self, path: str, cut: int = 0) -> str | None:
        """The one below which a path is a file without its first `cut` folders; None where it is below none."""
        parts = _parts(path)[cut:]
        if not parts or ".." in parts:
            return None
        every = itertools.chain(self._bases, () if cut else self._inner)  # not all for all: a disk is asked each time
        return next((base for base in every if is_named(self._tree, str(PurePosixPath(base, *parts)))), None)


def _find(bases: _Bases, paths: Sequence[str], most: int) -> tuple[str, int] | None:
    """The base of the first path that is there, and of how many folders, at most `most`, it is shortened for that."""
    tries = ((bases.of(path, cut), cut) for cut in range(most + 1) for path in paths)
    return next(((base, cut) for base, cut in tries if base is not None), None)


def _parts(path: str) -> list[str]:
    return [part for part in path.split("/") if part not in ("", ".")]


def _common(paths: Sequence[str]) -> list[str]:
    """The folders with which all paths begin."""
    folders = [_parts(path)[:-1] for path in paths]
    first, last = min(folders, default=[]), max(folders, default=[])
    return [one for one, _ in itertools.takewhile(lambda both: both[0] == both[1], zip(first, last, strict=False))]


def pairs_of(listed: FileList, folder: str, drop: str, image: int = 0, depth: int = 1) -> tuple[Pair, ...]:
    """Rows with an image's and a depth map's path below `folder` -> pairs; keys are the image paths less `drop`.

    `image` and `depth` say which columns. Raises UserError with the row.
    """
    names, locations, pairs = [], [], []
    for where, row in listed.numbered_rows():
        if len(row) <= max(image, depth) or not (row[image] and row[depth]):
            raise UserError(f"{where}: expected an image and a depth path, found {' '.join(row)!r}")
        picture, target = (inside(row[column], folder, where) for column in (image, depth))
        name = picture.relative_to(drop) if drop and picture.is_relative_to(drop) else picture
        names.append(name)
        locations.append(f"{where}: {picture}")
        pairs.append(Pair("", name.parent.name.removesuffix("_out"), str(picture), str(target)))
    keys = unique_keys(names, locations)
    return tuple(replace(pair, key=key) for pair, key in zip(pairs, keys, strict=True))


def inside(path: str, folder: str, where: str) -> PurePosixPath:
    """A listed path below `folder`, with or without a leading '/'. Raises UserError where it leads out of it."""
    whole = PurePosixPath(folder, path.lstrip("/"))
    if ".." in whole.parts or not path.strip("/.") or re.match("[A-Za-z]:/", path) or "\0" in path:
        raise UserError(f"{where}: {path!r} leaves the data set's folder, which --source names")
    return whole
