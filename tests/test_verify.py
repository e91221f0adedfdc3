"""Shards that nobody vouches for: verified, repaired, indexed. What is only looked at is never changed, and a repair
that is cut off leaves the directory as it was.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import pickle
import re
import shutil
import sys
import tarfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image
from trees import (
    SIZE,
    bts,
    contents,
    depth_bytes,
    jpeg_bytes,
    members,
    millimetres,
    packed,
    picture,
    sample_members,
    silent,
    vouch,
    write_tar,
)
from warm import warm_run

from mde_dist.data.shards import ShardDataset, open_split
from mde_dist.packing import examine as examine_module
from mde_dist.packing import repair as repair_module
from mde_dist.packing.examine import validate_shard
from mde_dist.packing.index_tars import index_tars
from mde_dist.packing.pack import PackConfig
from mde_dist.packing.repair import repair
from mde_dist.packing.validate import verify
from mde_dist.shard import main
from mde_dist.utils.cli import run_command
from mde_dist.utils.errors import UserError

Pair = tuple[bytes, bytes]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 7 training pairs (3, 3, 1) and 4 of test (3, 1)."""
    base = tmp_path_factory.mktemp("verify")
    packed(bts(base / "tree", 7, 4), base / "shards")
    return base / "shards"


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def read(shards: ShardDataset, sample: int) -> Pair:
    image, depth = np.empty((*shards.size, 3), np.uint8), np.empty(shards.size, np.uint16)
    shards.read_into(sample, image, depth)
    return image.tobytes(), depth.tobytes()


def samples(directory: Path, split: str = "train") -> dict[str, tuple[Pair, dict[str, str]]]:
    """Key -> pair and record of every sample; all have to be whole, and keys differ."""
    with open_split(directory, split) as shards:
        found = {shards.key(sample): (read(shards, sample), shards.meta(sample)) for sample in range(len(shards))}
        assert len(found) == len(shards)
        return found


def damage(directory: Path, sample: int, split: str = "train", member: str = "image") -> str:
    """Flip a bit of a sample -> its key."""
    with open_split(directory, split) as shards:
        key, path = shards.key(sample), Path(shards.file_of(sample))
    row = np.load(directory / manifest_of(directory)["splits"][split]["index"]["name"])[sample]
    data = bytearray(path.read_bytes())
    data[int(row[f"{member}_offset"]) + 20] ^= 1
    path.write_bytes(data)
    return key


def manifest_of(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "manifest.json").read_text())


def bare(directory: Path) -> Path:
    """Take away all but the tars."""
    for path in directory.iterdir():
        if path.suffix != ".tar":
            path.unlink()
    return directory


def accept(split: str, median: float) -> None:
    """Any median depth is right."""


