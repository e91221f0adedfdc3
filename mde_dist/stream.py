"""This rank's part of the global batches: which samples, as which views, and what all ranks have to agree on."""

import itertools
from collections.abc import Iterator

import numpy as np
import torch

from .config import Config
from .data.augment import prepare
from .data.loader import Draw, Loader
from .data.order import Order, mix, share
from .learning.losses import valid_pixels
from .run.monitor import Account
from .run.preemption import StopFlag

View = tuple[torch.Tensor, torch.Tensor]
"""image float32 (batch, 3, height, width), normalised; depth float32 (batch, height, width), metres, 0 = hole."""


def draws(order: Order, config: Config, samples_seen: int, world: int, rank: int) -> Iterator[Draw]:
    """This rank's batches from `samples_seen` on, without end: one per accumulation step."""
    batch, accumulate = config.train.batch_size, config.train.accumulate
    for first in itertools.count(samples_seen, batch):
        for step in range(accumulate):
            yield order.at(share(first, batch, accumulate, world, step, rank))


def take_views(
    loader: Loader, config: Config, size: tuple[int, int], account: Account
) -> tuple[list[View], np.ndarray]:
    """This rank's part of the next global batch: a view per accumulation step, and all (epoch, sample), int64 (n, 2).

    Each batch is turned into a view before the next one is asked for, which may overwrite its buffers.
    """
    views, samples = [], []
    for _ in range(config.train.accumulate):
        with account.waiting():
            batch = next(loader)
        views.append(prepare(batch, size, config.augment, config.train.seed))
        samples.append(np.stack([batch.epoch, batch.sample], axis=1))
    return views, np.concatenate(samples)


def step_news(views: list[View], samples: np.ndarray, stop: StopFlag) -> torch.Tensor:
    """What all ranks sum before a step: valid pixels, wishes to stop, and a hash of the samples (float64, (3,)).

    The hash adds up the same in any order: equal values in two runs say that both saw the same global batch.
    """
    pixels = torch.stack([valid_pixels(depth) for _, depth in views]).sum()
    batch_hash = int((mix(samples[:, 0], samples[:, 1]) >> np.uint64(32)).sum())
    rest = torch.tensor([float(bool(stop)), float(batch_hash)], dtype=torch.float64, device=pixels.device)
    return torch.cat([pixels[None], rest])
