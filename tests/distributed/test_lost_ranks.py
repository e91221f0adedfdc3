"""A rank that dies, hangs or fails ends the others soon, with one line that says which it was and where its log is."""

import signal
import time
from functools import partial
from pathlib import Path

import psutil
import pytest
from commands import learned, records, small, start, wait_for
from faults import patch
from warm import warm_run, warm_start, without_pictures

pytestmark = pytest.mark.distributed


def options(shards: Path, directory: Path, **changes):
    return small(data_shards=shards, train_heartbeat_timeout=4, **changes) | {"run": directory / "run"}


def errors(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith("error")]


def begun(run: Path):
    return lambda: (run / "checkpoints/step-00000001").is_dir()


@pytest.mark.parametrize(("victim", "speaker"), [(2, 0), (0, 1)])
def test_a_rank_that_is_killed_ends_the_others_with_one_line(room_shards, tmp_path, victim, speaker):
    run = tmp_path / "run"
    with warm_start("train", processes=3, **options(room_shards, tmp_path, train_total_samples=100_000)) as process:
        wait_for(begun(run), process)
        process.ranks[victim].kill()
        process.wait(60)
        others = [rank.returncode for number, rank in enumerate(process.ranks) if number != victim]
        assert others == [2, 2]
        (said,) = errors(process.output())
        assert said.startswith(f"error (rank {speaker}): rank {victim} is gone; log: {run}/logs/rank-{victim}.log")
        assert "Traceback" not in process.output()
        for number in {0, 1, 2} - {victim}:
            assert f"rank {victim} is gone" in (run / f"logs/rank-{number}.log").read_text()


def test_a_rank_that_hangs_is_missed_after_a_while_and_the_run_can_go_on(room_shards, tmp_path):
    run, given = tmp_path / "run", options(room_shards, tmp_path)
    with warm_start("train", processes=2, **given) as process:
        wait_for(begun(run), process)
        process.ranks[1].send_signal(signal.SIGSTOP)
        assert process.ranks[0].wait(60) == 2
        (said,) = errors(process.output())
        assert "rank 1 has given no sign of life for 4 s; log: " in said
    done = warm_run("train", processes=2, before=without_pictures, **given)
    assert done.returncode == 0, done.stderr
    assert [r["samples"] for r in records(run) if "loss" in r] == [12, 24, 36, 48, 60]


def fail(rank: int) -> None:
    def action(do_it, arguments):
        raise ValueError("a mistake in the code")

    patch("backward", action, call=3, rank=rank)


def test_a_rank_that_fails_has_its_traceback_in_its_log_and_is_named(room_shards, tmp_path):
    run = tmp_path / "run"
    given = options(room_shards, tmp_path)
    done = warm_run("train", processes=3, before=partial(fail, 1), **given)
    assert done.returncode != 0
    (said,) = errors(done.stderr)
    assert said.startswith(f"error (rank 0): rank 1 is gone; log: {run}/logs/rank-1.log")
    assert "Traceback" not in done.stderr
    assert "ValueError: a mistake in the code" in (run / "logs/rank-1.log").read_text()


def test_every_rank_has_its_log_and_the_terminal_shows_rank_0(room_shards, tmp_path):
    run = tmp_path / "run"
    for samples in (12, 12):  # once more: appended
        given = options(room_shards, tmp_path, train_total_samples=samples)
        with warm_start("train", processes=2, before=without_pictures, **given) as process:
            assert process.wait(120) == 0
            assert "evaluated at sample 12" in process.output(0) or "made: " in process.output(0)
            assert process.output(1) == ""
    for rank in (0, 1):
        log = (run / f"logs/rank-{rank}.log").read_text()
        assert log.count(f", rank {rank} of 2, process ") == 2
        assert log.count("evaluated at sample 12") == 1
        assert "samples 12/12 loss" in log


def test_log_lines_tell_the_slowest_rank_the_memory_and_the_time_left(room_shards, tmp_path):
    given = options(room_shards, tmp_path, train_total_samples=24)
    done = warm_run("train", processes=2, before=partial(slow_forward, 1), **given)
    assert done.returncode == 0, done.stderr
    for record in (r for r in records(tmp_path / "run") if "loss" in r):
        assert record["slowest_rank"] == 1
        assert record["slower"] > 0.2
        assert 0.1 < record["memory_gb"] < 20
        assert record["seconds_left"] >= 0
        assert record["images_per_second"] > 0
        assert 0 <= record["data_wait"] <= 1


def slow_forward(rank: int) -> None:
    without_pictures()

    def action(do_it, arguments):
        if arguments[0].training:
            time.sleep(1)
        return do_it()

    patch("forward", action, rank=rank)


def test_a_rank_that_dies_under_a_launcher_is_one_line_of_ours(room_shards, tmp_path):
    run, given = tmp_path / "run", options(room_shards, tmp_path)
    process = start("train", processes=2, **given)
    wait_for(begun(run), process)
    ranks = [child for child in psutil.Process(process.pid).children(recursive=True) if "--run" in child.cmdline()]
    (victim,) = [rank for rank in ranks if rank.environ()["RANK"] == "1"]
    victim.kill()
    output, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    (said,) = errors(output)
    assert said.startswith(f"error (rank 0): rank 1 is gone; log: {run}/logs/rank-1.log")
    assert not any(rank.is_running() for rank in ranks)
    assert learned(run)
