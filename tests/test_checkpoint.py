"""Checkpoints are whole or not there, whatever happens while they are written."""

import errno
import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save
from torch import nn

from mde_dist.models.config import ModelConfig
from mde_dist.models.depth_model import create_pretrained_model
from mde_dist.models.weights import EMA, FORMAT, MODEL, OPTIMIZER, STATE, read_model, read_tensors, serialize_model
from mde_dist.training.checkpoint import (
    Checkpoint,
    load_checkpoint,
    load_newest,
    newest_checkpoint,
    open_model,
    save_checkpoint,
    to_cpu,
)
from mde_dist.training.state import State
from mde_dist.utils.errors import UserError

ABOUT = {"config": {"model.encoder": "resnet18"}, "size": [32, 32]}


def write(directory: Path, step: int, keep: int = 2, best: int | None = None, average: bool = False, **more) -> Path:
    tensors = {"w": torch.full((3,), float(step))}
    files = {name: serialize_model(tensors, ABOUT) for name in ((MODEL, EMA) if average else (MODEL,))}
    return save_checkpoint(directory, {**files, OPTIMIZER: save(tensors)}, record(step), keep, best, **more)


def record(step: int) -> dict:
    return {**vars(State(samples_seen=step * 10, step=step)), "config": {}, "identity": {}}


def newest(directory: Path) -> tuple[int | None, list[str]]:
    """Step of the newest whole checkpoint, and what is said about broken ones."""
    said: list[str] = []
    for item in load_newest(directory):
        if isinstance(item, Checkpoint):
            assert item.tensors[MODEL]["w"].eq(item.state.step).all()
            assert item.state.samples_seen == item.state.step * 10
            return item.state.step, said
        said.append(item)
    return None, said


def steps(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_the_newest_is_found_again(tmp_path):
    assert newest(tmp_path) == (None, [])
    for step in (1, 2, 10):
        write(tmp_path, step)
    assert newest(tmp_path) == (10, [])


def test_the_newest_k_and_the_best_stay(tmp_path):
    for step in range(1, 7):
        write(tmp_path, step, keep=2, best=2 if step >= 2 else None)
    assert steps(tmp_path) == ["step-00000002", "step-00000005", "step-00000006"]


def test_a_second_checkpoint_of_a_step_takes_the_place_of_the_first_only_once_it_stands(tmp_path):
    write(tmp_path, 3)
    first = load_checkpoint(tmp_path / "step-00000003")
    write(tmp_path, 3)
    assert newest(tmp_path) == (3, [])
    assert steps(tmp_path) == ["step-00000003.1"]
    assert first.state.step == 3


@pytest.mark.parametrize("name", [MODEL, OPTIMIZER, STATE])
@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "flipped"])
def test_any_damage_is_found_and_the_one_before_is_taken(tmp_path, name, damage):
    write(tmp_path, 1)
    victim = write(tmp_path, 2) / name
    data = victim.read_bytes()
    if damage == "missing":
        victim.unlink()
    elif damage == "empty":
        victim.write_bytes(b"")
    elif damage == "cut":
        victim.write_bytes(data[: len(data) // 2])
    else:  # in state.json a digit of a checksum
        place = data.index(b'sha256": "') + 10 if name == STATE else len(data) - 1
        victim.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
    step, said = newest(tmp_path)
    assert step == 1
    assert len(said) == 1
    assert "step-00000002 is not whole" in said[0]


class Crash(BaseException):
    """Stands for a process that dies: nothing catches it."""


CALLS = ("open", "fsync", "replace", "rename", "rmtree")


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("number", range(12))
def test_dying_at_any_call_leaves_a_whole_checkpoint(tmp_path, monkeypatch, call, number):
    write(tmp_path, 1)
    write(tmp_path, 2)
    owner, name = {
        "open": (Path, "open"),
        "fsync": (os, "fsync"),
        "replace": (Path, "replace"),
        "rename": (Path, "rename"),
        "rmtree": (shutil, "rmtree"),
    }[call]
    real, count = getattr(owner, name), 0

    def dying(*arguments, **options):
        nonlocal count
        count += 1
        if count == number + 1:
            raise Crash
        return real(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, dying)
        try:
            write(tmp_path, 3)
        except Crash:
            finished = False
        else:
            finished = True
    step, said = newest(tmp_path)
    assert said == []
    assert step in ((3,) if finished else (2, 3))
    write(tmp_path, 4)  # and the next one cleans up
    assert newest(tmp_path) == (4, [])
    assert len([name for name in steps(tmp_path) if name.startswith("step-")]) == 2


def test_a_disk_that_takes_nothing_is_one_line_and_the_old_ones_stay(tmp_path):
    write(tmp_path, 1)
    files = {MODEL: b"x" * 10, f"nowhere/{OPTIMIZER}": b""}
    with pytest.raises(UserError, match="cannot write the checkpoint"):
        save_checkpoint(tmp_path, files, record(2), 2, None)
    assert newest(tmp_path) == (1, [])


def test_an_old_checkpoint_that_cannot_be_removed_is_said_and_removed_later(tmp_path, monkeypatch):
    """As on NFS where a file of it is open: the others go, and the directory stays."""
    write(tmp_path, 1, keep=1)
    said = []

    def held(path, ignore_errors=False):
        (Path(path) / MODEL).unlink(missing_ok=True)
        if not ignore_errors:
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY))

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", held)
        for step in (2, 2, 3):
            write(tmp_path, step, keep=1, warn=said.append)
    assert len(said) == 3 and all("cannot be removed (Directory not empty)" in line for line in said)
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-00000003"]  # nobody takes a half for a whole one
    assert newest(tmp_path) == (3, [])
    write(tmp_path, 4, keep=1, warn=said.append)
    assert steps(tmp_path) == ["step-00000004"] and len(said) == 3


