"""slurm/train.sbatch on a real SLURM: whatever happens to a job, it learns what it would have learned."""

import json
import re
from pathlib import Path
from tempfile import mkdtemp

import pytest
from commands import learned, small
from safetensors.torch import load_file
from warm import warm_run

STEPS = 32
NODES = ["--nodes=2", "--cpus-per-task=2"]


PLAN = {"train_total_samples": 12 * STEPS, "train_evaluate_every": 192, "train_checkpoint_every": 48}


class Job:
    """A training under slurm/train.sbatch."""

    def __init__(self, cluster, root, shards, sbatch, environment, **options):
        self.cluster, self.run, self.log = cluster, root / "run", root / "job.log"
        options = small(data_shards=shards, **PLAN) | options
        words = [text for name, value in ({"run": self.run} | options).items() for text in (f"--{name}", str(value))]
        sbatch = [*sbatch, f"--output={self.log}"]
        self.number = cluster.submit("slurm/train.sbatch", *words, sbatch=sbatch, **environment)

    def wait_for_step(self, step):
        """Until the checkpoint of a step, or of a later one, is there."""
        self.cluster.wait(lambda: self.newest() >= step, 120)

    def newest(self):
        found = (self.run / "checkpoints").glob("step-????????")
        return max((int(path.name[5:]) for path in found), default=0)

    def wait_for_restart(self, count, seconds=120):
        self.cluster.wait(lambda: self.cluster.restarts(self.number) >= count, seconds)

    def wait_until_running(self):
        """For what comes from the new start alone: the old one may still take steps while it ends."""
        self.cluster.wait(lambda: self.cluster.state(self.number) == "RUNNING", 120)

    def wait_for_end(self, seconds=180):
        return self.cluster.wait_for_end(self.number, seconds)

    def said(self):
        return self.log.read_text()


@pytest.fixture
def train(cluster, room_shards, tmp_path):
    """Starts trainings of the same config, by default two nodes with a rank each."""

    def start(sbatch=(), ranks=1, environment=None, **options):
        root, environment = Path(mkdtemp(dir=tmp_path)), {"RANKS_PER_NODE": str(ranks)} | (environment or {})
        return Job(cluster, root, room_shards, [*NODES, *sbatch], environment, **options)

    return start


@pytest.fixture(scope="module")
def quiet(room_shards, scratch):
    """The directory of the same training on two ranks, without a job, that nothing happens to."""
    directory = scratch("quiet") / "run"
    done = warm_run("train", processes=2, run=directory, **small(data_shards=room_shards, **PLAN))
    assert done.returncode == 0, done.stderr
    return directory


def steps(directory):
    return [record for record in learned(directory) if "loss" in record]


def same(job, quiet):
    """Whether a job has learned what the training without one has."""
    weights, expected = (load_file(directory / "model.safetensors") for directory in (job.run, quiet))
    assert all(weights[name].equal(tensor) for name, tensor in expected.items()), "other weights"
    assert steps(job.run) == steps(quiet), "other losses, or a step twice or not at all"
    return True


@pytest.mark.long
def test_two_nodes_with_two_ranks_each_train_together(cluster, train, quiet):
    job = train(ranks=2, **{"train.total-samples": 12 * 8})
    assert job.wait_for_end() == "COMPLETED", job.said()
    assert "3 per rank x 4 ranks" in job.said()
    assert cluster.restarts(job.number) == 0
    assert len(list((job.run / "logs").glob("rank-*.log"))) == 4
    batches = [[(step["samples"], step["batch"]) for step in steps(directory)] for directory in (job.run, quiet)]
    assert batches[0] == batches[1][:8]


@pytest.mark.long
def test_the_other_jobs_run_on_several_nodes_too(cluster, quiet, room_shards, tmp_path):
    """Beforehand slurm/doctor.sbatch, and afterwards slurm/evaluate.sbatch."""
    sbatch, environment = [*NODES, f"--output={tmp_path}/%j.log"], {"RANKS_PER_NODE": "1"}
    words = ["--data.shards", room_shards, "--data.size", "32x32", "--train.batch-size", 12, "--run", tmp_path / "new"]
    doctor = cluster.submit("slurm/doctor.sbatch", *words, sbatch=sbatch, **environment)
    words = ["--run", quiet, "--json", tmp_path / "result.json"]
    evaluate = cluster.submit("slurm/evaluate.sbatch", *words, sbatch=sbatch, **environment)
    for number, expected in ((doctor, "ready"), (evaluate, "protocol eigen, 8 images")):
        state, said = cluster.wait_for_end(number, 120), (tmp_path / f"{number}.log").read_text()
        assert state == "COMPLETED", said
        assert said.count(expected) == 1
    found = json.loads((tmp_path / "result.json").read_text())["results"]["model"]["eigen"]
    last = [record for record in learned(quiet) if "evaluation" in record][-1]
    assert found["abs_rel"] == pytest.approx(last["abs_rel"], abs=5e-6)


