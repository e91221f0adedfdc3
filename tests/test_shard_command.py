"""The shard command: what it says, and one line on stderr with exit code 2 for whatever a user can get wrong."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from commands import command, run
from trees import (
    SIZE,
    bts,
    contents,
    densedepth,
    eight_bit,
    folder,
    jpeg_bytes,
    millimetres,
    packed,
    packed_yet,
    picture,
    write,
)
from warm import warm_run

from mde_dist.data.shards import open_split
from mde_dist.shard import ShardConfig, main
from mde_dist.utils.cli import run_command
from mde_dist.utils.errors import UserError


def on_a_full_disk(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The command where no file can grow beyond 8 x 512 bytes, which stands for a full disk."""
    limited = ["/bin/sh", "-c", 'ulimit -f 8; exec "$@"', "sh", *command("shard", *arguments)]
    return subprocess.run(limited, capture_output=True, text=True, timeout=120)


def one_line(stderr: str) -> str:
    assert "Traceback" not in stderr
    assert stderr.startswith("error: ")
    assert stderr.endswith("\n")
    assert stderr.count("\n") == 1, stderr
    return stderr


def refused(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 2, done.stderr
    return one_line(done.stderr)


def refused_here(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The same through the command's own entry, without the seconds that a new process takes to import."""
    monkeypatch.setattr(sys, "argv", ["shard", *map(str, arguments)])
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        run_command(main)
    assert stop.value.code == 2
    return one_line(capfd.readouterr().err)


# --- processes of their own ---


def test_help_names_every_option_and_its_meaning() -> None:
    done = run("shard", "--help")
    assert done.returncode == 0
    assert done.stderr == ""
    words = " ".join(re.sub(r"[│╭╮╰╯─]", " ", done.stdout).split())
    for field in dataclasses.fields(ShardConfig):
        assert f"--{field.name.replace('_', '-')}" in words
    assert "The bytes do not depend on it" in words  # the docstrings are the help


def test_embedded_rooms_from_nothing_to_shards_with_a_table_and_the_next_command(tmp_path: Path) -> None:
    done = warm_run("shard", "--layout", "rooms", "--limit", 3, "--output", "my/shards", "--workers", 2, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    manifest = json.loads((tmp_path / "my/shards/manifest.json").read_text())
    for split, said in manifest["splits"].items():
        line = next(line for line in done.stdout.splitlines() if re.search(rf"│\s*{split}\s*│", line))
        cells = [cell.strip() for cell in line.strip("│").split("│")]
        assert cells[1:3] == ["3", "1"]
        assert cells[4].split() == [f"{said['depth'][what]:.3f}" for what in ("min", "median", "mean", "max")]
        assert 0.5 < said["depth"]["median"] < 8
        assert cells[5] == f"{said['depth']['holes']:.1%}"
    assert "6 pairs in" in done.stdout
    where = tmp_path / "my/shards"  # whole, so that it can be pasted in another folder, too
    assert done.stdout.splitlines()[-1] == f"next: accelerate launch -m mde_dist.train --data.shards {where}"
    assert [path.name for path in (tmp_path / "my").iterdir()] == ["shards"]
    with open_split(tmp_path / "my/shards", "test") as shards:
        assert len(shards) == 3


def test_a_bad_pair_that_turns_up_while_packing_is_one_line(tmp_path: Path) -> None:
    """It is met in a worker process, which must not speak for itself."""
    root = bts(tmp_path / "tree", 6, 3)
    bad = root / "sync/basement_0001a/sync_depth_00002.png"
    bad.write_bytes(bad.read_bytes()[:200])
    done = warm_run("shard", "--source", root, "--output", tmp_path / "shards")
    said = refused(done)
    assert str(bad) in said
    assert "--skip-bad" in said
    assert not packed_yet(tmp_path / "shards")


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    done = on_a_full_disk("--source", bts(tmp_path / "tree"), "--output", tmp_path / "shards")
    said = refused(done)
    assert "File too large" in said
    assert not (tmp_path / "shards").exists()


def test_a_disk_that_does_not_take_a_repair_is_one_line_and_changes_nothing(tmp_path: Path) -> None:
    directory = tmp_path / "shards"
    packed(bts(tmp_path / "tree"), directory)
    tar = directory / "train-000000.tar"
    data = bytearray(tar.read_bytes())
    data[700] ^= 1
    tar.write_bytes(data)
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    said = refused(on_a_full_disk("--repair", directory))
    assert f"{directory}: cannot be written (File too large)" in said
    after = {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}
    assert after == before


# --- the same entry, in this process ---


def tree(root: Path, kind: str) -> Path:
    if kind == "folder8":
        write(root / "images/a.jpg", jpeg_bytes(picture(0)))
        write(root / "depth/a.png", eight_bit(0))
    elif kind == "tenths":
        write(root / "images/a.jpg", jpeg_bytes(picture(0)))
        write(root / "depth/a.png", millimetres(0) * 10)
    elif kind == "mixed":
        folder(folder(root, count=3), count=1, first=3, size=(32, 32))
    elif kind == "nothing":
        root.mkdir()
    else:
        {"bts": bts, "dense": densedepth, "folder": folder}[kind](root)
    return root


@pytest.mark.parametrize(
    ("kind", "arguments", "words"),
    [
        ("nothing", [], ["is not a data set", "densedepth", "bts", "folder"]),
        ("bts", ["--layout", "densedepth"], ["is not a data set", "nyu2_train.csv"]),
        ("bts", ["--layout", "kitti"], ["kitti", "densedepth"]),
        ("bts", ["--layuot", "bts"], ["--layuot"]),
        ("bts", ["--workers", "0"], ["--workers 0", "at least 1"]),
        ("bts", ["--workers", "two"], ["two"]),
        ("bts", ["--workers", "1000000"], ["--workers 1000000", "at most 1024"]),
        ("bts", ["--samples-per-shard", "0"], ["--samples-per-shard 0", "at least 1"]),
        ("bts", ["--limit", "-1"], ["--limit -1", "at least 1"]),
        ("bts", ["--jpeg-quality", "101"], ["--jpeg-quality 101", "1 to 100"]),
        ("bts", ["--jpeg-quality", "0"], ["--jpeg-quality 0", "1 to 100"]),
        ("bts", ["--size", "24"], ["24", "HEIGHTxWIDTH"]),
        ("bts", ["--size", "0x32"], ["0x32", "HEIGHTxWIDTH"]),
        ("bts", ["--size", "24x99999"], ["24x99999"]),
        ("bts", ["--depth-codec", "lerc"], ["lerc", "zst"]),
        ("bts", ["--depth-scale", "train=much"], ["train=much", "SPLIT=METRES"]),
        ("bts", ["--depth-scale", "0"], ["--depth-scale 0", "SPLIT=METRES"]),
        ("bts", ["--depth-scale", "nan"], ["--depth-scale nan"]),
        ("bts", ["--depth-scale", "train=-0.001"], ["train=-0.001"]),
        ("bts", ["--depth-scale", "val=0.001"], ["'val'", "train, test"]),
        ("folder8", [], ["8-bit", "--depth-scale train="]),
        ("tenths", [], ["median depth is 2", "--depth-scale train=VALUE"]),
        ("mixed", [], ["32x32", "24x32", "--size"]),
    ],
)
def test_a_mistake_is_one_line_with_exit_code_2_and_nothing_is_written(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    kind: str,
    arguments: list[str],
    words: list[str],
) -> None:
    root = tree(tmp_path / "tree", kind)
    before = contents(root)
    said = refused_here(monkeypatch, capfd, "--source", root, "--output", tmp_path / "shards", *arguments)
    for word in words:
        assert word in said
    assert not (tmp_path / "shards").exists()
    assert contents(root) == before


def test_mistakes_that_need_no_tree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "shards"
    assert "--output" in refused_here(monkeypatch, capfd, "--layout", "rooms")
    assert "--source DIR is missing" in refused_here(monkeypatch, capfd, "--output", output)
    said = refused_here(monkeypatch, capfd, "--source", tmp_path / "nowhere", "--output", output)
    assert f"--source {tmp_path / 'nowhere'}: no such folder" in said
    (tmp_path / "file").write_text("x")
    said = refused_here(monkeypatch, capfd, "--source", bts(tmp_path / "tree"), "--output", tmp_path / "file/shards")
    assert "cannot write" in said
    assert not output.exists()


def test_debug_shows_the_traceback_of_the_mistake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["--source", str(tmp_path / "nowhere"), "--output", str(tmp_path / "shards"), "--debug"]
    monkeypatch.setattr(sys, "argv", ["shard", *arguments])
    with pytest.raises(UserError, match="no such folder"):  # which ends in a traceback
        run_command(main)


def test_output_may_be_the_empty_directory_one_stands_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    try:
        main(["--source", str(bts(tmp_path / "tree")), "--output", ".", "--workers", "1"])
    except UserError:
        return  # refusing it in words would do as well
    assert (tmp_path / "here/manifest.json").is_file()


def test_a_missing_file_is_named_with_how_many_lack_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    root = densedepth(tmp_path / "tree", 5, 3)
    gone = [root / f"data/nyu2_train/basement_0001a_out/{i}.jpg" for i in (1, 5)]
    for path in gone:
        path.unlink()
    said = refused_here(monkeypatch, capfd, "--source", root, "--output", tmp_path / "shards")
    assert f"{gone[0]} is missing" in said
    assert "2 of 5" in said
    assert not list(tmp_path.glob("*shards*"))


@pytest.mark.parametrize("what", ["shards", "file", "visible"])
def test_an_output_that_is_not_empty_is_refused_and_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], what: str
) -> None:
    root, output = bts(tmp_path / "tree"), tmp_path / "out"
    if what == "shards":
        main(["--source", str(root), "--output", str(output), "--workers", "1"])
    elif what == "file":
        output.write_text("mine")
    else:
        write(output / "notes.txt", b"mine")
    before = contents(tmp_path)
    said = refused_here(monkeypatch, capfd, "--source", root, "--output", output)
    assert f"--output {output} is there already" in said
    assert contents(tmp_path) == before


def test_an_output_that_is_empty_or_deep_down_is_accepted(tmp_path: Path) -> None:
    root = bts(tmp_path / "tree")
    (tmp_path / "empty").mkdir()
    for output in (tmp_path / "empty", tmp_path / "not/there/yet"):
        main(["--source", str(root), "--output", str(output), "--workers", "1"])
        assert (output / "manifest.json").is_file()
        assert [path.name for path in output.parent.iterdir() if path.name.startswith(".")] == []


def test_it_says_layout_scale_and_what_it_guessed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    main(["--source", str(densedepth(tmp_path / "dense")), "--output", str(tmp_path / "a"), "--workers", "1"])
    said = capfd.readouterr().out
    assert f"{tmp_path / 'dense'}: layout densedepth" in said
    train, test = (
        next(line for line in said.splitlines() if line.startswith(f"  {name}:")) for name in ("train", "test")
    )
    assert "4 pairs, 24x32, median 2." in train
    assert "8-bit" in train
    assert "3 pairs, 24x32, median 2." in test
    assert "16-bit millimetres, declared" in test
    main(["--source", str(folder(tmp_path / "plain")), "--output", str(tmp_path / "b"), "--workers", "1"])
    assert "guessed" in capfd.readouterr().out


def test_skipped_pairs_and_new_jpegs_are_counted_and_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    root = densedepth(tmp_path / "tree", 4, 3)
    gone, bad = root / "data/nyu2_test/00000_depth.png", root / "data/nyu2_test/00002_depth.png"
    gone.unlink()
    write(bad, np.zeros(SIZE, np.uint16))
    main(["--source", str(root), "--output", str(tmp_path / "out"), "--workers", "1", "--skip-bad"])
    said = capfd.readouterr().out
    assert "test: 2 pairs skipped:" in said
    assert f"{gone} is missing" in said
    assert f"{bad} has no valid pixel" in said
    assert "test: 1 images stored as new JPEG" in said
    assert "train: " not in said.split("┘")[-1]  # nothing to say of it after the table


def test_options_from_a_toml_file_are_overruled_by_the_command_line(tmp_path: Path) -> None:
    root = bts(tmp_path / "tree", 6, 3)
    file = tmp_path / "shard.toml"
    file.write_text(
        f'source = "{root}"\noutput = "{tmp_path / "one"}"\nsamples_per_shard = 2\nworkers = 1\n'
        'size = "12x16"\nskip_bad = true\ndepth_codec = "png"\n'
    )
    main(["--config", str(file)])
    main(["--config", str(file), "--output", str(tmp_path / "two"), "--samples-per-shard", "4", "--depth-codec", "zst"])
    one, two = (json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("one", "two"))
    assert (one["image_size"], one["codec"], len(one["splits"]["train"]["shards"])) == ([12, 16], "png", 3)
    assert (two["image_size"], two["codec"], len(two["splits"]["train"]["shards"])) == ([12, 16], "zst", 2)


def test_only_the_first_rank_of_a_node_speaks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["shard", "--source", os.fspath(tmp_path / "nowhere"), "--output", "x"])
    with pytest.raises(SystemExit) as stop:
        run_command(main)
    assert stop.value.code == 2
    assert capfd.readouterr().err == ""


def test_rooms_take_neither_a_source_nor_a_scale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for extra in (["--source", str(tmp_path)], ["--depth-scale", "0.001"]):
        said = refused_here(monkeypatch, capfd, "--layout", "rooms", "--output", tmp_path / "shards", *extra)
        assert "leave out --source and --depth-scale" in said
    assert not list(tmp_path.iterdir())
