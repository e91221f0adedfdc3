"""Metrics against plain NumPy, against numbers worked out by hand, and the deltas against arithmetic of integers."""

import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mde_dist.evaluation.metrics import METRICS, N_COLUMNS, PROTOCOLS, crop_slices, image_metrics, summarise
from mde_dist.evaluation.metrics import score as score_terms

EIGEN, FULL, BLOG, DENSEDEPTH, LSQ = (PROTOCOLS[name] for name in ("eigen", "full", "blog", "densedepth", "lsq"))
PLAIN = replace(FULL, clamp=None, valid=(0.0, math.inf))
LIMITS = {"blog": (0, np.inf), "densedepth": (0, np.inf)}
CLAMPS = {"densedepth": 100}
CROPS = {"eigen": (45, 471, 41, 601), "lsq": (45, 471, 41, 601), "densedepth": (20, 460, 24, 616)}


def score(prediction, depth, protocol, per_metre=1):
    """Per image the number of valid pixels and the metrics, float64 (batch, 1 + metrics)."""
    rows = score_terms(prediction, depth, protocol, per_metre)
    return torch.cat([rows[:, :1], image_metrics(rows, protocol)], dim=1)


def maps(values):
    """A batch of one map of one row."""
    return torch.tensor([[values]], dtype=torch.float64)


def named(prediction, depth, protocol=FULL, per_metre=1):
    """Scores of a single image by name."""
    (row,) = score(prediction, depth, protocol, per_metre).tolist()
    return {"count": row[0], **dict(zip(protocol.metrics, row[1:], strict=True))}


def pixels(prediction, depth, protocol):
    """Of one image in millimetres the predictions and truths that a protocol compares, float64 lists."""
    p, g = prediction.astype(np.float64), depth.astype(np.float64)
    inside = np.ones(g.shape, bool)
    if protocol in CROPS and g.shape == (480, 640):
        top, bottom, left, right = CROPS[protocol]
        inside[:] = False
        inside[top:bottom, left:right] = True
    low, high = LIMITS.get(protocol, (1, 10_000))
    mask = inside & (g > low) & (g < high)
    p, g = p[mask], g[mask]
    if protocol == "blog":
        return np.where(np.isfinite(p), p, 0), g
    if protocol == "lsq" and len(g):
        finite = np.isfinite(p)
        if finite.any():
            (scale, shift), *_ = np.linalg.lstsq(
                np.stack([p[finite], np.ones(finite.sum())], axis=1), g[finite], rcond=None
            )
            p = np.where(finite, scale * np.where(finite, p, 0) + shift, p)
    p = np.where(np.isnan(p), 0, p)
    return np.minimum(np.maximum(p, CLAMPS.get(protocol, 1)), 10_000), g


def formulas(p, g, protocol):
    """The metrics over lists of pixels in millimetres, in float64; the deltas as whole numbers have them."""
    abs_rel = np.mean(np.abs(p - g) / g)
    deltas = [np.mean((4**k * p < 5**k * g) & (4**k * g < 5**k * p)) for k in (1, 2, 3)]
    if protocol == "blog":
        return [abs_rel, deltas[0]]
    p, g = p / 1000, g / 1000
    d = np.log(p) - np.log(g)
    return [
        abs_rel,
        np.mean((p - g) ** 2 / g),
        np.sqrt(np.mean((p - g) ** 2)),
        np.sqrt(np.mean(d**2)),
        np.mean(np.abs(np.log10(p) - np.log10(g))),
        100 * np.std(d),
        *deltas,
    ]


def by_numpy(prediction, depth, protocol):
    """Image by image."""
    width, rows = 3 if protocol == "blog" else 10, []
    for image, truth in zip(prediction, depth, strict=True):
        p, g = pixels(image, truth, protocol)
        rows.append([len(g), *formulas(p, g, protocol)] if len(g) else [0] * width)
    return np.array(rows, np.float64)