def command(capfd: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """The command's own entry in this process -> exit code, stdout, stderr."""
    capfd.readouterr()
    before, sys.argv = sys.argv, ["shard", *map(str, arguments)]
    try:
        run_command(main)
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    finally:
        sys.argv = before
    return code, *capfd.readouterr()


def one_line(said: str) -> str:
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert "Traceback" not in said
    return said


# --- the commands, as processes of their own ---


def test_verify_and_repair_as_a_user_runs_them(copy: Path) -> None:
    key = damage(copy, 4)
    before = contents(copy)
    found = warm_run("shard", verify=copy)
    assert found.returncode == 1
    assert found.stderr == ""
    lines = [line for line in found.stdout.splitlines() if not line.startswith("verifying: ")]  # said where it is slow
    assert lines[0] == f"{copy}/train-000001.tar, key {key}: image fails its checksum"
    assert lines[1].strip() == f"{copy}: 1 problem; 10 of 11 samples are whole"
    assert f"python -m mde_dist.shard --repair {copy}" in lines[2]
    assert contents(copy) == before
    mended = warm_run("shard", repair=copy)
    assert mended.returncode == 0, mended.stderr
    assert mended.stderr == ""
    assert f"what was damaged is in {copy}/quarantine" in mended.stdout
    assert re.search(r"│\s*train\s*│\s*6\s*│", mended.stdout)
    assert "cannot be continued" in mended.stdout
    assert key not in samples(copy)


# --- verify ---


def test_a_whole_directory_is_whole_and_left_alone(whole: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = contents(whole)
    told: list[tuple[int, int]] = []
    verdict = verify(whole, 2, lambda *counts: told.append(counts))
    assert (verdict.problems, verdict.broken) == ([], set())
    assert [len(report.rows) for report in verdict.reports["train"]] == [3, 3, 1]
    assert told[-1] == (11, 11)
    code, said, _ = command(capfd, "--verify", whole, "--workers", 1)
    assert code == 0
    lines = [line for line in said.splitlines() if not line.startswith("verifying: ")]  # said where it is slow
    assert lines[0] == f"{whole}: 11 samples in 5 shards, all whole"
    assert lines[1:] == [f"next: accelerate launch -m mde_dist.train --data.shards {whole}"]
    code, said, _ = command(capfd, "--repair", whole, "--workers", 1)
    assert code == 0
    assert "all whole" in said
    assert contents(whole) == before


def test_progress_reaches_the_total_whatever_is_damaged(copy: Path) -> None:
    damage(copy, 0)
    os.truncate(copy / "train-000001.tar", 3000)
    (copy / "test-000000.tar").unlink()
    told: list[tuple[int, int]] = []
    verify(copy, 1, lambda *counts: told.append(counts))
    assert told[-1] == (11, 11)


def several(directory: Path) -> list[str]:
    """Damage of many kinds -> what each problem has to say."""
    keys = [damage(directory, 0), damage(directory, 4, member="depth"), damage(directory, 2, "test")]
    os.truncate(directory / "train-000001.tar", (directory / "train-000001.tar").stat().st_size - 1024 - 512)
    (directory / "train-000002.tar").unlink()
    data = (directory / "test.index.npy").read_bytes()
    (directory / "test.index.npy").write_bytes(data[:-1])
    (directory / "train.mean.blosc").unlink()
    return [
        f"train-000000.tar, key {keys[0]}: image fails its checksum",
        f"train-000001.tar, key {keys[1]}: depth fails its checksum",
        "train-000002.tar: No such file",
        "test.index.npy: not the index",
        "train.mean.blosc: No such file",
    ]


def test_several_problems_are_all_named_the_same_for_any_workers(copy: Path) -> None:
    wanted = several(copy)
    verdicts = [verify(copy, workers, silent) for workers in (1, 2)]
    for words in wanted:
        assert sum(words in problem for problem in verdicts[0].problems) == 1, words
    assert verdicts[0].broken == {"train", "test"}
    assert verdicts[0].problems == verdicts[1].problems
    for split in ("train", "test"):
        one, two = (verdict.reports[split] for verdict in verdicts)
        assert [(r.path, r.problems, r.keys, r.bytes, r.sha256) for r in one] == [
            (r.path, r.problems, r.keys, r.bytes, r.sha256) for r in two
        ]
        assert all((a.rows == b.rows).all() for a, b in zip(one, two, strict=True))


def test_many_problems_are_listed_up_to_twenty_and_counted(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    packed(bts(tmp_path / "tree", 30, 1), tmp_path / "shards", PackConfig(samples_per_shard=30))
    for sample in range(25):
        damage(tmp_path / "shards", sample)
    code, said, error = command(capfd, "--verify", tmp_path / "shards", "--workers", 1)
    assert (code, error) == (1, "")
    assert said.count("fails its checksum") == 20
    assert "and 5 more" in said
    assert "25 problems; 6 of 31 samples are whole" in said


@pytest.mark.parametrize("what", ["median", "holes"])
def test_statistics_that_are_not_those_of_the_samples_are_found(copy: Path, what: str) -> None:
    manifest = manifest_of(copy)
    manifest["splits"]["train"]["depth"][what] += 0.001
    (copy / "manifest.json").write_text(json.dumps(manifest))
    before = samples(copy)
    verdict = verify(copy, 1, silent)
    assert [p for p in verdict.problems if "depth statistics of split train" in p] == verdict.problems != []
    repair(copy, verdict)
    assert verify(copy, 1, silent).problems == []
    assert samples(copy) == before


def test_a_hash_of_the_manifest_that_is_wrong_is_found(copy: Path) -> None:
    """Every sample is whole: somebody wrote the manifest by hand."""
    manifest = manifest_of(copy)
    manifest["splits"]["train"]["shards"][1]["sha256"] = "0" * 64
    (copy / "manifest.json").write_text(json.dumps(manifest))
    before = samples(copy)
    verdict = verify(copy, 1, silent)
    assert len(verdict.problems) == 1
    assert re.search(r"train-000001\.tar: sha256 \w{64}, the manifest says 0{64}", verdict.problems[0])
    repair(copy, verdict)
    assert verify(copy, 1, silent).problems == []
    assert samples(copy) == before


@pytest.mark.parametrize("kind", ["folder", "fifo"])
def test_a_shard_that_is_no_file_is_a_problem_not_a_hang(copy: Path, kind: str) -> None:
    path = copy / "train-000001.tar"
    path.unlink()
    path.mkdir() if kind == "folder" else os.mkfifo(path)
    problems: list[str] = []
    thread = threading.Thread(
        target=lambda: problems.extend(validate_shard(path, "blosc", SIZE, None).problems), daemon=True
    )
    thread.start()
    thread.join(3)
    hangs = thread.is_alive()
    while thread.is_alive():  # let it go, so that none is left behind
        with contextlib.suppress(OSError):
            os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
        thread.join(0.01)
    assert not hangs
    assert len(problems) == 1
    assert str(path) in problems[0]


def test_a_directory_without_a_manifest_says_how_to_index(
    copy: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (copy / "manifest.json").unlink()
    for directory in (copy, tmp_path / "nowhere"):
        for option in ("--verify", "--repair"):
            code, _, error = command(capfd, option, directory)
            assert code == 2
            assert "manifest.json" in one_line(error)
            assert (f"--index {directory}" if directory == copy else f"--output {directory}") in error


def test_only_one_thing_is_done_at_once(copy: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code, _, error = command(capfd, "--verify", copy, "--index", copy)
    assert code == 2
    assert "not --verify and --index" in one_line(error)


# --- repair ---


def test_a_repair_leaves_the_other_split_and_the_whole_shards_untouched(copy: Path) -> None:
    damage(copy, 4)
    before, good = contents(copy), samples(copy, "test")
    old = manifest_of(copy)
    old_bytes = (copy / "manifest.json").read_bytes()
    damaged_tar = (copy / "train-000001.tar").read_bytes()
    repaired = repair(copy, verify(copy, 1, silent))
    after = contents(copy)
    assert set(after) == {
        *("manifest.json", "test-000000.tar", "test-000001.tar", "test.index.npy", "test.mean.blosc"),
        *("train-000000.tar", "train-000001-r1.tar", "train-000002.tar", "train-r1.index.npy", "train-r1.mean.blosc"),
        *(f"quarantine/{name}" for name in ("manifest-r1.json", "train-000001.tar", "train.index.npy")),
        "quarantine/train.mean.blosc",
    }
    for name in before:
        if name.startswith("test") or name in ("train-000000.tar", "train-000002.tar"):
            assert after[name] == before[name]
    assert (copy / "quarantine/manifest-r1.json").read_bytes() == old_bytes
    assert (copy / "quarantine/train-000001.tar").read_bytes() == damaged_tar
    new = manifest_of(copy)
    assert new["splits"]["test"] == old["splits"]["test"]
    assert new["source"] == old["source"]
    for name in ("depth_scale", "reencoded_images", "skipped"):  # where it came from is not forgotten
        assert new["splits"]["train"][name] == old["splits"]["train"][name]
    assert repaired.raw == new
    assert samples(copy, "test") == good


def test_repair_keeps_what_is_whole_byte_for_byte(copy: Path) -> None:
    before = samples(copy)
    raw = {name: data for tar in copy.glob("train*.tar") for name, data in members(tar)}
    key = damage(copy, 4)
    repair(copy, verify(copy, 2, silent))
    before.pop(key)
    assert samples(copy) == before
    now = {name: data for tar in copy.glob("train*.tar") for name, data in members(tar)}
    assert now == {name: data for name, data in raw.items() if not name.startswith(f"{key}.")}


def test_a_second_repair_is_the_second_revision(copy: Path) -> None:
    keys = [damage(copy, 4)]
    repair(copy, verify(copy, 1, silent))
    keys.append(damage(copy, 3))  # in the shard that was written by the first repair
    repair(copy, verify(copy, 1, silent))
    names = {path.name for path in copy.iterdir()}
    assert {"train-000001-r2.tar", "train-r2.index.npy", "train-r2.mean.blosc"} <= names
    assert not [name for name in names if "-r1" in name]
    quarantined = {path.name for path in (copy / "quarantine").iterdir()}
    assert quarantined == {
        *("manifest-r1.json", "train-000001.tar", "train.index.npy", "train.mean.blosc"),
        *("manifest-r2.json", "train-000001-r1.tar", "train-r1.index.npy", "train-r1.mean.blosc"),
    }
    assert verify(copy, 1, silent).problems == []
    assert len(samples(copy)) == 5
    assert not set(keys) & set(samples(copy))


def test_a_shard_of_which_nothing_is_whole_is_left_out(copy: Path) -> None:
    (copy / "train-000001.tar").write_bytes(b"")
    repair(copy, verify(copy, 1, silent))
    assert [shard["name"] for shard in manifest_of(copy)["splits"]["train"]["shards"]] == [
        "train-000000.tar",
        "train-000002.tar",
    ]
    assert len(samples(copy)) == 4
    assert verify(copy, 1, silent).problems == []


def test_nothing_left_of_a_split_is_one_line_and_changes_nothing(copy: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for sample in range(4):
        damage(copy, sample, "test")
    before = contents(copy)
    code, _, error = command(capfd, "--repair", copy, "--workers", 1)
    assert code == 2
    assert "no sample of split test is whole" in one_line(error)
    assert contents(copy) == before


def test_nothing_left_of_one_split_changes_nothing_of_another_that_could_be_repaired(
    whole: Path, tmp_path: Path
) -> None:
    for lost in ("train", "test"):
        copy = Path(shutil.copytree(whole, tmp_path / lost))
        for split, count in (("train", 7), ("test", 4)):
            for sample in range(count if split == lost else 1):
                damage(copy, sample, split)
        before = contents(copy)
        verdict = verify(copy, 1, silent)
        with pytest.raises(UserError, match=f"no sample of split {lost} is whole"):
            repair(copy, verdict)
        assert contents(copy) == before


class Cut(Exception):
    """The power went."""


def cut_off(monkeypatch: pytest.MonkeyPatch, target: object, name: str, call: int) -> None:
    """Let the `call`-th call of a function end it all."""
    original, calls = getattr(target, name), 0

    def wrapper(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            raise Cut
        return original(*arguments, **options)

    monkeypatch.setattr(target, name, wrapper)


@pytest.mark.parametrize(
    ("target", "name", "call"),
    [
        (repair_module, "_rewrite", 2),
        (examine_module, "write_split", 1),
        (repair_module, "write_atomic", 1),
        (repair_module, "write_manifest", 1),
        (Path, "replace", 1),  # every file that takes its name
        (Path, "replace", 3),
        (Path, "replace", 5),
        (Path, "rename", 1),  # what moves to quarantine
        (Path, "rename", 3),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_repair_that_is_cut_off_can_be_done_again(
    copy: Path, monkeypatch: pytest.MonkeyPatch, target: object, name: str, call: int
) -> None:
    keys = {damage(copy, 0), damage(copy, 4)}
    expected = {key: it for key, it in samples_but(copy, keys).items()}
    before = contents(copy)
    verdict = verify(copy, 1, silent)
    with monkeypatch.context() as patch:
        cut_off(patch, target, name, call)
        with pytest.raises(Cut):
            repair(copy, verdict)
    after = contents(copy)
    again = verify(copy, 1, silent)
    if again.problems:  # as it was before, but for new files that nobody names
        assert {file: after[file] for file in before} == before
        assert samples_but(copy, keys) == expected
        repair(copy, again)
    assert verify(copy, 1, silent).problems == []
    assert samples(copy) == expected
    kept = {sha for file, sha in contents(copy).items() if file.startswith("quarantine/")} | set(
        contents(copy).values()
    )
    assert {before["train-000000.tar"], before["train-000001.tar"], before["manifest.json"]} <= kept


def samples_but(directory: Path, keys: set[str]) -> dict[str, tuple[Pair, dict[str, str]]]:
    with open_split(directory, "train") as shards:
        every = {shards.key(sample): sample for sample in range(len(shards))}
        return {key: (read(shards, it), shards.meta(it)) for key, it in every.items() if key not in keys}


def test_what_is_repaired_is_read_by_plain_webdataset(copy: Path) -> None:
    key = damage(copy, 4)
    repair(copy, verify(copy, 1, silent))
    urls = [str(copy / shard["name"]) for shard in manifest_of(copy)["splits"]["train"]["shards"]]
    found = {sample["__key__"]: sample for sample in webdataset.WebDataset(urls, shardshuffle=False)}
    assert len(found) == 6
    assert key not in found
    for sample in found.values():
        number = int(json.loads(sample["json"])["source"][-9:-4])
        assert sample["jpg"] == jpeg_bytes(picture(number))
        assert sample["depth.blosc"] == depth_bytes(millimetres(number, holes=0.3))


# --- index ---


def test_an_index_made_of_the_packers_tars_is_the_packers_own(whole: Path, tmp_path: Path) -> None:
    directory = bare(Path(shutil.copytree(whole, tmp_path / "tars")))
    before = contents(directory)
    made, problems = index_tars(directory, 2, silent, False, accept)
    assert problems == []
    after = contents(directory)
    assert {name: after[name] for name in before} == before
    own = contents(whole)
    for name in ("train.index.npy", "test.index.npy", "train.mean.blosc", "test.mean.blosc"):
        assert after[name] == own[name]
    old = manifest_of(whole)
    for split, said in made.raw["splits"].items():
        for what in ("samples", "shards", "index", "mean_map", "depth"):
            assert said[what] == old["splits"][split][what]
    assert (made.raw["codec"], made.raw["image_size"]) == (old["codec"], old["image_size"])
    for split in ("train", "test"):
        assert samples(directory, split) == samples(whole, split)
    assert verify(directory, 1, silent).problems == []


def test_the_index_command_says_what_it_made_and_what_to_do_next(copy: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code, said, error = command(capfd, "--index", bare(copy), "--workers", 1)
    assert (code, error) == (0, "")
    assert re.search(r"│\s*train\s*│\s*7\s*│\s*3\s*│", said)
    assert said.splitlines()[-1] == f"next: accelerate launch -m mde_dist.train --data.shards {copy}"


@pytest.mark.parametrize(
    "form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT], ids=["gnu", "pax", "ustar"]
)
@pytest.mark.parametrize(
    "key",
    [
        "{:04d}",
        "a/b/{:04d}",
        "./{:04d}",
        "some.folder/with.dots/{:04d}",
        "scène/küche_{:04d}",
        "long/" * 12 + "{:04d}",
        "d" * 60 + "/" + "e" * 26 + "{:04d}",  # .jpg just fits where .depth.blosc does not
        "d" * 60 + "/" + "e" * 31 + "{:04d}",
        "d" * 60 + "/" + "e" * 60 + "{:04d}",
    ],
    ids=["plain", "folders", "dot", "dots", "letters", "65", "91", "96", "125"],
)
def test_keys_as_other_tools_write_them(tmp_path: Path, key: str, form: int) -> None:
    content = [member for seed in range(4) for member in sample_members(key.format(seed), seed)]
    write_tar(tmp_path / "set-000000.tar", content, form)
    made, problems = index_tars(tmp_path, 1, silent, False, accept)
    assert (problems, made.splits["set"].samples) == ([], 4)
    assert verify(tmp_path, 1, silent).problems == []
    with open_split(tmp_path, "set") as shards:
        for seed in range(4):
            depth = np.frombuffer(read(shards, seed)[1], np.uint16).reshape(SIZE)
            assert np.array_equal(depth, millimetres(seed))
            assert shards.meta(seed) == {}
    data = bytearray((tmp_path / "set-000000.tar").read_bytes())
    data[int(np.load(tmp_path / "set.index.npy")[2]["image_offset"]) + 300] ^= 1
    (tmp_path / "set-000000.tar").write_bytes(data)
    verdict = verify(tmp_path, 1, silent)
    assert verdict.problems == [f"{tmp_path / 'set-000000.tar'}, key {key.format(2)}: image fails its checksum"]
    repair(tmp_path, verdict)
    assert verify(tmp_path, 1, silent).problems == []
    with open_split(tmp_path, "set") as shards:
        assert [read(shards, sample)[1] for sample in range(3)] == [millimetres(seed).tobytes() for seed in (0, 1, 3)]
    found = webdataset.WebDataset([str(tmp_path / "set-000000-r1.tar")], shardshuffle=False)
    assert [sample["__key__"] for sample in found] == [key.format(seed) for seed in (0, 1, 3)]


def test_tars_of_webdatasets_own_writer_with_members_that_are_not_ours(tmp_path: Path) -> None:
    with webdataset.ShardWriter(str(tmp_path / "nyu-%05d.tar"), maxcount=3, verbose=0) as writer:
        for seed in range(7):
            sample = {"__key__": f"{seed:05d}", "jpg": jpeg_bytes(picture(seed)), "cls": seed, "caption.txt": "a room"}
            sample |= {"depth.png": depth_bytes(millimetres(seed), "png"), "json": {"scene": f"s{seed}"}}
            sample |= {"pickle": pickle.dumps(Trap(tmp_path / "ran"))}
            writer.write(sample)
    made, problems = index_tars(tmp_path, 1, silent, False, accept)
    assert (problems, made.codec, list(made.splits)) == ([], "png", ["nyu"])
    with open_split(tmp_path, "nyu") as shards:
        assert len(shards) == 7
        for seed in range(7):
            assert read(shards, seed)[1] == millimetres(seed).tobytes()
            assert shards.meta(seed) == {"scene": f"s{seed}"}
    assert verify(tmp_path, 1, silent).problems == []
    assert not (tmp_path / "ran").exists()


class Trap:
    """Leaves a trace where it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_no_pickle_is_ever_loaded(copy: Path, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    with (copy / "train.index.npy").open("wb") as file:
        np.save(file, np.array([Trap(ran)] * 7, dtype=object), allow_pickle=True)
    manifest = manifest_of(copy)
    data = (copy / "train.index.npy").read_bytes()
    manifest["splits"]["train"]["index"].update(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    (copy / "manifest.json").write_text(json.dumps(manifest))
    ran.unlink(missing_ok=True)
    verdict = verify(copy, 1, silent)
    assert any("train.index.npy" in problem for problem in verdict.problems)
    repair(copy, verdict)
    assert verify(copy, 1, silent).problems == []
    assert not ran.exists()


def test_an_archive_of_arrays_in_place_of_the_index_is_a_problem(copy: Path) -> None:
    """Even where the manifest names it."""
    rows = np.load(copy / "train.index.npy")
    with (copy / "train.index.npy").open("wb") as file:
        np.savez(file, rows)
    data = (copy / "train.index.npy").read_bytes()
    manifest = manifest_of(copy)
    manifest["splits"]["train"]["index"].update(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    (copy / "manifest.json").write_text(json.dumps(manifest))
    assert any("train.index.npy" in problem for problem in verify(copy, 1, silent).problems)


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (["train-000000.tar", "train-000001.tar"], ["train"]),
        (["train-0.tar", "val_0.tar", "val_1.tar"], ["train", "val"]),
        (["000000.tar", "000001.tar"], ["train"]),
        (["nyu.tar"], ["nyu"]),
        (["nyu.v2-0000.tar"], ["nyu.v2"]),
        (["train-000000-r1.tar", "train-000001.tar"], ["train"]),
        (["my set-0.tar"], ["my set"]),
    ],
    ids=str,
)
def test_tars_of_one_name_before_their_number_are_a_split(tmp_path: Path, names: list[str], splits: list[str]) -> None:
    for number, name in enumerate(names):
        write_tar(tmp_path / name, sample_members(f"{number}", number))
    made, _ = index_tars(tmp_path, 1, silent, False, accept)
    assert list(made.splits) == splits
    assert sum(split.samples for split in made.splits.values()) == len(names)


def refused_index(directory: Path, capfd: pytest.CaptureFixture[str], *arguments: object) -> str:
    """One line, exit code 2, and nothing is written."""
    before = contents(directory)
    code, _, error = command(capfd, "--index", directory, "--workers", 1, *arguments)
    assert code == 2, error
    assert contents(directory) == before
    return one_line(error)


def test_index_refuses_a_manifest_that_is_there(copy: Path, capfd: pytest.CaptureFixture[str]) -> None:
    said = refused_index(copy, capfd)
    assert "manifest.json is there already" in said
    assert f"--verify {copy}" in said


def test_index_refuses_a_directory_without_tars(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert "no tar with samples" in refused_index(tmp_path, capfd)
    (tmp_path / "notes.txt").write_text("x")
    assert "no tar with samples" in refused_index(tmp_path, capfd)


def png_image(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture(seed)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("extensions", "words"),
    [
        (("png", "depth.blosc"), ["depth.blosc, png"]),
        (("jpg", "depth.npy"), ["depth.npy, jpg"]),
        (("jpg", "exr"), ["exr, jpg"]),
        (("rgb.jpg", "depth.png"), ["depth.png, rgb.jpg"]),
        (("cls",), ["cls"]),
    ],
)
def test_index_names_the_members_that_it_found_and_cannot_use(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], extensions: tuple[str, ...], words: list[str]
) -> None:
    payload = {"png": png_image(0), "jpg": jpeg_bytes(picture(0)), "depth.blosc": depth_bytes(millimetres(0))}
    write_tar(tmp_path / "t-0.tar", [(f"k.{extension}", payload.get(extension, b"x")) for extension in extensions])
    said = refused_index(tmp_path, capfd)
    for word in ["KEY.depth.blosc or KEY.depth.zst or KEY.depth.png", "pack from the source", *words]:
        assert word in said


def test_index_refuses_depth_of_two_codecs(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_tar(tmp_path / "t-0.tar", sample_members("a", 0) + sample_members("b", 1, "png"))
    assert "key b: " in refused_index(tmp_path, capfd)


def test_index_refuses_pictures_of_another_size_than_most(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    odd = sample_members("odd", 0, size=(32, 48))
    write_tar(tmp_path / "t-0.tar", odd + [m for i in range(3) for m in sample_members(f"{i}", i)])
    assert "key odd: " in refused_index(tmp_path, capfd)
    made, problems = index_tars(tmp_path, 1, silent, True, accept)
    assert (made.size, made.splits["t"].samples, len(problems)) == (SIZE, 3, 1)


def scaled(directory: Path, factor: float, name: str = "train-0.tar") -> Path:
    content = []
    for seed in range(3):
        depth = (millimetres(seed) * factor).astype(np.uint16)
        content += [(f"{seed}.depth.blosc", depth_bytes(depth)), (f"{seed}.jpg", jpeg_bytes(picture(seed)))]
    write_tar(directory / name, content)
    return directory


@pytest.mark.parametrize("factor", [10, 0.1])
def test_index_refuses_a_median_depth_that_is_not_of_a_room_unless_told(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], factor: float
) -> None:
    said = refused_index(scaled(tmp_path, factor), capfd)
    assert "split train: the median depth is" in said
    assert "--depth-scale train=0.001" in said
    for scale in ("0.0001", "train=0.01"):
        assert "tars are indexed as they are" in refused_index(tmp_path, capfd, "--depth-scale", scale)
    code, _, error = command(capfd, "--index", tmp_path, "--workers", 1, "--depth-scale", "train=0.001")
    assert (code, error) == (0, "")
    assert samples(tmp_path)["1"][0][1] == (millimetres(1) * factor).astype(np.uint16).tobytes()


def test_a_scale_for_all_or_for_another_split(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    scaled(scaled(tmp_path, 10), 10, "val-0.tar")
    assert "split val: " in refused_index(tmp_path, capfd, "--depth-scale", "train=0.001")
    assert command(capfd, "--index", tmp_path, "--workers", 1, "--depth-scale", "0.001")[0] == 0


def with_problems(directory: Path) -> Path:
    """Tars of which three of eight samples cannot be used."""
    content = [sample_members(f"{seed}", seed) for seed in range(8)]
    content[1] = content[1][:1]
    content[4] = [content[4][0], ("4.jpg", content[4][1][1][:400])]
    content[6] = [("6.depth.blosc", depth_bytes(np.zeros(SIZE, np.uint16))), content[6][1]]
    for number in range(2):
        write_tar(directory / f"t-{number}.tar", [m for sample in content[4 * number :][:4] for m in sample])
    return directory


def test_index_refuses_problems_unless_told_to_leave_them_out(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    said = refused_index(with_problems(tmp_path), capfd)
    assert re.search(r"t-0\.tar: key 1: has no image \(and 2 more\); .*--skip-bad", said)
    code, said, error = command(capfd, "--index", tmp_path, "--workers", 1, "--skip-bad")
    assert (code, error) == (0, "")
    assert "3 left out:" in said
    for words in ("key 1: has no image", "key 4: ", "key 6: depth has no valid pixel"):
        assert words in said
    assert len(manifest_of(tmp_path)["splits"]["t"]["skipped"]) == 3
    assert list(samples(tmp_path, "t")) == ["0", "2", "3", "5", "7"]


def test_what_was_left_out_when_indexing_is_no_problem_later(tmp_path: Path) -> None:
    """The index leaves it out and the manifest says so: every sample that it names is whole."""
    index_tars(with_problems(tmp_path), 1, silent, True, accept)
    assert verify(tmp_path, 1, silent).problems == []


def test_a_tar_without_samples_is_left_out(tmp_path: Path) -> None:
    write_tar(tmp_path / "t-0.tar", [m for i in range(3) for m in sample_members(f"{i}", i)])
    write_tar(tmp_path / "t-1.tar", [])
    made, _ = index_tars(tmp_path, 1, silent, True, accept)
    assert [shard.name for shard in made.splits["t"].shards] == ["t-0.tar"]


def test_a_split_of_tars_without_samples_is_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_tar(tmp_path / "train-0.tar", [m for i in range(3) for m in sample_members(f"{i}", i)])
    write_tar(tmp_path / "val-0.tar", [])
    for arguments in ([], ["--skip-bad"]):
        assert "split val" in refused_index(tmp_path, capfd, *arguments)


def test_a_tar_that_cannot_be_read_is_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_tar(tmp_path / "t-0.tar", sample_members("a", 0))
    (tmp_path / "t-1.tar").mkdir()
    assert "t-1.tar" in refused_index(tmp_path, capfd)
    (tmp_path / "t-1.tar").rmdir()
    (tmp_path / "t-1.tar").symlink_to(tmp_path / "nowhere")
    assert "t-1.tar" in refused_index(tmp_path, capfd)


@pytest.mark.parametrize("name", ["train (1)-0.tar", "~train-0.tar", "train#1-0.tar", "-train-0.tar"])
def test_a_tar_whose_name_no_manifest_may_hold_is_one_line_and_nothing_is_written(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str
) -> None:
    write_tar(tmp_path / name, sample_members("a", 0))
    assert name in refused_index(tmp_path, capfd)


def broken_once(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = manifest_of(directory)
    change(manifest)
    (directory / "manifest.json").write_text(json.dumps(manifest))


def test_an_old_or_damaged_manifest_can_be_moved_away_and_made_anew(
    copy: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """What the refusal advises works."""
    before = samples(copy)
    broken_once(copy, lambda manifest: manifest.update(version=1))
    code, _, error = command(capfd, "--verify", copy)
    assert code == 2
    assert f"--index {copy}" in one_line(error)
    (copy / "manifest.json").rename(copy / "manifest.old")
    assert command(capfd, "--index", copy, "--workers", 1)[0] == 0
    assert samples(copy) == before


def test_a_sample_that_somebody_else_vouches_for_is_looked_at_all_the_same(tmp_path: Path) -> None:
    """Checksums that agree say nothing about pictures."""
    write_tar(tmp_path / "t-0.tar", [m for i in range(3) for m in sample_members(f"{i}", i)] + [("x.jpg", b"x")])
    content = members(tmp_path / "t-0.tar")
    content[1] = content[1][0], content[1][1][:500]
    write_tar(tmp_path / "t-0.tar", content)
    vouch(tmp_path)
    problems = verify(tmp_path, 1, silent).problems
    assert any("t-0.tar, key 0: " in problem for problem in problems)
    assert any("t-0.tar: key x: has no depth" in problem for problem in problems)
