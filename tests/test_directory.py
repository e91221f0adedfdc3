"""The run directory: one writer, one identity."""

import errno
import os
import shutil
import subprocess
import sys

import pytest
from safetensors.torch import save
from torch import zeros

from mde_dist.models.weights import MODEL, OPTIMIZER
from mde_dist.training.checkpoint import save_checkpoint
from mde_dist.training.run_dir import RunDirectory, differences
from mde_dist.training.state import State
from mde_dist.utils.errors import UserError

HOLD = """
import sys, time
from pathlib import Path
from mde_dist.training.run_dir import RunDirectory
with RunDirectory(Path(sys.argv[1]), {}, "", is_main=True):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_process_is_refused_and_told_who_holds_it(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout and holder.stdout.readline() == "held\n"
        with (
            pytest.raises(UserError, match=f"another training is at work in it .process {holder.pid} on "),
            RunDirectory(tmp_path, {}, "", is_main=True),
        ):
            pass
    finally:
        holder.kill()
        holder.communicate()
    with RunDirectory(tmp_path, {}, "", is_main=True):  # the lock died with its holder
        pass


def test_a_rank_that_does_not_write_does_not_lock(tmp_path):
    with RunDirectory(tmp_path, {}, "", is_main=True), RunDirectory(tmp_path, {}, "", is_main=False):
        pass


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "photo.jpg").write_bytes(b"")
    with pytest.raises(UserError, match="not a run directory"), RunDirectory(tmp_path, {}, "", is_main=True):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["photo.jpg"]


@pytest.mark.parametrize("link", ["run", "run/checkpoints"])
def test_a_disk_that_is_not_mounted_is_no_new_run(tmp_path, link):
    """A run whose checkpoints lie behind a link that leads nowhere would begin anew."""
    (tmp_path / link).parent.mkdir(exist_ok=True)
    (tmp_path / link).symlink_to(tmp_path / "disk/run")
    with (
        pytest.raises(UserError, match=f"{link} is a link that leads nowhere"),
        RunDirectory(tmp_path / "run", {}, "", is_main=True),
    ):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_path_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"), RunDirectory(tmp_path / "file/run", {}, "", is_main=True):
        pass


def test_preempted_is_there_from_the_stop_to_the_next_start(tmp_path):
    with RunDirectory(tmp_path, {}, "a = 1\n", is_main=True) as directory:
        directory.start()
        assert (tmp_path / "config.toml").read_text() == "a = 1\n"
        directory.mark_preempted("stopped at sample 3")
    assert (tmp_path / "PREEMPTED").read_text() == "stopped at sample 3\n"
    with RunDirectory(tmp_path, {}, "", is_main=True) as directory:
        directory.start()
    assert not (tmp_path / "PREEMPTED").exists()


def test_differences_name_what_changed_came_and_went():
    assert differences({"a": 1, "b": 2}, {"a": 1, "b": 3}) == ["b was 2, is 3"]
    assert differences({"a": 1}, {"a": 1, "c": 2}) == ["c was None, is 2"]
    assert differences({"a": 1, "c": 2}, {"a": 1}) == ["c was 2, is None"]
    assert differences({"a": [1, 2]}, {"a": [1, 2]}) == []


DEFAULTS = {"optim.lr": 0.1, "loss.new": 1, "train.total_samples": 60, "train.batch_size": 12}


def with_checkpoint(path, identity, config=None):
    record = {**vars(State(samples_seen=24, step=2)), "config": config or {}, "identity": identity}
    files = dict.fromkeys((MODEL, OPTIMIZER), save({"w": zeros(1)}))
    return save_checkpoint(path / "checkpoints", files, record, 2, None)


def directory_of(path, **identity):
    return RunDirectory(path, {"optim.lr": 0.1, "manifest": "m", **identity}, "", True, DEFAULTS)


def test_a_field_that_a_newer_version_adds_has_its_default_in_an_older_run(tmp_path):
    with_checkpoint(tmp_path, {"optim.lr": 0.1, "manifest": "m", "train.total_samples": 36})
    assert directory_of(tmp_path, **{"loss.new": 1}).resume().state.samples_seen == 24
    for changes, words in (({"loss.new": 2}, "loss.new was 1, is 2"), ({"optim.lr": 0.2}, "optim.lr was 0.1, is 0.2")):
        with pytest.raises(UserError, match=words):
            directory_of(tmp_path, **changes).resume()


def test_a_field_that_this_version_does_not_know_is_one_line(tmp_path):
    with_checkpoint(tmp_path, {"optim.lr": 0.1, "manifest": "m", "loss.newer": 3})
    with pytest.raises(UserError, match=r"another version of mde_dist: loss\.newer was 3") as error:
        directory_of(tmp_path).resume()
    assert "\n" not in str(error.value)


def test_a_run_none_of_whose_checkpoints_is_whole_is_not_begun_anew(tmp_path):
    """It would drop what is left of them, and every line of metrics.jsonl."""
    assert directory_of(tmp_path).resume() is None
    (with_checkpoint(tmp_path, {"optim.lr": 0.1, "manifest": "m"}) / MODEL).unlink()
    said = []
    with pytest.raises(UserError, match="none of its 1 checkpoints"):
        directory_of(tmp_path).resume(said.append)
    assert len(said) == 1 and "step-00000002 is not whole" in said[0]


def test_more_samples_than_before_are_said_and_less_than_were_seen_refused(tmp_path):
    with_checkpoint(tmp_path, {"optim.lr": 0.1, "manifest": "m"}, {"train.total_samples": 20})
    directory, said = directory_of(tmp_path), []
    found = directory.resume()
    directory.note_change(found, {"train.total_samples": 20, "train.batch_size": 12}, "", said.append)
    assert said == []
    directory.note_change(found, {"train.total_samples": 40}, "; so there", said.append)
    assert said == ["note: train.total_samples was 20, is 40 from sample 24 on; so there"]
    for samples in (20, 24, 40):  # 20: it ended with the batch that reached them
        directory.refuse_less(found, samples)
    with pytest.raises(UserError, match="has seen 24 already"):
        directory.refuse_less(found, 22)


def test_what_cannot_be_removed_is_said_once_a_run(tmp_path, monkeypatch, capsys):
    def held(path, ignore_errors=False):
        if not ignore_errors:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))

    monkeypatch.setattr(shutil, "rmtree", held)
    directory, files = directory_of(tmp_path), dict.fromkeys((MODEL, OPTIMIZER), save({"w": zeros(1)}))
    for step in range(1, 5):
        directory.save(files, {**vars(State(samples_seen=step, step=step)), "config": {}}, 1, None)
    assert directory.resume().state.step == 4
    (said,) = capsys.readouterr().out.splitlines()
    assert said.startswith("warning: the old checkpoint") and "(Device or resource busy)" in said
