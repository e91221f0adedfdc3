"""A plain folder: images/ and depth/ with the same names, in the root (split `train`) or once in a folder per split.

Pairs are in natural order of their names, 2 before 10, as predictions are that are matched by their order.
"""

from itertools import islice

from mde_dist.data.depth import DepthScale
from mde_dist.data.images import IMAGE_SUFFIXES, UnreadableImage
from mde_dist.packing.sources.choice import SourceOptions
from mde_dist.packing.sources.lists import FileList, pairs_of
from mde_dist.packing.sources.pairs import Source, Split
from mde_dist.packing.sources.pictures import PictureReader, depth_bits
from mde_dist.packing.sources.tree import Tree, Unreadable, whole_folders
from mde_dist.utils.errors import UserError
from mde_dist.utils.io import natural_order

_TRIED = 16  # depth maps, until one can be read
EXPECTED = "images/NAME.* with depth/NAME.png, or one such folder per split"


def folder(tree: Tree, choice: SourceOptions) -> Source | None:
    whole = "images" in {*tree.folders(""), *tree.files("")}  # files: a link that leads nowhere is one
    bases = {"train": ""} if whole else {name: name for name in tree.folders("")}
    splits, notes = {}, []
    for split, base in bases.items():
        try:
            within_it = {*tree.folders(base), *tree.files(base)}
        except UserError as error:
            notes.append(f"{error}, and was left out")
            continue
        if not within_it & {"images", "depth"} or not {"images", "depth"} <= set(whole_folders(tree, base)):
            continue
        choice.forbid_kind("a plain folder")
        within = f"{base}/" if base else ""
        names = [name for name in tree.files(f"{within}images") if _is_image(name)]
        names.sort(key=natural_order)
        rows = [[f"{within}images/{name}", f"{within}depth/{name.rpartition('.')[0]}.png"] for name in names]
        if not rows:
            raise UserError(f"{tree.root / within / 'images'} holds no image ({', '.join(IMAGE_SUFFIXES)})")
        hidden = [name for name in tree.left_behind(f"{within}images") if _is_image(name) and name[:2] != "._"]
        if hidden:
            hidden_path = tree.root / within / "images" / hidden[0]
            notes.append(f"{split}: {len(hidden):,} hidden images, such as {hidden_path}, were left out")
        scale = choice.override(split) or _guess(tree, [row[1] for row in rows], split)
        pairs = pairs_of(FileList(tree.root / base, rows), "", f"{within}images")
        splits[split] = Split(pairs, scale)
    if not splits:
        return None
    whole_folders(tree, "")  # one that leads nowhere would be a split that is missed
    return Source("folder", tree.root, splits, PictureReader(tree), tuple(notes))


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES)


def _guess(tree: Tree, names: list[str], split: str) -> DepthScale:
    """The scale of a plain folder from the first depth map that can be read: 16 bits are nearly always millimetres, 8
    bits anything."""
    there = islice((name for name in names if tree.is_file(name)), _TRIED)
    name, bits = next(((name, bits) for name in there if (bits := _bits(tree, name))), (names[0], None))
    if bits is None:
        raise UserError(f"{tree.root / name}: missing or unreadable; every image needs a depth map of its name")
    if bits == 8:
        raise UserError(
            f"{tree.root / name} is 8-bit and a plain folder does not say what a step means; "
            f"give metres per step, for example --depth-scale {split}=0.0392157"
        )
    return DepthScale(1e-3, bits=16, reason="guessed: millimetres, because the files are 16-bit PNG")


def _bits(tree: Tree, name: str) -> int | None:
    try:
        return depth_bits(tree, name)
    except (Unreadable, UnreadableImage):
        return None
