"""h5: one file per pair, as sparse-to-dense and FastDepth have it, or the tars of these files from Hugging Face.

{train,val}/SCENE/00001.h5 with `rgb` uint8 (3, height, width) and `depth` float32 metres (height, width). Its `val` is
the official test set, and our split `test`.
"""

import io
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from mde_dist.data.depth import DepthScale, to_millimetres
from mde_dist.data.tar import members
from mde_dist.packing.sources.choice import SourceOptions
from mde_dist.packing.sources.hdf5 import FLOAT_METRES, array, check_depth, check_image, import_h5py, opened
from mde_dist.packing.sources.keys import unique_keys
from mde_dist.packing.sources.lists import FileList, find_list, inside, locate_list
from mde_dist.packing.sources.pairs import BadPair, Pair, RawPair, Source, Split
from mde_dist.packing.sources.tree import FolderTree, Tree, Unreadable, check_size, whole_folders
from mde_dist.utils.errors import UserError
from mde_dist.utils.folders import left_behind

EXPECTED = "train/SCENE/00001.h5 and val/official/00001.h5, or train-000000.tar and val-000000.tar of such files"
_NAMES = {"train": "train", "test": "val"}  # our split -> its name here
_HOME = "nyudepth_hdf5"
_BASES = ("", _HOME, f"data/{_HOME}")
_VAL = "val is the official test set: split test"


def h5(tree: Tree, choice: SourceOptions) -> Source | None:
    found = {split: _listed(tree, split, choice) or _walked(tree, split) for split in _NAMES}
    lists = {split: listed for split, listed in found.items() if listed}
    if not lists:
        return _tars(tree, choice)
    import_h5py()
    choice.forbid_kind("h5")
    splits, notes = {}, [_VAL] if "test" in lists else []
    for split, listed in lists.items():
        listed = locate_list(tree, listed, _BASES)
        notes += listed.notes(split)
        splits[split] = Split(_pairs(listed, listed.base, _NAMES[split]), choice.scale(split, FLOAT_METRES))
    return Source("h5", tree.root, splits, H5Reader(tree), tuple(notes))


def _listed(tree: Tree, split: str, choice: SourceOptions) -> FileList | None:
    """A list of one column, its rows without what leads to the folder of `train` and `val`."""
    name = f"{_HOME}_{_NAMES[split]}.csv"
    names = [str(PurePosixPath(base, name)) for base in ("", "data", _HOME, f"data/{_HOME}")]
    listed = find_list(tree, names, _BASES, choice.lists.get(split))
    if listed is None or not listed.rows[0][0].endswith(".h5"):
        return None  # or a list of another layout
    return replace(listed, rows=[[row[0].rpartition(f"{_HOME}/")[2], *row[1:]] for row in listed.rows])


def _walked(tree: Tree, split: str) -> FileList | None:
    name = _NAMES[split]
    for base in _BASES:
        above = "/".join(filter(None, (base, name)))
        rows = [
            [f"{name}/{scene}/{file}"]
            for scene in whole_folders(tree, above)
            for file in tree.files(f"{above}/{scene}")
            if file.endswith(".h5")
        ]
        if rows:
            return FileList(tree.root / above, rows)
    return None


def _pairs(listed: FileList, base: str, drop: str) -> tuple[Pair, ...]:
    names, locations, pairs = [], [], []
    for where, row in listed.numbered_rows():
        if len(row) != 1 or not row[0].endswith(".h5"):
            raise UserError(f"{where}: expected the path of an .h5 file, found {' '.join(row)!r}")
        path = inside(row[0], base, where)
        names.append(_below(PurePosixPath(row[0].lstrip("/")), drop))
        locations.append(f"{where}: {path}")
        pairs.append(Pair("", path.parent.name, str(path), str(path)))
    keys = unique_keys(names, locations)
    return tuple(replace(pair, key=key) for pair, key in zip(pairs, keys, strict=True))


def _below(path: PurePosixPath, drop: str) -> PurePosixPath:
    return path.relative_to(drop) if path.is_relative_to(drop) else path


class H5Reader:
    """Reads pairs that are a file each."""

    def __init__(self, tree: Tree):
        self.tree = tree

    def read(self, pair: Pair, scale: DepthScale) -> RawPair:
        path = self.tree.root / pair.image
        try:
            return decode_h5(self.tree.read(pair.image), path, scale)
        except Unreadable as error:
            raise BadPair(f"{path} cannot be read ({error})") from None

    def missing(self, pair: Pair) -> list[Path]:
        return [] if self.tree.is_file(pair.image) else [self.tree.root / pair.image]

    def stamp(self, pair: Pair) -> list[Any]:
        return self.tree.stamp(pair.image)


