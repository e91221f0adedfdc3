"""densedepth, also Kaggle's nyu_data: data/nyu2_{train,test}.csv with rows `image,depth`; as a folder or as the ZIP.

8-bit depth 0..10 m for training, 16-bit millimetres for test; both filled.
"""

from pathlib import PurePosixPath

from mde_dist.data.depth import DENSEDEPTH_8BIT, MILLIMETRES
from mde_dist.packing.sources.choice import SourceOptions
from mde_dist.packing.sources.lists import find_list, locate_list, pairs_of
from mde_dist.packing.sources.pairs import Source, Split
from mde_dist.packing.sources.pictures import PictureReader
from mde_dist.packing.sources.tree import FolderTree, Tree, is_named

EXPECTED = "data/nyu2_train.csv or data/nyu2_test.csv"


def densedepth(tree: Tree, choice: SourceOptions) -> Source | None:
    bases = [tree, tree.below("nyu_data")]
    if isinstance(tree, FolderTree) and tree.root.name == "data":
        bases.append(FolderTree(tree.root.parent))  # rows start above `data`
    has = [base for base in bases if any(is_named(base, f"data/nyu2_{split}.csv") for split in ("train", "test"))]
    if not has and not (choice.lists and choice.layout == "densedepth"):
        return None
    base, splits = has[0] if has else tree, {}
    notes: list[str] = []
    for split, declared in (("train", DENSEDEPTH_8BIT), ("test", MILLIMETRES)):
        listed = find_list(base, [f"data/nyu2_{split}.csv"], [""], choice.lists.get(split))
        if listed:
            choice.require_kind("filled", "densedepth")
            listed = locate_list(base, listed, [""])
            notes += listed.notes(split)
            pairs = pairs_of(listed, listed.base, str(PurePosixPath(listed.base, "data")))
            splits[split] = Split(pairs, choice.scale(split, declared), "filled")
    return Source("densedepth", base.root, splits, PictureReader(base), tuple(notes)) if splits else None