def random_pair(seed, size, batch=2, holes=0.3, wild=0.1):
    """Millimetres, float64 (batch, *size): predictions near the truth, a tenth of them 5/4 or 4/5 of it, with holes,
    depths out of range, and some predictions that are none."""
    rng = np.random.default_rng(seed)
    depth = 20 * rng.integers(10, 600, (batch, *size)) + rng.choice([0, 3], (batch, *size))
    metres = (depth / 1000 * rng.lognormal(0, 0.35, depth.shape)).astype(np.float32)  # of a model
    prediction = metres.astype(np.float64) * 1000
    tie = (rng.random(depth.shape) < 0.1) & (depth % 20 == 0)
    prediction[tie] = np.where(rng.random(depth.shape) < 0.5, depth * 5 // 4, depth * 4 // 5)[tie]
    depth[rng.random(depth.shape) < holes] = 0
    strange = np.array([np.nan, np.inf, -np.inf, -1000.0, 0.0, 1e-6, 50_000.0, -3000.0])
    prediction = np.where(rng.random(depth.shape) < wild, rng.choice(strange, depth.shape), prediction)
    return prediction, depth.astype(np.float64)


@pytest.mark.parametrize("protocol", ["full", "blog", "densedepth-whole", "lsq-whole"])
@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 2**32 - 1),
    st.tuples(st.integers(1, 13), st.integers(1, 13)),
    st.integers(1, 4),
    st.floats(0, 1),
    st.sampled_from([0.0, 0.1, 1.0]),
)
@example(0, (3, 3), 2, 1.0, 0.0)
def test_every_metric_is_that_of_numpy(protocol, seed, size, batch, holes, wild):
    prediction, depth = random_pair(seed, size, batch, holes, wild)
    name = protocol.removesuffix("-whole")  # without the crop, which has a test of its own
    got = score(torch.from_numpy(prediction), torch.from_numpy(depth), replace(PROTOCOLS[name], crop=None), 1000)
    assert got.dtype == torch.float64
    # silog is a difference of two means: what is left of it below 1e-5 is rounding
    np.testing.assert_allclose(got.numpy(), by_numpy(prediction, depth, name), rtol=1e-7, atol=1e-5)
    assert torch.isfinite(got).all()


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_every_metric_of_whole_maps_is_that_of_numpy(protocol):
    prediction, depth = random_pair(1, (480, 640), batch=2)
    got = score(torch.from_numpy(prediction), torch.from_numpy(depth), PROTOCOLS[protocol], 1000)
    np.testing.assert_allclose(got.numpy(), by_numpy(prediction, depth, protocol), rtol=1e-10, atol=1e-10)


def test_protocols_are_what_their_names_promise():
    assert list(PROTOCOLS) == ["eigen", "full", "blog", "densedepth", "lsq"]
    assert EIGEN.metrics == FULL.metrics == DENSEDEPTH.metrics == LSQ.metrics == METRICS
    assert METRICS[:3] == ("abs_rel", "sq_rel", "rmse")
    assert BLOG.metrics == ("abs_rel", "delta1")


# --- by hand ---


def test_two_pixels_by_hand():
    # p = 1, 4; g = 2, 5; the third has no measurement
    got = named(maps([1.0, 4.0, 7.0]), maps([2.0, 5.0, 0.0]))
    assert got["count"] == 2
    assert got["abs_rel"] == pytest.approx((1 / 2 + 1 / 5) / 2)  # 0.35
    assert got["sq_rel"] == pytest.approx((1 / 2 + 1 / 5) / 2)  # both errors are 1 m
    assert got["rmse"] == pytest.approx(1.0)
    a, b = math.log(2), math.log(1.25)  # -d
    assert got["rmse_log"] == pytest.approx(math.sqrt((a * a + b * b) / 2))
    assert got["log10"] == pytest.approx((math.log10(2) + math.log10(1.25)) / 2)
    assert got["silog"] == pytest.approx(100 * (a - b) / 2)  # deviation of two numbers: half their distance
    assert [got[f"delta{k}"] for k in (1, 2, 3)] == [0.0, 0.5, 0.5]  # ratios 2 and exactly 1.25


def test_deltas_are_strict_and_symmetric():
    truth = maps([1.0, 1.0, 1.0, 1.25, 1.5625, 1.953125, 4.0, 4.0])
    prediction = maps([1.25, 1.5625, 1.953125, 1.0, 1.0, 1.0, 4.9, 3.21])
    got = named(prediction, truth)
    # ratios 1.25, 1.25^2, 1.25^3 both ways, then 1.225 and 1.246
    assert got["delta1"] == 2 / 8
    assert got["delta2"] == 4 / 8
    assert got["delta3"] == 6 / 8


