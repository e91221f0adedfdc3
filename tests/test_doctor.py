"""The doctor finds what would keep a training from working, says what to do, and leaves everything as it is."""

import fcntl
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from commands import environment, small
from faults import few_files, forbid_pickle, left_behind, no_locks, out_of_memory, quick_checkup, together
from gaps import run_with_gaps
from test_disk import mount, root_only
from trees import write
from warm import warm_run

from mde_dist.data.shards import open_split
from mde_dist.tools.diagnostics import data, machine, step
from mde_dist.tools.diagnostics.examine import duration, verdict
from mde_dist.tools.diagnostics.panel import RankSurvey, Row, format_bytes
from mde_dist.tools.diagnostics.run_dir import check_cache, check_disk
from mde_dist.tools.diagnostics.step import Measured, checkpoint_bytes
from mde_dist.training.config import read_config
from mde_dist.training.step import TrainModule, check_statistics
from mde_dist.utils.errors import UserError

CHECKS = [
    *("batch", "versions", "environment", "devices", "shards", "open files", "scratch", "run directory", "samples"),
    *("memory", "network", "loader", "disk"),
]
"""Rows of one process, in their order."""


def table(text: str) -> dict[str, tuple[str, str, str]]:
    """check -> (result, what was found, what to do) of a printed table."""
    rows: list[list[str]] = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split("│")[1:-1]]
        if cells and cells[0]:
            rows.append(cells)
        elif cells:
            rows[-1] = [f"{before} {more}".strip() for before, more in zip(rows[-1], cells, strict=True)]
    return {check: (result, found, advice) for check, result, found, advice in rows}


def examine(*faults, processes=1, cwd=None, **options):
    """-> (the finished process, its table)."""
    before = partial(together, quick_checkup, *faults)
    done = warm_run("doctor", processes=processes, before=before, env=environment(COLUMNS="400"), cwd=cwd, **options)
    assert "Traceback" not in done.stderr
    assert not done.stderr.startswith("error"), done.stderr
    return done, table(done.stdout)


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*")}


@pytest.fixture
def damaged(room_shards, tmp_path) -> Path:
    """A copy of the shards, to be damaged."""
    return shutil.copytree(room_shards, tmp_path / "damaged")


def test_where_all_is_well_it_says_ready_and_leaves_nothing(room_shards, tmp_path):
    done, rows = examine(forbid_pickle, run=tmp_path / "run", **small(data_shards=room_shards))
    assert done.returncode == 0, done.stdout
    assert list(rows) == CHECKS
    assert {result for result, _, advice in rows.values()} == {"ok"}
    assert not any(advice for *_, advice in rows.values())
    assert done.stdout.splitlines()[-1] == "ready: nothing stands in the way"
    assert "12 per rank x 1 ranks x 1 accumulated = 12" in rows["batch"][1]
    assert torch.__version__ in rows["versions"][1]
    assert "30 to train on, 8 to evaluate on, 5 shards" in rows["shards"][1]
    assert "38 read and decoded" in rows["samples"][1]
    assert "one process: nothing to reduce" in rows["network"][1]
    assert "is new" in rows["run directory"][1]
    assert re.search(r"^60 samples at [\d.]+ images/s: about 0:\d\d \+ evaluations$", done.stdout, re.MULTILINE)
    assert "checking: memory and step" in done.stdout
    assert not list(tmp_path.iterdir())


def test_a_run_of_the_same_config_would_be_resumed_and_is_left_as_it_is(undisturbed, room_shards):
    before = snapshot(undisturbed)
    done, rows = examine(no_locks, run=undisturbed, **small(data_shards=room_shards))
    assert done.returncode == 0, done.stdout
    assert "goes on at sample 60 of 60" in rows["run directory"][1]
    assert "of them there" in rows["disk"][1]
    assert "all 60 samples are done" in done.stdout
    assert snapshot(undisturbed) == before


