"""One training, whatever the number of ranks: the same gradients, weights and scores, to rounding or exactly."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from commands import learned, records, small
from faults import die, forbid_pickle, holes, together
from safetensors.torch import load_file
from warm import warm_run, without_pictures

pytestmark = pytest.mark.distributed

ONE_STEP = {
    **{"train_total_samples": 16, "train_batch_size": 16, "train_evaluate_every": 16, "evaluate_limit": 1},
    **{"optim_grad_clip_norm": 0, "optim_warmup_samples": 0, "optim_lr": 1e-3, "optim_weight_decay": 0.1},
}


STRONG = {
    **{"model_norm": "group", "model_upsample": "bilinear", "model_head": "full", "model_output": "log"},
    **{"loss_kind": "silog", "loss_gradient_weight": 0.5, "augment_zoom": 1.5, "augment_cut_depth": 0.5},
}


def train(directory: Path, shards: Path, processes: int, *flags, before=holes, **changes) -> Path:
    given = small(data_shards=shards, **changes)
    fault = partial(together, without_pictures, before) if before else without_pictures
    done = warm_run("train", *flags, processes=processes, before=fault, run=directory, **given)
    assert done.returncode == 0, done.stderr
    return directory


@pytest.fixture(scope="module", params=["group", "frozen", "strong"])
def steps(request, room_shards, scratch):
    """(ranks, accumulation) -> the checkpoint after one step; ranks and parts differ in their count of valid pixels."""
    root, case = scratch(request.param), request.param
    flags, options = (["--model.skip-conv"], STRONG) if case == "strong" else ([], {"model_norm": case})
    shapes = [(1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (4, 1), (4, 2)]
    found = {}
    for ranks, parts in shapes if case == "group" else [(1, 1), (2, 2), (4, 1)]:
        run = root / f"{ranks}x{parts}"
        train(run, room_shards, ranks, *flags, train_grad_accum_steps=parts, **options, **ONE_STEP)
        found[ranks, parts] = run / "checkpoints/step-00000001"
    return found


def gradients(checkpoint: Path) -> dict[str, torch.Tensor]:
    """AdamW's first moment after one step is a tenth of the gradient."""
    state = load_file(checkpoint / "optimizer.safetensors")
    return {name: 10 * value for name, value in state.items() if name.endswith("|exp_avg")}


def test_one_step_has_the_same_gradient_on_every_number_of_ranks_and_parts(steps):
    reference = gradients(steps[1, 1])
    assert all(value.abs().max() > 0 for value in reference.values())
    for shape, checkpoint in steps.items():
        for name, value in gradients(checkpoint).items():
            difference, size = (value - reference[name]).abs().max(), reference[name].abs().max()
            assert difference <= 2e-5 * size, (shape, name, float(difference / size))


def test_one_step_leads_to_the_same_weights(steps):
    """To rounding: the step of a weight is lr * g / (|g| + eps), which is steep only where g is next to nothing."""
    reference, slope = load_file(steps[1, 1] / "model.safetensors"), gradients(steps[1, 1])
    for shape, checkpoint in steps.items():
        for name, value in load_file(checkpoint / "model.safetensors").items():
            clear = torch.ones_like(value, dtype=torch.bool)
            if f"{name}|exp_avg" in slope:
                gradient = slope[f"{name}|exp_avg"].abs()
                clear = gradient > 1e-3 * gradient.max()
                assert clear.any(), name
            assert torch.allclose(value[clear], reference[name][clear], rtol=1e-5, atol=1e-6), (shape, name)


def test_the_loss_is_the_mean_over_the_global_batch(steps):
    losses = {
        shape: next(r["loss"] for r in records(checkpoint.parent.parent) if "loss" in r)
        for shape, checkpoint in steps.items()
    }
    assert len(losses) >= 3
    assert all(loss == pytest.approx(losses[1, 1], rel=1e-6) for loss in losses.values())


@pytest.mark.parametrize("ranks", [3, 4])
def test_killed_on_several_ranks_it_ends_bit_for_bit_as_undisturbed(room_shards, tmp_path, ranks):
    """With batch statistics, and on three ranks and more, where a sum depends on the order in which it is taken."""
    options = {"train_total_samples": 36, "train_evaluate_every": 36}
    undisturbed = train(tmp_path / "undisturbed", room_shards, ranks, before=None, **options)
    given = small(data_shards=room_shards, **options) | {"run": tmp_path / "run"}
    done = warm_run("train", processes=ranks, before=partial(die, "backward", 4, "before"), **given)
    assert done.returncode != 0
    train(tmp_path / "run", room_shards, ranks, before=None, **options)
    assert learned(tmp_path / "run") == learned(undisturbed)
    one, other = (load_file(run / "model.safetensors") for run in (tmp_path / "run", undisturbed))
    assert all(one[name].equal(other[name]) for name in one)


def test_killed_it_goes_on_on_another_number_of_ranks_with_the_same_losses_to_rounding(room_shards, tmp_path):
    options = {"model_norm": "group", "optim_lr": 1e-4}
    undisturbed = train(tmp_path / "undisturbed", room_shards, 1, before=None, **options)
    given = small(data_shards=room_shards, **options) | {"run": tmp_path / "run"}
    done = warm_run("train", processes=2, before=partial(die, "backward", 4, "after"), **given)
    assert done.returncode != 0
    train(tmp_path / "run", room_shards, 3, before=None, **options)
    lines, others = ([r for r in learned(run) if "loss" in r] for run in (tmp_path / "run", undisturbed))
    assert [r["batch"] for r in lines] == [r["batch"] for r in others]
    assert [r["samples"] for r in lines] == [12, 24, 36, 48, 60]
    assert [r["loss"] for r in lines] == pytest.approx([r["loss"] for r in others], rel=1e-4)


def test_average_and_statistics_are_those_of_all_ranks(room_shards, tmp_path):
    """Rank 1 scores its images as rank 0 does: the same digits as one process that reads the published model."""
    run = train(tmp_path / "run", room_shards, 2, "--evaluate.flip", before=None, optim_ema_samples=24)
    last = [line for line in records(run) if "evaluation" in line][-1]
    target = tmp_path / "scores.json"
    for flags in (["--flip"], []):
        done = warm_run("evaluate", *flags, checkpoint=run / "model.safetensors", json=target, **{"batch-size": 3})
        assert done.returncode == 0, done.stderr
        scored = json.loads(target.read_text())["results"]["model"]["eigen"]
        assert ({name: last[name] for name in scored} == scored) == bool(flags)
    assert json.loads((run / "evaluations/last.json").read_text())["predictor"]["flip"] is True


def test_nothing_reads_or_writes_a_pickle(room_shards, tmp_path):
    given = small(data_shards=room_shards, train_total_samples=36) | {"run": tmp_path / "run"}
    faults = partial(together, forbid_pickle, partial(die, "optimizer", 3, "before"))
    assert warm_run("train", processes=2, before=faults, **given).returncode == -9
    done = warm_run("train", processes=2, before=partial(together, without_pictures, forbid_pickle), **given)
    assert done.returncode == 0, done.stderr
    assert "resumed at sample" in done.stdout
