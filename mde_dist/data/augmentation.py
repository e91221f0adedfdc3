"""Stored batch -> one view of each image and its depth, as floats, on the device.

A view's parameters are hashed from (seed, epoch, sample), so they do not depend on ranks, threads or batch size.
"""

import functools

import numpy as np
import torch
import torch.nn.functional as F

from mde_dist.data.config import AugmentConfig
from mde_dist.data.crops import on_device, paste_depth, random_crop_zoom, rectangles
from mde_dist.data.depth import COUNTS_PER_METRE, first_valid, footprints
from mde_dist.data.loader import Batch
from mde_dist.data.sampler import hash_uniform

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def prepare_images(batch: Batch, size: tuple[int, int]) -> torch.Tensor:
    """-> RGB float32 (batch, 3, *size), 0..1."""
    return resize_image(batch.image.permute(0, 3, 1, 2).float() / 255, size)


def prepare_depth(batch: Batch) -> torch.Tensor:
    """-> float32 (batch, height, width) metres as stored, 0 = hole."""
    return batch.depth.float() / COUNTS_PER_METRE


def depth_counts(batch: Batch) -> torch.Tensor:
    """-> float64 (batch, height, width): the counts as stored, COUNTS_PER_METRE a metre, 0 = hole; for scores."""
    return batch.depth.double()


def prepare(
    batch: Batch, size: tuple[int, int], augment: AugmentConfig, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """A training view of each sample for (seed, epoch, sample), of images resized to `size`.

    -> (image float32 (batch, 3, height, width) normalised as for ImageNet, depth float32 (batch, height, width) metres,
    0 = hole), height and width as `view_size` says.
    """
    image, depth = prepare_images(batch, size), prepare_depth(batch)
    if depth.shape[-2:] != size:
        depth = first_valid(depth, _footprints_on(depth.device, (depth.shape[-2], depth.shape[-1]), size))
    draw = hash_uniform(seed, batch.epoch[:, None], batch.sample[:, None], np.arange(15))
    image, depth = random_crop_zoom(image, depth, draw[:, 7:10], augment)
    # chosen in float64: rounded to float32 a draw can reach 1, which is below no probability
    draw[:, :2] = draw[:, :2] < (augment.flip, augment.color)
    pasted = rectangles(draw[:, 10:], (depth.shape[-2], depth.shape[-1]), augment)
    drawn = on_device(np.concatenate([draw[:, :7], pasted], axis=1).astype(np.float32), image.device)
    image, depth = _flip(image, depth, drawn[:, 0] > 0)
    image = _recolor(image, drawn[:, 1] > 0, drawn[:, 2:7])
    if augment.cut_depth > 0:
        image = paste_depth(image, depth, drawn[:, 7:])
    return normalise(image), depth


@functools.lru_cache(maxsize=64)  # as the means of ImageNet below: a copy to the device is waited for
def _footprints_on(
    device: torch.device, source: tuple[int, int], target: tuple[int, int]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """`footprints`, ready for the device."""
    steps = footprints(source, target)
    return [(torch.from_numpy(rows).to(device), torch.from_numpy(columns).to(device)) for rows, columns in steps]


def resize_image(image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """float (batch, 3, height, width) -> (batch, 3, *size), bilinear, without aliasing."""
    if image.shape[-2:] == size:
        return image
    return F.interpolate(image, size, mode="bilinear", align_corners=False, antialias=True)


def normalise(image: torch.Tensor) -> torch.Tensor:
    """RGB 0..1 (batch, 3, height, width) -> zero mean and unit variance over ImageNet."""
    mean, std = _imagenet(image.device)
    return (image - mean) / std


@functools.cache  # or each batch would wait for a copy of these to its device
def _imagenet(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(torch.tensor(values, device=device).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))  # type: ignore[return-value]


def _flip(image: torch.Tensor, depth: torch.Tensor, chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    flipped = torch.where(chosen.view(-1, 1, 1, 1), image.flip(-1), image)
    return flipped, torch.where(chosen.view(-1, 1, 1), depth.flip(-1), depth)


def _recolor(image: torch.Tensor, chosen: torch.Tensor, draw: torch.Tensor) -> torch.Tensor:
    """`draw` (batch, 5) in [0, 1): gamma, brightness, three channels."""
    gamma, brightness = 0.9 + 0.2 * draw[:, :1], 0.75 + 0.5 * draw[:, 1:2]
    gain = brightness * (0.9 + 0.2 * draw[:, 2:5])
    changed = (image.pow(gamma.view(-1, 1, 1, 1)) * gain.view(-1, 3, 1, 1)).clamp(0, 1)
    return torch.where(chosen.view(-1, 1, 1, 1), changed, image)
