"""Files that a data set names and nobody can read, as git-annex and moved disks leave them: each is named."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from trees import bts, densedepth, folder, h5, marigold, newcrfs, silent

from mde_dist.inference.images import Unreadable, read_image
from mde_dist.inference.inputs import find_inputs
from mde_dist.packing.pack import PackConfig, pack, plan
from mde_dist.packing.sources import Source, open_source
from mde_dist.utils.errors import UserError

NOWHERE = Path("/nowhere/at/all")
Make = Callable[[Path], Path]
MAKE: dict[str, Make] = {
    "folder": folder,
    "densedepth": lambda root: densedepth(root, test=0),
    "bts": lambda root: bts(root, test=0),
    "newcrfs": newcrfs,
    "marigold": lambda root: marigold(root, test=0),
    "marigold without lists": lambda root: marigold(root, test=0, lists=False),
    "h5": lambda root: h5(root, test=0),
}


def kill(path: Path) -> None:
    """A link that leads nowhere in place of a file or folder."""
    if path.is_dir():
        path.rename(path.with_name(".was"))
    else:
        path.unlink()
    path.symlink_to(NOWHERE)


def circle(path: Path) -> None:
    path.unlink()
    path.symlink_to(path)


def names_it(root: Path, path: Path, make: Callable[[], object] | None = None) -> None:
    with pytest.raises(UserError) as error:
        make() if make else open_source(root)
    assert path.name in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("end", [kill, circle])
@pytest.mark.parametrize("half", ["image", "depth"])
@pytest.mark.parametrize("place", [0, -1], ids=["first", "last"])
@pytest.mark.parametrize("layout", MAKE)
def test_a_file_that_cannot_be_reached_is_a_pair_that_is_named(
    tmp_path: Path, layout: str, place: int, half: str, end: Callable[[Path], None]
) -> None:
    root = MAKE[layout](tmp_path)
    before = open_source(root)
    pair = before.splits["train"].pairs[place]
    path = root / (pair.image if half == "image" else pair.depth)
    end(path)
    source = open_source(root)
    assert source.splits["train"].pairs == before.splits["train"].pairs
    names_it(root, path, lambda: plan(source, PackConfig()))
    _, missing = plan(source, PackConfig(skip_bad=True))
    (line,) = missing["train"]
    assert str(path) in line
    assert "a link that leads nowhere" in line


def test_such_pairs_are_left_out_where_they_may_be(tmp_path: Path) -> None:
    root = folder(tmp_path / "tree")
    (root / "depth/0000.png").write_bytes(b"damaged, and the first")
    kill(root / "images/0001.jpg")
    kill(root / "depth/0003.png")
    source = open_source(root)
    names_it(root, root / "images/0001.jpg", lambda: pack(source, tmp_path / "o", PackConfig(), 1, silent))
    manifest = pack(source, tmp_path / "o", PackConfig(skip_bad=True), 1, silent)
    assert manifest.splits["train"].samples == 1
    assert len(manifest.raw["splits"]["train"]["skipped"]) == 3


def both(root: Path) -> Path:
    folder(root / "train")
    folder(root / "test", first=9)
    return root


def marigold_files(root: Path) -> Path:
    return marigold(root, lists=False)


@pytest.mark.parametrize(
    ("make", "dead"),
    [
        (both, "test"),
        (both, "test/images"),
        (both, "test/depth"),
        (folder, "images"),
        (folder, "depth"),
        (densedepth, "data/nyu2_test.csv"),
        (densedepth, "data/nyu2_train.csv"),
        (bts, "nyudepthv2_train_files_with_gt.txt"),
        (lambda root: bts(root, test=0), "nyudepthv2_train_files_with_gt.txt"),
        (marigold, "filename_list_test.txt"),
        (marigold_files, "train/kitchen_0028b"),
        (h5, "train/kitchen_0028b"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_list_or_a_folder_that_cannot_be_reached_is_named(tmp_path: Path, make: Make, dead: str) -> None:
    root = make(tmp_path / "tree")
    kill(root / dead)
    names_it(root, root / dead)
    (tmp_path / "link").symlink_to(NOWHERE)
    names_it(tmp_path / "link", tmp_path / "link")


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is closed to root")
@pytest.mark.parametrize(("make", "closed"), [(both, "test"), (marigold_files, "train/kitchen_0028b")])
def test_a_folder_that_is_closed_is_named(tmp_path: Path, make: Make, closed: str) -> None:
    root = make(tmp_path)
    (root / closed).chmod(0)
    try:
        names_it(root, root / closed)
        entries = find_inputs([root], tmp_path / "out").entries
        with pytest.raises(Unreadable, match="cannot be read"):
            read_image(next(file for file, _ in entries if file == root / closed))
    finally:
        (root / closed).chmod(0o755)


def test_links_that_stand_for_no_pairs_are_in_nobodys_way(tmp_path: Path) -> None:
    def pairs(source: Source) -> int:
        return sum(len(split.pairs) for split in source.splits.values())

    for number, (make, places) in enumerate(((both, ("", "test/")), (folder, ("", "images/")), (h5, ("train/", "")))):
        root = make(tmp_path / str(number))
        count = pairs(open_source(root))
        for place in places:
            (root / place / "README.md").symlink_to(NOWHERE)
            (root / place / "LICENSE").symlink_to("../.git/annex/objects/x/y/MD5-s9--0/MD5-s9--0")
        assert pairs(open_source(root)) == count


@pytest.mark.parametrize(
    ("pointer", "whose"),
    [
        ("/annex/objects/SHA256E-s1048--0f.jpg\n", "git-annex"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0f\nsize 1048\n", "Git LFS"),
    ],
    ids=["annex", "lfs"],
)
def test_a_file_that_stands_for_another_says_so(tmp_path: Path, pointer: str, whose: str) -> None:
    root = folder(tmp_path / "tree")
    for name in ("images/0000.jpg", "depth/0001.png"):
        (root / name).write_text(pointer)
    manifest = pack(open_source(root), tmp_path / "o", PackConfig(skip_bad=True), 1, silent)
    skipped = sorted(manifest.raw["splits"]["train"]["skipped"])
    assert [line.count(whose) for line in skipped] == [1, 1]
    assert "depth/0001.png is not a readable depth map" in skipped[0]
    assert "images/0000.jpg is not a readable image" in skipped[1]