def test_perfect_prediction():
    depth = torch.from_numpy(random_pair(3, (7, 9))[1]).clamp(max=9900)
    for protocol in (FULL, BLOG):
        for row in score(depth, depth, protocol, 1000).tolist():
            values = dict(zip(protocol.metrics, row[1:], strict=True))
            assert all(values[name] == (1.0 if name.startswith("delta") else 0.0) for name in values)


def test_silog_forgives_scale_and_nothing_else_does():
    depth = torch.from_numpy(random_pair(3, (7, 9), batch=1)[1]).clamp(max=8000)
    got = named(depth * 1.2, depth, per_metre=1000)
    assert got["silog"] == pytest.approx(0, abs=1e-4)
    assert got["abs_rel"] == pytest.approx(0.2, rel=1e-6)
    assert got["rmse_log"] == pytest.approx(math.log(1.2), rel=1e-6)
    assert got["log10"] == pytest.approx(math.log10(1.2), rel=1e-6)
    assert (got["delta1"], got["delta2"]) == (1.0, 1.0)


def test_silog_of_a_constant_error_is_never_nan():
    # mean d^2 - (mean d)^2 comes out a hair below 0 for some of these
    factor = torch.linspace(0.5, 2, 300, dtype=torch.float64).view(300, 1, 1)
    depth = torch.full((300, 3, 7), 3.0, dtype=torch.float64)
    silog = score(depth * factor, depth, FULL)[:, 1 + METRICS.index("silog")]
    assert ((silog >= 0) & (silog < 1e-4)).all()


# --- traps of the blog's code ---


def test_negative_predictions_are_wrong():
    truth = maps([1.0, 2.0, 3.0])
    blog = named(-3 * truth, truth, BLOG)
    assert blog["delta1"] == 0.0  # the ratios are -3 and -1/3: below 1.25 each
    assert blog["abs_rel"] == pytest.approx(4.0)  # |-3g - g| / g
    full = named(-3 * truth, truth)
    assert full["delta3"] == 0.0
    assert full["abs_rel"] == pytest.approx(1 - 1e-3 * (1 + 1 / 2 + 1 / 3) / 3)


@pytest.mark.parametrize("none", [math.nan, 0.0])
def test_no_prediction_counts_as_wrong(none):
    got = named(maps([none, 2.0, 2.0, 2.0]), maps([2.0, 2.0, 2.0, 2.0]), BLOG)
    assert got == {"count": 4.0, "abs_rel": 0.25, "delta1": 0.75}  # as wrong as predicting 0 m: abs_rel 1 at one of 4
    assert named(maps([none, 2.0]), maps([2.0, 2.0]))["delta1"] == 0.5


@pytest.mark.parametrize("none", [math.nan, math.inf, -math.inf, -5.0])
@pytest.mark.parametrize("protocol", [FULL, BLOG])
def test_predictions_over_holes_do_not_matter(protocol, none):
    truth = maps([2.0, 0.0, 3.0, 0.0])
    clean = score(maps([2.2, 1.0, 2.5, 1.0]), truth, protocol)
    assert torch.equal(score(maps([2.2, none, 2.5, none]), truth, protocol), clean)


@pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=PROTOCOLS)
def test_an_image_without_valid_pixels_is_unscored_and_harms_no_other(protocol):
    prediction, depth = (torch.from_numpy(array) for array in random_pair(5, (48, 64), batch=3))
    depth[1] = 0
    prediction[1] = math.nan
    rows = score(prediction, depth, protocol, 1000)
    assert rows[1].tolist() == [0.0] * (1 + len(protocol.metrics))
    assert torch.equal(rows[::2], score(prediction[::2], depth[::2], protocol, 1000))
    summary = summarise(score_terms(prediction, depth, protocol, 1000), protocol)
    assert (summary.images, summary.unscored) == (2, (1,))
    assert all(math.isfinite(value) for value in summary.metrics.values())


