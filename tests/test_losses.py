"""Masked sums: what was not measured has no part in loss or gradient."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mde_dist.training.config import LossConfig
from mde_dist.training.losses import berhu, depth_loss, gradient, l1, log_l1, mse, silog, valid_counts


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
    assert l1(prediction, depth).item() == pytest.approx(np.abs(p - g)[g > 0].sum(), rel=1e-5, abs=1e-9)
    expected = np.abs(np.log(p[g > 0]) - np.log(g[g > 0])).sum()
    assert log_l1(prediction, depth).item() == pytest.approx(expected, rel=1e-5, abs=1e-9)
    count = valid_counts(depth)
    assert count.dtype == torch.float64
    assert count.tolist() == [(g > 0).sum(), (g > 0).any((1, 2)).sum()]


def test_by_hand():
    prediction = torch.tensor([[[1.0, 2.0], [3.0, 9.0]]])
    depth = torch.tensor([[[2.0, 2.5], [0.0, 6.0]]])
    # 1 + 0.25 + 9; the 3.0 stands over a hole
    assert mse(prediction, depth).item() == 10.25
    assert valid_counts(depth).tolist() == [3, 1]


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


EVERY = [
    LossConfig(),
    LossConfig("l1"),
    LossConfig("log_l1"),
    LossConfig("berhu"),
    LossConfig("silog"),
    LossConfig("silog", silog_lambda=1, gradient_weight=0.5),
]
every = pytest.mark.parametrize("config", EVERY, ids=lambda config: f"{config.kind}-{config.gradient_weight:g}")


@every
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf, 1e30])
def test_what_stands_over_a_hole_poisons_neither_loss_nor_gradient(config, poison):
    prediction, depth = random_pair(1)
    clean = depth_loss(prediction, depth, config, valid_counts(depth))
    prediction[depth == 0] = poison
    prediction.requires_grad_()
    loss = depth_loss(prediction, depth, config, valid_counts(depth))
    loss.backward()
    assert loss.item() == clean.item()
    assert torch.isfinite(prediction.grad).all()
    assert (prediction.grad[depth == 0] == 0).all()
    assert (prediction.grad[depth > 0] != 0).any()


@every
def test_what_is_wrong_at_a_measured_pixel_is_seen(config):
    prediction, depth = random_pair(1)
    prediction[tuple((depth > 0).nonzero()[0])] = np.nan
    assert torch.isnan(depth_loss(prediction, depth, config, valid_counts(depth)))


@every
def test_a_batch_of_holes_is_zero_and_has_a_gradient_of_zeros(config):
    prediction = torch.rand((2, 4, 5), generator=torch.Generator().manual_seed(0)).requires_grad_()
    depth = torch.zeros((2, 4, 5))
    loss = depth_loss(prediction, depth, config, valid_counts(depth))
    loss.backward()
    assert loss.item() == 0
    assert valid_counts(depth).tolist() == [0, 0]
    assert (prediction.grad == 0).all()


@every
def test_an_image_that_is_met_exactly_has_a_finite_gradient(config):
    _, depth = random_pair(3)
    prediction = depth.clamp(min=0.5).where(depth > 0, 1.0).requires_grad_()
    depth = prediction.detach().where(depth > 0, 0.0)
    loss = depth_loss(prediction, depth, config, valid_counts(depth))
    loss.backward()
    assert loss.item() <= 1.01e-4
    assert torch.isfinite(prediction.grad).all()


@every
def test_the_shares_of_the_parts_of_a_batch_add_up(config):
    prediction, depth = random_pair(2, (6, 8, 8))
    depth[3] = 0  # an image without a measurement is in no mean
    counted = valid_counts(depth)
    assert counted.tolist() == (sum(valid_counts(depth[k : k + 2]) for k in (0, 2, 4))).tolist()
    whole = depth_loss(prediction, depth, config, counted)
    parts = sum(depth_loss(prediction[k : k + 2], depth[k : k + 2], config, counted) for k in (0, 2, 4))
    assert whole.item() == pytest.approx(parts.item(), rel=1e-6)
    without = torch.arange(6) != 3
    alone = depth_loss(prediction[without], depth[without], config, valid_counts(depth[without]))
    assert whole.item() == pytest.approx(alone.item(), rel=1e-6)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**32 - 1), st.floats(0, 0.9))
def test_silog_is_the_formula(seed, focus):
    prediction, depth = random_pair(seed)
    expected = 0.0
    for p, g in zip(prediction.double().numpy(), depth.double().numpy(), strict=True):
        d = np.log(p[g > 0]) - np.log(g[g > 0])
        expected += np.sqrt((d**2).mean() - focus * d.mean() ** 2)
    assert silog(prediction, depth, focus).item() == pytest.approx(expected, rel=1e-4)


def test_silog_forgives_a_wrong_scale_as_far_as_it_is_told_to():
    _, depth = random_pair(5)
    double = torch.where(depth > 0, 2 * depth, 1.0)
    assert silog(double, depth, 0).item() == pytest.approx(3 * np.log(2), rel=1e-5)
    assert silog(double, depth, 0.75).item() == pytest.approx(3 * np.log(2) / 2, rel=1e-4)
    assert silog(double, depth, 1).item() < 1e-2


def test_berhu_by_hand():
    depth = torch.tensor([[[5.0, 5.0, 5.0, 0.0]], [[2.0, 2.0, 2.0, 2.0]]])
    prediction = torch.tensor([[[5.5, 8.0, 0.0, 99.0]], [[2.0, 2.0, 2.0, 2.1]]])
    # first image: c = 5 / 5 = 1: 0.5, (9 + 1) / 2, (25 + 1) / 2; second: c = 0.02: (0.01 + 0.0004) / 0.04
    assert berhu(prediction, depth).item() == pytest.approx(0.5 + 5 + 13 + 0.26, rel=1e-5)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32 - 1), st.integers(1, 20), st.integers(1, 20))
def test_gradient_is_the_formula(seed, height, width):
    prediction, depth = random_pair(seed, (2, height, width))
    expected = 0.0
    for p, g in zip(prediction.double().numpy(), depth.double().numpy(), strict=True):
        for step in (1, 2, 4, 8):
            rows, columns = range(0, height, step), range(0, width, step)
            for down, right in ((step, 0), (0, step)):
                pairs = [((y, x), (y + down, x + right)) for y in rows for x in columns]
                pairs = [(a, b) for a, b in pairs if b[0] < height and b[1] < width and g[a] > 0 and g[b] > 0]
                d = [abs(np.log(p[a] / g[a]) - np.log(p[b] / g[b])) for a, b in pairs]
                expected += np.mean(d) if d else 0
    assert gradient(prediction, depth).item() == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_gradient_sees_edges_and_no_scale():
    depth = torch.ones((1, 16, 16))
    depth[..., 8:] = 4
    assert gradient(3 * depth, depth).item() == pytest.approx(0, abs=1e-5)
    # 16 of 15 * 16 pairs to the right jump by log 4; at half, quarter and eighth scale 8 of 7 * 8, 4 of 3 * 4, 2 of 2
    assert gradient(torch.ones_like(depth), depth).item() == pytest.approx(np.log(4) * (1 / 15 + 1 / 7 + 1 / 3 + 1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_predictions_are_summed_in_float32(dtype):
    # 10,000 errors of 3 m: 90,000 is beyond float16, and bfloat16 stops counting at a few hundred terms
    prediction, depth = torch.full((1, 100, 100), 5.0, dtype=dtype), torch.full((1, 100, 100), 2.0)
    loss = mse(prediction, depth)
    assert loss.dtype == torch.float32
    assert loss.item() == 90_000


def test_count_is_exact_beyond_float32():
    depth = torch.ones(1).expand(1, 4097, 4097)  # one more than 2**24 + 2**13
    assert valid_counts(depth).tolist() == [4097**2, 1]
