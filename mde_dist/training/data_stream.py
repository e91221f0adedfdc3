"""This rank's part of the global batches: which samples, as which views, and what all ranks have to agree on."""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from accelerate import Accelerator

from mde_dist.data.augmentation import prepare
from mde_dist.data.loader import BatchIndices, DataLoader, Stopped
from mde_dist.data.prefetch import AHEAD, Prefetch
from mde_dist.data.sampler import GlobalSampler, hash64, rank_indices
from mde_dist.data.shards import ShardDataset
from mde_dist.distributed.process_group import all_reduce_device_and_host
from mde_dist.distributed.signals import PreemptionHandler
from mde_dist.training.config import Config
from mde_dist.training.losses import valid_counts
from mde_dist.training.step import TrainBatch
from mde_dist.training.throughput import ThroughputMeter
from mde_dist.utils.errors import UserError


@contextmanager
def training_stream(
    config: Config, shards: ShardDataset, samples_seen: int, accelerator: Accelerator, stop: PreemptionHandler
) -> Iterator[DataLoader]:
    """The loader of this rank's batches from `samples_seen` on, without end: one per accumulation step."""
    world, rank = accelerator.num_processes, accelerator.process_index
    batch, accumulate = config.train.batch_size, config.train.grad_accum_steps
    order = training_order(config, shards)
    windows = ((end, shards.shards_of(ranges)) for end, ranges in order.windows(samples_seen))
    check_cache_size(config, shards, order)

    def batch_indices(prefetch: Prefetch) -> Iterator[BatchIndices]:
        for first in itertools.count(samples_seen, batch):
            prefetch.advance(first)
            for step in range(accumulate):
                yield order.at(rank_indices(first, batch, accumulate, world, step, rank))

    with (
        Prefetch(shards, windows) as prefetch,
        DataLoader(
            shards,
            batch_indices(prefetch),
            batch // (world * accumulate),
            accelerator.device,
            config.data.threads,
            config.data.prefetch_batches,
            replace=True,
            timeout=config.data.read_timeout,
            stop=lambda: bool(stop),
        ) as loader,
    ):
        yield loader


def training_order(config: Config, shards: ShardDataset) -> GlobalSampler:
    """Order of the training samples, as the config asks for it."""
    return GlobalSampler(len(shards), shards.block, config.data.shuffle_shards, config.train.seed)


def batch_keys(config: Config, shards: ShardDataset, samples_seen: int, world: int, ranks: Sequence[int]) -> list[str]:
    """Keys of the samples that these ranks see of the global batch at `samples_seen`."""
    batch, accumulate = config.train.batch_size, config.train.grad_accum_steps
    parts = [rank_indices(samples_seen, batch, accumulate, world, step, r) for r in ranks for step in range(accumulate)]
    _, samples = training_order(config, shards).at(np.concatenate(parts))
    return [shards.key(sample) for sample in samples.tolist()]


def check_cache_size(config: Config, shards: ShardDataset, order: GlobalSampler) -> None:
    """Refuse a cache that cannot hold what is fetched ahead: shards would go before they are read. Raises UserError."""
    coming = [ranges for _, ranges in itertools.islice(order.windows(0), 1 + AHEAD)]
    need = sum(shards.info.shards[number].bytes for number in shards.shards_of(np.concatenate(coming)))
    if shards.remote and need > config.data.cache_options.limit:
        raise UserError(
            f"data.cache_gb = {config.data.cache_gb:g}: too small for the {need / 1e9:.3g} GB of shards that are on "
            "their way at a time; raise it, or lower data.shuffle_shards"
        )


@dataclass
class LocalBatch:
    """This rank's part of a global batch, as far as it came."""

    views: list[TrainBatch] = field(default_factory=list)
    """One per accumulation step."""
    samples: np.ndarray = field(default_factory=lambda: np.empty((0, 2), np.int64))
    """(epoch, sample) of all, int64 (n, 2)."""
    replaced: int = 0
    """Damaged samples among them."""
    error: UserError | None = None
    """Reason why the stream can give no more batches."""


def next_local_batch(loader: DataLoader, config: Config, size: tuple[int, int], meter: ThroughputMeter) -> LocalBatch:
    """This rank's part of the next global batch.

    Each batch is turned into a view before the next one is asked for, which may overwrite its buffers. A stream that
    fails or is stopped leaves the batch incomplete: the others have to hear of it before this rank may end.
    """
    local = LocalBatch()
    try:
        for _ in range(config.train.grad_accum_steps):
            with meter.waiting():
                batch = next(loader)
            with meter.working():
                local.views.append(prepare(batch, size, config.augment, config.train.seed))
            local.samples = np.concatenate([local.samples, np.stack([batch.epoch, batch.sample], axis=1)])
            local.replaced += batch.replaced
    except Stopped:
        pass  # the stop flag says so to all ranks
    except UserError as error:
        local.error = error
    return local


@dataclass(frozen=True)
class GlobalBatchInfo:
    """Values that are summed over all ranks before each step."""

    global_counts: torch.Tensor
    """Valid pixels, and images that have some: float64 (2,) on the device."""
    stopped: bool
    failed: bool
    batch_hash: int
    """Hash of its samples, the same in any order: equal values in two runs say that both saw the same batch."""
    replaced: int


def reduce_batch_info(accelerator: Accelerator, local: LocalBatch, stop: PreemptionHandler) -> GlobalBatchInfo:
    """Sum over the ranks what each has to say before the step; on a GPU without waiting for what it still computes."""
    batch_hash = int((hash64(local.samples[:, 0], local.samples[:, 1]) >> np.uint64(32)).sum())
    host_values = [float(bool(stop)), float(local.error is not None), float(batch_hash), float(local.replaced)]
    none = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
    global_counts, host_sums = all_reduce_device_and_host(
        accelerator, sum((valid_counts(depth) for _, depth in local.views), none), host_values
    )
    stops, failures, batch_hash, replaced = map(int, host_sums)
    return GlobalBatchInfo(global_counts, stops > 0, failures > 0, batch_hash, replaced)


def check_bad_sample_quota(config: Config, replaced: int, samples_seen: int, shards: ShardDataset) -> UserError | None:
    """The error that ends a run on a stream of which too much is damaged.

    The fraction is of the samples that came so far, or of the split where those are fewer. So it does not depend on the
    number of ranks, and a few early finds do not end a run.
    """
    allowed = config.data.max_bad_fraction * max(samples_seen, len(shards))
    if replaced <= allowed:
        return None
    return UserError(
        f"{replaced} of {samples_seen} samples were damaged and replaced, more than data.max_bad_fraction = "
        f"{config.data.max_bad_fraction:g} allows; {shards.advice}"
    )