def test_all_that_is_wrong_is_told_at_once(undisturbed, damaged):
    """A run of another config, a shard that is not there, few open files, a batch that does not fit, and leftovers."""
    (damaged / "train-000001.tar").unlink()
    before = snapshot(undisturbed)
    faults = (partial(few_files, 100), out_of_memory, no_locks)
    faults += (partial(left_behind, "ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4"),)
    faults += (partial(left_behind, "NVIDIA_TF32_OVERRIDE", "0"),)
    faults += (partial(left_behind, "GLOO_SOCKET_IFNAME", "no-such-0"),)
    done, rows = examine(*faults, run=undisturbed, **small(data_shards=damaged, train_seed=3))
    assert done.returncode == 1
    assert rows["shards"][0] == "fail"
    assert "train-000001.tar: No such file" in rows["shards"][1]
    assert f"python -m mde_dist.shard --verify {damaged}" in rows["shards"][2]
    assert rows["environment"][0] == "warn"
    found = rows["environment"][1]
    assert "ACCELERATE_GRADIENT_ACCUMULATION_STEPS=4 (--train.grad-accum-steps decides) is not obeyed" in found
    assert "NVIDIA_TF32_OVERRIDE=0" in found
    assert "GLOO_SOCKET_IFNAME=no-such-0" in found
    assert rows["open files"][:2] == ("fail", "100 allowed, 130 needed")
    assert "ulimit -n 1024" in rows["open files"][2]
    assert rows["memory"][:2] == ("fail", "out of memory with 12 images of 32x32 at a time")
    assert "try --train.grad-accum-steps 2 (6 at a time, the same batch)" in rows["memory"][2]
    assert rows["run directory"][0] == "warn"  # without the shards nobody can tell
    assert done.stdout.splitlines()[-1] == "not ready: 3 problems (shards, open files, memory)"
    assert snapshot(undisturbed) == before


def test_a_run_of_another_config_is_refused_with_what_differs(undisturbed, room_shards):
    done, rows = examine(run=undisturbed, **small(data_shards=room_shards, train_seed=3))
    assert done.returncode == 1
    result, found, advice = rows["run directory"]
    assert result == "fail"
    assert "train.seed was 0, is 3" in found
    assert "choose another --run" in advice
    assert "not ready: 1 problem (run directory)" in done.stdout


def test_damaged_samples_are_named(damaged, tmp_path):
    tar = damaged / "train-000002.tar"
    data = bytearray(tar.read_bytes())
    data[data.index(b"\xff\xd8\xff") + 200] ^= 0xFF
    tar.write_bytes(data)
    done, rows = examine(run=tmp_path / "run", **small(data_shards=damaged))
    assert done.returncode == 1
    result, found, advice = rows["samples"]
    assert result == "fail"
    assert "train-000002.tar, key " in found
    assert "image fails its checksum" in found
    assert f"--verify {damaged}" in advice
    assert "damaged sample" not in done.stdout.replace(found, ""), "the loader's own words are for trainings"


@root_only
def test_a_disk_without_room_for_the_checkpoints(room_shards, tmp_path):
    """They lie on another disk than the run, behind a link; one was moved from there, and its file is gone."""
    disk, run = tmp_path / "disk", tmp_path / "run"
    moved = run / "moved"
    disk.mkdir()
    moved.mkdir(parents=True)
    (run / "checkpoints").symlink_to(disk)
    (moved / "model.safetensors").symlink_to(tmp_path / "gone")
    if not mount(disk, 250):
        pytest.skip("no file system can be mounted here")
    try:
        (disk / "step-00000001").symlink_to(moved)
        done, rows = examine(run=run, **small(data_shards=room_shards, model_encoder="resnet18"))
        left = [*disk.glob(".*"), *run.glob(".*")]
    finally:
        subprocess.run(["umount", "-l", disk], check=True)
    assert done.returncode == 1
    assert rows["disk"][0] == "fail"
    assert "262 MB free" in rows["disk"][1]
    assert "2 + 2 checkpoints of 153 MB" in rows["disk"][1]
    assert "lower --train.keep-checkpoints" in rows["disk"][2]
    assert not left


@root_only
def test_a_disk_that_cannot_be_written(room_shards, tmp_path):
    if not mount(tmp_path, 900, "ro"):
        pytest.skip("no file system can be mounted here")
    try:
        done, rows = examine(run=tmp_path / "run", **small(data_shards=room_shards))
    finally:
        subprocess.run(["umount", "-l", tmp_path], check=True)
    assert done.returncode == 1
    assert rows["disk"][0] == "fail"
    assert f"{tmp_path}: cannot be written (Read-only file system)" in rows["disk"][1]


def test_without_arguments_the_rooms_are_not_there_yet(tmp_path):
    done, rows = examine(cwd=tmp_path, **{"train.batch-size": 2})
    assert done.returncode == 0, done.stdout
    assert rows["shards"][0] == "warn"
    assert "rendered and packed first" in rows["shards"][2]
    assert rows["memory"][0] == "ok"
    assert "ready, with 1 warning (shards)" in done.stdout
    assert not list(tmp_path.iterdir())


