"""Masked sums: what was not measured has no part in loss or gradient."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mde_dist.learning.losses import mse, valid_pixels


def random_pair(seed, shape=(3, 7, 9), holes=0.4):
    rng = np.random.default_rng(seed)
    depth = rng.uniform(0.3, 10, shape) * (rng.random(shape) >= holes)
    prediction = rng.uniform(0.01, 12, shape)
    return torch.from_numpy(prediction.astype(np.float32)), torch.from_numpy(depth.astype(np.float32))


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32 - 1), st.floats(0, 1))
def test_sum_and_count_are_those_of_numpy(seed, holes):
    prediction, depth = random_pair(seed, holes=holes)
    p, g = prediction.double().numpy(), depth.double().numpy()
    assert mse(prediction, depth).item() == pytest.approx(((p - g)[g > 0] ** 2).sum(), rel=1e-5, abs=1e-9)
    count = valid_pixels(depth)
    assert count.dtype == torch.float64
    assert count.shape == ()
    assert count.item() == (g > 0).sum()


def test_by_hand():
    prediction = torch.tensor([[[1.0, 2.0], [3.0, 9.0]]])
    depth = torch.tensor([[[2.0, 2.5], [0.0, 6.0]]])
    # 1 + 0.25 + 9; the 3.0 stands over a hole
    assert mse(prediction, depth).item() == 10.25
    assert valid_pixels(depth).item() == 3


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**32 - 1))
def test_gradient_is_twice_the_error_and_zero_at_holes(seed):
    prediction, depth = random_pair(seed)
    prediction.requires_grad_()
    mse(prediction, depth).backward()
    expected = torch.where(depth > 0, 2 * (prediction.detach() - depth), 0.0)
    assert torch.allclose(prediction.grad, expected, rtol=1e-6, atol=1e-6)
    assert (prediction.grad[depth == 0] == 0).all()
    assert (prediction.grad[depth > 0] != 0).all()


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf, 1e30])
def test_what_stands_over_a_hole_poisons_neither_sum_nor_gradient(poison):
    prediction, depth = random_pair(1)
    clean = mse(prediction, depth)
    prediction[depth == 0] = poison
    prediction.requires_grad_()
    loss = mse(prediction, depth)
    loss.backward()
    assert loss.item() == clean.item()
    assert torch.isfinite(prediction.grad).all()
    assert (prediction.grad[depth == 0] == 0).all()


def test_what_is_wrong_at_a_measured_pixel_is_seen():
    prediction, depth = random_pair(1)
    prediction[tuple((depth > 0).nonzero()[0])] = np.nan
    assert torch.isnan(mse(prediction, depth))


def test_a_batch_of_holes_is_zero_and_has_a_gradient_of_zeros():
    prediction = torch.rand((2, 4, 5), generator=torch.Generator().manual_seed(0)).requires_grad_()
    depth = torch.zeros((2, 4, 5))
    loss = mse(prediction, depth)
    loss.backward()
    assert loss.item() == 0
    assert valid_pixels(depth).item() == 0
    assert (prediction.grad == 0).all()


def test_parts_of_a_batch_add_up():
    prediction, depth = random_pair(2, (6, 8, 8))
    whole, parts = mse(prediction, depth), sum(mse(prediction[k : k + 2], depth[k : k + 2]) for k in (0, 2, 4))
    assert whole.item() == pytest.approx(parts.item(), rel=1e-6)
    assert valid_pixels(depth) == sum(valid_pixels(depth[k : k + 2]) for k in (0, 2, 4))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_predictions_are_summed_in_float32(dtype):
    # 10,000 errors of 3 m: 90,000 is beyond float16, and bfloat16 stops counting at a few hundred terms
    prediction, depth = torch.full((1, 100, 100), 5.0, dtype=dtype), torch.full((1, 100, 100), 2.0)
    loss = mse(prediction, depth)
    assert loss.dtype == torch.float32
    assert loss.item() == 90_000


def test_count_is_exact_beyond_float32():
    depth = torch.ones(1).expand(1, 4097, 4097)  # one more than 2**24 + 2**13
    assert valid_pixels(depth).item() == 4097**2
