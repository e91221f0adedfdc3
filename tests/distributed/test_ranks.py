"""One training on several ranks: real processes over gloo.

`runs` has one training of each kind that a user starts, on one process and through the launcher; the others are forked.
"""

import json
import os
import signal
import subprocess
from functools import partial

import numpy as np
import psutil
import pytest
import torch
from commands import environment, files_below, learned, records, run, small, start, wait_for
from faults import hosts_apart
from safetensors.torch import load_file
from warm import warm_run, warm_start, without_pictures

from mde_dist.data.augmentation import normalise, resize_image
from mde_dist.distributed.process_group import check_world
from mde_dist.evaluation.metrics import resize_to
from mde_dist.evaluation.results import read_record
from mde_dist.models.depth_model import load_model
from mde_dist.models.weights import read_model
from mde_dist.training.snapshots import read_snapshots
from mde_dist.utils.errors import UserError

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def runs(undisturbed, room_shards, scratch):
    """The same small training on 1, 2 and 3 ranks, and on 2 ranks with 3 accumulation steps: directories by name."""
    root, options = scratch("ranks"), small(data_shards=room_shards)
    outcomes = {
        "2": run("train", processes=2, run=root / "2", **options),
        "3": warm_run("train", processes=3, run=root / "3", **options),
        "2x3": warm_run("train", processes=2, run=root / "2x3", **options, **{"train.grad-accum-steps": 3}),
    }
    shapes = {"2": "6 per rank x 2 ranks", "3": "4 per rank x 3 ranks", "2x3": "2 per rank x 2 ranks"}
    for name, done in outcomes.items():
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("model.safetensors\n") == 1, "the summary has to appear once"
        assert shapes[name] in done.stdout
    return {"1": undisturbed} | {name: root / name for name in outcomes}


def ranks_of(launcher: subprocess.Popen) -> list[psutil.Process]:
    return psutil.Process(launcher.pid).children(recursive=True)


def batches(directory) -> list[tuple[int, str]]:
    return [(r["samples"], r["batch"]) for r in records(directory) if "batch" in r]


@pytest.mark.parametrize("other", ["2", "3", "2x3"])
def test_every_topology_sees_the_same_global_batches(runs, other):
    assert batches(runs[other]) == batches(runs["1"])
    assert len({batch for _, batch in batches(runs["1"])}) == 5


@pytest.mark.parametrize("other", ["2", "3", "2x3"])
def test_every_topology_leaves_one_set_of_files(runs, other):
    logs = {name for name in files_below(runs[other]) if name.startswith("logs/")}
    assert logs == {f"logs/rank-{rank}.log" for rank in range(int(other[0]))}
    assert files_below(runs[other]) - logs == files_below(runs["1"]) - logs
    assert [r["samples"] for r in learned(runs[other])] == [r["samples"] for r in learned(runs["1"])]
    assert [r["start"]["ranks"] for r in records(runs[other]) if "start" in r] == [int(other[0])]


def test_numbers_of_the_host_may_travel_apart_from_those_of_the_device(runs, room_shards, tmp_path):
    """As they do where the device is a GPU: another group, the same sums, the same training."""
    done = warm_run("train", processes=2, before=hosts_apart, run=tmp_path / "apart", **small(data_shards=room_shards))
    assert done.returncode == 0, done.stderr
    assert learned(tmp_path / "apart") == learned(runs["2"])


def test_gradients_that_travel_as_bf16_are_alike_on_all_ranks_and_nearly_those_of_fp32(runs, room_shards, tmp_path):
    options = {"train.grad-comm-dtype": "bf16", "train.ddp-bucket-mb": 4}
    done = warm_run("train", processes=2, run=tmp_path / "bf16", **small(data_shards=room_shards), **options)
    assert done.returncode == 0, done.stderr
    theirs, ours = (load_file(path / "model.safetensors") for path in (runs["2"], tmp_path / "bf16"))
    assert any(not theirs[name].equal(value) for name, value in ours.items())
    losses = [[r["loss"] for r in records(path) if "loss" in r] for path in (runs["2"], tmp_path / "bf16")]
    assert losses[0] != losses[1]
    np.testing.assert_allclose(*losses, rtol=0.1)


def test_a_checkpoint_scores_the_same_digits_on_1_2_and_3_ranks(runs, tmp_path):
    results = []
    one_core = partial(os.sched_setaffinity, 0, {min(os.sched_getaffinity(0))})  # sums depend on the number of threads
    for processes in (1, 2, 3):
        target = tmp_path / f"{processes}.json"
        options = {"checkpoint": runs["3"] / "model.safetensors", "json": target, "batch-size": 3, "before": one_core}
        done = warm_run("evaluate", "--protocols", "eigen", "full", "blog", processes=processes, **options)
        assert done.returncode == 0, done.stderr
        results.append(json.loads(target.read_text()))
    assert results[0] == results[1] == results[2]
    assert results[0]["results"]["model"]["eigen"]["images"] == 8


