"""The order of samples: every one once per epoch, whoever asks for whichever position."""

import itertools
import tracemalloc
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mde_dist.data.sampler import GlobalSampler, hash64, hash_uniform, rank_indices, shuffled

orders = st.builds(
    GlobalSampler,
    samples=st.integers(1, 400),
    block=st.integers(1, 80),
    window=st.integers(1, 9),
    seed=st.integers(0, 2**63),
)


def epoch_of(order, epoch):
    """Samples of a whole epoch in their order."""
    epochs, samples = order.at(np.arange(epoch * order.samples, (epoch + 1) * order.samples))
    assert (epochs == epoch).all()
    return samples


# --- hashing ---


def test_mix_is_splitmix64():
    # the first outputs of the published generator for the seeds 0 and 1
    assert int(hash64(0)) == 0xE220A8397B1DCDAF
    assert int(hash64(1)) == 0x910A2DEC89025CC1


def test_mix_golden_values():
    # checkpoints of earlier runs rely on these: a change of the hash is a change of every run's order
    assert int(hash64(0, 0)) == 12035550249420947055
    assert int(hash64(1, 2, 3)) == 15020427595393229491
    assert int(hash64(-1)) == int(hash64(2**64 - 1)) == 16490336266968443936
    assert int(hash64(2**63, 5)) == 1083902114974056470
    expected = [0.7215081806049702, 0.23928447285727472, 0.27598243332716743, 0.42056992093657886]
    assert hash_uniform(7, np.arange(4)).tolist() == expected


def test_mix_of_arrays_is_mix_of_their_elements():
    rows, columns = np.arange(3)[:, None], np.arange(4)
    table = hash64(5, rows, columns)
    assert table.shape == (3, 4)
    assert table.dtype == np.uint64
    assert [[int(hash64(5, r, c)) for c in range(4)] for r in range(3)] == table.tolist()


def test_words_and_their_places_matter():
    values = {int(hash64(*words)) for words in [(), (0,), (0, 0), (1, 2), (2, 1), (1, 2, 0), (0, 1, 2), (3,)]}
    assert len(values) == 8


def test_mix_does_not_warn_of_its_overflow():
    with np.errstate(all="raise"):
        hash64(2**64 - 1, 2**63, np.array([2**62]), -5)


def test_uniform_numbers_are_uniform():
    drawn = hash_uniform(11, np.arange(200_000))
    assert drawn.dtype == np.float64
    assert drawn.min() >= 0
    assert drawn.max() < 1
    counts = np.bincount((drawn * 20).astype(int), minlength=20)
    # chi square of 19 degrees of freedom: 45 is passed once in a thousand times, and the seed is fixed
    assert ((counts - 10_000) ** 2 / 10_000).sum() < 45
    assert abs(np.corrcoef(drawn[1:], drawn[:-1])[0, 1]) < 0.01
    assert abs(np.corrcoef(drawn, hash_uniform(12, np.arange(200_000)))[0, 1]) < 0.01


# --- permutations ---


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 600), st.integers(0, 2**64 - 1))
def test_shuffled_numbers_are_all_there(n, key):
    assert sorted(shuffled(n, key).tolist()) == list(range(n))


def test_shuffled_sorts_by_hash():
    hashes = [int(hash64(99, 7, k)) for k in range(13)]
    assert shuffled(13, 99, 7).tolist() == sorted(range(13), key=hashes.__getitem__)
    assert shuffled(13, 99, 7).dtype == np.int64


# --- the stream ---


@settings(deadline=None, max_examples=80)
@given(orders, st.sampled_from([0, 1, 5, 10**9]))
@example(GlobalSampler(1, 1, 1, 0), 0)
@example(GlobalSampler(23, 5, 2, 42), 0)
@example(GlobalSampler(25, 5, 2, 42), 0)
@example(GlobalSampler(7, 10, 3, 1), 1)
def test_every_sample_comes_once_per_epoch(order, epoch):
    assert sorted(epoch_of(order, epoch).tolist()) == list(range(order.samples))


