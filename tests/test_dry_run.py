"""A dry run: all that was recognised, a picture, what would be refused, and nothing packed."""

from __future__ import annotations

import os
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from trees import bts, contents, densedepth, eight_bit, folder, h5, marigold, millimetres, write, zipped

from mde_dist.data.manifest import NAME
from mde_dist.shard import main
from mde_dist.utils.cli import run_command

NYUV2 = Path(os.environ.get("MDE_DIST_NYUV2", "/nonexistent"))
real = pytest.mark.skipif(not NYUV2.is_dir(), reason="MDE_DIST_NYUV2 names no folder")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory that one stands in."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def look(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], *arguments: object) -> tuple[str, str]:
    """Exit code 0: what it printed, ""; exit code 2: what it printed, its error."""
    monkeypatch.setattr(sys, "argv", ["shard", "--dry-run", *map(str, arguments)])
    capfd.readouterr()
    try:
        run_command(main)
    except SystemExit as stop:
        assert stop.code == 2
        out, error = capfd.readouterr()
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        return out, error
    out, error = capfd.readouterr()
    assert error == ""
    return out, error


def test_it_says_all_it_recognised_and_packs_nothing(
    tmp_path: Path, here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    root = densedepth(tmp_path / "tree")
    before = contents(root)
    said, _ = look(monkeypatch, capfd, "--source", root)
    lines = [line.strip() for line in said.splitlines()]
    assert lines[0] == f"{root}: layout densedepth"
    train, test = lines.index("train: 4 pairs: not a size that is known (densedepth has 50,688)"), 5
    assert lines[train + 1] == "image: 24x32, JPEG"
    assert lines[train + 2].startswith("depth: 8-bit PNG, filled; metres = (v + 0.5) * 0.0392157 (8-bit")
    assert lines[train + 3].startswith("depth: min 1.")
    assert "median 2." in lines[train + 3]
    assert lines[train + 3].endswith("holes 0.0% (from 4 pairs)")
    assert lines[test + 1] == "image: 24x32, PNG"
    assert lines[test + 2].startswith("depth: 16-bit PNG, filled; metres = v * 0.001 (16-bit millimetres, declared")
    assert lines[-2] == "preview: preview.png"
    assert lines[-1] == f"next: python -m mde_dist.shard --output {here}/shards/tree --source {root}"
    assert [path.name for path in here.iterdir()] == ["preview.png"]
    assert contents(root) == before


def test_the_command_it_names_packs(
    tmp_path: Path, here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    root = zipped(marigold(tmp_path / "tree"), tmp_path / "my source.zip")
    lists = [f"{split}={tmp_path / 'tree' / f'filename_list_{split}.txt'}" for split in ("train", "test")]
    said, _ = look(
        monkeypatch, capfd, "--source", root, "--list", *lists, "--depth-map", "filled", "--size", "12x16",
        "--limit", 2, "--depth-scale", "test=0.001", "--output", "my shards",
    )  # fmt: skip
    words = shlex.split(said.splitlines()[-1].removeprefix("next: "))
    assert words[:3] == ["python", "-m", "mde_dist.shard"]
    assert words[words.index("--list") + 1 :][:2] == lists
    assert not (here / "my shards").exists()
    main([*words[3:], "--workers", "1"])
    manifest = (here / "my shards" / NAME).read_text()
    assert '"depth_map": "filled"' in manifest
    assert '"samples": 2' in manifest


def test_the_picture_shows_eight_pairs_images_over_depth(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    shown = []
    monkeypatch.setattr(
        "mde_dist.packing.dry_run.draw_thumbnails", lambda path, thumbnails, title: shown.append(thumbnails)
    )
    for train, test, expected in ((10, 3, (5, 3)), (12, 12, (4, 4)), (2, 0, (2, 0))):
        look(monkeypatch, capfd, "--source", bts(tmp_path / f"{train}", train, test))
        titles = [thumbnail.title.split("\n")[0] for thumbnail in shown.pop()]
        assert (titles.count("train"), titles.count("test")) == expected
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    look(monkeypatch, capfd, "--source", tmp_path / "12", "--preview", tmp_path / "look.png")
    with Image.open(tmp_path / "look.png") as preview:
        assert preview.format == "PNG"
        assert preview.width > 800
        assert len(np.unique(np.asarray(preview.convert("RGB")).reshape(-1, 3), axis=0)) > 1000


def test_h5_val_is_called_test_and_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    said, _ = look(monkeypatch, capfd, "--source", h5(tmp_path / "tree"))
    assert "val is the official test set: split test" in said
    assert "image: 24x32, uint8 array" in said
    assert "depth: float32 array, as given; metres = v * 1 (float metres, declared by the layout)" in said
    assert re.search(r"holes ([789]|1[0123])\.\d% \(from 4 pairs\)", said)


def test_everything_that_packing_would_refuse_is_said_at_once(
    tmp_path: Path, here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    root = folder(tmp_path / "tree/train")
    folder(tmp_path / "tree/test", size=(32, 32))
    for i in range(4):
        write(root / f"depth/{i:04d}.png", millimetres(i) * 10)
    (root / "images/0001.jpg").write_bytes(b"\xff\xd8no image")
    (tmp_path / "tree/test/depth/0003.png").unlink()
    out, error = look(monkeypatch, capfd, "--source", tmp_path / "tree")
    assert "split train: the median depth is 2" in error
    also = [line for line in out.splitlines() if line.strip().startswith("also refused:")]
    assert len(also) == 5
    for line, words in zip(
        also,
        ("more than 3x", "0003.png is missing", "0003.png cannot be read", "0001.jpg is not a", "several sizes"),
        strict=True,
    ):
        assert words in line
    assert "warning: train: 1 of the 4 pairs tried cannot be used" in out
    assert "next:" not in out
    assert [path.name for path in here.iterdir()] == ["preview.png"]


def test_what_cannot_be_recognised_leaves_nothing_behind(
    tmp_path: Path, here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    root = bts(tmp_path / "tree")
    for path in root.glob("sync/*/*.png"):
        write(path, eight_bit(1))
    for arguments, words in (
        (["--source", tmp_path / "nowhere"], "no such folder"),
        (["--source", root], "is 8-bit, but"),
        (
            ["--source", root, "--depth-scale", "train=0.04", "--preview", tmp_path / "no/where.png"],
            "cannot be written",
        ),
        ([], "--source DIR is missing"),
        (["--source", root, "--verify", root], "name one thing to do, not --dry-run and --verify"),
    ):
        _, error = look(monkeypatch, capfd, *arguments)
        assert words in error
    assert list(here.iterdir()) == []


def test_a_preview_belongs_to_a_dry_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["shard", "--source", "x", "--output", "y", "--preview", "z.png"])
    with pytest.raises(SystemExit):
        run_command(main)
    assert "--preview z.png: it is the picture of a dry run" in capfd.readouterr().err


def test_shards_are_no_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    main(["--source", str(bts(tmp_path / "tree")), "--output", str(tmp_path / "shards"), "--workers", "1"])
    _, error = look(monkeypatch, capfd, "--source", tmp_path / "shards")
    assert "holds packed shards already" in error


@real
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("densedepth", ["795 of the 50,688 that densedepth has", "8-bit PNG, filled", "480x640, JPEG", "holes 0.0%"]),
        ("bts", ["202 pairs (the official test set has 654)", "holes 28.", "16-bit PNG"]),
    ],
)
def test_the_real_pairs(
    here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], name: str, words: list[str]
) -> None:
    said, _ = look(monkeypatch, capfd, "--source", NYUV2 / name)
    for word in words:
        assert word in said
    assert "warning" not in said
    with Image.open(here / "preview.png") as preview:
        assert preview.width > 700