def test_the_baselines_do_not_depend_on_the_ranks(runs):
    def of(name):
        return [r for r in records(runs[name]) if "baseline" in r]

    assert of("1") == of("2") == of("3")
    assert len(of("1")) == 2


@pytest.mark.parametrize("name", ["1", "2", "3"])
def test_the_held_out_images_are_kept_with_what_the_model_predicts_for_them(runs, name):
    shown, other = read_snapshots(runs[name]), read_snapshots(runs["1"])
    assert shown.keys == other.keys and len(shown.keys) == 6
    assert (shown.image == other.image).all() and (shown.target == other.target).all()
    assert sorted(shown.predictions) == [24, 48, 60]
    model = load_model(*read_model(runs[name] / "model.safetensors")).eval()
    image = torch.from_numpy(shown.image).permute(0, 3, 1, 2).float() / 255
    with torch.inference_mode():
        expected = resize_to(model(normalise(resize_image(image, (32, 32)))), torch.from_numpy(shown.target))
    assert np.abs(shown.predictions[60] - expected.numpy()).max() < 2e-3


def test_a_training_keeps_the_record_that_an_evaluation_of_its_model_writes(runs, tmp_path):
    kept = read_record(runs["2"] / "evaluations/last.json")
    done = warm_run("evaluate", run=runs["2"], json=tmp_path / "scores.json", **{"batch-size": 3})
    assert done.returncode == 0, done.stderr
    scored = read_record(tmp_path / "scores.json")
    for name in ("fingerprints", "images", "where", "ground_truth"):
        assert kept[name] == scored[name]


def test_killed_on_two_ranks_it_goes_on_on_one_with_the_same_batches(runs, room_shards, tmp_path):
    directory = tmp_path / "run"
    options = small(data_shards=room_shards)
    process = warm_start("train", processes=2, run=directory, **options)
    wait_for(lambda: (directory / "checkpoints/step-00000002").is_dir(), process)
    process.kill()
    done = warm_run("train", run=directory, before=without_pictures, **options)
    assert done.returncode == 0, done.stderr
    assert "resumed at sample" in done.stdout
    assert batches(directory) == batches(runs["1"])


def test_ranks_whose_launcher_is_killed_stop_by_themselves_and_leave_a_checkpoint(runs, room_shards, tmp_path):
    directory = tmp_path / "run"
    process = start("train", processes=2, run=directory, **small(data_shards=room_shards))
    wait_for(lambda: (directory / "checkpoints/step-00000001").is_dir(), process)
    ranks = ranks_of(process)
    process.kill()
    _, alive = psutil.wait_procs(ranks, timeout=60)
    assert not alive
    assert (directory / "PREEMPTED").is_file()
    done = warm_run("train", processes=2, before=without_pictures, run=directory, **small(data_shards=room_shards))
    assert done.returncode == 0, done.stderr
    assert learned(directory) == learned(runs["2"])


def test_two_ranks_give_the_same_bits_twice(runs, room_shards, tmp_path):
    options = small(data_shards=room_shards)
    done = warm_run("train", processes=2, before=without_pictures, run=tmp_path / "again", **options)
    assert done.returncode == 0, done.stderr
    assert learned(tmp_path / "again") == learned(runs["2"])
    one, other = load_file(tmp_path / "again/model.safetensors"), load_file(runs["2"] / "model.safetensors")
    assert all(one[name].equal(other[name]) for name in one)


def test_a_batch_that_does_not_divide_by_the_ranks_is_refused_once(room_shards, tmp_path):
    done = run("train", processes=2, run=tmp_path / "run", **small(data_shards=room_shards, train_batch_size=9))
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert len(lines) == 1
    assert "does not divide by 2 ranks" in lines[0]
    assert not list(tmp_path.iterdir())


def test_processes_that_would_train_independently_are_refused(room_shards, tmp_path):
    """As `srun -n 2 python -m mde_dist.train` would start them: siblings, but nobody gave them a rank."""
    options = small(data_shards=room_shards)
    for variable in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"):
        done = warm_run("train", run=tmp_path / "run", env=environment(**{variable: "2"}), **options)
        assert done.returncode == 2
        assert "2 independent trainings" in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_world_smaller_than_promised_is_refused():
    check_world(2, 2)
    with pytest.raises(UserError, match="promised 2 processes"):
        check_world(1, 2)


def test_a_signal_to_one_rank_stops_all_at_the_same_step(runs, room_shards, tmp_path):
    directory = tmp_path / "run"
    options = small(data_shards=room_shards)
    process = start("train", processes=2, run=directory, **options)
    wait_for(lambda: (directory / "checkpoints/step-00000001").is_dir(), process)
    ranks_of(process)[1].send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=60)
    assert (directory / "PREEMPTED").is_file(), output
    done = warm_run("train", processes=2, before=without_pictures, run=directory, **options)
    assert done.returncode == 0, done.stderr
    assert learned(directory) == learned(runs["2"])
    first, again = (r for r in records(directory) if "start" in r)
    assert 0 == first["samples"] < again["samples"]
    assert first["start"]["time"] < again["start"]["time"]
