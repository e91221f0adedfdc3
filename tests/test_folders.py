"""Folders as all commands see them: what systems leave behind is left out, links are followed, and loops end."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from test_dead_links import MAKE
from test_predictions import Listed
from trees import (
    folder,
    h5_tars,
    jpeg_bytes,
    marigold,
    members,
    picture,
    sample_members,
    silent,
    write,
    write_tar,
    zipped,
)

from mde_dist.data.config import CacheOptions
from mde_dist.data.store import open_store
from mde_dist.evaluation.predictions import open_predictions
from mde_dist.inference.export_check import images_below
from mde_dist.inference.inputs import find_inputs
from mde_dist.packing.index_tars import index_tars
from mde_dist.packing.sources import open_source
from mde_dist.training.run_dir import RunDirectory
from mde_dist.utils.errors import UserError
from mde_dist.utils.folders import left_behind, list_below

NOTES = b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X        "  # as macOS keeps of a file on other systems' disks
FOLDERS = ("@eaDir", ".ipynb_checkpoints", "__MACOSX", "lost+found", "#recycle", "$RECYCLE.BIN", ".Spotlight-V100")
FILES = (".DS_Store", "Thumbs.db", "desktop.ini", "Icon\r")


def leave_behind(root: Path) -> None:
    """Add the files that systems and tools leave in and beside each folder and file of a tree."""
    for place in [root, *(path for path in root.rglob("*") if path.is_dir())]:
        files = [path for path in place.iterdir() if path.is_file()]
        for name in FILES:
            (place / name).write_bytes(NOTES)
        for path in files:
            path.with_name(f"._{path.name}").write_bytes(NOTES)
        for name in FOLDERS:
            (place / name).mkdir()
            for path in files:
                shutil.copy(path, place / name / path.name)
        (place / FOLDERS[0] / "SYNOPHOTO_THUMB_M.jpg").write_bytes(jpeg_bytes(picture(0)))


def names(folder: Path) -> list[str]:
    return [str(name) for _, name in find_inputs([folder], folder.parent / "results").entries]


@pytest.mark.parametrize("name", ["._a.png", ".a", "THUMBS.DB", "@eaDir/a.jpg", "a/__MACOSX/b", *FOLDERS, *FILES])
def test_what_is_left_behind(name: str) -> None:
    assert left_behind(name)


@pytest.mark.parametrize(
    "name", ["a.png", "./a.jpg", "../a", "a_.jpg", "depth/thumbs.db.png", "lost and found", "recycle"]
)
def test_what_is_not_left_behind(name: str) -> None:
    assert not left_behind(name)


@pytest.mark.parametrize("kept", ["only folder", "zip"])
@pytest.mark.parametrize("layout", [*MAKE, "h5 tars"])
def test_a_source_is_what_it_is_without_what_was_left_behind(tmp_path: Path, layout: str, kept: str) -> None:
    make: Callable[[Path], Path] = h5_tars if layout == "h5 tars" else MAKE[layout]
    if layout == "h5 tars" and kept == "zip":
        pytest.skip("tars of files are read in folders only")
    root = make(tmp_path / "above/tree").parent
    before = open_source(root)
    leave_behind(root)
    after = open_source(zipped(root, tmp_path / "tree.zip") if kept == "zip" else root)
    assert {name: split.pairs for name, split in after.splits.items()} == {
        name: split.pairs for name, split in before.splits.items()
    }
    assert len(after.notes) == len(before.notes)


def test_members_of_tars_of_h5_files_that_were_left_behind_are_none(tmp_path: Path) -> None:
    root = h5_tars(tmp_path)
    before = open_source(root).splits["train"].pairs
    for tar in (root / "data").iterdir():
        found = members(tar)
        write_tar(
            tar, [pair for name, data in found for pair in ((f"{Path(name).parent}/._x.h5", NOTES), (name, data))]
        )
    after = open_source(root).splits["train"].pairs
    assert [(pair.key, pair.image) for pair in after] == [(pair.key, pair.image) for pair in before]


def test_members_of_tars_that_were_left_behind_are_none(tmp_path: Path) -> None:
    whole = sample_members("a", 0)
    notes = [(f"{before}{name}", NOTES) for before in ("__MACOSX/", "._") for name, _ in whole]
    rest = sample_members("./.ipynb_checkpoints/a-checkpoint", 0)[:1]
    write_tar(tmp_path / "train-000000.tar", [*notes, *whole, *rest])
    shutil.copy(tmp_path / "train-000000.tar", tmp_path / "._train-000000.tar")
    (tmp_path / "._x.tar").write_bytes(NOTES)
    manifest, problems = index_tars(tmp_path, 1, silent, skip_bad=False, check=lambda split, median: None)
    assert [(split.samples, len(split.shards)) for split in manifest.splits.values()] == [(1, 1)]
    assert not problems


def test_notes_on_tars_are_no_tars(tmp_path: Path) -> None:
    (tmp_path / "._train-000000.tar").write_bytes(NOTES)
    with pytest.raises(UserError, match="--source"):  # it says how to pack, not to index what is there
        open_store(tmp_path, CacheOptions())


def test_images_and_predictions_are_those_without_what_was_left_behind(tmp_path: Path) -> None:
    root, samples = folder(tmp_path / "tree"), Listed(tuple(f"images/{number:04d}.jpg" for number in range(4)))
    leave_behind(root)
    assert names(root / "images") == ["0000", "0001", "0002", "0003"]
    assert [path.name for path in images_below(root / "images")] == ["0000.jpg", "0001.jpg", "0002.jpg", "0003.jpg"]
    for match in ("name", "order"):
        predictions, notes = open_predictions(root / "depth", samples, match)
        assert [Path(predictions.name(number)).name for number in range(4)] == [f"000{n}.png" for n in range(4)]
        assert len(notes) == 1


def test_a_hidden_image_is_said(tmp_path: Path) -> None:
    root = folder(tmp_path / "tree")
    shutil.copy(root / "images/0000.jpg", root / "images/.0009.jpg")
    leave_behind(root)
    for lines in (open_source(root).notes, find_inputs([root / "images"], tmp_path / "out").notes):
        (line,) = (line for line in lines if "hidden" in line)
        assert " 1 hidden" in line
    assert ".0009.jpg" in next(line for line in open_source(root).notes if "hidden" in line)


def test_a_folder_with_nothing_else_in_it_may_become_a_run(tmp_path: Path) -> None:
    for name in ("lost+found", ".DS_Store"):
        (tmp_path / name).mkdir()
    with RunDirectory(tmp_path, {}, "", is_main=True) as run:
        assert run.path == tmp_path


# --- links ---


@pytest.fixture
def linked(tmp_path: Path) -> Path:
    """A folder with pictures 2 and 10, those of another folder by a link, and links that lead round in circles."""
    root, far = tmp_path / "photos", tmp_path / "disk/album"
    for place, name in ((root, "10.png"), (root, "2.png"), (far / "deep", "1.png")):
        write(place / name, np.full((24, 32), 2000, np.uint16))
        write(place / name.replace("png", "jpg"), jpeg_bytes(picture(1)))
    (root / "album").symlink_to(far, target_is_directory=True)
    (root / "itself").symlink_to(root, target_is_directory=True)
    (far / "back").symlink_to(root, target_is_directory=True)
    (far / "deep/up").symlink_to("..", target_is_directory=True)
    return root


EACH_ONCE = ["2", "10", "album/deep/1"]


def test_linked_folders_are_followed_once_and_loops_end(linked: Path) -> None:
    files = [str(path.relative_to(linked).with_suffix("")) for path in list_below(linked).files]
    assert files[::2] == files[1::2] == EACH_ONCE
    assert names(linked) == EACH_ONCE
    assert [
        str(path.relative_to(linked).with_suffix("")) for path in images_below(linked) if path.suffix == ".jpg"
    ] == (EACH_ONCE)
    for match in ("name", "order"):
        predictions, _ = open_predictions(linked, Listed(("2.jpg", "10.jpg", "album/deep/1.jpg")), match)
        assert [str(Path(predictions.name(n)).relative_to(linked)) for n in range(3)] == [f"{n}.png" for n in EACH_ONCE]


def test_a_folder_that_is_linked_twice_is_there_twice_as_in_a_source(tmp_path: Path) -> None:
    root = marigold(tmp_path / "tree", test=0, lists=False)
    scene = next((root / "train").iterdir())
    (root / "train/another").symlink_to(scene.name, target_is_directory=True)
    pairs = {pair.image for pair in open_source(root).splits["train"].pairs}
    below = {str(path.relative_to(root)) for path in list_below(root).files if path.name.startswith("rgb_")}
    assert pairs == below
    assert sum(path.startswith("train/another/") for path in pairs) == 2


def test_of_predictions_in_a_folder_and_by_a_link_to_it_one_is_taken(tmp_path: Path) -> None:
    write(tmp_path / "predictions/run3/1.png", np.full((24, 32), 2000, np.uint16))
    (tmp_path / "predictions/latest").symlink_to("run3", target_is_directory=True)
    predictions, _ = open_predictions(tmp_path / "predictions", Listed(("a/1.jpg",)))
    assert len(predictions) == 1


def test_earlier_results_are_left_out_however_the_output_is_named(tmp_path: Path) -> None:
    write(tmp_path / "photos/1.jpg", jpeg_bytes(picture(1)))
    write(tmp_path / "photos/out/1_color.png", picture(1))
    (tmp_path / "link").symlink_to("photos/out", target_is_directory=True)
    for output in (tmp_path / "photos/out", tmp_path / "photos/../photos/out", tmp_path / "link"):
        assert [str(name) for _, name in find_inputs([tmp_path / "photos"], output).entries] == ["1"]


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is closed to root")
def test_a_closed_folder_is_named(tmp_path: Path) -> None:
    write(tmp_path / "p/1.png", np.full((24, 32), 2000, np.uint16))
    write(tmp_path / "p/closed/2.png", np.full((24, 32), 2000, np.uint16))
    (tmp_path / "p/closed").chmod(0)
    try:
        with pytest.raises(UserError, match="closed"):
            open_predictions(tmp_path / "p", Listed(("1.jpg",)))
        with pytest.raises(UserError, match="closed"):
            find_inputs([tmp_path / "p/closed"], tmp_path / "out")
    finally:
        (tmp_path / "p/closed").chmod(0o755)