# --- mask and clamp ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_range_of_the_ground_truth_is_strict(dtype):
    below, above = math.nextafter(10.0, 0), math.nextafter(1e-3, 1)
    if dtype == torch.float32:
        below, above = float(np.nextafter(np.float32(10), np.float32(0))), 0.00101
    values = [0.0, 5e-4, 1e-3, above, below, 10.0, 10.1, 65.0]
    truth = torch.tensor([[values]], dtype=dtype)
    assert score(truth, truth, FULL)[0, 0].item() == 2
    assert score(truth, truth, BLOG)[0, 0].item() == 7


@pytest.mark.parametrize("protocol", ["eigen", "full", "lsq"])
def test_one_millimetre_and_ten_metres_are_not_scored(protocol):
    counts = torch.tensor([[[1, 2, 9_999, 10_000, 0]]], dtype=torch.float64)
    whole = replace(PROTOCOLS[protocol], crop=None)
    assert score(counts, counts, whole, 1000)[0, 0].item() == 2
    # in metres as the published code compares them: as float32, where 1 mm is a hair above the double 1e-3
    metres = counts.float() / 1000
    assert score(metres, metres, whole)[0, 0].item() == 2


# --- ties ---


@pytest.mark.parametrize("k", [1, 2, 3])
def test_no_tie_is_below(k):
    """All whole millimetres that a uint16 holds whose ratio is 1.25^k exactly, either way."""
    n = torch.arange(1, 65535 // 5**k + 1, dtype=torch.float64)
    for p, g in ((n * 5**k, n * 4**k), (n * 4**k, n * 5**k)):
        assert named(p[None, None], g[None, None], PLAIN, 1000)[f"delta{k}"] == 0


def exact_delta(p, g, k):
    """Of floats as the rational numbers that they are."""
    bound = Fraction(5, 4) ** k
    below = [
        a > 0 and max(Fraction(a) / Fraction(b), Fraction(b) / Fraction(a)) < bound for a, b in zip(p, g, strict=True)
    ]
    return Fraction(sum(below), len(below))


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.tuples(st.integers(1, 65535), st.integers(1, 65535)), min_size=1, max_size=30), st.integers(1, 13000)
)
def test_the_deltas_are_those_of_whole_numbers(pairs, quarter):
    pairs += [(5 * quarter, 4 * quarter), (4 * quarter, 5 * quarter)]
    p, g = (torch.tensor([[column]], dtype=torch.float64) for column in zip(*pairs, strict=True))
    got = named(p, g, PLAIN, 1000)
    for k in (1, 2, 3):
        assert got[f"delta{k}"] == pytest.approx(float(exact_delta(*zip(*pairs, strict=True), k)), abs=1e-12)


@pytest.mark.parametrize("truth", [math.nan, math.inf, -1.0, -math.inf])
def test_ground_truth_that_is_none_is_not_scored(truth):
    for protocol in (FULL, BLOG):
        got = named(maps([2.0, 2.0]), maps([truth, 4.0]), protocol)
        assert (got["count"], got["abs_rel"]) == (1, 0.5)


@pytest.mark.parametrize(
    ("prediction", "taken_as"),
    [
        (math.nan, 1e-3),
        (math.inf, 10.0),
        (-math.inf, 1e-3),
        (-2.0, 1e-3),
        (0.0, 1e-3),
        (1e-4, 1e-3),
        (1e-3, 1e-3),
        (10.0, 10.0),
        (10.5, 10.0),
        (1e30, 10.0),
        (3.7, 3.7),
    ],
)
def test_predictions_are_held_within_the_range(prediction, taken_as):
    got = named(maps([prediction]), maps([4.0]))
    assert got["abs_rel"] == pytest.approx(abs(taken_as - 4) / 4, rel=1e-12)
    assert got["rmse_log"] == pytest.approx(abs(math.log(taken_as / 4)), rel=1e-12)


def test_blog_takes_predictions_as_they_are():
    got = named(maps([100.0, 1e-4]), maps([10.0, 20.0]), BLOG)
    assert got["abs_rel"] == pytest.approx((9 + (20 - 1e-4) / 20) / 2)
    assert got["count"] == 2


# --- crop ---


def test_crop_of_a_whole_map():
    assert crop_slices(EIGEN.crop, 480, 640) == (slice(45, 471), slice(41, 601))


