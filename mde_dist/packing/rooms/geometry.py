"""Shapes, rotations and the pinhole camera.

Room coordinates are metres with x and y on the floor and z up; the camera's axes are right, down and forward, so that
the distance along a ray whose forward component is 1 is the z-depth that NYU Depth v2 stores.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]  # float32 wherever there is one per pixel
Pair = tuple[float, float]

BOX, CYLINDER, ELLIPSOID = range(3)


@dataclass(frozen=True)
class Camera:
    """Pinhole: position (3,) in metres; axes (3, 3) with rows right, down, forward; focal length in pixels."""

    position: Floats
    axes: Floats
    size: tuple[int, int]
    focal: float

    def rays(self) -> Floats:
        """Directions (3, height, width) in room axes, with forward component 1."""
        height, width = self.size
        x = ((np.arange(width) - (width - 1) / 2) / self.focal).astype(np.float32)
        y = ((np.arange(height) - (height - 1) / 2) / self.focal).astype(np.float32)
        right, down, forward = self.axes[:, :, None, None]
        return right * x + down * y[:, None] + forward

    def project(self, points: Floats) -> tuple[Floats, Floats, Floats]:
        """Points (3, n) -> column and row in pixels and z-depth in metres, each (n,)."""
        x, y, z = self.axes @ (points - self.position[:, None])
        scale = self.focal / np.maximum(z, np.float32(1e-3))
        return x * scale + (self.size[1] - 1) / 2, y * scale + (self.size[0] - 1) / 2, z


def intrinsics(size: tuple[int, int]) -> tuple[float, float, float, float]:
    """fx, fy, cx, cy in pixels of an image of (height, width); pixel centres are at whole numbers."""
    height, width = size
    return 519 / 640 * width, 519 / 640 * width, (width - 1) / 2, (height - 1) / 2


def view_axes(yaw: float, pitch: float, roll: float) -> Floats:
    """Rows right, down, forward of a camera looking along `yaw`, `pitch` radians below the horizon."""
    forward = np.array([np.cos(yaw) * np.cos(pitch), np.sin(yaw) * np.cos(pitch), -np.sin(pitch)])
    right = np.array([np.sin(yaw), -np.cos(yaw), 0.0])
    down = np.cross(forward, right)
    c, s = np.cos(roll), np.sin(roll)
    return np.stack([c * right + s * down, c * down - s * right, forward]).astype(np.float32)


def turned(turn: Floats, x: Floats, y: Floats, z: Floats) -> Floats:
    """Vectors (3, ...) rotated around z by the angle whose cosine and sine are `turn`."""
    c, s = turn
    return np.stack([c * x - s * y, s * x + c * y, z])


def turn_matrix(angle: float) -> NDArray[np.float64]:
    """The same rotation around z as a matrix, from the angle in radians."""
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])