@settings(deadline=None, max_examples=40)
@given(orders, st.data())
def test_any_position_is_reached_without_those_before(order, data):
    whole = np.concatenate([epoch_of(order, epoch) for epoch in range(3)])
    places = data.draw(st.lists(st.integers(0, 3 * order.samples - 1), min_size=1, max_size=30))
    epochs, samples = order.at(np.array(places))
    assert samples.tolist() == whole[places].tolist()
    assert epochs.tolist() == [place // order.samples for place in places]
    _, single = order.at(np.array(places[0]))
    assert single.shape == ()
    assert int(single) == whole[places[0]]


def test_shape_and_type_are_those_of_the_positions():
    order = GlobalSampler(50, 8, 2, 3)
    epochs, samples = order.at(np.arange(60).reshape(3, 4, 5))
    assert epochs.shape == samples.shape == (3, 4, 5)
    assert epochs.dtype == samples.dtype == np.int64
    assert samples.ravel().tolist() == order.at(np.arange(60))[1].tolist()
    assert order.at(np.arange(0))[1].shape == (0,)


def reference_epoch(samples, block, window, seed, epoch):
    """The order by its definition: blocks sorted by their hashes, then the samples of a window by theirs."""
    blocks = sorted(range(-(-samples // block)), key=lambda k: int(hash64(seed, epoch, 1, k)))
    order = []
    for first in range(0, len(blocks), window):
        inside = [n for k in blocks[first : first + window] for n in range(k * block, min(k * block + block, samples))]
        by_hash = sorted(range(len(inside)), key=lambda k: int(hash64(seed, epoch, 2, first // window, k)))
        order += [inside[k] for k in by_hash]
    return order


def test_golden_order():
    # a change here changes the data that every earlier run has seen, and breaks resuming it
    epochs, samples = GlobalSampler(samples=23, block=5, window=2, seed=42).at(np.arange(46))
    assert epochs.tolist() == [0] * 23 + [1] * 23
    assert samples[:23].tolist() == [2, 5, 8, 9, 7, 4, 6, 3, 1, 0, 12, 16, 19, 15, 18, 11, 13, 14, 10, 17, 20, 22, 21]
    assert samples[23:].tolist() == [10, 13, 11, 21, 14, 20, 12, 22, 5, 7, 2, 1, 9, 6, 4, 8, 3, 0, 18, 17, 16, 15, 19]
    assert samples.tolist() == reference_epoch(23, 5, 2, 42, 0) + reference_epoch(23, 5, 2, 42, 1)
    billion = GlobalSampler(samples=10**9, block=1000, window=8, seed=1).at(np.arange(10**12, 10**12 + 5))
    assert billion[0].tolist() == [1000] * 5
    assert billion[1].tolist() == [552927219, 552927634, 836130409, 162725772, 552927279]


@settings(deadline=None, max_examples=60)
@given(orders, st.integers(0, 3))
def test_reading_is_near_sequential(order, epoch):
    blocks = epoch_of(order, epoch) // order.block
    first, last = {}, {}
    for place, block in enumerate(blocks.tolist()):
        first.setdefault(block, place)
        last[block] = place
    # a window is read and done with: so many places at most from a block's first sample to its last ...
    assert max(last[block] - first[block] for block in first) < order.window * order.block
    # ... and so many blocks at most are in use at any time
    in_use = [sum(first[block] <= place <= last[block] for block in first) for place in range(order.samples)]
    assert max(in_use) <= order.window


def test_windows_are_of_the_permuted_blocks():
    order = GlobalSampler(samples=1000, block=10, window=4, seed=0)
    blocks = epoch_of(order, 0).reshape(25, 40) // 10
    sets = [set(row.tolist()) for row in blocks]
    assert all(len(found) == 4 for found in sets)
    # blocks that share a window are not neighbours in the split, save by chance
    neighbours = sum(block + 1 in found for found in sets for block in found)
    assert neighbours < 12  # 25 windows of 6 pairs, each adjacent in 2 of 100 cases: 3 expected, 75 if not permuted


def test_neighbours_are_as_far_apart_as_in_a_full_shuffle():
    order = GlobalSampler(samples=20_000, block=100, window=16, seed=4)
    rng = np.random.default_rng(0)

    def distances(sequence):
        return np.abs(np.diff(sequence)).mean()

    full = np.mean([distances(rng.permutation(order.samples)) for _ in range(5)])  # n / 3
    assert full == pytest.approx(order.samples / 3, rel=0.02)
    for epoch in range(3):
        samples = epoch_of(order, epoch)
        # of 16 blocks, one neighbour in 16 is of the same block: 15/16 of the full distance expected
        assert distances(samples) == pytest.approx(15 / 16 * full, rel=0.06)
        # inside a window there is no order left
        rank = np.argsort(np.argsort(samples[: 16 * 100]))
        assert distances(rank) == pytest.approx(1600 / 3, rel=0.06)
        assert abs(np.corrcoef(rank, np.arange(1600))[0, 1]) < 0.08


def test_one_window_over_all_is_a_full_shuffle():
    order = GlobalSampler(samples=5000, block=64, window=100, seed=2)
    samples = epoch_of(order, 0)
    assert np.abs(np.diff(samples)).mean() == pytest.approx(5000 / 3, rel=0.04)
    assert abs(np.corrcoef(samples, np.arange(5000))[0, 1]) < 0.05


def test_first_sample_over_seeds_is_even():
    # also the short last block: samples 20, 21, 22 come first as often as any other place allows
    counts = np.zeros(23)
    runs = 1500
    for seed in range(runs):
        counts[GlobalSampler(23, 5, 5, seed).at(np.array([0]))[1]] += 1
    expected = runs / 23
    assert ((counts - expected) ** 2 / expected).sum() < 22 + 5 * np.sqrt(44)


@pytest.mark.parametrize(
    "make", [lambda k: epoch_of(GlobalSampler(500, 20, 5, 7), k), lambda k: epoch_of(GlobalSampler(500, 20, 5, k), 3)]
)
def test_epochs_and_seeds_differ(make):
    sequences = [make(k) for k in range(12)]
    blocks_first = {int(sequence[0] // 20) for sequence in sequences}
    assert len(blocks_first) > 4
    pairs = list(pairwise(sequences))
    # two random permutations agree at one place on average; blocks stay together, so that agreement comes in clusters
    assert max((one == other).sum() for one, other in pairs) < 15
    # 25 blocks: a correlation of one pair spreads by 1/5, the mean of 11 pairs by 0.06
    assert abs(np.mean([np.corrcoef(one, other)[0, 1] for one, other in pairs])) < 0.2


def test_two_windows_of_one_epoch_are_shuffled_differently():
    order = GlobalSampler(samples=4000, block=1000, window=1, seed=1)
    inside = epoch_of(order, 0).reshape(4, 1000) % 1000
    for one, other in pairwise(inside):
        assert (one == other).sum() < 10


def test_a_billion_samples_cost_the_memory_of_their_blocks():
    order = GlobalSampler(samples=10**9, block=1024, window=16, seed=1)
    positions = 10**12 + np.arange(64)
    tracemalloc.start()
    epochs, samples = order.at(positions)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100 * 10**9 / 1024  # bytes: a hundred a block while they are sorted; a table of samples would be 8 GB
    assert (epochs == 1000).all()
    assert len(set(samples.tolist())) == 64
    assert len(set((samples // 1024).tolist())) <= 16
    assert ((samples >= 0) & (samples < 10**9)).all()


def test_positions_across_the_ends_of_epochs_and_windows():
    order = GlobalSampler(samples=10**9 + 7, block=1000, window=8, seed=3)
    epochs, samples = order.at(np.array([10**9 + 6, 10**9 + 7, 2 * (10**9 + 7) - 1]))
    assert epochs.tolist() == [0, 1, 1]
    assert ((samples >= 0) & (samples < order.samples)).all()
    around = np.arange(8000 * 500 - 4000, 8000 * 500 + 4000)  # a half of two windows each
    samples = order.at(around)[1]
    assert len(set(samples.tolist())) == len(around)
    halves = [set((half // 1000).tolist()) for half in (samples[:4000], samples[4000:])]
    assert not halves[0] & halves[1]
    assert [len(half) for half in halves] == [8, 8]


@pytest.mark.parametrize("wrong", [(0, 5, 2), (5, 0, 2), (5, 5, 0), (-1, 5, 2)])
def test_impossible_orders_are_refused(wrong):
    with pytest.raises(ValueError, match="positive"):
        GlobalSampler(*wrong, seed=0)


# --- sharing out ---


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 10**12),
    st.integers(1, 6),
    st.integers(1, 6),
    st.integers(1, 9),
    st.integers(1, 400),
    st.integers(0, 9),
)
def test_share_parts_the_batch_for_every_topology(first, size, accumulate, world, samples, seed):
    batch = size * accumulate * world
    parts = [
        rank_indices(first, batch, accumulate, world, step, rank) for step in range(accumulate) for rank in range(world)
    ]
    assert {len(part) for part in parts} == {size}
    assert sorted(np.concatenate(parts).tolist()) == list(range(first, first + batch))
    # a step of accumulation is the same samples in sum, whatever the number of ranks
    for step in range(accumulate):
        places = np.concatenate([rank_indices(first, batch, accumulate, world, step, rank) for rank in range(world)])
        alone = rank_indices(first, batch, accumulate, 1, step, 0)
        assert sorted(places.tolist()) == alone.tolist()
    # and through the order, the batch is the samples that one rank alone would see
    order = GlobalSampler(samples, 16, 3, seed)
    alone = order.at(rank_indices(first, batch, 1, 1, 0, 0))
    shared = [order.at(part) for part in parts]
    for which in (0, 1):
        assert sorted(np.concatenate([part[which] for part in shared]).tolist()) == sorted(alone[which].tolist())


def test_share_golden_values():
    assert rank_indices(100, 12, 2, 3, 0, 0).tolist() == [100, 101]
    assert rank_indices(100, 12, 2, 3, 0, 2).tolist() == [104, 105]
    assert rank_indices(100, 12, 2, 3, 1, 1).tolist() == [108, 109]
    assert rank_indices(0, 4, 1, 1, 0, 0).dtype == np.int64


@pytest.mark.parametrize(("batch", "accumulate", "world"), [(8, 1, 3), (8, 3, 1), (8, 2, 3), (2, 2, 2), (0, 1, 1)])
def test_a_batch_that_cannot_be_shared_evenly_is_refused(batch, accumulate, world):
    with pytest.raises(ValueError, match="does not divide"):
        rank_indices(0, batch, accumulate, world, 0, 0)


# --- elastic: any topology, any resume, any change of the batch size ---

segments = st.lists(
    st.tuples(st.integers(1, 16), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3)), min_size=1, max_size=5
)
"""Each a stretch of training: ranks, accumulation steps, samples per rank and step, optimizer steps."""


@settings(deadline=None, max_examples=150)
@given(orders, segments, st.integers(0, 10**9))
def test_a_run_cut_into_pieces_of_any_topology_and_batch_size_is_the_one_stream(order, pieces, start):
    seen, got = start, []
    for world, accumulate, size, steps in pieces:
        batch = world * accumulate * size
        for _ in range(steps):
            parts = [
                order.at(rank_indices(seen, batch, accumulate, world, step, rank))
                for step in range(accumulate)
                for rank in range(world)
            ]
            got += [pair for epochs, samples in parts for pair in zip(epochs.tolist(), samples.tolist(), strict=True)]
            seen += batch
    epochs, samples = order.at(np.arange(start, seen))
    assert got == list(zip(epochs.tolist(), samples.tolist(), strict=True))


@settings(deadline=None, max_examples=60)
@given(orders, segments)
def test_three_epochs_bring_every_sample_three_times_whatever_the_topology(order, pieces):
    counts, seen, total = np.zeros(order.samples, int), 0, 3 * order.samples
    for world, accumulate, size, _ in itertools.cycle(pieces):
        batch = world * accumulate * size
        for step in range(accumulate):
            for rank in range(world):
                positions = rank_indices(seen, batch, accumulate, world, step, rank)
                np.add.at(counts, order.at(positions[positions < total])[1], 1)
        seen += batch
        if seen >= total:
            break
    assert (counts == 3).all()


# --- what comes next, for fetching it in time ---


@settings(deadline=None, max_examples=100)
@given(orders, st.integers(0, 3000))
def test_windows_name_the_samples_of_every_stretch_to_come(order, position):
    start = None
    for end, ranges in itertools.islice(order.windows(position), 6):
        samples = np.concatenate([np.arange(first, last) for first, last in ranges])
        if start is None:
            start = end - len(samples)
            assert start <= position < end
        assert sorted(order.at(np.arange(start, end))[1].tolist()) == sorted(samples.tolist())
        assert len(ranges) <= order.window
        start = end


def test_windows_cost_the_same_at_any_position():
    order = GlobalSampler(samples=10**9 + 7, block=1000, window=8, seed=3)
    tracemalloc.start()
    for position in (0, 10**7, 10**15):
        end, ranges = next(order.windows(position))
        assert 0 < end - position <= 8000
        assert ranges.shape == (8, 2)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100 * 10**6  # bytes: a hundred a block, while they are sorted
