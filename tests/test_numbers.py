"""A loss or a gradient that is not finite: nothing is learned from it, whoever sees it, and the batch is named."""

import json
import re
from functools import partial
from pathlib import Path

import pytest
from commands import learned, records, small
from faults import not_finite, together
from safetensors.torch import load_file
from warm import warm_run, without_pictures

from mde_dist.data.shards import open_split
from mde_dist.training.checkpoint import newest_checkpoint
from mde_dist.training.config import read_config
from mde_dist.training.data_stream import batch_keys
from mde_dist.utils.errors import UserError

pytestmark = pytest.mark.distributed


def train(directory: Path, shards: Path, *faults, processes=2, **changes):
    given = small(data_shards=shards, train_total_samples=36, **changes) | {"run": directory / "run"}
    return warm_run("train", processes=processes, before=partial(together, without_pictures, *faults), **given)


def errors(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith("error")]


def keys_of(shards: Path, ranks: list[int]) -> list[str]:
    config = read_config(["--train.batch-size", "12"])
    with open_split(shards, "train") as split:
        return batch_keys(config, split, 12, 2, ranks)


@pytest.mark.parametrize(
    ("what", "rank", "said", "ranks"),
    [
        ("loss", 1, "the loss of rank 1 is not finite at sample 12", [1]),
        ("loss", None, "the loss of rank 0, 1 is not finite at sample 12", [0, 1]),
        ("gradient", 0, "the gradient is not finite (nan) at sample 12", [0, 1]),
    ],
)
def test_it_stops_all_ranks_before_the_optimizer_steps_and_names_the_batch(
    room_shards, tmp_path, what, rank, said, ranks
):
    run = tmp_path / "run"
    done = train(tmp_path, room_shards, partial(not_finite, 2, what, rank))
    assert done.returncode == 2, done.stdout + done.stderr
    (line,) = errors(done.stderr)
    assert line.startswith(f"error: {said}")
    keys = keys_of(room_shards, ranks)
    assert f"(keys: {', '.join(keys)})" in line
    assert f"--debug-from {run}/failed" in line
    assert newest_checkpoint(run / "checkpoints").state.step == 1
    # the state before the batch is kept to be looked at, and is none to go on from
    failed = newest_checkpoint(run / "failed")
    assert json.loads((failed.path / "state.json").read_text())["batch"] == keys
    before = load_file(run / "checkpoints/step-00000001/model.safetensors")
    assert all(failed.tensors["model.safetensors"][name].equal(before[name]) for name in before)


def test_what_the_device_did_before_the_host_heard_of_it_was_not_learned_from(room_shards, tmp_path):
    """Nothing is logged or saved between: the step after the bad one is done when the bad one is heard of."""
    seldom = {"train_log_every": 36, "train_evaluate_every": 36, "optim_ema_samples": 100}
    options = seldom | {"train_checkpoint_every": 36, "processes": 1}
    done = train(tmp_path / "struck", room_shards, partial(not_finite, 2, "loss"), **options)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "the loss is not finite at sample 12" in errors(done.stderr)[0]
    failed = newest_checkpoint(tmp_path / "struck/run/failed")
    assert (failed.state.step, failed.state.samples_seen) == (1, 12)
    done = train(
        tmp_path / "whole", room_shards, **options | {"train_checkpoint_every": 12, "train_keep_checkpoints": 9}
    )
    assert done.returncode == 0, done.stderr
    for name, tensors in failed.tensors.items():
        whole = load_file(tmp_path / "whole/run/checkpoints/step-00000001" / name)
        assert all(tensors[key].equal(value) for key, value in whole.items()), name


def test_what_does_not_come_again_is_no_obstacle(room_shards, tmp_path):
    assert train(tmp_path / "struck", room_shards, partial(not_finite, 2, "loss", 1)).returncode == 2
    for name in ("struck", "undisturbed"):
        done = train(tmp_path / name, room_shards)
        assert done.returncode == 0, done.stderr
    assert learned(tmp_path / "struck/run") == learned(tmp_path / "undisturbed/run")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_batch_can_be_left_out_without_a_trace(room_shards, tmp_path, rank):
    """The loss of one rank is nan: the weights stay, and so do the statistics, which its forward pass has changed."""
    options = {
        "train_nonfinite": "skip",
        "train_checkpoint_every": 12,
        "train_keep_checkpoints": 9,
        "train_evaluate_every": 36,
    }
    done = train(tmp_path, room_shards, partial(not_finite, 2, "loss", rank), **options)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "run"
    assert f"batch 1 left out of at most 10: the loss of rank {rank} is not finite at sample 12" in done.stdout
    lines = [r for r in records(run) if "loss" in r]
    assert [(r["samples"], r.get("skipped", 0)) for r in lines] == [(12, 0), (24, 1), (36, 1)]
    assert lines[1]["loss"] is None and lines[1]["grad_norm"] is None
    first, second = (load_file(run / f"checkpoints/step-0000000{step}/model.safetensors") for step in (1, 2))
    assert all(first[name].equal(second[name]) for name in first)
    assert any(not first[name].equal(value) for name, value in load_file(run / "model.safetensors").items())


def test_a_model_that_explodes_is_stopped_and_debug_mode_shows_where(room_shards, tmp_path):
    """No fault is injected here: a rate of 1e20 does it."""
    options = {
        "optim_lr": 1e20,
        "optim_warmup_samples": 0,
        "optim_grad_clip_norm": 0,
        "train_nonfinite": "skip",
        "train_max_skipped": 1,
    }
    done = train(tmp_path, room_shards, processes=1, **options)
    assert done.returncode == 2
    (line,) = errors(done.stderr)
    assert "at sample 24" in line
    assert "1 batches were left out before" in line
    hint = re.search(r"python -m mde_dist.train (--debug .*)$", line)[1]
    done = warm_run("train", *hint.split())
    assert done.returncode != 0
    assert re.search(r"UserError: encoder\.\S+ \(\w+\) gives values that are not finite", done.stderr)
    assert "in forward" in done.stderr  # the traceback leads there


def test_debug_from_is_for_debugging():
    with pytest.raises(UserError, match="debug_from is for --debug only"):
        read_config(["--debug-from", "x"])
