"""Signals, to one rank or to all, whatever a run is doing: all stop at the same step and leave one whole checkpoint."""

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from commands import environment, learned, small, wait_for
from faults import no_data, signalled, slow, together
from warm import Warm, warm_run, warm_start, without_pictures

from mde_dist.training.checkpoint import newest_checkpoint

pytestmark = pytest.mark.distributed

SECONDS = 30  # a stop takes one or two on an idle machine


def options(shards: Path, directory: Path, **changes):
    """Three steps on two ranks, long enough to hear of a signal in, and evaluations after the second and the last."""
    given = small(data_shards=shards, model_encoder="resnet18", train_total_samples=36, **changes)
    return given | {"run": directory / "run"}


@pytest.fixture(scope="module")
def undisturbed(room_shards, scratch):
    root = scratch("undisturbed")
    done = warm_run("train", processes=2, before=without_pictures, **options(room_shards, root))
    assert done.returncode == 0, done.stderr
    return learned(root / "run")


def check_stop(process: Warm, run: Path, number: int) -> int:
    """What every stop leaves; returns the sample at which it was."""
    assert [rank.returncode for rank in process.ranks] == [128 + number] * 2, process.output()
    said = process.output(0)
    assert "Traceback" not in process.output()
    assert said.count("stopped at sample ") == 1
    sample = int((run / "PREEMPTED").read_text().removeprefix("stopped at sample "))
    assert f"stopped at sample {sample} by a signal" in said
    assert newest_checkpoint(run / "checkpoints").state.samples_seen == sample
    assert not list(run.glob("checkpoints/.*"))
    return sample


CASES = {
    # name: (faults, the signal that shows in the exit code, the sample at which the run stops)
    "to all in a step": (partial(signalled, "backward", 3, signal.SIGTERM), signal.SIGTERM, 24),
    "to one in a step": (partial(signalled, "backward", 3, signal.SIGUSR1, rank=1), signal.SIGUSR1, 24),
    "to rank 0, and another one": (
        partial(signalled, "backward", 2, signal.SIGUSR2, rank=0, again=signal.SIGTERM),
        signal.SIGUSR2,
        12,
    ),
    "to one in the evaluation that scores the baselines": (
        partial(signalled, "evaluation", 1, signal.SIGTERM, rank=1),
        signal.SIGTERM,
        24,
    ),
    "to one while evaluating": (partial(signalled, "evaluation", 2, signal.SIGUSR1, rank=1), signal.SIGUSR1, 36),
    "to all while a checkpoint is being written": (
        partial(together, partial(slow, "file of a checkpoint", 1), partial(signalled, "backward", 3, signal.SIGUSR2)),
        signal.SIGUSR2,
        24,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_signal_stops_all_ranks_at_one_step_and_the_run_goes_on_from_it(undisturbed, room_shards, tmp_path, case):
    faults, number, expected = CASES[case]
    given = options(room_shards, tmp_path)
    with warm_start("train", processes=2, before=faults, **given) as process:
        process.wait(120)
        assert check_stop(process, tmp_path / "run", number) == expected
    done = warm_run("train", processes=2, before=without_pictures, **given)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "run/PREEMPTED").exists()
    assert learned(tmp_path / "run") == undisturbed


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_to_the_launching_script_reaches_the_ranks(room_shards, tmp_path, number):
    """As from a scheduler: launch/one_node.sh becomes the launcher, which dies at USR1 by itself. Under nohup
    it and its ranks live on when the terminal goes."""
    nohup = ["nohup"] * (number == signal.SIGUSR1)
    run = tmp_path / "run"
    flags = [text for name, value in options(room_shards, tmp_path).items() for text in (f"--{name}", str(value))]
    env = environment(PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    script = Path(__file__).parents[2] / "launch/one_node.sh"
    process = subprocess.Popen(
        [*nohup, script, "2", *flags, "--train.total-samples", "100000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=env,
        start_new_session=True,
    )
    wait_for(lambda: (run / "checkpoints/step-00000001").is_dir(), process)
    if nohup:
        os.killpg(process.pid, signal.SIGHUP)
        wait_for(lambda: (run / "checkpoints/step-00000003").is_dir(), process)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert output.count("stopped at sample ") == 1, output
    sample = int((run / "PREEMPTED").read_text().removeprefix("stopped at sample "))
    assert newest_checkpoint(run / "checkpoints").state.samples_seen == sample


@pytest.mark.parametrize("signalled_rank", [0, 1])
def test_a_signal_ends_a_wait_for_data_on_another_rank(undisturbed, room_shards, tmp_path, signalled_rank):
    """Rank 1 waits for a disk that does not answer, rank 0 in a collective for rank 1; one of them is told to stop."""
    given, mark = options(room_shards, tmp_path, data_threads=1, data_prefetch_batches=1), tmp_path / "waiting"
    faults = partial(no_data, after=9, rank=1, mark=mark)  # six in a step
    with warm_start("train", processes=2, before=faults, **given) as process:
        end = time.monotonic() + 120
        while not (mark.exists() and (tmp_path / "run/checkpoints/step-00000001").is_dir()):
            assert time.monotonic() < end and process.poll() is None, process.output()
            time.sleep(0.05)
        time.sleep(1)  # until rank 0 is in the collective
        start = time.monotonic()
        process.ranks[signalled_rank].send_signal(signal.SIGUSR1)
        process.wait(120)
        assert time.monotonic() - start < SECONDS
        assert check_stop(process, tmp_path / "run", signal.SIGUSR1) == 12
    done = warm_run("train", processes=2, before=without_pictures, **given)
    assert done.returncode == 0, done.stderr
    assert learned(tmp_path / "run") == undisturbed
