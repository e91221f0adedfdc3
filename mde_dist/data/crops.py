"""Geometry of augmentation, on the device: the part of an image that a training view shows, and what is pasted into it.

All positions are drawn and computed on the host in float64; the device only gathers.
"""

import numpy as np
import torch
import torch.nn.functional as F

from mde_dist.data.config import AugmentConfig, border_pixels, inner_size, view_size

PASTED_WHITE = 10.0
"""Metres that are white where depth is pasted as grey values."""
_PASTED_SIDE = 0.75  # p of CutDepth, as Kim et al. (GLPDepth, 2022) take it


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
    top, left = (border_pixels(side, augment.border) for side in size)
    height, width = inner_size(size, augment.border)
    image = image[..., top : top + height, left : left + width]
    depth = depth[..., top : top + height, left : left + width]
    if augment.zoom == 1 and view == (height, width):
        return image, depth
    zoom = 1 + (augment.zoom - 1) * draw[:, 2]
    rows = _positions(draw[:, 0], height, view[0], zoom, augment.zoom > 1)
    columns = _positions(draw[:, 1], width, view[1], zoom, augment.zoom > 1)
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


def _positions(draw: np.ndarray, source: int, target: int, zoom: np.ndarray, between: bool) -> np.ndarray:
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


def paste_depth(image: torch.Tensor, depth: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """The image 0..1 with grey values of the depth in `boxes`, as `rectangles` gives them; holes keep the image."""
    top, bottom, left, right = boxes[:, :, None].unbind(1)
    row = torch.arange(depth.shape[-2], device=depth.device)
    column = torch.arange(depth.shape[-1], device=depth.device)
    inside = ((row >= top) & (row < bottom))[:, :, None] & ((column >= left) & (column < right))[:, None, :]
    grey = (depth / PASTED_WHITE).clamp(0, 1)
    return torch.where((inside & (depth > 0))[:, None], grey[:, None], image)


def on_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """A copy of a small array, which nothing waits for: a plain copy to a GPU waits for all that it has to do."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
