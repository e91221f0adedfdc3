"""The run directory: one writer, one identity."""

import subprocess
import sys

import pytest

from mde_dist.errors import UserError
from mde_dist.run.directory import RunDirectory, differences

HOLD = """
import sys, time
from pathlib import Path
from mde_dist.run.directory import RunDirectory
with RunDirectory(Path(sys.argv[1]), {}, "", writes=True):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_process_is_refused_and_told_who_holds_it(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout and holder.stdout.readline() == "held\n"
        with (
            pytest.raises(UserError, match=f"another training is at work in it .process {holder.pid} on "),
            RunDirectory(tmp_path, {}, "", writes=True),
        ):
            pass
    finally:
        holder.kill()
        holder.communicate()
    with RunDirectory(tmp_path, {}, "", writes=True):  # the lock died with its holder
        pass


def test_a_rank_that_does_not_write_does_not_lock(tmp_path):
    with RunDirectory(tmp_path, {}, "", writes=True), RunDirectory(tmp_path, {}, "", writes=False):
        pass


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "photo.jpg").write_bytes(b"")
    with pytest.raises(UserError, match="not a run directory"), RunDirectory(tmp_path, {}, "", writes=True):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["photo.jpg"]


def test_a_path_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"), RunDirectory(tmp_path / "file/run", {}, "", writes=True):
        pass


def test_preempted_is_there_from_the_stop_to_the_next_start(tmp_path):
    with RunDirectory(tmp_path, {}, "a = 1\n", writes=True) as directory:
        directory.start()
        assert (tmp_path / "config.toml").read_text() == "a = 1\n"
        directory.mark_preempted("stopped at sample 3")
    assert (tmp_path / "PREEMPTED").read_text() == "stopped at sample 3\n"
    with RunDirectory(tmp_path, {}, "", writes=True) as directory:
        directory.start()
    assert not (tmp_path / "PREEMPTED").exists()


def test_differences_name_what_changed_came_and_went():
    assert differences({"a": 1, "b": 2}, {"a": 1, "b": 3}) == ["b was 2, is 3"]
    assert differences({"a": 1}, {"a": 1, "c": 2}) == ["c was None, is 2"]
    assert differences({"a": 1, "c": 2}, {"a": 1}) == ["c was 2, is None"]
    assert differences({"a": [1, 2]}, {"a": [1, 2]}) == []
