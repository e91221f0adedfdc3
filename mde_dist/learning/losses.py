"""Masked losses as sums and counts, so that ranks and accumulation steps can divide by the one global count."""

import torch


def mse(prediction: torch.Tensor, depth: torch.Tensor) -> torch.Tensor:
    """Sum over valid pixels (depth > 0) of the squared error, m^2.

    prediction, depth: (batch, height, width) metres. Divide by `valid_pixels` of the whole global batch.
    """
    valid = depth > 0
    return torch.where(valid, prediction.float() - depth, 0.0).square().sum()


def valid_pixels(depth: torch.Tensor) -> torch.Tensor:
    """Number of pixels with a measurement, float64 scalar on the device of `depth`."""
    return (depth > 0).sum(dtype=torch.float64)