def test_of_an_old_checkpoint_on_another_disk_the_link_goes_and_the_rest_stays(tmp_path):
    run, other, said = tmp_path / "run", tmp_path / "other", []
    write(run, 1, keep=2, warn=said.append)
    (run / "step-00000001").rename(other)
    (run / "step-00000001").symlink_to(other)
    assert newest(run) == (1, [])
    (run / ".step-00000000-1.tmp").symlink_to(other)  # as an earlier version left them
    for step in (2, 3):
        write(run, step, keep=2, warn=said.append)
    assert sorted(path.name for path in run.iterdir()) == ["step-00000002", "step-00000003"]
    assert (other / MODEL).is_file() and not said


def test_nothing_but_safetensors_and_json_is_written(tmp_path):
    target = write(tmp_path, 1)
    assert {path.name for path in target.iterdir()} == {MODEL, OPTIMIZER, STATE}
    assert json.loads((target / STATE).read_text())["format"] == FORMAT


def test_a_model_file_carries_what_rebuilds_it(tmp_path):
    model = nn.BatchNorm2d(3)
    path = tmp_path / MODEL
    names = ("data.shards", "data.eval_shards", "data.train_split", "data.eval_split")
    config = {"model.encoder": "resnet18", **dict.fromkeys(names, "x")}
    path.write_bytes(serialize_model(to_cpu(model.state_dict()), {"config": config, "size": (240, 320)}))
    metadata, tensors = read_model(path)
    assert metadata["config"] == config
    assert metadata["size"] == [240, 320]
    assert tensors.keys() == model.state_dict().keys()


@pytest.mark.parametrize("content", [b"", b"garbage", b"\xff" * 64, save({"w": torch.zeros(1)})])
def test_what_is_no_model_is_refused_in_one_line(tmp_path, content):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"model\.safetensors"):
        read_model(path)


def test_a_model_is_named_by_a_file_its_folder_or_a_run(tmp_path):
    write(tmp_path / "checkpoints", 1)
    newest = write(tmp_path / "checkpoints", 2) / MODEL
    for run, file in ((tmp_path, None), (None, newest), (None, newest.parent)):
        path, metadata, tensors = open_model(run, file)
        assert path == newest and metadata["size"] == [32, 32] and tensors["w"].eq(2).all()
    for run, file in ((None, None), (tmp_path, Path("x"))):
        with pytest.raises(UserError, match="either"):
            open_model(run, file)
    with pytest.raises(UserError, match="no checkpoint"):
        open_model(tmp_path / "nowhere", None)


def flip(path: Path, place: int, bit: int = 1) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= bit
    path.write_bytes(data)


