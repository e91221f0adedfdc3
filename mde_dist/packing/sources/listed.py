"""bts and marigold: a list of files per split, with a second depth map in the third column of some.

bts (also AdaBins, ZoeDepth, NeWCRFs): nyudepthv2_{train,test}_files_with_gt.txt, rows `image depth` and then nothing,
the focal length, or a path to the filled map. marigold: filename_list_{train,test}.txt, rows `rgb depth filled`, or no
list at all. 16-bit millimetres.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from mde_dist.data.depth import MILLIMETRES
from mde_dist.data.images import IMAGE_SUFFIXES
from mde_dist.packing.sources.choice import SourceOptions
from mde_dist.packing.sources.lists import FileList, find_list, locate_list, pairs_of
from mde_dist.packing.sources.pairs import AS_GIVEN, Source, Split
from mde_dist.packing.sources.pictures import PictureReader
from mde_dist.packing.sources.tree import Tree, is_named, whole_folders


@dataclass(frozen=True)
class _Kind:
    name: str
    names: tuple[str, ...]
    """Names of list files, `{}` for the split."""
    folders: tuple[str, ...]
    """Folders in which they may lie."""
    bases: Mapping[str, Sequence[str]]
    """Folders from which a split's paths may start; the first one where no file is found."""

    def bases_of(self, split: str) -> Sequence[str]:
        return self.bases.get(split, self.bases["train"])


_BTS = _Kind(
    "bts",
    ("nyudepthv2_{}_files_with_gt.txt", "nyudepthv2_{}_files_with_gt_dense.txt"),
    ("", "data_splits", "train_test_inputs"),
    {
        "train": ("sync", "", "nyu_depth_v2/sync", "train"),
        "test": ("official_splits/test", "", "nyu_depth_v2/official_splits/test", "official_splits", "test"),
    },
)
_MARIGOLD = _Kind(
    "marigold",
    ("filename_list_{}.txt",),
    ("", "data_split/nyu", "nyu"),
    dict.fromkeys(("train", "test"), ("", "nyu_labeled_extracted")),
)
EXPECTED_BTS = "nyudepthv2_train_files_with_gt.txt or nyudepthv2_test_files_with_gt.txt (or any name with --list)"
EXPECTED_MARIGOLD = "filename_list_train.txt, or train/SCENE/rgb_0003.png with depth_0003.png"


def bts(tree: Tree, choice: SourceOptions) -> Source | None:
    return _source(_BTS, tree, _lists(_BTS, tree, choice), choice)


def marigold(tree: Tree, choice: SourceOptions) -> Source | None:
    return _source(_MARIGOLD, tree, _lists(_MARIGOLD, tree, choice) or _walk(tree), choice)


def _lists(kind: _Kind, tree: Tree, choice: SourceOptions) -> dict[str, FileList]:
    """The list of each split: the one given, if its rows are of this kind, or the one that lies in the data set."""
    found = {}
    for split in ("train", "test", *sorted(set(choice.lists) - {"train", "test"})):
        names = [str(PurePosixPath(folder, name.format(split))) for folder in kind.folders for name in kind.names]
        listed = find_list(tree, names, kind.bases_of(split), choice.lists.get(split))
        if listed and (split not in choice.lists or choice.layout == kind.name or _is_of(listed, kind)):
            found[split] = listed
    return found


def _is_of(listed: FileList, kind: _Kind) -> bool:
    """Say whether a given list is of the kind: of marigold where the third column is a `filled` picture."""
    row = listed.rows[0]
    marigold = len(row) == 3 and PurePosixPath(row[2]).name.startswith("filled")
    pictures = PurePosixPath(row[0]).suffix.lower() in IMAGE_SUFFIXES
    return marigold if kind is _MARIGOLD else not marigold and (pictures or len(row) > 1)


def _source(kind: _Kind, tree: Tree, lists: Mapping[str, FileList], choice: SourceOptions) -> Source | None:
    if not lists:
        return None
    two = {split for split, listed in lists.items() if _has_filled(listed)}
    if not two:
        choice.forbid_kind(f"{kind.name} with these lists")
    splits, notes = {}, []
    for split, listed in lists.items():
        listed = locate_list(tree, listed, kind.bases_of(split))
        base = listed.base
        column = 2 if split in two and choice.depth_map == "filled" else 1
        pairs = pairs_of(listed, base, _drop(kind, base, split), depth=column)
        held = ("raw" if column == 1 else "filled") if split in two else AS_GIVEN
        splits[split] = Split(pairs, choice.scale(split, MILLIMETRES), held)
        if listed.path.suffix:
            notes.append(f"{split}: listed in {listed.path.name}, with paths below {base or tree.root}")
        notes += listed.notes(split)
    return Source(kind.name, tree.root, splits, PictureReader(tree), tuple(notes))


def _drop(kind: _Kind, base: str, split: str) -> str:
    """Path that all images of a split start with, and their keys do not need."""
    return str(PurePosixPath(base, split)) if kind is _MARIGOLD else base


def _has_filled(listed: FileList) -> bool:
    """Say whether the third column is a picture, not a focal length."""
    row = listed.rows[0]
    return len(row) > 2 and PurePosixPath(row[2]).suffix.lower() in IMAGE_SUFFIXES


def _walk(tree: Tree) -> dict[str, FileList]:
    """marigold's files without its lists: {train,test}/SCENE/rgb_0003.png."""
    found = {}
    for split in ("train", "test"):
        rows = []
        for scene in whole_folders(tree, split):
            for name in tree.files(f"{split}/{scene}"):
                if re.fullmatch(r"rgb_\d+\.png", name):
                    names = [name, *(name.replace("rgb_", what) for what in ("depth_", "filled_"))]
                    rows.append([f"{split}/{scene}/{name}" for name in names])
        if rows and is_named(tree, rows[0][1]):
            if not is_named(tree, rows[0][2]):
                rows = [row[:2] for row in rows]
            found[split] = FileList(tree.root / split, rows)
    return found
