"""The ways in which depth numbers go wrong are recognised, and nothing is cried over that is merely not good."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mde_dist.evaluation.metrics import PROTOCOLS, score, summarise
from mde_dist.evaluation.sanity_checks import N_STATISTICS, detect_failures, image_statistics, mean_depth

IMAGES, SIZE = 40, (30, 40)


def rooms(seed=0, images=IMAGES):
    """Truths in metres: a floor that comes nearer, walls at different distances, and a box; 5 % holes."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[: SIZE[0], : SIZE[1]] / np.array(SIZE)[:, None, None]
    depth = np.empty((images, *SIZE))
    for image in depth:
        back, left, right, floor = rng.uniform(1.5, 6), *rng.uniform(0.5, 3, 2), rng.uniform(0.5, 2)
        walls = [back + 0 * x, back * left * (x + 0.3), back * right * (1.3 - x), floor * back * (1.4 - y)]
        image[:] = np.minimum.reduce(walls)
        top, side = rng.uniform(0.2, 0.7, 2)
        image[int(top * SIZE[0]) :, int(side * SIZE[1]) :][:10, :12] *= rng.uniform(0.5, 0.9)
    depth[rng.random(depth.shape) < 0.05] = 0
    return torch.from_numpy(np.clip(depth, 0, 9.5)).float()


def learned(truth, seed=1, quality=0.8, noise=0.15):
    """What a model of some quality predicts: partly the image, partly the mean map, wrong by a factor per image."""
    rng = np.random.default_rng(seed)
    mean = truth.sum(0) / (truth > 0).sum(0)
    seen = torch.where(truth > 0, truth, mean)
    factor = torch.from_numpy(rng.lognormal(0, noise, (len(truth), 1, 1)))
    return (quality * seen + (1 - quality) * mean) * factor


def said(prediction, truth, **options):
    return detect_failures(
        torch.cat([image_statistics(p, t) for p, t in zip(prediction.split(7), truth.split(7), strict=True)]), **options
    )


@pytest.mark.parametrize("quality", [1.0, 0.8, 0.5, 0.3])
@pytest.mark.parametrize("bias", [0.85, 1.0, 1.15])
def test_a_model_that_is_merely_not_good_is_left_alone(quality, bias):
    truth = rooms()
    assert said(bias * learned(truth, quality=quality), truth) == []


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**31), st.floats(0.5, 1.0), st.floats(0.05, 0.25))
def test_no_false_alarm_whatever_the_rooms(seed, quality, noise):
    # what is a third of an image, and wrong by a quarter, is sometimes taken for another image, and may be
    truth = rooms(seed)
    assert said(learned(truth, seed + 1, quality, noise), truth) == []


@pytest.mark.parametrize(
    ("factor", "words"),
    [
        (255 / 10_000, "8-bit depth (255 = 10 m) had been read as millimetres"),
        (10_000 / 255, "the ground truth were 8-bit depth"),
        (1e-3, "1/1000"),
        (1e3, "millimetres were taken for metres"),
        (100, "centimetres"),
        (5.0, "they were written as metres * 5000"),
        (1 / 6, "the ground truth were written as metres * 6000"),
        (0.256, "they were written as metres * 256 and read as millimetres"),
        (0.256 * 0.86, "they were written as metres * 256 and read as millimetres"),  # nearer to a fifth
        (256, "they were written as metres * 256 and taken for metres"),
        (1000 / 256, "they were millimetres read as metres * 256"),
        (0.1, "scaled to 0..1"),
        (2.3, "off by a constant; multiply them by 0.4"),
        (0.55, "off by a constant; multiply them by 1.7"),
        (-1.0, "not positive"),
    ],
)
def test_scales_that_are_off_are_named(factor, words):
    truth = rooms()
    (line,) = said(factor * learned(truth, noise=0.05), truth)
    assert words in line


def test_what_has_learned_nothing_is_not_said_to_have_a_unit():
    truth = rooms()
    noise = torch.from_numpy(np.random.default_rng(0).lognormal(-0.6, 0.1, truth.shape))
    assert "as if" not in said(noise, truth)[0]


def test_eight_bits_read_as_millimetres_score_0_9745():
    """As FACTS.md says: |p - g| / g with p = 255/10000 g is 0.9745 in every pixel."""
    truth = rooms()
    rows = score(truth * 255 / 10_000, truth, PROTOCOLS["full"])
    assert summarise(rows, PROTOCOLS["full"]).metrics["abs_rel"] == pytest.approx(0.9745, abs=1e-4)
    (line,) = said(truth * 255 / 10_000, truth)
    assert "0.9745" in line


def test_scale_is_no_matter_where_it_is_fitted():
    truth = rooms()
    assert said(0.01 * learned(truth), truth, scale_matters=False) == []


@pytest.mark.parametrize(
    "transform", [lambda p: 1 / p, lambda p: 0.3 / p + 0.1, lambda p: 255 / p, lambda p: 30 / (p + 1)]
)
def test_inverse_depth_is_recognised_whatever_its_scale(transform):
    truth = rooms()
    for matters in (True, False):
        (line,) = said(transform(learned(truth)), truth, scale_matters=matters)
        assert "inverted" in line


