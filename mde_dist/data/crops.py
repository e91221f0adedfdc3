"""Geometry of augmentation, on the device: the part of an image that a training view shows, and what is pasted into it.

All places are drawn and computed on the host in float64; the device only gathers.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from mde_dist.utils.cli import Size
from mde_dist.utils.errors import UserError

LEAST_CROP = 32
"""Pixels per side: the encoder halves an image five times."""
PASTED_WHITE = 10.0
"""Metres that are white where depth is pasted as grey values."""
_PASTED_SIDE = 0.75  # p of CutDepth, as Kim et al. (GLPDepth, 2022) take it


@dataclass(frozen=True)
class AugmentConfig:
    """Random views of the training images."""

    flip: float = 0.5
    """Probability of mirroring left and right, 0..1."""
    color: float = 0.5
    """Probability of a change of gamma (0.9..1.1), brightness (0.75..1.25) and colour channels (0.9..1.1), 0..1; the
    ranges are those of BTS (Lee et al., 2019)."""
    border: float = 0
    """Share of height and of width that is left out at each side of every training image, 0..0.25: the white frame of
    Kinect images; 0.0625 leaves out about as much as the crop of Eigen et al. (2014). Evaluation sees whole images."""
    crop: Size | None = None
    """Train on a random window of this size in pixels, of images resized to data.size; None = on all of them. At least
    32x32. Evaluation sees whole images."""
    zoom: float = 1
    """Largest magnification, 1..4: each image is magnified z times about a random place, z uniform in 1..zoom, and its
    depth divided by z (Eigen et al., 2014)."""
    cut_depth: float = 0
    """Probability of pasting a random rectangle of the depth map into the image, as grey values, 0..1 (CutDepth, Ishii
    and Yamashita, 2021)."""


def view_size(size: tuple[int, int], augment: AugmentConfig) -> tuple[int, int]:
    """Height and width of the training views of images of `size`, pixels. Raises UserError where the crop is larger."""
    height, width = _inner(size, augment.border)
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


def _inner(size: tuple[int, int], border: float) -> tuple[int, int]:
    height, width = (side - 2 * _frame(side, border) for side in size)
    return height, width


def _frame(side: int, border: float) -> int:
    """Pixels that are left out at each end of a side."""
    return int(np.floor(border * side + 0.5))


def random_crop_zoom(
    image: torch.Tensor, depth: torch.Tensor, draw: np.ndarray, augment: AugmentConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """A window of each image and its depth: border left out, magnified, cropped.

    image (batch, 3, height, width), depth (batch, height, width) metres, `draw` float64 (batch, 3) in [0, 1): where the
    window lies from top to bottom and from left to right, and the magnification. Without zoom pixels are copied; with
    it the image is interpolated bilinearly, and depth is that of the nearest pixel, which may be a hole.

    Magnifying by z makes a point (X, Y, Z), seen at f X / Z pixels from the axis, appear at z f X / Z = f X / (Z / z):
    where a camera of the same focal length f sees the same X and Y at depth Z / z. So things keep their size in
    metres, which is what a depth is guessed from. (It is not quite what a camera that moved ahead sees: that would take
    the same way off all depths, not the same share.)
    """
    size = (image.shape[-2], image.shape[-1])
    view = view_size(size, augment)
    if augment.zoom == 1 and view == size:
        return image, depth
    (top, left), (height, width) = (_frame(side, augment.border) for side in size), _inner(size, augment.border)
    image = image[..., top : top + height, left : left + width]
    depth = depth[..., top : top + height, left : left + width]
    if augment.zoom == 1 and view == (height, width):
        return image, depth
    zoom = 1 + (augment.zoom - 1) * draw[:, 2]
    rows = _places(draw[:, 0], height, view[0], zoom, augment.zoom > 1)
    columns = _places(draw[:, 1], width, view[1], zoom, augment.zoom > 1)
    told = on_device(np.concatenate([zoom[:, None], rows, columns], axis=1), image.device)
    y, x = told[:, 1 : 1 + view[0]], told[:, 1 + view[0] :]
    one = torch.arange(len(image), device=image.device).view(-1, 1, 1)
    row, column = y.long()[:, :, None], x.long()[:, None, :]
    depth = depth[one, row, column]
    if augment.zoom == 1:
        # channels innermost: each pixel is one piece of memory
        return image.permute(0, 2, 3, 1)[one, row, column].permute(0, 3, 1, 2), depth
    across, down = (2 * x / width - 1).float(), (2 * y / height - 1).float()
    grid = torch.stack(torch.broadcast_tensors(across[:, None, :], down[:, :, None]), dim=-1)
    image = F.grid_sample(image, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return image, depth / told[:, :1, None].float()


def _places(draw: np.ndarray, source: int, target: int, zoom: np.ndarray, between: bool) -> np.ndarray:
    """Positions of the centres of a window's pixels along one side, float64 (batch, target), from 0 at the first
    pixel's outer edge to `source`. `between`: the window may begin between pixels."""
    room = source - target / zoom
    first = draw * room if between else np.floor(draw * (room + 1))
    return first[:, None] + (np.arange(target) + 0.5) / zoom[:, None]


def rectangles(draw: np.ndarray, size: tuple[int, int], augment: AugmentConfig) -> np.ndarray:
    """Rectangles into which depth is pasted: float64 (batch, 4) of (top, bottom, left, right) in whole pixels, empty
    where nothing is.

    `draw` (batch, 5) in [0, 1): whether, top, left, height, width. With W the image's width and a, c drawn: left = a W
    and width = max((W - a W) c p, 1), p = 0.75; height likewise (Ishii and Yamashita, 2021).
    """
    first = np.floor(draw[:, 1:3] * size)
    length = np.maximum(np.floor((size - first) * draw[:, 3:5] * _PASTED_SIDE), 1)
    last = first + length * (draw[:, :1] < augment.cut_depth)
    return np.stack([first[:, 0], last[:, 0], first[:, 1], last[:, 1]], axis=1)


def paste_depth(image: torch.Tensor, depth: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """The image 0..1 with grey values of the depth in `places`, as `rectangles` gives them; holes keep the image."""
    top, bottom, left, right = places[:, :, None].unbind(1)
    row = torch.arange(depth.shape[-2], device=depth.device)
    column = torch.arange(depth.shape[-1], device=depth.device)
    inside = ((row >= top) & (row < bottom))[:, :, None] & ((column >= left) & (column < right))[:, None, :]
    grey = (depth / PASTED_WHITE).clamp(0, 1)
    return torch.where((inside & (depth > 0))[:, None], grey[:, None], image)


def on_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """A copy of a small array, which nothing waits for: a plain copy to a GPU waits for all that it has to do."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
