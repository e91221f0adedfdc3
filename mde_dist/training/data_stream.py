"""This rank's part of the global batches: which samples, as which views, and what all ranks have to agree on."""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from accelerate import Accelerator

from mde_dist.data.augmentation import prepare
from mde_dist.data.loader import Draw, Loader, Stopped
from mde_dist.data.prefetch import AHEAD, Prefetch
from mde_dist.data.sampler import Order, mix, share
from mde_dist.data.shards import ShardSet
from mde_dist.distributed.process_group import sum_apart
from mde_dist.distributed.signals import StopFlag
from mde_dist.training.config import Config
from mde_dist.training.losses import counts
from mde_dist.training.step import View
from mde_dist.training.throughput import Account
from mde_dist.utils.errors import UserError


@contextmanager
def training_stream(
    config: Config, shards: ShardSet, samples_seen: int, accelerator: Accelerator, stop: StopFlag
) -> Iterator[Loader]:
    """The loader of this rank's batches from `samples_seen` on, without end: one per accumulation step."""
    world, rank = accelerator.num_processes, accelerator.process_index
    batch, accumulate = config.train.batch_size, config.train.accumulate
    order = training_order(config, shards)
    windows = ((end, shards.shards_of(ranges)) for end, ranges in order.windows(samples_seen))
    check_room(config, shards, order)

    def draws(prefetch: Prefetch) -> Iterator[Draw]:
        for first in itertools.count(samples_seen, batch):
            prefetch.reached(first)
            for step in range(accumulate):
                yield order.at(share(first, batch, accumulate, world, step, rank))

    with (
        Prefetch(shards, windows) as prefetch,
        Loader(
            shards,
            draws(prefetch),
            batch // (world * accumulate),
            accelerator.device,
            config.data.threads,
            config.data.ahead,
            replace=True,
            timeout=config.data.read_timeout,
            stop=lambda: bool(stop),
        ) as loader,
    ):
        yield loader


def training_order(config: Config, shards: ShardSet) -> Order:
    """Which sample stands at which place of the stream."""
    return Order(len(shards), shards.block, config.data.window, config.train.seed)


def batch_keys(config: Config, shards: ShardSet, samples_seen: int, world: int, ranks: Sequence[int]) -> list[str]:
    """Keys of the samples that these ranks see of the global batch at `samples_seen`."""
    batch, accumulate = config.train.batch_size, config.train.accumulate
    parts = [share(samples_seen, batch, accumulate, world, step, r) for r in ranks for step in range(accumulate)]
    _, samples = training_order(config, shards).at(np.concatenate(parts))
    return [shards.key(sample) for sample in samples.tolist()]


def check_room(config: Config, shards: ShardSet, order: Order) -> None:
    """Refuse a cache that cannot hold what is fetched ahead: shards would go before they are read. Raises UserError."""
    coming = [ranges for _, ranges in itertools.islice(order.windows(0), 1 + AHEAD)]
    need = sum(shards.info.shards[number].bytes for number in shards.shards_of(np.concatenate(coming)))
    if shards.remote and need > config.data.cache_options.limit:
        raise UserError(
            f"data.cache_gb = {config.data.cache_gb:g}: too small for the {need / 1e9:.3g} GB of shards that are on "
            "their way at a time; raise it, or lower data.window"
        )


@dataclass
class Share:
    """This rank's part of a global batch, as far as it came."""

    views: list[View] = field(default_factory=list)
    """One per accumulation step."""
    samples: np.ndarray = field(default_factory=lambda: np.empty((0, 2), np.int64))
    """(epoch, sample) of all, int64 (n, 2)."""
    replaced: int = 0
    """Damaged samples among them."""
    error: UserError | None = None
    """Why the stream can give no more."""


def take_share(loader: Loader, config: Config, size: tuple[int, int], account: Account) -> Share:
    """This rank's part of the next global batch.

    Each batch is turned into a view before the next one is asked for, which may overwrite its buffers. A stream that
    fails or is stopped leaves the share incomplete: the others have to hear of it before this rank may end.
    """
    share = Share()
    try:
        for _ in range(config.train.accumulate):
            with account.waiting():
                batch = next(loader)
            with account.working():
                share.views.append(prepare(batch, size, config.augment, config.train.seed))
            share.samples = np.concatenate([share.samples, np.stack([batch.epoch, batch.sample], axis=1)])
            share.replaced += batch.replaced
    except Stopped:
        pass  # the stop flag says so to all ranks
    except UserError as error:
        share.error = error
    return share


@dataclass(frozen=True)
class News:
    """What all ranks know before a step of the global batch."""

    counted: torch.Tensor
    """Valid pixels, and images that have some: float64 (2,) on the device."""
    stopped: bool
    failed: bool
    batch_hash: int
    """Of its samples; adds up the same in any order: equal values in two runs say that both saw the same batch."""
    replaced: int


def share_news(accelerator: Accelerator, share: Share, stop: StopFlag) -> News:
    """Sum over the ranks what each has to say before the step; on a GPU without waiting for what it still computes."""
    batch_hash = int((mix(share.samples[:, 0], share.samples[:, 1]) >> np.uint64(32)).sum())
    rest = [float(bool(stop)), float(share.error is not None), float(batch_hash), float(share.replaced)]
    none = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
    counted, told = sum_apart(accelerator, sum((counts(depth) for _, depth in share.views), none), rest)
    stops, failures, batch_hash, replaced = map(int, told)
    return News(counted, stops > 0, failures > 0, batch_hash, replaced)


def poisoned(config: Config, replaced: int, samples_seen: int, shards: ShardSet) -> UserError | None:
    """What ends a run on a stream of which too much is damaged.

    The share is of the samples that came so far, or of the split where those are fewer; so it does not depend on the
    number of ranks, and a few early finds do not end a run.
    """
    allowed = config.data.max_bad_fraction * max(samples_seen, len(shards))
    if replaced <= allowed:
        return None
    return UserError(
        f"{replaced} of {samples_seen} samples were damaged and replaced, more than data.max_bad_fraction = "
        f"{config.data.max_bad_fraction:g} allows; {shards.advice}"
    )
