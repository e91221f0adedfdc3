"""The parts of a decoder: normalisation, upsampling, what follows a skip connection, heads, range of the output."""

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial

import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from mde_dist.models.config import Norm, Upsample

ENCODER_NORMS: dict[str, Callable[[int], nn.Module]] = {
    "batch": nn.BatchNorm2d,
    "group": partial(nn.GroupNorm, 32),
    "frozen": torchvision.ops.FrozenBatchNorm2d,
}
_HALF, _FULL = 32, 16
"""Channels of the full-resolution head at half and at the whole size."""


def resize(x: torch.Tensor, like: torch.Tensor, mode: Upsample) -> torch.Tensor:
    """(batch, channels, h, w) -> height and width of `like`: not by 2, since odd sides are rounded on the way down."""
    if x.shape[-2:] == like.shape[-2:]:
        return x
    return F.interpolate(x, like.shape[-2:], mode=mode, align_corners=False if mode == "bilinear" else None)


def refinement(channels: int, norm: Norm) -> nn.Module:
    """Block that follows each sum of two features: convolution, normalisation, ReLU."""
    return nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1, bias=False), _norm(channels, norm), nn.ReLU(True))


def _norm(channels: int, norm: Norm) -> nn.Module:
    """Normalisation of the decoder, which has no statistics to freeze: 32 groups, or fewer where they would be of one
    channel."""
    return nn.BatchNorm2d(channels) if norm == "batch" else nn.GroupNorm(min(32, channels // 2), channels)


def full_precision(device: torch.device) -> AbstractContextManager:
    """A block in which autocast rounds nothing: its inputs have to be float32.

    bfloat16 has 8 significant bits: between 4 m and 8 m it resolves 31 mm. Where autocast is off nothing is entered,
    for an exported graph would show it.
    """
    kind = device.type
    on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if on else contextlib.nullcontext()


class QuarterHead(nn.Conv2d):
    """Features at a quarter of the image's size -> one number there, float32."""

    def __init__(self, channels: int):
        super().__init__(channels, 1, 3, padding=1)

    def forward(self, x: torch.Tensor, half: torch.Tensor, image: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        with full_precision(x.device):
            return super().forward(x.float())


class FullHead(nn.Module):
    """Features at a quarter and at half of the image's size -> one number at its whole size, float32."""

    def __init__(self, channels: int, norm: Norm):
        """`channels`: of both."""
        super().__init__()
        self.to_half = nn.Conv2d(channels, _HALF, 3, padding=1)
        self.skip = nn.Conv2d(channels, _HALF, 1)
        self.at_half = refinement(_HALF, norm)
        self.to_full = nn.Conv2d(_HALF, _FULL, 3, padding=1)
        self.at_full = refinement(_FULL, norm)
        self.last = nn.Conv2d(_FULL, 1, 3, padding=1)

    def forward(self, x: torch.Tensor, half: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        x = self.at_half(resize(self.to_half(x), half, "bilinear") + self.skip(half))
        x = self.at_full(resize(self.to_full(x), image, "bilinear"))
        with full_precision(x.device):
            return self.last(x.float())


def depth_activation(raw: torch.Tensor, output: str, low: float, high: float) -> torch.Tensor:
    """Any number -> metres: softplus = above 0, sigmoid = low..high, log = low..high in logarithms."""
    if output == "softplus":
        return F.softplus(raw)
    share = raw.sigmoid()
    return low + (high - low) * share if output == "sigmoid" else low * (high / low) ** share
