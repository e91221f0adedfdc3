"""Optimizer and schedule: a pure function of samples seen, and a state that continues bit for bit."""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from mde_dist.training.config import OptimConfig
from mde_dist.training.optim import learning_rate, load_optimizer_tensors, make_optimizer, optimizer_tensors


def small_model(seed=0, width=4):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, 1, 1)
        )


def train_step(model, optimizer, step):
    image = torch.rand((2, 3, 8, 8), generator=torch.Generator().manual_seed(step))
    optimizer.zero_grad()
    (model(image) - image.sum(1, keepdim=True)).square().mean().backward()
    optimizer.step()


# --- schedule ---


def test_warm_up_rises_by_equal_steps_to_the_whole_rate():
    config = OptimConfig(lr=1e-3)  # over 240 samples, in batches of 24: ten steps, the first of which has a tenth
    rates = [learning_rate(config, seen, 10**9, 24) for seen in range(0, 264, 24)]
    assert rates == pytest.approx([1e-4 * step for step in range(1, 11)] + [1e-3])


@pytest.mark.parametrize("batch", [1, 5, 7, 8, 100])
def test_warm_up_is_over_the_same_samples_for_every_batch(batch):
    config = OptimConfig(lr=1e-3, warmup_samples=20, schedule="constant")
    for seen in range(0, 40, batch):
        # the share of the warm-up that is behind once the step is done
        assert learning_rate(config, seen, 1000, batch) == pytest.approx(1e-3 * min(seen + batch, 20) / 20)


def test_cosine_golden_points():
    config = OptimConfig(lr=2e-3, warmup_samples=100)
    # 100 .. 1100: half a cosine from lr to 1 % of it; halfway the mean of both, at a third 0.01 + 0.99 * 0.75
    assert learning_rate(config, 100, 1100, 8) == pytest.approx(2e-3)
    assert learning_rate(config, 600, 1100, 8) == pytest.approx(2e-3 * 0.505)
    assert learning_rate(config, 100 + 1000 // 4, 1100, 8) == pytest.approx(
        2e-3 * (0.01 + 0.99 * (2 + math.sqrt(2)) / 4)
    )
    assert learning_rate(OptimConfig(lr=2e-3, warmup_samples=0), 300, 900, 8) == pytest.approx(2e-3 * 0.7525)
    assert learning_rate(config, 1100, 1100, 8) == pytest.approx(2e-5)
    assert learning_rate(config, 5000, 1100, 8) == pytest.approx(2e-5)  # past the end it does not rise again


def test_poly_golden_points():
    config = OptimConfig(lr=2e-3, warmup_samples=100, schedule="poly", poly_power=0.9, min_lr_ratio=0.0)
    assert learning_rate(config, 100, 1100, 8) == pytest.approx(2e-3)
    assert learning_rate(config, 600, 1100, 8) == pytest.approx(2e-3 * 0.5**0.9)
    assert learning_rate(config, 1100, 1100, 8) == 0
    straight = OptimConfig(lr=1.0, warmup_samples=0, schedule="poly", poly_power=1, min_lr_ratio=0.2)
    assert learning_rate(straight, 25, 100, 8) == pytest.approx(0.2 + 0.8 * 0.75)
    assert learning_rate(straight, 400, 100, 8) == pytest.approx(0.2)


def test_cosine_falls_all_the_way():
    config = OptimConfig(warmup_samples=50)
    rates = [learning_rate(config, seen, 2000, 8) for seen in range(50, 2001)]
    assert all(a > b for a, b in pairwise(rates))
    assert max(rates) == pytest.approx(config.lr)


def test_constant_stays_after_warm_up():
    config = OptimConfig(lr=5e-4, schedule="constant", warmup_samples=4)
    assert learning_rate(config, 1, 100, 1) == pytest.approx(2.5e-4)
    assert {learning_rate(config, seen, 100, 1) for seen in (4, 50, 100, 10_000)} == {5e-4}


@pytest.mark.parametrize("schedule", ["constant", "cosine", "poly"])
@pytest.mark.parametrize(("warmup", "total"), [(0, 1), (0, 0), (10, 10), (10, 5)])
def test_short_runs_have_a_rate(schedule, warmup, total):
    config = OptimConfig(lr=1e-3, schedule=schedule, warmup_samples=warmup)
    for seen in range(12):
        assert 1e-5 * 0.999 <= learning_rate(config, seen, total, 8) <= 1e-3 * 1.001
    assert learning_rate(config, 0, total, 8) == pytest.approx(1e-3 if warmup == 0 else 8e-4)


# --- optimizer ---