@pytest.mark.parametrize(
    ("pixel", "scored"),
    [
        ((45, 41), True),
        ((470, 600), True),
        ((44, 300), False),
        ((471, 300), False),
        ((200, 40), False),
        ((200, 601), False),
    ],
)
def test_crop_pixel_by_pixel(pixel, scored):
    depth = torch.zeros((1, 480, 640))
    depth[0][pixel] = 3.0
    prediction = torch.ones((1, 480, 640))
    assert score(prediction, depth, EIGEN)[0, 0].item() == scored
    assert score(prediction, depth, FULL)[0, 0].item() == 1
    assert score(prediction, depth, BLOG)[0, 0].item() == 1


@settings(deadline=None, max_examples=80)
@given(st.integers(8, 2000), st.integers(8, 2000))
@example(240, 320)
@example(960, 1280)
@example(228, 304)
def test_crop_is_in_proportion(height, width):
    rows, columns = crop_slices(EIGEN.crop, height, width)
    for edge, of_480x640, side in (
        (rows.start, 45, height / 480),
        (rows.stop, 471, height / 480),
        (columns.start, 41, width / 640),
        (columns.stop, 601, width / 640),
    ):
        assert abs(edge - of_480x640 * side) <= 0.5 + 1e-9
    assert 0 <= rows.start < rows.stop <= height
    assert 0 <= columns.start < columns.stop <= width


def test_crop_of_half_a_map():
    depth = torch.full((1, 240, 320), 3.0)
    count = score(depth, depth, EIGEN)[0, 0].item()
    assert 213 * 280 <= count <= 214 * 280  # rows 22.5 : 235.5, columns 20.5 : 300.5
    assert crop_slices(EIGEN.crop, 960, 1280) == (slice(90, 942), slice(82, 1202))


# --- size of the prediction ---


def test_smaller_predictions_are_enlarged_bilinearly():
    # 2 -> 4 columns, half-pixel centres: 1, 1.25 * 1 + ... = 1, 1.5, 2.5, 3
    got = named(torch.tensor([[[1.0, 3.0]]]), torch.tensor([[[1.0, 1.5, 2.5, 3.0], [1.0, 1.5, 2.5, 3.0]]]))
    assert got["count"] == 8
    assert got["rmse"] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("protocol", [EIGEN, FULL, BLOG])
def test_enlarging_comes_before_crop_and_clamp(protocol):
    # a plane in the image is a plane at any size, but at the border; the crop must be of the enlarged map
    rows, columns = torch.arange(48.0).view(48, 1), torch.arange(64.0)
    small = (2 + 0.01 * (rows + 0.5) + 0.02 * (columns + 0.5))[None]
    rows, columns = torch.arange(480.0).view(480, 1), torch.arange(640.0)
    large = (2 + 0.001 * (rows + 0.5) + 0.002 * (columns + 0.5))[None]
    got = named(small, large, protocol)
    if protocol is EIGEN:
        assert got["abs_rel"] < 1e-6  # the 5 pixels of the border that bilinear holds constant are cropped away
    assert got["abs_rel"] < 1e-4
    beyond = named(torch.tensor([[[20.0, 0.0]]]), torch.full((1, 1, 4), 5.0), FULL)
    # 20, 15, 5, 0 and only then held within 1e-3 .. 10: errors 5, 5, 0, 4.999
    assert beyond["abs_rel"] == pytest.approx((5 + 5 + 0 + 4.999) / 4 / 5)


def test_larger_predictions_are_brought_to_the_size_of_the_truth():
    got = named(torch.full((1, 6, 8), 3.0), torch.full((1, 3, 4), 2.0))
    assert (got["count"], got["abs_rel"]) == (12, 0.5)


# --- batches and splits ---


@pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=PROTOCOLS)
def test_batch_composition_does_not_matter(protocol):
    prediction, depth = (torch.from_numpy(array) for array in random_pair(8, (96, 128), batch=5))
    small = prediction[:, ::4, ::4].contiguous()
    for p in (prediction, small):
        whole = score(p, depth, protocol, 1000)
        alone = torch.cat([score(p[k : k + 1], depth[k : k + 1], protocol, 1000) for k in range(5)])
        order = torch.tensor([3, 0, 4, 1, 2])
        assert torch.equal(score(p[order], depth[order], protocol, 1000), whole[order])
        np.testing.assert_allclose(alone.numpy(), whole.numpy(), rtol=1e-12, atol=1e-12)