def test_weights_that_rot_are_named_and_the_whole_ones_before_are_taken(tmp_path, capsys):
    """In any file, and with the sums of a checkpoint of an older version, which has none of its own."""
    checkpoints = tmp_path / "checkpoints"
    whole = [write(checkpoints, step, keep=9, average=step == 3) for step in range(1, 6)]
    rewrite(whole[2])  # as an older version wrote it
    flip(whole[4] / MODEL, -1)
    flip(whole[3] / STATE, whole[3].joinpath(STATE).read_bytes().index(b'"samples_seen": 4') + 16)
    flip(whole[2] / EMA, -1)
    (whole[1] / MODEL).unlink()
    path, _, tensors = open_model(tmp_path, None)
    assert path == whole[0] / MODEL and tensors["w"].eq(1).all()
    said = capsys.readouterr().err.splitlines()
    named = [whole[4] / MODEL, whole[3], whole[2] / EMA, whole[1] / MODEL]
    assert len(said) == 4 and all(str(name) in line for name, line in zip(named, said, strict=True))
    for name in (named[0], named[2], whole[3] / MODEL):  # one that is named itself is refused
        with pytest.raises(UserError, match=f"{name} is damaged"):
            read_model(name)
        with pytest.raises(UserError, match=f"{name} is damaged"):  # as --model.weights, too
            create_pretrained_model(ModelConfig(weights=str(name)), seed=0)
    flip(whole[0] / OPTIMIZER, -1)  # of which only training has need
    assert open_model(tmp_path, None)[0] == path
    flip(path, -1)
    with pytest.raises(UserError, match="none of its 5 checkpoints is whole"):
        open_model(tmp_path, None)
    with pytest.raises(UserError, match="no whole checkpoint"):
        newest_checkpoint(checkpoints)
    assert "step-00000005 is not whole" in capsys.readouterr().err


def test_a_model_on_its_own_is_read_as_it_was_written_or_not_at_all(tmp_path):
    data = serialize_model({"w": torch.arange(6.0).view(2, 3), "b": torch.ones(2)}, ABOUT)
    assert data == serialize_model({"w": torch.arange(6.0).view(2, 3), "b": torch.ones(2)}, ABOUT)
    path = tmp_path / MODEL
    path.write_bytes(data)
    expected = read_model(path)
    assert expected[0].keys() == {"config", "size", "version"}
    refused = 0
    for place in range(0, len(data), 3):
        path.write_bytes(data)
        flip(path, place, 1 << place % 8)
        try:
            metadata, tensors = read_model(path)
        except UserError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            refused += 1
        else:  # the word "sha256" was struck: all else is as it was
            assert {name: metadata[name] for name in expected[0]} == expected[0]
            assert all(tensors[name].equal(value) for name, value in expected[1].items())
    assert refused >= len(data) // 3 - 2
    path.write_bytes(data)
    assert read_tensors(path)[1]["w"].equal(expected[1]["w"])
    older = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]["mde_dist"]
    path.write_bytes(save(expected[1], {"mde_dist": json.dumps(json.loads(older) | {"sha256": None})}))
    assert read_model(path)[1]["w"].equal(expected[1]["w"])  # of a version that knew no sums


def test_a_state_is_read_as_it_was_written_or_not_at_all(tmp_path):
    first = write(tmp_path, 1)
    state = first / STATE
    data = state.read_bytes()
    expected = load_checkpoint(first)
    refused = 0
    for place in range(0, len(data), 5):
        state.write_bytes(data)
        flip(state, place)
        try:
            found = load_checkpoint(first)
        except UserError:
            refused += 1
        else:
            assert (found.state, found.config, found.identity) == (expected.state, expected.config, expected.identity)
    assert refused >= len(data) // 5 - 2


# --- what is read may be anything ---


def rewrite(path: Path, **changes) -> None:
    """Change state.json of a checkpoint; `None` removes an entry. As an older version it has no sum of its own."""
    whole = json.loads((path / STATE).read_text()) | {"sha256": None} | changes
    (path / STATE).write_text(json.dumps({name: value for name, value in whole.items() if value is not None}))