def decode_h5(data: bytes, path: Path, scale: DepthScale) -> RawPair:
    """The pair of one file's bytes. Raises BadPair with `path`."""
    with opened(io.BytesIO(data), path) as entries:
        rgb, depth = (array(entries, name, path) for name in ("rgb", "depth"))
        check_image(rgb, rgb.shape, path)
        stored = check_depth(depth, depth.shape, path, scale)
        image = np.ascontiguousarray(rgb[()].transpose(1, 2, 0))
        return RawPair(image, to_millimetres(depth[()], scale), None, "uint8 array", stored)


# --- the same files in tars ---


@dataclass(frozen=True)
class Member(Pair):
    """A pair that is a member of a tar; `image` and `depth` are both TAR/MEMBER."""

    tar: str
    offset: int
    """Offset of its payload, bytes."""
    bytes: int


def _tars(tree: Tree, choice: SourceOptions) -> Source | None:
    """train-000000.tar …, val-000000.tar … in the folder or in its `data`."""
    if not isinstance(tree, FolderTree):
        return None
    for folder in ("", "data"):
        names = [name for name in tree.files(folder) if re.fullmatch(r"(train|val|test)-\d+\.tar", name)]
        tars = [str(PurePosixPath(folder, name)) for name in names]
        if any(_holds_h5(tree.root / tar) for tar in tars):
            break
    else:
        return None
    import_h5py()
    choice.forbid_kind("h5")
    found: dict[str, list[tuple[PurePosixPath, Member]]] = {}
    for tar in tars:
        name = PurePosixPath(tar).name.split("-")[0]
        found.setdefault("train" if name == "train" else "test", []).extend(_members(tree, tar, name))
    splits = {}
    for split, named in found.items():
        if named:
            keys = unique_keys([name for name, _ in named], [str(tree.root / member.image) for _, member in named])
            pairs = tuple(replace(member, key=key) for (_, member), key in zip(named, keys, strict=True))
            splits[split] = Split(pairs, choice.scale(split, FLOAT_METRES))
    notes = (f"tars of .h5 files, in {tree.root / folder}", *([_VAL] if "test" in splits else []))
    return Source("h5", tree.root, splits, TarReader(tree), notes) if splits else None


def _holds_h5(path: Path) -> bool:
    try:
        first = next((info.name for info in members(path, []) if not left_behind(info.name)), "")
    except OSError:
        return False
    return first.endswith(".h5")


def _members(tree: FolderTree, tar: str, name: str) -> Iterator[tuple[PurePosixPath, Member]]:
    """The pairs of one tar, from its headers, without their keys; each with the path that its key is made of.

    Raises UserError where the tar is not whole.
    """
    problems: list[str] = []
    try:
        for info in members(tree.root / tar, problems):
            path = PurePosixPath(info.name.lstrip("./"))
            if path.suffix == ".h5" and not left_behind(info.name):
                shown = f"{tar}/{path}"
                member = Member("", path.parent.name, shown, shown, tar, info.offset_data, info.size)
                yield _below(path, name), member
    except OSError as error:
        raise UserError(f"{tree.root / tar}: cannot be read ({error.strerror or error})") from None
    if problems:
        raise UserError(f"{tree.root / tar}: {problems[0]}; download it again, or set it aside")


class TarReader:
    """Reads pairs that are members of tars, at the offsets that their index gives."""

    def __init__(self, tree: FolderTree):
        self.tree = tree

    def read(self, pair: Member, scale: DepthScale) -> RawPair:
        path = self.tree.root / pair.image
        try:
            check_size(pair.bytes)
            with (self.tree.root / pair.tar).open("rb") as file:
                data = os.pread(file.fileno(), pair.bytes, pair.offset)
        except (OSError, Unreadable) as error:
            raise BadPair(f"{path} cannot be read ({getattr(error, 'strerror', None) or error})") from None
        return decode_h5(data, path, scale)

    def missing(self, pair: Member) -> list[Path]:
        return [] if self.tree.is_file(pair.tar) else [self.tree.root / pair.tar]

    def stamp(self, pair: Member) -> list[Any]:
        return [pair.offset, pair.bytes, self.tree.stamp(pair.tar)]
