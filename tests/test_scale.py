"""The formulas of benchmarks/scale.md, against values worked by hand and against simulation."""

import itertools
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import scale_formulas as scale


def test_a_ring_sends_nearly_twice_the_bytes():
    assert scale.ring(1, 1e9, 1e9) == 0
    assert scale.ring(2, 1e9, 1e9) == pytest.approx(1.0)  # half there, half back
    assert scale.ring(4, 1e9, 1e9) == pytest.approx(1.5)
    assert scale.ring(4, 0, 1e9, hop=1e-6) == pytest.approx(6e-6)  # three hops to sum, three to tell


def test_a_ring_moves_what_its_formula_says():
    ranks, parts = 5, np.arange(5 * 5, dtype=float).reshape(5, 5)  # a rank's tensor in as many parts as there are ranks
    held, sent = parts.copy(), np.zeros(ranks)
    for hop, rank in itertools.product(range(2 * (ranks - 1)), range(ranks)):
        part, to = (rank - hop) % ranks, (rank + 1) % ranks
        # first sums go round, then the finished parts; what leaves a rank in a hop was there before it
        held[to, part] = held[rank, part] + (held[to, part] if hop < ranks - 1 else 0)
        sent[rank] += 1 / ranks
    assert (held == parts.sum(0)).all()
    assert sent == pytest.approx(np.full(ranks, scale.ring(ranks, 1.0, 1.0)))


def test_distinct_groups_among_draws():
    assert scale.distinct(7, 3, 1) == pytest.approx(1.0)
    assert scale.distinct(2, 2, 2) == pytest.approx(5 / 3)  # two of four: one group in a third of the cases
    assert scale.distinct(4, 256, 1024) == 4
    draw, members = np.random.default_rng(0), np.arange(40) // 4
    found = [len(set(draw.choice(members, 12, replace=False))) for _ in range(4000)]
    assert scale.distinct(10, 4, 12) == pytest.approx(np.mean(found), abs=4 * np.std(found) / 4000**0.5)


def test_distinct_groups_in_a_window_of_the_real_order():
    samples, block, window, batch = 4096, 64, 8, 16
    found = scale.groups_in_batches(np.arange(samples) // block, block, window, batch)
    assert found == pytest.approx(scale.distinct(window, block, batch), abs=0.15)


def test_two_samples_meet():
    assert scale.meet(4, 2) == pytest.approx(1 / 3)
    assert scale.meet(1024, 8192) == 1


def test_one_shard_that_is_short_makes_every_block_touch_two():
    assert scale.shards_fetched(64 * 100, 64, 4, short=0) == 1
    assert scale.shards_fetched(64 * 100, 64, 4, short=1) == pytest.approx(2, abs=0.1)


def test_a_batch_dealt_out_by_shard_is_read_by_fewer_nodes():
    as_it_is = scale.read_by_node(8192, 64, 16, 256, nodes=4, by_shard=False)
    assert as_it_is == 1
    # a quarter of the shards, and a few at the edges
    assert 0.25 < scale.read_by_node(8192, 64, 16, 256, nodes=4, by_shard=True) < 0.5


@pytest.mark.parametrize(("threads", "step", "share"), [(1, 8.0, 0.0), (1, 2.0, 0.5), (2, 1.0, 0.5), (2, 3.0, 0.0)])
def test_waiting_is_what_decoding_cannot_keep_up_with(threads, step, share):
    # four samples of one second: a batch comes every 4 s from one thread, every 2 s from two
    found = scale.waiting(np.ones(8), threads, 4, ahead=2, step=step, batches=200)
    assert found == pytest.approx(share, abs=0.01)


def test_an_all_reduce_hides_behind_backward_but_for_its_last_bucket():
    assert scale.exposed(0.01, step=1.0) == pytest.approx(0.01 * scale.LAST_BUCKET)
    assert scale.exposed(10.0, step=0.9) == pytest.approx(10.0 - 0.9 * scale.OVERLAP)