def test_only_kernels_are_decayed():
    model = small_model()
    optimizer = make_optimizer(model, OptimConfig(weight_decay=0.1, lr=0.01))
    assert type(optimizer) is torch.optim.AdamW
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    named = dict(model.named_parameters())
    assert {name: decay[id(p)] for name, p in named.items()} == {
        "0.weight": 0.1,
        "0.bias": 0.0,
        "1.weight": 0.0,
        "1.bias": 0.0,
        "3.weight": 0.1,
        "3.bias": 0.0,
    }
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(named)  # each once
    # a gradient of zero moves nothing but what is decayed: by lr * decay
    before = {name: p.detach().clone() for name, p in named.items()}
    for p in named.values():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in named.items():
        assert torch.allclose(p, before[name] * (0.999 if p.ndim > 1 else 1), rtol=1e-6, atol=0), name


def test_rate_of_the_config_is_that_of_the_first_step():
    model = small_model()
    before = [p.detach().clone() for p in model.parameters()]
    train_step(model, make_optimizer(model, OptimConfig(lr=0.02, weight_decay=0.0)), 0)
    moved = torch.cat([(p - b).abs().flatten() for p, b in zip(model.parameters(), before, strict=True)])
    # Adam's first step is lr for every parameter with a gradient far above epsilon
    assert moved.max().item() == pytest.approx(0.02, rel=1e-3)


# --- state ---


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_a_restored_optimizer_continues_bit_for_bit(steps):
    config = OptimConfig(lr=0.01)
    model = small_model()
    optimizer = make_optimizer(model, config)
    for step in range(steps):
        train_step(model, optimizer, step)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    tensors = {name: value.clone() for name, value in optimizer_tensors(model, optimizer).items()}

    other = small_model(seed=1)
    other.load_state_dict(weights)
    restored = make_optimizer(other, config)
    load_optimizer_tensors(other, restored, tensors)
    for step in range(steps, steps + 3):
        train_step(model, optimizer, step)
        train_step(other, restored, step)
    for name, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name
    after = optimizer_tensors(other, restored)
    for name, value in optimizer_tensors(model, optimizer).items():
        assert torch.equal(after[name], value), name


def test_without_the_state_it_does_not_continue():
    # what the test above would miss if the state did not matter
    model, other = small_model(), small_model()
    optimizer = make_optimizer(model, OptimConfig())
    train_step(model, optimizer, 0)
    other.load_state_dict(model.state_dict())
    fresh = make_optimizer(other, OptimConfig())
    train_step(model, optimizer, 1)
    train_step(other, fresh, 1)
    assert not torch.equal(model[0].weight, other[0].weight)


def test_state_is_named_by_parameter():
    model = small_model()
    optimizer = make_optimizer(model, OptimConfig())
    assert optimizer_tensors(model, optimizer) == {}
    train_step(model, optimizer, 0)
    tensors = optimizer_tensors(model, optimizer)
    names = {name for name, _ in model.named_parameters()}
    assert set(tensors) == {f"{name}|{key}" for name in names for key in ("step", "exp_avg", "exp_avg_sq")}
    assert tensors["0.weight|exp_avg"].shape == model[0].weight.shape
    # Adam after one step: (1 - beta) of the gradient, and of its square
    assert torch.allclose(tensors["0.weight|exp_avg"], 0.1 * model[0].weight.grad)
    assert torch.allclose(tensors["0.weight|exp_avg_sq"], 0.001 * model[0].weight.grad ** 2)


def trained_tensors(model):
    optimizer = make_optimizer(model, OptimConfig())
    train_step(model, optimizer, 0)
    return optimizer_tensors(model, optimizer)


def test_tensors_of_another_shape_are_refused():
    tensors, model = trained_tensors(small_model(width=5)), small_model(width=4)
    with pytest.raises(ValueError, match="shape"):
        load_optimizer_tensors(model, make_optimizer(model, OptimConfig()), tensors)


def test_tensors_of_unknown_parameters_are_refused():
    tensors, model = trained_tensors(nn.Sequential(*small_model(), nn.Conv2d(1, 1, 1))), small_model()
    with pytest.raises((KeyError, ValueError)):
        load_optimizer_tensors(model, make_optimizer(model, OptimConfig()), tensors)


def test_tensors_that_leave_parameters_out_are_refused():
    # those of a resnet18 all fit a resnet34, whose other layers would begin anew without a word
    tensors, model = trained_tensors(small_model()), nn.Sequential(*small_model(), nn.Conv2d(1, 1, 1))
    with pytest.raises((KeyError, ValueError)):
        load_optimizer_tensors(model, make_optimizer(model, OptimConfig()), tensors)


def test_another_batch_than_the_one_it_is_meant_for_changes_the_rate_by_the_root():
    config = OptimConfig(lr=1e-3, base_batch_size=8, schedule="constant", warmup_samples=0)
    rates = [learning_rate(config, 0, 100, batch) for batch in (8, 32, 2)]
    assert rates == pytest.approx([1e-3, 2e-3, 5e-4])
    assert learning_rate(OptimConfig(lr=1e-3, schedule="constant", warmup_samples=0), 0, 100, 32) == 1e-3