@pytest.mark.parametrize(
    "changes",
    [
        {"samples_seen": -1},
        {"samples_seen": 2**70},
        {"samples_seen": "20"},
        {"samples_seen": True},
        {"samples_seen": 1.5},
        {"samples_seen": None},
        {"step": 3},
        {"evaluated": 21},
        {"replaced": [1]},
        {"skipped": {"a": 1}},
        {"best": {"abs_rel": float("nan"), "samples": 1, "step": 1}},
        {"best": {"abs_rel": 0.1}},
        {"best": "good"},
        {"config": ["a"]},
        {"identity": 1},
        {"format": "other"},
        {"version": 1},
        {"files": {}},
        {"files": []},
        {"files": {MODEL: {"bytes": 1, "sha256": "0"}}},
        {"files": {"../../../etc/passwd": {"bytes": 1, "sha256": "0"}}},
        {"files": {"/etc/hostname": {"bytes": 1, "sha256": "0"}}},
        {"files": {MODEL: "x", OPTIMIZER: "y"}},
    ],
    ids=str,
)
def test_a_hostile_state_is_refused_and_the_one_before_is_taken(tmp_path, changes):
    write(tmp_path, 1)
    rewrite(write(tmp_path, 2), **changes)
    step, said = newest(tmp_path)
    assert step == 1
    assert len(said) == 1
    assert "step-00000002 is not whole" in said[0]
    assert "\n" not in said[0]


@pytest.mark.parametrize(
    "content", [b"[" * 100_000, b"1", b"null", b"\xff\xfe", b" " * (2**24 + 1), b'{"a": ' * 50_000]
)
def test_a_state_that_is_no_table_or_has_no_end_is_refused(tmp_path, content):
    write(tmp_path, 1)
    (write(tmp_path, 2) / STATE).write_bytes(content)
    step, said = newest(tmp_path)
    assert (step, len(said)) == (1, 1)


def header(text: str, data: bytes = b"") -> bytes:
    return len(text).to_bytes(8, "little") + text.encode() + data


@pytest.mark.parametrize(
    "content",
    [
        (2**63).to_bytes(8, "little") + b"{}",
        header("{"),
        header('{"w": {"dtype": "F32", "shape": [1000000000000], "data_offsets": [0, 4000000000000]}}', b"1234"),
        header('{"w": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}', b"1234"),
        header('{"w": {"dtype": "PY", "shape": [1], "data_offsets": [0, 4]}}', b"1234"),
        b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00\x8c\x02os\x94\x8c\x06system\x94\x93\x94.",  # a pickle
    ],
)
def test_a_hostile_safetensors_file_with_the_right_checksum_is_refused(tmp_path, content):
    write(tmp_path, 1)
    victim = write(tmp_path, 2)
    (victim / OPTIMIZER).write_bytes(content)
    files = json.loads((victim / STATE).read_text())["files"]
    files[OPTIMIZER] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    rewrite(victim, files=files)
    step, said = newest(tmp_path)
    assert (step, len(said)) == (1, 1)


@pytest.mark.parametrize(
    "metadata",
    [
        "[]",
        "[" * 100_000,
        '{"config": {}}',
        '{"config": [], "size": [1, 1]}',
        '{"config": {}, "size": [1, 99999]}',
        '{"config": {}, "size": [true, 1]}',
        '{"config": {}, "size": 7}',
        '{"config": {"data.shards": {"a": 1}}, "size": [32, 32]}',
    ],
)
def test_a_model_that_says_something_impossible_of_itself_is_refused(tmp_path, metadata):
    path = tmp_path / MODEL
    path.write_bytes(save({"w": torch.zeros(1)}, {"mde_dist": metadata}))
    with pytest.raises(UserError, match="not a model of mde_dist"):
        read_model(path)


def test_what_a_writer_left_that_died_goes_with_the_next_checkpoint(tmp_path):
    write(tmp_path, 1)
    (tmp_path / ".step-00000007.tmp").mkdir()
    (tmp_path / ".step-00000007.tmp" / MODEL).write_bytes(b"x")
    write(tmp_path, 2)
    assert steps(tmp_path) == ["step-00000001", "step-00000002"]


def test_the_average_is_preferred_where_there_is_one(tmp_path):
    target = write(tmp_path / "checkpoints", 1, average=True)
    assert open_model(tmp_path, None)[0] == target / EMA
    write(tmp_path / "checkpoints", 2)
    assert open_model(tmp_path, None)[0].name == MODEL
