"""A disk that is full, a directory that may not be written: the run says so, stops or trains on, and nothing is lost.

On real file systems of a limited size, which only root can mount.
"""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from commands import learned, small, wait_for
from faults import slow, together
from safetensors.torch import load_file
from warm import warm_run, warm_start, without_pictures

from mde_dist.training.checkpoint import newest_checkpoint
from mde_dist.training.checkpoint_writer import AsyncCheckpointWriter
from mde_dist.utils.errors import UserError
from mde_dist.utils.jsonl import JsonlLogger, read_records

root_only = pytest.mark.skipif(os.geteuid() != 0, reason="mounting a file system takes root")


def options(shards: Path, **changes):
    return small(
        data_shards=shards, model_encoder="resnet18", train_keep_checkpoints=1, train_total_samples=36, **changes
    )


def mount(folder: Path, megabytes: int, *more: str) -> bool:
    line = ["mount", "-t", "tmpfs", "-o", ",".join([f"size={megabytes}m", *more]), "tmpfs", str(folder)]
    return subprocess.run(line, capture_output=True, check=False).returncode == 0


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """One that takes one checkpoint of 153 MB, and not a second one beside it."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if not mount(folder, 250):
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.fixture(scope="module")
def undisturbed(room_shards, scratch) -> Path:
    run = scratch("undisturbed") / "run"
    done = warm_run("train", before=without_pictures, run=run, **options(room_shards))
    assert done.returncode == 0, done.stderr
    return run


def check_end(run: Path, undisturbed: Path) -> None:
    assert learned(run) == learned(undisturbed)
    one, other = (load_file(folder / "model.safetensors") for folder in (run, undisturbed))
    assert all(one[name].equal(other[name]) for name in one)


@root_only
@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_full_disk_stops_the_run_and_the_checkpoint_before_stands(undisturbed, room_shards, small_disk, ranks):
    run = small_disk / "run"
    done = warm_run("train", processes=ranks, before=without_pictures, run=run, **options(room_shards))
    assert done.returncode == 2, done.stdout + done.stderr
    (said,) = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert "cannot write the checkpoint" in said
    assert "No space left on device; the earlier ones are whole" in said
    assert "Traceback" not in done.stderr
    assert newest_checkpoint(run / "checkpoints").state.samples_seen == 12
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000001"]  # nothing half-written is left
    assert mount(small_disk, 600, "remount")
    done = warm_run("train", processes=ranks, before=without_pictures, run=run, **options(room_shards))
    assert done.returncode == 0, done.stderr
    assert "resumed at sample 12" in done.stdout
    if ranks == 1:
        check_end(run, undisturbed)


@root_only
@pytest.mark.slow
def test_a_run_that_may_do_so_trains_on_beside_a_full_disk(undisturbed, room_shards, small_disk):
    run, given = small_disk / "run", options(room_shards, train_save_errors="continue")
    faults = partial(together, without_pictures, partial(slow, "forward", 1))
    with warm_start("train", before=faults, run=run, **given) as process:
        wait_for(lambda: "warning: cannot write the checkpoint" in process.output(), process)
        assert mount(small_disk, 600, "remount")
        assert process.wait(120) == 0, process.output()
        assert "No space left on device; the earlier ones are whole; training goes on" in process.output()
    check_end(run, undisturbed)


@root_only
@pytest.mark.slow
def test_what_cannot_be_saved_at_the_end_is_an_error_even_then(room_shards, small_disk):
    done = warm_run("train", run=small_disk / "run", **options(room_shards, train_save_errors="continue"))
    assert done.returncode == 2, done.stdout
    assert "error: cannot write the checkpoint" in done.stderr
    assert newest_checkpoint(small_disk / "run/checkpoints").state.samples_seen == 12


@root_only
@pytest.mark.slow
def test_a_directory_that_becomes_read_only_stops_the_run_with_one_line(undisturbed, room_shards, tmp_path):
    run, given = tmp_path / "run", options(room_shards)
    checkpoints = run / "checkpoints"
    faults = partial(together, without_pictures, partial(slow, "forward", 1))
    with warm_start("train", before=faults, run=run, **given) as process:
        wait_for(lambda: (checkpoints / "step-00000001").is_dir(), process)
        subprocess.run(["mount", "--bind", checkpoints, checkpoints], check=True)
        try:
            subprocess.run(["mount", "-o", "remount,bind,ro", checkpoints], check=True)
            assert process.wait(120) == 2, process.output()
        finally:
            subprocess.run(["umount", "-l", checkpoints], check=True)
        (said,) = [line for line in process.read("err").splitlines() if line.startswith("error")]
        assert "Read-only file system; the earlier ones are whole" in said
    assert newest_checkpoint(checkpoints).state.samples_seen in (12, 24)
    done = warm_run("train", before=without_pictures, run=run, **given)
    assert done.returncode == 0, done.stderr
    check_end(run, undisturbed)


# --- the parts, alone ---


def test_lines_that_the_disk_did_not_take_are_written_when_it_does(tmp_path):
    path, complaints = tmp_path / "metrics.jsonl", []
    with contextlib.closing(JsonlLogger(path, 0, 0, complaints.append)) as records:
        records.write({"samples": 1})
        real, records._file = records._file, open("/dev/full", "wb", buffering=0)  # noqa: SIM115, PTH123
        for samples in (2, 3):
            records.write({"samples": samples})
        assert [r["samples"] for r in read_records(path)] == [1]
        assert [str(error) for error in complaints] == ["/dev/full: cannot be written (No space left on device)"]
        with pytest.raises(UserError, match="No space left"):
            records.finish()
        records._file.close()
        records._file = real
        records.write({"samples": 4})
        records.finish()
    assert [r["samples"] for r in read_records(path)] == [1, 2, 3, 4]


def test_a_saver_writes_one_at_a_time_and_what_is_written_once():
    done, complaints = [], []

    def fail(copy):
        raise UserError("no")

    with AsyncCheckpointWriter(complaints.append) as saver:
        for label in (1, 1, 2):
            saver.submit(label, lambda label=label: label, done.append)
        saver.finish()
        assert done == [1, 2]
        saver.submit(3, lambda: None, fail)
        with pytest.raises(UserError, match="no"):
            saver.finish()
        assert [str(error) for error in complaints] == ["no"]
        saver.submit(3, lambda: 3, done.append)  # again, since it failed
    assert done == [1, 2, 3]
    assert saver.error is None


def test_a_mistake_in_the_code_that_writes_is_not_lost():
    def fail(copy):
        raise ZeroDivisionError

    with AsyncCheckpointWriter(lambda error: None) as saver:
        saver.submit(1, lambda: None, fail)
        with pytest.raises(ZeroDivisionError):
            saver.finish()
