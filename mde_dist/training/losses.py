"""Masked losses as sums over pixels or over images, so that ranks and accumulation steps can divide by the one global
count."""

from collections.abc import Callable

import torch

from mde_dist.training.config import LossConfig

UNITS: dict[str, str] = {"mse": "m²", "l1": "m", "log_l1": "", "berhu": "m", "silog": ""}
"""Units of the losses; one with a gradient term, which has no unit, has none either."""
_SMALLEST = 1e-3  # metres: a logarithm needs more than 0
_SCALES = 4  # of the gradient loss


def depth_loss(
    prediction: torch.Tensor, depth: torch.Tensor, config: LossConfig, global_counts: torch.Tensor
) -> torch.Tensor:
    """This part's share of the loss of a global batch, scalar: the shares of all parts add up to it.

    prediction: (batch, height, width) metres, positive; depth: the same with 0 = hole; global_counts: `valid_counts` of
    the whole global batch.
    """
    pixels, images = global_counts.clamp(min=1).float()
    if config.kind == "silog":
        loss = silog(prediction, depth, config.silog_lambda) / images
    else:
        loss = _OVER_PIXELS[config.kind](prediction, depth) / pixels
    if config.gradient_weight:
        loss = loss + config.gradient_weight * gradient(prediction, depth) / images
    return loss


def valid_counts(depth: torch.Tensor) -> torch.Tensor:
    """Pixels with a measurement, and images with at least one: float64 (2,) on the device of `depth`."""
    valid = depth > 0
    return torch.stack([valid.sum(dtype=torch.float64), valid.flatten(1).any(1).sum(dtype=torch.float64)])


def mse(prediction: torch.Tensor, depth: torch.Tensor) -> torch.Tensor:
    """Sum over valid pixels of the squared error, m^2."""
    return _error(prediction, depth).square().sum()


def l1(prediction: torch.Tensor, depth: torch.Tensor) -> torch.Tensor:
    """Sum over valid pixels of the absolute error, metres."""
    return _error(prediction, depth).abs().sum()


def log_l1(prediction: torch.Tensor, depth: torch.Tensor) -> torch.Tensor:
    """Sum over valid pixels of |log p - log g|: to first order the relative error."""
    return _log_error(prediction, depth).abs().sum()


def berhu(prediction: torch.Tensor, depth: torch.Tensor) -> torch.Tensor:
    """Sum over valid pixels of |e| up to c and (e^2 + c^2) / 2c beyond, c = max|e| / 5 over the image; metres."""
    error = _error(prediction, depth).abs()
    # clamped, or where an image is met exactly 0 / 0 would be its gradient
    c = (error.detach().flatten(1).amax(1) / 5).clamp(min=1e-6)[:, None, None]
    return torch.where(error <= c, error, (error.square() + c.square()) / (2 * c)).sum()


def silog(prediction: torch.Tensor, depth: torch.Tensor, focus: float) -> torch.Tensor:
    """Sum over images of sqrt(mean d^2 - focus (mean d)^2), d = log p - log g over the image's valid pixels."""
    d, pixels = _log_error(prediction, depth).flatten(1), (depth > 0).flatten(1).sum(1)
    mean, square = d.sum(1) / pixels.clamp(min=1), d.square().sum(1) / pixels.clamp(min=1)
    # the root of 0 has no slope, and rounding can take the difference below it
    return (square - focus * mean.square()).clamp(min=1e-8).sqrt().where(pixels > 0, 0).sum()


def gradient(prediction: torch.Tensor, depth: torch.Tensor) -> torch.Tensor:
    """Sum over images and scales of the mean |difference of d between neighbours|, d = log p - log g.

    At scale k every 2^k-th pixel counts, and only pairs of which both are valid.
    """
    d, valid = _log_error(prediction, depth), depth > 0
    total = d.new_zeros(())
    for step in (1 << k for k in range(_SCALES)):
        e, there = d[:, ::step, ::step], valid[:, ::step, ::step]
        for axis in (1, 2):
            length = e.shape[axis] - 1
            both = there.narrow(axis, 0, length) & there.narrow(axis, 1, length)
            # of a pair in its image's mean; taken apart, since it needs no gradient: small steps wait for each kernel
            share = both / both.sum((1, 2), keepdim=True).clamp(min=1)
            total = total + (e.diff(dim=axis).abs() * share).sum()
    return total


_OVER_PIXELS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "mse": mse,
    "l1": l1,
    "log_l1": log_l1,
    "berhu": berhu,
}


def _error(prediction: torch.Tensor, depth: torch.Tensor) -> torch.Tensor:
    """float32 (batch, height, width) metres, 0 at holes."""
    return torch.where(depth > 0, prediction.float() - depth, 0.0)


def _log_error(prediction: torch.Tensor, depth: torch.Tensor) -> torch.Tensor:
    """log p - log g, float32 (batch, height, width), 0 at holes."""
    valid = depth > 0
    # holes are taken out before the logarithm: what is selected away after it still has its gradient, 0 * inf
    p = torch.where(valid, prediction.float(), 1.0).clamp(min=_SMALLEST)
    return p.log() - torch.where(valid, depth, 1.0).log()
