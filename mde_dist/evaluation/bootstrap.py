"""Confidence interval of a mean over images: the percentile bootstrap (Efron and Tibshirani, 1993)."""

from collections.abc import Iterator

import numpy as np
import torch

from mde_dist.evaluation.metrics import Protocol, image_metrics

RESAMPLES = 10_000
LEVEL = 0.95
NOTE = "images of one scene are alike, so they are rather too narrow"
_AT_ONCE = 500  # resamples whose weights are held in memory


def resamples(images: int, seed: int) -> Iterator[np.ndarray]:
    """RESAMPLES in pieces: how often each image is there, float64 (at once, images). The same for the same seed."""
    random = np.random.default_rng(seed)
    for start in range(0, RESAMPLES, _AT_ONCE):
        times = min(_AT_ONCE, RESAMPLES - start)
        yield random.multinomial(images, np.full(images, 1 / images), size=times).astype(np.float64)


def means(rows: np.ndarray, drawn: np.ndarray, protocol: Protocol) -> np.ndarray:
    """The metrics (resamples, metrics) of a split, `score` rows, in which image i is there drawn[:, i] times."""
    if protocol.mean_over == "pixels":
        weights = drawn * rows[:, 0]
        pooled = weights @ rows / weights.sum(1, keepdims=True)
        return image_metrics(torch.from_numpy(pooled), protocol).numpy()
    return drawn @ image_metrics(torch.from_numpy(rows), protocol).numpy() / drawn.sum(1, keepdims=True)


def interval(resampled: np.ndarray) -> np.ndarray:
    """(resamples, ...) -> lower and upper end of the interval, (2, ...)."""
    return np.quantile(resampled, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