def test_a_job_that_is_stopped_three_ways_comes_back_each_time(cluster, train, quiet):
    job = train()
    job.wait_for_step(4)
    cluster.client("scancel", "--signal=USR2", "--batch", str(job.number))
    job.wait_for_restart(1)
    job.wait_until_running()
    assert "stopped by a signal; back into the queue" in job.said()
    job.wait_for_step(job.newest() + 4)
    cluster.client("scontrol", "requeue", str(job.number))
    job.wait_for_restart(2)
    job.wait_until_running()
    job.wait_for_step(job.newest() + 4)
    other = cluster.submit(
        "tests/slurm/sleep.sh", sbatch=["--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null"]
    )
    job.wait_for_restart(3)
    assert cluster.wait_for_end(other, 60) == "COMPLETED"
    assert job.wait_for_end() == "COMPLETED", job.said()
    assert same(job, quiet)
    # what each start said is in one log
    assert [int(number) for number in re.findall(r"start (\d), ", job.said())] == [1, 2, 3, 4]


@pytest.mark.long
def test_time_limits_in_mid_run_are_no_end(cluster, train):
    """SLURM itself tells it to make room, at any time from its start to most of a minute later; training takes longer.

    That a run which goes on learns what it would have learned is shown above.
    """
    options = {"train.total-samples": 12 * 2000, "train.evaluate-every": 12 * 2000}
    job = train(["--nodes=1", "--time=1", "--signal=B:USR2@40"], ranks=1, **options)
    job.wait_for_restart(1)
    assert "stopped by a signal; back into the queue" in job.said()
    job.wait_until_running()
    step = job.newest()
    job.wait_for_step(step + 4)
    if step:  # it had come to one before it was told
        cluster.wait(lambda: re.search(r"resumed at sample [1-9]", job.said()), 60)
    cluster.client("scancel", str(job.number))
    assert job.wait_for_end(60) == "CANCELLED"


@pytest.mark.long
def test_a_lost_node_sends_the_job_back_into_the_queue(cluster, train, quiet):
    job = train(**{"train.heartbeat-timeout": 5})
    job.wait_for_step(4)
    cluster.kill_node("node2")
    job.wait_for_restart(1, 180)
    cluster.start_node("node2")
    assert job.wait_for_end() == "COMPLETED", job.said()
    assert same(job, quiet)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"train.batch-size": 0}, "error: train.batch_size = 0: must be at least 1"),
        ({"data.shards": "/nowhere"}, "the run failed on its own"),
    ],
)
def test_a_run_that_fails_on_its_own_is_not_tried_again(cluster, train, options, words):
    job = train(**options)
    assert job.wait_for_end(90) == "FAILED"
    assert words in job.said()
    assert cluster.restarts(job.number) == 0


def test_the_number_of_restarts_has_a_limit(cluster, train):
    job = train(["--nodes=1"], ranks=1, environment={"MAX_RESTARTS": "1"}, **{"train.total-samples": 12 * 1000})
    # the first one comes before anything is trained, while the script still reads its options
    cluster.wait(lambda: cluster.runs("mde_dist.config", job.number), 60)
    cluster.client("scancel", "--signal=USR2", "--batch", str(job.number))
    job.wait_for_restart(1)
    job.wait_until_running()
    job.wait_for_step(4)
    cluster.client("scancel", "--signal=USR2", "--batch", str(job.number))
    assert job.wait_for_end(60) == "FAILED"
    assert "restarted 1 times already (MAX_RESTARTS)" in job.said()
    assert (job.run / "PREEMPTED").exists()  # the same command goes on


def test_what_a_user_cancels_does_not_come_back(cluster, train):
    job = train(["--nodes=1"], ranks=1, **{"train.total-samples": 12 * 1000})
    job.wait_for_step(4)
    cluster.client("scancel", str(job.number))
    assert job.wait_for_end(60) == "CANCELLED"
    cluster.wait(lambda: "stopped at sample" in job.said(), 30)
    assert not cluster.client("squeue", "-h", "-j", str(job.number), "-t", "PD,R").strip()
    assert cluster.restarts(job.number) == 0


def test_a_job_that_slurm_does_not_take_back_says_so(cluster, train):
    job = train(["--nodes=1", "--no-requeue"], ranks=1, **{"train.total-samples": 12 * 1000})
    job.wait_for_step(4)
    cluster.client("scancel", "--signal=USR2", "--batch", str(job.number))
    assert job.wait_for_end(60) == "FAILED"
    assert "SLURM does not take it back; submit it again to go on" in job.said()
