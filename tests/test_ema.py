"""The moving average, by hand."""

import math

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mde_dist.training.ema import Ema

KEPT, LEFT_OUT = torch.zeros(()), torch.ones(())


def model(value: float) -> nn.Module:
    made = nn.Sequential(nn.Linear(1, 1, bias=False), nn.BatchNorm1d(1))
    with torch.no_grad():
        made[0].weight.fill_(value)
        made[1].running_mean.fill_(value)
        made[1].num_batches_tracked.fill_(int(value))
    return made


def test_two_steps_by_hand():
    ema = Ema(model(1.0), samples=1e9)
    # early on the decay is step / (step + 9): 1/10, then 2/11
    ema.update(model(11.0), 8, 1, KEPT)
    assert ema.model[0].weight.item() == pytest.approx(0.1 * 1 + 0.9 * 11)
    assert ema.model[1].running_mean.item() == pytest.approx(10.0)
    assert ema.model[1].num_batches_tracked.item() == 11  # a count is no average
    ema.update(model(21.0), 8, 2, KEPT)
    assert ema.model[0].weight.item() == pytest.approx(2 / 11 * 10 + 9 / 11 * 21)


def test_a_step_that_is_left_out_does_not_move_it():
    ema = Ema(model(1.0), samples=1e9)
    ema.update(model(11.0), 8, 1, LEFT_OUT)
    assert ema.model[0].weight.item() == ema.model[1].running_mean.item() == 1.0


@pytest.mark.parametrize("batch", [5, 10, 50])
def test_after_its_samples_an_old_weight_counts_1_over_e_whatever_the_batch(batch):
    ema, late = Ema(model(1.0), samples=1000), 10**6
    for step in range(1000 // batch):
        ema.update(model(0.0), batch, late + step, KEPT)
    assert ema.model[0].weight.item() == pytest.approx(math.exp(-1), rel=1e-4)


def test_it_is_another_model_that_needs_no_gradient():
    first = model(1.0)
    ema = Ema(first, samples=10)
    assert all(not p.requires_grad for p in ema.model.parameters())
    assert all(p.requires_grad for p in first.parameters())
    with torch.no_grad():
        first[0].weight.fill_(5.0)
    assert ema.model[0].weight.item() == 1.0


@pytest.mark.parametrize("step", [1, 2, 10, 10**6])
def test_its_digits_are_those_of_float64(step):
    draw = torch.Generator().manual_seed(step)
    first, then = (nn.Linear(50, 40), nn.Linear(50, 40))
    with torch.no_grad():
        for tensor in (*first.parameters(), *then.parameters()):
            tensor.normal_(generator=draw)
    old, new = first.weight.detach().double(), then.weight.detach().double()
    ema = Ema(first, samples=1000)
    ema.update(then, 24, step, KEPT)
    decay = min(math.exp(-24 / 1000), step / (step + 9))
    expected = decay * old + (1 - decay) * new
    assert (ema.model.weight - expected).abs().max() < 4 * torch.finfo(torch.float32).eps * expected.abs().max()


class Counting(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls.append(str(function))
        return function(*args, **(kwargs or {}))


def test_an_update_is_a_handful_of_operations_however_many_tensors_there_are():
    """A GPU's host starts each of them by itself."""
    layers = nn.Sequential(*(nn.BatchNorm2d(2) for _ in range(50)))
    ema = Ema(layers, samples=10)
    with Counting() as counting:
        ema.update(layers, 8, 1, KEPT)
    assert 0 < len(counting.calls) < 10
    # CUDA starts as many kernels as there are tensors where their weights are a list
    assert "aten._foreach_lerp_.List" not in counting.calls