def test_inputs_are_left_alone():
    prediction, depth = (torch.from_numpy(array) for array in random_pair(8, (6, 8)))
    kept = prediction.clone(), depth.clone()
    score(prediction, depth, FULL, 1000)
    assert torch.equal(prediction.nan_to_num(7.5), kept[0].nan_to_num(7.5))
    assert torch.equal(depth, kept[1])


def test_half_precision_is_scored_in_double():
    depth = torch.full((1, 300, 300), 3.0)
    got = named(torch.full((1, 300, 300), 3.5, dtype=torch.bfloat16), depth)
    assert got["rmse"] == 0.5
    assert got["count"] == 90_000


def test_mean_is_over_images_not_over_pixels():
    depth = torch.full((2, 4, 5), 2.0)
    depth[0].view(-1)[1:] = 0  # one valid pixel, wrong by half
    prediction = torch.stack([torch.full((4, 5), 3.0), torch.full((4, 5), 2.0)])
    summary = summarise(score_terms(prediction, depth, FULL), FULL)
    assert summary.protocol == "full"
    assert summary.images == 2
    assert summary.unscored == ()
    assert summary.metrics["abs_rel"] == 0.25  # over pixels it would be 0.5 / 21
    assert summary.metrics["rmse"] == 0.5  # over pixels sqrt(1 / 21)
    assert summary.metrics["delta1"] == 0.5


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**32 - 1), st.integers(1, 30), st.floats(0, 1))
def test_summary_is_the_mean_of_the_scored_rows(seed, images, empty):
    rng = np.random.default_rng(seed)
    rows = rng.random((images, N_COLUMNS))
    rows[:, 0] = rng.integers(1, 1000, images)
    rows[rng.random(images) < empty] = 0
    scored = torch.from_numpy(rows[rows[:, 0] > 0])
    summary = summarise(torch.from_numpy(rows), EIGEN)
    assert summary.images == len(scored)
    assert summary.unscored == tuple(np.flatnonzero(rows[:, 0] == 0).tolist())
    assert tuple(summary.metrics) == METRICS
    for k, name in enumerate(METRICS):
        if len(scored):
            assert summary.metrics[name] == pytest.approx(image_metrics(scored, EIGEN)[:, k].mean().item(), rel=1e-12)
        else:
            assert math.isnan(summary.metrics[name])


# --- all pixels pooled ---


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.floats(0, 1))
@example(0, 3, 1.0)
def test_pooled_metrics_are_those_of_all_pixels_in_one_list(seed, images, holes):
    prediction, depth = random_pair(seed, (9, 11), images, holes)
    protocol = replace(DENSEDEPTH, crop=None)
    rows = score_terms(torch.from_numpy(prediction), torch.from_numpy(depth), protocol, 1000)
    summary = summarise(rows, protocol)
    lists = [pixels(p, g, "densedepth") for p, g in zip(prediction, depth, strict=True)]
    p, g = (np.concatenate(parts) for parts in zip(*lists, strict=True))
    assert summary.images == sum(len(truth) > 0 for _, truth in lists)
    if len(g):
        np.testing.assert_allclose(list(summary.metrics.values()), formulas(p, g, "densedepth"), rtol=1e-7, atol=1e-5)