@pytest.mark.parametrize(
    ("order", "words"),
    [
        (lambda n: np.roll(np.arange(n), 1), "images 1 before"),
        (lambda n: np.roll(np.arange(n), -3), "images 3 further on"),
        (lambda n: np.arange(n)[::-1].copy(), "in reverse"),
        (lambda n: np.array(sorted(range(n), key=str)), "10 comes before 2"),
        (lambda n: np.random.default_rng(3).permutation(n), "other images than their own"),
    ],
)
@pytest.mark.parametrize("factor", [1.0, 5.0])
def test_another_order_is_recognised(order, words, factor):
    truth = rooms()
    lines = said(factor * learned(truth, noise=0.05)[order(IMAGES)], truth)
    assert words in lines[-1]
    assert "another order" in lines[-1]


def test_images_of_one_scene_that_follow_one_another_hide_no_shift():
    truth = rooms().repeat_interleave(3, 0)
    truth = truth * torch.linspace(0.97, 1.03, 3).repeat(IMAGES)[:, None, None]
    assert said(learned(truth, noise=0.02), truth) == []
    (line,) = said(learned(truth, noise=0.02).roll(1, 0), truth)
    assert "images 1 before" in line


def test_predictions_that_say_nothing_are_recognised():
    truth = rooms()
    blind = (truth.sum(0) / (truth > 0).sum(0)).expand_as(truth)
    assert said(blind, truth) == ["the predictions are the same for every image"]
    noise = torch.from_numpy(np.random.default_rng(0).lognormal(0, 0.3, (IMAGES, 1, 1)))
    (line,) = said(blind * noise, truth)
    assert "no better than other images" in line


def test_few_images_and_images_without_pixels_are_taken():
    truth = rooms()
    assert said(learned(truth)[:3].flip(0), truth[:3]) == []  # too few to tell their order
    truth[5] = 0
    assert said(learned(rooms()), truth) == []
    assert detect_failures(image_statistics(truth[5:6].double(), truth[5:6])) == []
    prediction = learned(rooms())
    prediction[3] = torch.nan
    prediction[4, 0, 0] = 1e300
    (line,) = said(prediction, truth)
    assert "not finite" in line


def test_pixels_that_are_not_finite_are_counted_where_there_is_a_truth():
    truth = rooms()
    prediction = learned(truth)
    prediction[3, 4, 5], prediction[3, 6, 7], prediction[9, 0, 0] = torch.nan, torch.inf, -torch.inf
    truth[3, 4, 5] = truth[9, 0, 0] = 2.0
    truth[3, 6, 7] = 0  # a hole
    (line,) = said(prediction, truth)
    assert "2 pixels" in line
    assert "2 of 40 images" in line


@pytest.mark.parametrize("kept_as", [lambda g: g, lambda g: (g / 1000).float().double() * 1000])
def test_the_truth_in_place_of_predictions_is_recognised(kept_as):
    """As counts, or as float32 metres; in all images or in some; where it has holes, anything may stand."""
    truth = (rooms() * 1000).round().double()
    copy = torch.where(truth > 0, kept_as(truth), 1234.0)
    (line,) = detect_failures(image_statistics(copy, truth, 1000))
    assert "the ground truth itself in every image" in line
    mixed = learned(truth)
    mixed[:7] = copy[:7]
    (line,) = detect_failures(image_statistics(mixed, truth, 1000))
    assert "the ground truth itself in 7 of 40 images" in line
    almost = copy.clone()
    almost[:, ::5, ::5] += 5
    assert detect_failures(image_statistics(almost, truth, 1000)) == []


@pytest.mark.parametrize("quality", [0.2, 0.5, 1.0])
def test_a_dozen_images_of_a_weak_model_are_in_order_and_a_shuffle_of_them_is_not(quality):
    """A weak model is nearer to the mean map than to the image: the distance alone tells a dozen of them not apart."""
    alarms = found = 0
    for seed in range(40):
        truth = rooms(seed, 12)
        prediction = learned(truth, seed + 100, quality)
        alarms += said(prediction, truth) != []
        shuffled = torch.from_numpy(np.random.default_rng(seed).permutation(12))
        found += any("order" in line for line in said(prediction[shuffled], truth))
    assert alarms == 0
    assert found >= 37


def test_signals_by_hand():
    # p / g = 2, 2, 4 (one hole, one prediction that is none): median 2; mean of the truth over 1, 2, 3 and 4
    rows = image_statistics(
        torch.tensor([[[2.0, 4.0, 12.0, 5.0, torch.nan]]]), torch.tensor([[[1.0, 2.0, 3.0, 0.0, 4.0]]])
    )
    assert rows.shape == (1, N_STATISTICS)
    assert rows[0, 0] == 2
    p, g = np.array([2, 4, 12]), np.array([1, 2, 3])
    assert rows[0, 1].item() == pytest.approx(np.corrcoef(p, g)[0, 1])
    assert rows[0, 2].item() == pytest.approx(np.corrcoef(1 / p, g)[0, 1])
    assert mean_depth(rows) == pytest.approx(2.5)
