"""Options of the data: augmentation, cache. Imports no torch, so that `--help` is quick."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mde_dist.utils.cli import Size, option
from mde_dist.utils.errors import UserError

PATIENCE = 40.0
"""Seconds without a new byte after which a server counts as away."""
LEAST_CROP = 32
"""Pixels per side: the encoder halves an image five times."""


@dataclass(frozen=True)
class CacheOptions:
    """Options of the cache of whole remote shards."""

    directory: Path = Path("~/.cache/mde_dist")
    """One per node, for all its processes; best on a local disk."""
    limit: int = 100 * 10**9
    """Bytes; the files used longest ago go first."""
    patience: float = PATIENCE
    """Seconds without a byte from a server after which it is given up."""


@dataclass(frozen=True)
class AugmentConfig:
    """Random views of the training images."""

    flip: float = option(0.5, low=0, high=1)
    """Probability of mirroring left and right, 0..1."""
    color: float = option(0.5, low=0, high=1)
    """Probability of a change of gamma (0.9..1.1), brightness (0.75..1.25) and colour channels (0.9..1.1), 0..1; the
    ranges are those of BTS (Lee et al., 2019)."""
    border: float = option(0, low=0, high=0.25)
    """Share of height and of width that is left out at each side of every training image, 0..0.25: the white frame of
    Kinect images; 0.0625 leaves out about as much as the crop of Eigen et al. (2014). Evaluation sees whole images."""
    crop: Size | None = None
    """Train on a random window of this size in pixels, of images resized to data.size; None = on all of them. At least
    32x32. Evaluation sees whole images."""
    zoom: float = option(1, low=1, high=4)
    """Largest magnification, 1..4: each image is magnified z times about a random point, z uniform in 1..zoom, and its
    depth divided by z (Eigen et al., 2014)."""
    cut_depth: float = option(0, low=0, high=1)
    """Probability of pasting a random rectangle of the depth map into the image, as grey values, 0..1 (CutDepth, Ishii
    and Yamashita, 2021)."""


def view_size(size: tuple[int, int], augment: AugmentConfig) -> tuple[int, int]:
    """Height and width of the training views of images of `size`, pixels. Raises UserError where the crop is larger."""
    height, width = inner_size(size, augment.border)
    if augment.crop is None:
        return height, width
    high, wide = augment.crop
    if min(high, wide) < LEAST_CROP:
        raise UserError(f"augment.crop = {high}x{wide}: must be at least {LEAST_CROP}x{LEAST_CROP}")
    if high > height or wide > width:
        what = f"images of {size[0]}x{size[1]}" + (
            f" without augment.border = {augment.border:g}" * (augment.border > 0)
        )
        raise UserError(f"augment.crop = {high}x{wide}: must fit into {height}x{width}, which is what {what} leave")
    return high, wide


def inner_size(size: tuple[int, int], border: float) -> tuple[int, int]:
    height, width = (side - 2 * border_pixels(side, border) for side in size)
    return height, width


def border_pixels(side: int, border: float) -> int:
    """Pixels that are left out at each end of a side."""
    return math.floor(border * side + 0.5)


def eval_shards_of(config: Mapping[str, Any]) -> str:
    """Directory or URL of the evaluation split in a trained model's config. Raises UserError."""
    place = config.get("data.eval_shards") or config.get("data.shards")
    if not place:
        raise UserError("the checkpoint does not say what it was trained on; name it: --shards DIR or --source DIR")
    return place
