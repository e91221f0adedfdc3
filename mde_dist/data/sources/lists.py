"""Lists of files: found in the data set or named by --list, read within limits, turned into pairs that stay inside."""

import csv
import itertools
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from ...errors import UserError
from .keys import unique_keys
from .pairs import Pair
from .tree import MAX_FILE, FolderTree, Tree, Unreadable, is_named

Row = list[str]
_FIRST_ROWS = 8  # with which the folder is sought that paths start from


@dataclass(frozen=True)
class FileList:
    """The rows of a list, by columns, and where it came from."""

    place: Path
    rows: list[Row]
    first: int = 1
    """Number of the first row in the file."""


def find_list(tree: Tree, names: Iterable[str], given: Path | None = None, comma: bool = False) -> FileList | None:
    """The list `given`, or else the first of `names` that is there; None where none is.

    Raises UserError, also where the first is a link that leads nowhere.
    """
    if given is not None:
        return parse_list(given, _unpacked(given, _read(FolderTree(given.parent), given.name)), comma)
    found = next((name for name in names if is_named(tree, name)), None)
    return None if found is None else parse_list(tree.root / found, _read(tree, found), comma)


def parse_list(place: Path, data: bytes, comma: bool = False) -> FileList:
    """Text -> rows: without the mark that some editors put first, with '/' as the separator of paths."""
    try:
        text = data.decode("utf-8-sig").replace("\\", "/")
        lines = text.splitlines()
        split = csv.reader(lines) if comma else (line.split() for line in lines)
        rows = [[column.strip() for column in row] for row in split if row]
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{place}: not a readable list of files ({error})") from None
    if not rows:
        raise UserError(f"{place} lists no pairs")
    return FileList(place, rows)


def _read(tree: Tree, name: str) -> bytes:
    try:
        return tree.read(name)
    except Unreadable as error:
        raise UserError(f"{tree.root / name}: not a readable list of files ({error})") from None


def _unpacked(place: Path, data: bytes) -> bytes:
    """The bytes of a .gz, up to the limit of a file; others as they are."""
    if place.suffix != ".gz":
        return data
    stream = zlib.decompressobj(wbits=31)  # 31 = with the head of gzip
    try:
        plain = stream.decompress(data, MAX_FILE)
        if stream.unconsumed_tail:
            raise UserError(f"{place}: more than {MAX_FILE:,} bytes when unpacked; that is no list of files")
        if not stream.eof:
            raise zlib.error("it is cut off")
    except zlib.error as error:
        raise UserError(f"{place}: not a readable list of files ({error})") from None
    return plain


def find_base(tree: Tree, listed: FileList, bases: Sequence[str], column: int = 0) -> str:
    """The folder below which the first rows' paths lie: one of `bases`, in the tree or in one of its folders.

    The first of `bases` where none of the paths is there.
    """
    deeper = (str(PurePosixPath(folder, base)) for folder in tree.folders("") for base in bases)
    for base in itertools.chain(bases, deeper):
        for row in listed.rows[:_FIRST_ROWS]:
            if len(row) > column and is_named(tree, str(PurePosixPath(base, row[column].lstrip("/")))):
                return base
    return bases[0]


def pairs_of(listed: FileList, folder: str, drop: str, image: int = 0, depth: int = 1) -> tuple[Pair, ...]:
    """Rows with an image's and a depth map's path below `folder` -> pairs; keys are the image paths less `drop`.

    `image` and `depth` say which columns. Raises UserError with the row.
    """
    names, places, pairs = [], [], []
    for number, row in enumerate(listed.rows, listed.first):
        where = f"{listed.place}, row {number}"
        if len(row) <= max(image, depth) or not (row[image] and row[depth]):
            raise UserError(f"{where}: expected an image and a depth path, found {' '.join(row)!r}")
        if number == 1 and not any("." in column or "/" in column for column in row):
            raise UserError(f"{where}: {','.join(row)!r} is a heading, not a pair; remove it")
        picture, target = (inside(row[column], folder, where) for column in (image, depth))
        name = picture.relative_to(drop) if drop and picture.is_relative_to(drop) else picture
        names.append(name)
        places.append(f"{where}: {picture}")
        pairs.append(Pair("", name.parent.name.removesuffix("_out"), str(picture), str(target)))
    keys = unique_keys(names, places)
    return tuple(replace(pair, key=key) for pair, key in zip(pairs, keys, strict=True))


def inside(path: str, folder: str, where: str) -> PurePosixPath:
    """A listed path below `folder`, with or without a leading '/'. Raises UserError where it leads out of it."""
    whole = PurePosixPath(folder, path.lstrip("/"))
    if ".." in whole.parts or not path.strip("/.") or ":" in path.lstrip("/").split("/")[0] or "\0" in path:
        raise UserError(f"{where}: {path!r} leaves the data set's folder")
    return whole
