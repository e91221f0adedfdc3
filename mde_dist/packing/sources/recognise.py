"""Recognition of the layout of a folder, a ZIP or a file: each layout is asked, the first that knows it answers.

A layout is one function `(tree, choice) -> Source | None`; None means "this is not my layout".
"""

from collections.abc import Callable, Mapping
from pathlib import Path

from mde_dist.data.depth import DepthScale
from mde_dist.data.manifest import NAME as MANIFEST
from mde_dist.packing.sources import densedepth, folder, h5, labeled, listed
from mde_dist.packing.sources.choice import SourceOptions
from mde_dist.packing.sources.pairs import DepthMap, Source
from mde_dist.packing.sources.rendered import rooms
from mde_dist.packing.sources.tree import FolderTree, Tree, ZipTree
from mde_dist.utils.errors import UserError
from mde_dist.utils.io import leads_nowhere

Scales = Mapping[str, DepthScale]

LAYOUTS: dict[str, Callable[[Tree, SourceOptions], Source | None]] = {
    "densedepth": densedepth.densedepth,
    "bts": listed.bts,
    "h5": h5.h5,
    "labeled": labeled.labeled,
    "marigold": listed.marigold,
    "folder": folder.folder,
}
EXPECTED = {
    "densedepth": densedepth.EXPECTED,
    "bts": listed.EXPECTED_BTS,
    "h5": h5.EXPECTED,
    "labeled": labeled.EXPECTED,
    "marigold": listed.EXPECTED_MARIGOLD,
    "folder": folder.EXPECTED,
}


def open_source(
    root: Path,
    layout: str | None = None,
    scales: Scales | None = None,
    lists: Mapping[str, Path] | None = None,
    depth_map: DepthMap | None = None,
) -> Source:
    """Recognise the data set in `root`, a folder, a ZIP or the labelled .mat file; or take the layout named.

    `scales` overrule what the layout declares, by split; the key "" stands for every split. `lists` name files of
    pairs by split, `depth_map` the map where there are two. Raises UserError where nothing fits.
    """
    if layout == "rooms":
        if scales or lists or depth_map:
            raise UserError("--layout rooms is rendered, in metres: leave out --depth-scale, --list and --depth-map")
        return rooms()
    choice = SourceOptions(layout, scales or {}, lists or {}, depth_map)
    source = _find(root, choice)
    for split in choice.scales:
        if split and split not in source.splits:
            raise UserError(f"--depth-scale names split {split!r}; {root} has {', '.join(source.splits)}")
    for split, file in choice.lists.items():
        if split not in source.splits or source.layout in ("labeled", "folder"):
            raise UserError(f"--list {split}={file}: not a list of pairs as {root} ({source.layout}) has them")
    return source


def _find(root: Path, choice: SourceOptions) -> Source:
    if root.suffix == ".mat" and root.is_file() and choice.layout in (None, "labeled"):
        source = labeled.labeled(FolderTree(root.parent), choice, root.name)
        if source:
            return source
    names = [choice.layout] if choice.layout else list(LAYOUTS)
    for tree in _trees(root):
        for name in names:
            source = LAYOUTS[name](tree, choice)
            if source:
                return source
    dead = [name for name in tree.files("") if leads_nowhere(tree.root / name)]
    links = f" ({', '.join(dead[:3])}{' …' * (len(dead) > 3)} in it: links that lead nowhere)" if dead else ""
    raise UserError(
        f"--source {root} is not a data set that mde_dist knows{links}; it looked for "
        + "; ".join(f"{name}: {EXPECTED[name]}" for name in names)
    )


def _trees(root: Path) -> list[Tree]:
    """The tree in `root`, and what lies in its only folder, as archives have it. Raises UserError."""
    tree: Tree
    if root.is_dir():
        tree = FolderTree(root)
    elif root.exists():
        tree = ZipTree(root)
    else:
        what = "a link that leads nowhere" if leads_nowhere(root) else "no such folder"
        raise UserError(f"--source {root}: {what}")
    if tree.is_file(MANIFEST):
        raise UserError(f"--source {root} holds packed shards already: train on them with --data.shards {root}")
    only = tree.folders("")
    return [tree, tree.below(only[0])] if len(only) == 1 and not tree.files("") else [tree]