def test_pooled_metrics_by_hand():
    depth = torch.full((2, 480, 640), 2.0)
    depth[0] = 0
    depth[0, 20, 24], depth[0, 459, 615] = 4.0, 12.0  # the corners of the crop; there is no upper limit
    depth[0, 19, 24] = depth[0, 460, 615] = depth[0, 20, 23] = depth[0, 459, 616] = 1.0  # outside
    prediction = torch.stack([torch.full((480, 640), 3.0), torch.full((480, 640), 2.0)])
    rows = score_terms(prediction, depth, DENSEDEPTH)
    inside = 440 * 592
    assert rows[:, 0].tolist() == [2, inside]
    metrics = summarise(rows, DENSEDEPTH).metrics
    # errors 1 of 4 and 9 of 12 in the first image, none in the second; over images abs_rel would be 0.25
    assert metrics["abs_rel"] == pytest.approx((1 / 4 + 9 / 12) / (inside + 2), rel=1e-12)
    assert metrics["rmse"] == pytest.approx(math.sqrt((1 + 81) / (inside + 2)), rel=1e-12)
    assert metrics["delta1"] == pytest.approx(inside / (inside + 2), rel=1e-12)  # 4/3 and 4 are beyond 1.25
    # d = ln 3/4 and ln 3/12: mean square less square of the mean, over all pixels
    a, b, n = math.log(3 / 4), math.log(3 / 12), inside + 2
    assert metrics["silog"] == pytest.approx(100 * math.sqrt((a * a + b * b) / n - ((a + b) / n) ** 2), rel=1e-9)


def test_the_published_script_divides_by_the_prediction_and_we_do_not():
    got = named(maps([2.0]), maps([4.0]), replace(DENSEDEPTH, crop=None))
    assert got["abs_rel"] == 0.5  # |2 - 4| / 4; with the arguments swapped it would be 1


@pytest.mark.parametrize(("prediction", "taken_as"), [(0.02, 0.1), (-1.0, 0.1), (math.nan, 0.1), (30.0, 10.0)])
def test_densedepth_holds_predictions_within_its_range(prediction, taken_as):
    got = named(maps([prediction]), maps([4.0]), replace(DENSEDEPTH, crop=None))
    assert got["abs_rel"] == pytest.approx(abs(taken_as - 4) / 4, rel=1e-12)


# --- scale and shift fitted ---


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**32 - 1), st.floats(0.01, 100), st.floats(-50, 50), st.booleans())
def test_lsq_does_not_see_scale_and_shift(seed, scale, shift, inverted):
    prediction, depth = random_pair(seed, (12, 16), 2, 0.3, 0.0)
    prediction, depth = torch.from_numpy(prediction) / 1000, torch.from_numpy(depth) / 1000
    other = prediction * (-scale if inverted else scale) + shift
    protocol = replace(LSQ, crop=None)
    first, second = (score(p, depth, protocol).numpy() for p in (prediction, other))
    np.testing.assert_allclose(first, second, rtol=1e-6, atol=1e-6)


def test_lsq_by_hand():
    # p = 1, 2, 3 and g = 2, 3, 7: slope cov/var = (5/3)/(2/3) = 2.5, through the means 2 and 4: 1.5, 4, 6.5
    got = named(maps([1.0, 2.0, 3.0, 100.0]), maps([2.0, 3.0, 7.0, 0.0]), replace(LSQ, crop=None))
    assert got["count"] == 3
    assert got["abs_rel"] == pytest.approx((0.5 / 2 + 1 / 3 + 0.5 / 7) / 3, rel=1e-12)
    assert got["rmse"] == pytest.approx(math.sqrt((0.25 + 1 + 0.25) / 3), rel=1e-12)


def test_lsq_of_a_constant_prediction_is_the_mean_of_the_truth():
    got = named(maps([7.7, 7.7, 7.7]), maps([1.0, 2.0, 6.0]), replace(LSQ, crop=None))
    assert got["abs_rel"] == pytest.approx((2 + 0.5 + 0.5) / 3, rel=1e-9)


def test_lsq_fits_what_is_scored_and_nothing_else():
    """Pixels outside the crop, and predictions that are none, take no part; the latter count as wrong."""
    depth = torch.full((1, 480, 640), 3.0)
    depth[0, :, 320:] = 5.0
    prediction = depth * 0.1 + 7
    prediction[0, :45] = 1e6
    prediction[0, 100, 100] = math.nan
    got = named(prediction.double(), depth, LSQ)
    wrong = (3 - 1e-3) / 3  # held at 1 mm
    assert got["abs_rel"] == pytest.approx(wrong / (426 * 560), rel=1e-6)


@pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=PROTOCOLS)
def test_numbers_too_large_for_a_float32_are_none(protocol):
    rows = score_terms(torch.tensor([[[1e300, 2.0]]], dtype=torch.float64), maps([2.0, 2.0]), protocol)
    assert torch.isfinite(rows).all()
