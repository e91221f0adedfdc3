"""What a rank takes from the stream, from order to view: independent of topology, threads and where it began."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mde_dist.data.augmentation import prepare
from mde_dist.data.loader import Batch
from mde_dist.data.shards import open_split
from mde_dist.distributed.signals import PreemptionHandler
from mde_dist.training.config import Config, read_config
from mde_dist.training.data_stream import check_bad_sample_quota, next_local_batch, reduce_batch_info, training_stream
from mde_dist.training.throughput import ThroughputMeter
from mde_dist.utils.errors import UserError

CPU = torch.device("cpu")
SIZE = (24, 32)


def config_of(batch, accumulate=1, threads=1, *more) -> Config:
    flags = ["--train.batch-size", batch, "--train.grad-accum-steps", accumulate, "--data.threads", threads, *more]
    views = ["--augment.border", "0.05", "--augment.zoom", "1.5", "--augment.cut-depth", "0.5"]
    return read_config([*map(str, flags), "--data.shuffle-shards", "2", "--data.size", "24x32", *views])


def shares(shards, config, samples_seen, steps, world):
    """Stream position -> (epoch, sample, view) as the ranks of a topology take them, one rank after another."""
    accumulate, found = config.train.grad_accum_steps, {}
    size = config.train.batch_size // (world * accumulate)
    for rank in range(world):
        topology = SimpleNamespace(num_processes=world, process_index=rank, device=CPU)
        with training_stream(config, shards, samples_seen, topology, PreemptionHandler()) as loader:
            for step in range(steps):
                share = next_local_batch(loader, config, SIZE, ThroughputMeter(CPU))
                assert share.error is None
                for part, (image, depth) in enumerate(share.views):
                    first = samples_seen + step * config.train.batch_size + (part * world + rank) * size
                    for row in range(size):
                        epoch, sample = share.samples[part * size + row].tolist()
                        found[first + row] = epoch, sample, image[row].numpy().tobytes(), depth[row].numpy().tobytes()
    return found


@pytest.fixture(scope="module")
def alone(room_shards):
    """Positions 0..399 as one process with one thread takes them."""
    with open_split(room_shards, "train") as shards:
        return shares(shards, config_of(20), 0, 20, 1)


@settings(deadline=None, max_examples=25)
@given(
    world=st.integers(1, 16),
    accumulate=st.integers(1, 4),
    threads=st.integers(1, 4),
    size=st.integers(1, 2),
    resume=st.integers(0, 250),
)
def test_every_topology_takes_the_same_views(room_shards, alone, world, accumulate, threads, size, resume):
    batch = world * accumulate * size
    with open_split(room_shards, "train") as shards:
        found = shares(shards, config_of(batch, accumulate, threads), resume, 1, world)
    assert found == {position: alone[position] for position in range(resume, resume + batch)}


def test_accumulated_views_are_those_of_their_samples(room_shards):
    """The loader's buffers are reused: a view must not change when the next part of the batch is read."""
    config = config_of(20, 5, 3, "--data.prefetch-batches", 1)
    topology = SimpleNamespace(num_processes=1, process_index=0, device=CPU)
    with open_split(room_shards, "train") as shards:
        with training_stream(config, shards, 40, topology, PreemptionHandler()) as loader:
            share = next_local_batch(loader, config, shards.size, ThroughputMeter(CPU))
        image, depth = np.empty((1, *shards.size, 3), np.uint8), np.empty((1, *shards.size), np.uint16)
        for number, (epoch, sample) in enumerate(share.samples):
            shards.read_into(int(sample), image[0], depth[0])
            one = Batch(torch.from_numpy(image), torch.from_numpy(depth), np.array([epoch]), np.array([sample]))
            expected = prepare(one, shards.size, config.augment, config.train.seed)
            for tensor, other in zip(share.views[number // 4], expected, strict=True):
                assert torch.allclose(tensor[number % 4], other[0], atol=1e-6)
    assert len(share.samples) == 20


def test_the_hash_of_a_batch_is_the_sum_over_any_topology(room_shards):
    hashes = []
    with open_split(room_shards, "train") as shards:
        for world, accumulate in ((1, 1), (2, 1), (3, 2), (4, 3)):
            config = config_of(24, accumulate)
            total = np.zeros(3)
            for rank in range(world):
                topology = SimpleNamespace(num_processes=world, process_index=rank, device=CPU)
                with training_stream(config, shards, 7, topology, PreemptionHandler()) as loader:
                    alone = SimpleNamespace(num_processes=1, device=CPU)  # the sum over the ranks is taken here
                    news = reduce_batch_info(
                        alone, next_local_batch(loader, config, SIZE, ThroughputMeter(CPU)), PreemptionHandler()
                    )
                    assert not (news.stopped or news.failed)
                    total += np.array([news.global_counts[0].item(), news.batch_hash, news.replaced])
            hashes.append(total.tolist())
    assert all(found == hashes[0] for found in hashes)
    assert hashes[0][0] > 0
    assert hashes[0][2] == 0


class Thousand(SimpleNamespace):
    """As many samples."""

    def __len__(self):
        return 1000


@pytest.mark.parametrize(
    ("replaced", "seen", "ends"), [(0, 0, False), (10, 12, False), (11, 12, True), (20, 2000, False), (21, 2000, True)]
)
def test_the_quota_is_of_the_samples_so_far_but_at_least_of_the_split(replaced, seen, ends):
    config = config_of(12, 1, 1, "--data.max-bad-fraction", "0.01")
    error = check_bad_sample_quota(config, replaced, seen, Thousand(advice="look at it"))
    assert (error is not None) == ends
    if ends:
        assert isinstance(error, UserError)
        assert f"{replaced} of {seen} samples" in str(error)
        assert "look at it" in str(error)


def test_a_stopped_stream_leaves_the_share_incomplete_without_an_error(room_shards):
    config = config_of(12)
    stop = PreemptionHandler()
    topology = SimpleNamespace(num_processes=1, process_index=0, device=CPU)
    with (
        open_split(room_shards, "train") as shards,
        training_stream(config, shards, 0, topology, stop) as loader,
    ):
        first = next_local_batch(loader, config, SIZE, ThroughputMeter(CPU))
        assert len(first.samples) == 12
        news = reduce_batch_info(SimpleNamespace(num_processes=1, device=CPU), first, stop)
    assert not news.stopped
    assert news.global_counts[0] > 0