def test_directories_that_training_would_not_take(room_shards, tmp_path):
    """Somebody's files, and a run that is at work."""
    (tmp_path / "files").mkdir()
    (tmp_path / "files/thesis.tex").touch()
    before = snapshot(tmp_path)
    done, rows = examine(run=tmp_path / "files", **small(data_shards=room_shards))
    assert done.returncode == 1
    assert "is not empty and not a run directory" in rows["run directory"][1]
    assert snapshot(tmp_path) == before
    (tmp_path / "run").mkdir()
    with (tmp_path / "run/.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        lock.flush()
        done, rows = examine(run=tmp_path / "run", **small(data_shards=room_shards))
    assert done.returncode == 1
    assert f"another training is at work in it (process {os.getpid()} on" in rows["run directory"][1]


def test_a_bad_command_line_is_one_line():
    done = warm_run("doctor", **{"train.batch-size": 0})
    assert (done.returncode, done.stderr) == (2, "error: train.batch_size = 0: must be at least 1\n")


# --- the parts, alone ---


def look_at_disks(*folders: str) -> None:
    """Tell the rows of run directories and of caches in these folders."""
    for folder in folders:
        panel = RankSurvey(Accelerator(cpu=True), lambda word: None)
        config = read_config(["--run", f"{folder}/run"])
        check_disk(panel, config, checkpoint=1000, refused=False)
        check_cache(panel, Path(folder))
        sys.stderr.writelines(f"{Path(folder).name}: {row.check}: {row.result}: {row.found}\n" for row in panel.rows)


def test_a_disk_without_locks_or_flushes_is_told_and_a_broken_one_is_a_failure(tmp_path):
    lacking, broken = tmp_path / "lacking", tmp_path / "broken"
    for folder in (lacking, broken):
        folder.mkdir()
    rules = [f"flock:ENOLCK:{lacking}", f"fsync-dir:EINVAL:{lacking}", f"fsync-dir:EIO:{broken}"]
    said = run_with_gaps(look_at_disks, rules, lacking, broken)
    for row in ("lacking: disk: warn", "lacking: cache: warn", "broken: disk: fail", "broken: cache: fail"):
        assert row in said
    assert said.count("no file locks") == said.count("nothing tells when the disk has it all") == 2
    assert not [*lacking.iterdir(), *broken.iterdir()]


@pytest.fixture
def panel() -> RankSurvey:
    """Of one process that believes to be two, for what is judged without asking."""
    device = torch.device("cpu")
    lone = SimpleNamespace(process_index=0, num_processes=1, local_process_index=0, device=device, is_main_process=True)
    found = RankSurvey(lone, lambda word: None)
    found.world, found.hosts, found.nodes = 2, ["one", "two"], [0, 1]
    return found


def test_packages_that_a_training_uses_and_that_are_too_old_are_named(panel, tmp_path, monkeypatch):
    """By the metadata of what is installed, of which Python finds that of this folder first."""
    extras = {"s3": "s3fs>=2024.6", "wandb": "not-there>=1", "test": "ruff>=0.9"}
    needs = ["torch>=2.5", "tyro>=1.0", *(f"{need}; extra == '{extra}'" for extra, need in extras.items())]
    for package in ("mde_dist-0.1.0", "torch-2.5.0+cpu", "tyro-0.9.35", "s3fs-2024.5.1", "ruff-0.1.0"):
        name, version = package.split("-")
        lines = [f"Name: {name}", f"Version: {version}"]
        lines += [f"Requires-Dist: {need}" for need in needs if name == "mde_dist"]
        write(tmp_path / f"{package}.dist-info/METADATA", "\n".join(lines).encode())
    monkeypatch.syspath_prepend(tmp_path)
    machine.check_minimums(panel)
    (row,) = panel.rows
    assert row.result == "warn"
    assert re.findall(r"[a-z0-9]+ \d[\w.]+", row.found) == ["tyro 0.9.35", "s3fs 2024.5.1"]
    assert row.advice == "pip install 'tyro>=1.0' 's3fs>=2024.6'"


@pytest.mark.parametrize(
    ("offsets", "result"), [([0.0, 0.3], "ok"), ([0.0, -3.0], "warn"), ([0.0, 90.0], "fail"), ([0.0, -90.0], "fail")]
)
def test_clocks_that_differ(panel, monkeypatch, offsets, result):
    monkeypatch.setattr(machine, "clock_offsets", lambda accelerator: offsets)
    machine.check_clocks(panel)
    assert panel.rows[0].result == result
    assert ("rank 1 (two)" in panel.rows[0].found) == (result != "ok")


@pytest.mark.parametrize(("speeds", "result"), [([60, 60], "ok"), ([60, 40], "warn"), ([20, 60], "fail")])
def test_a_loader_that_is_too_slow_for_the_step(panel, room_shards, speeds, result):
    config = read_config(["--train.batch-size", "100"])  # 50 images/s for each of the two
    with open_split(room_shards, "train") as shards:
        data.judge_loader(panel, config, shards, speeds, 1.0)
    (row,) = panel.rows
    assert row.result == result
    assert ("--data.threads" in row.advice) == (result != "ok")
    assert ("rank 0 (one)" in row.found) == (speeds[0] != speeds[1])


@pytest.mark.parametrize(("reduce", "result"), [(0.2, "ok"), (0.5, "warn")])
def test_a_network_that_takes_long_is_no_hindrance(panel, monkeypatch, reduce, result):
    monkeypatch.setattr(step, "time_all_reduce", lambda accelerator, tensor, budget: reduce)
    measured = Measured(parameters=10, checkpoint=1, seconds=1.0)
    step.check_network(panel, measured)
    assert panel.rows[0].result == result
    assert f"{reduce:.0%} of forward and backward" in panel.rows[0].found
    assert measured.whole == 1 + reduce


def test_one_value_per_channel_is_told_as_training_tells_it(panel):
    panel.world = 1
    config = read_config(["--model.encoder", "tiny", "--data.size", "32x32", "--train.batch-size", "1"])
    assert step.measure_step(panel, config, (32, 32), None) == Measured()
    with pytest.raises(UserError) as told:
        check_statistics(config, panel.accelerator, (32, 32))
    (row,) = panel.rows
    assert (row.check, row.result, f"{row.found}; {row.advice}") == ("memory", "fail", str(told.value))


def test_a_check_that_does_not_come_back_is_a_failure(panel):
    (answer,) = panel.query_ranks(lambda: time.sleep(5), "", limit=0.05)
    assert answer.error == "no answer within 0 s"


def test_the_bytes_of_a_checkpoint_are_those_that_are_written(undisturbed):
    accelerator = SimpleNamespace(device=torch.device("cpu"), num_processes=1)
    newest = max((undisturbed / "checkpoints").iterdir())
    written = sum(path.stat().st_size for path in newest.glob("*.safetensors"))
    expected = checkpoint_bytes(TrainModule(read_config(["--model.encoder", "tiny"]), accelerator, (32, 32)))
    assert expected == pytest.approx(written, rel=0.02)  # names and metadata take some


def test_words_for_ranks_bytes_and_time(panel):
    panel.hosts = ["a", "a", "b", "b"]
    assert panel.named([3, 0, 1]) == "ranks 0-1, 3 (b, a)"
    assert panel.differing({0: "x", 1: "y"}) == "rank 0 (a): x\nrank 1 (a): y"
    panel.world = 4
    assert panel.differing(dict.fromkeys(range(4), "same")) == "same"
    assert panel.differing({2: "bad"}) == "rank 2 (b): bad"
    assert [format_bytes(size) for size in (999, 1500, 152.6e6, 43e9, 2e12)] == [
        *("999 bytes", "1.5 KB", "153 MB", "43 GB", "2 TB")
    ]
    cpu = SimpleNamespace(device=torch.device("cpu"))
    config = read_config(["--train.total-samples", "100000", "--train.batch-size", "10"])
    for seconds, speeds, start, words in (
        (1.0, None, 0, "100,000 samples at 10 images/s: about 2:46:40 + evaluations"),
        (1.0, None, 99_000, "1,000 samples at 10 images/s: about 1:40 + evaluations"),
        (1.0, [10.0], 99_000, "1,000 samples at 5 images/s: about 3:20 + evaluations"),
    ):
        assert duration(config, cpu, Measured(seconds=seconds), speeds, start) == words
    gpu = SimpleNamespace(device=torch.device("cuda"))
    assert "at 10 images/s" in duration(config, gpu, Measured(seconds=1.0), [30.0, 30.0], 0)
    rows = [Row("a", "ok", ""), Row("b", "warn", ""), Row("c", "warn", "")]
    assert verdict(rows) == "ready, with 2 warnings (b, c)"
    assert verdict([*rows, Row("d", "fail", "")]) == "not ready: 1 problem (d)"
