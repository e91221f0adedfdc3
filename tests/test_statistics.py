"""Depth statistics of a split: exact, and the same however the work was shared out."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mde_dist.data.statistics import Statistics


def random_maps(seed, count, size=(6, 9), high=65536, holes=0.3):
    rng = np.random.default_rng(seed)
    maps = (rng.integers(1, high, (count, *size)) * (rng.random((count, *size)) >= holes)).astype(np.uint16)
    maps[0, 0, 0] = rng.integers(1, high)  # one measurement at least
    return maps


def statistics_of(maps):
    result = Statistics.empty(maps.shape[1:])
    for k, millimetres in enumerate(maps):
        result.add(millimetres, reencoded=k % 3 == 0)
    return result


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 9),
    st.lists(st.integers(0, 9), max_size=4),
    st.sampled_from([2, 5, 11, 3000, 65536]),
    st.floats(0, 1),
)
@example(0, 9, [3, 3, 7], 65536, 0.5)
def test_parts_merge_into_the_whole(seed, count, cuts, high, holes):
    maps = random_maps(seed, count, high=high, holes=holes)
    whole = statistics_of(maps)
    merged = Statistics.empty(maps.shape[1:])
    expected_reencoded = 0
    for part in np.split(maps, sorted(min(cut, count) for cut in cuts)):
        of_part = statistics_of(part) if len(part) else Statistics.empty(maps.shape[1:])
        expected_reencoded += int(of_part.reencoded[0])
        merged.merge(vars(of_part))
    for name in ("histogram", "total", "valid"):
        assert (vars(merged)[name] == vars(whole)[name]).all(), name
    assert merged.reencoded.tolist() == [expected_reencoded]
    assert merged.summary() == whole.summary()
    assert (merged.mean_map() == whole.mean_map()).all()


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.sampled_from([2, 4, 3000, 65536]), st.floats(0, 1))
@example(1, 5, 65536, 0.0)
@example(1, 1, 2, 1.0)
def test_summary_is_that_of_numpy(seed, count, high, holes):
    maps = random_maps(seed, count, high=high, holes=holes)
    summary = statistics_of(maps).summary()
    valid = np.sort(maps[maps > 0].astype(np.float64)) / 1000
    assert summary["min"] == valid[0]
    assert summary["max"] == valid[-1]
    assert summary["mean"] == pytest.approx(valid.mean(), rel=1e-12)
    assert summary["median"] == valid[(len(valid) - 1) // 2]  # of an even number the lower of the two in the middle
    if len(valid) % 2:
        assert summary["median"] == np.median(valid)
    assert summary["holes"] == pytest.approx((maps == 0).mean(), rel=1e-12)


def test_summary_by_hand():
    statistics = Statistics.empty((2, 2))
    statistics.add(np.array([[0, 1000], [2000, 4000]], np.uint16), reencoded=True)
    statistics.add(np.array([[0, 3000], [0, 4000]], np.uint16), reencoded=False)
    # valid: 1, 2, 3, 4, 4 m; 3 of 8 pixels are holes
    assert statistics.summary() == {"min": 1.0, "median": 3.0, "mean": 2.8, "max": 4.0, "holes": 0.375}
    # (no measurement: the overall mean), (1 + 3) / 2, 2 / 1, (4 + 4) / 2
    assert statistics.mean_map().tolist() == [[2800, 2000], [2000, 4000]]
    assert statistics.mean_map().dtype == np.uint16
    assert statistics.reencoded.tolist() == [1]
    assert statistics.histogram[[0, 1000, 2000, 3000, 4000, 4001]].tolist() == [3, 1, 1, 1, 2, 0]


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32 - 1), st.integers(1, 12), st.sampled_from([2, 3000, 65536]), st.floats(0, 1))
def test_mean_map_is_that_of_numpy(seed, count, high, holes):
    maps = random_maps(seed, count, high=high, holes=holes)
    measured = np.ma.masked_equal(maps.astype(np.float64), 0)
    expected = np.ma.filled(measured.mean(0), measured.mean())
    got = statistics_of(maps).mean_map().astype(np.float64)
    assert np.abs(got - expected).max() <= 0.5 + 1e-6  # rounded to millimetres


def test_sums_do_not_wrap():
    statistics = Statistics.empty((2, 3))
    farthest = np.full((2, 3), 65535, np.uint16)
    for _ in range(3):
        statistics.add(farthest, reencoded=False)
    assert (statistics.mean_map() == 65535).all()
    statistics.histogram *= 2**40  # as many pixels as 10 million images hold
    statistics.total *= 2**28
    statistics.valid *= 2**28
    assert statistics.summary()["mean"] == pytest.approx(65.535, rel=1e-12)
    assert (statistics.mean_map() == 65535).all()


def test_an_added_map_is_left_alone():
    maps = random_maps(3, 1)
    before = maps.copy()
    statistics = statistics_of(maps)
    statistics.merge(vars(statistics_of(maps)))
    assert (maps == before).all()
    assert (statistics.valid == 2 * (maps[0] > 0)).all()
