"""The scene as arrays of solids and lights, and what rays meet in it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mde_dist.packing.rooms.geometry import BOX, CYLINDER, ELLIPSOID, Camera, Floats, turned
from mde_dist.packing.rooms.materials import Material, Rgb

BACK = np.array([1, -1], np.float32)  # turns the cosine and sine of an angle into those of its opposite


@dataclass(frozen=True)
class Light:
    """Point light seen as a camera (for its shadow map), with its colour times power; `beam` limits it to forward."""

    view: Camera
    power: Rgb
    beam: bool


@dataclass
class Scene:
    """Solids as arrays over n parts; part 0 is the room itself, seen from inside."""

    centre: Floats  # (n, 3)
    half: Floats  # (n, 3)
    turn: Floats  # (n, 2): cosine and sine of the rotation around z
    shape: NDArray[np.int8]  # (n,)
    material: NDArray[np.int16]  # (n,)
    materials: list[Material]
    faces: list[int]  # materials of the room's faces: -x, +x, -y, +y, floor, ceiling
    lights: list[Light]
    position: Floats  # (3,) of the camera
    axes: Floats  # (3, 3) of the camera

    @property
    def extent(self) -> Floats:
        """Width, length and height of the room in metres, (3,)."""
        return self.half[0] * 2

    def unmeasurable(self) -> list[int]:
        """Materials that send nothing back to the depth sensor."""
        return [k for k, material in enumerate(self.materials) if not material.measurable]


@dataclass
class Surface:
    """Surfaces that the n rays of an image hit; vectors are (3, n)."""

    point: Floats
    normal: Floats
    uv: Floats  # (2, n) metres along the face
    footprint: Floats  # (n,) metres of surface under one pixel
    material: NDArray[np.int16]  # (n,)
    facing: Floats  # (n,) cosine between the ray and the normal


def interval(shape: int, half: Floats, origin: Floats, rays: Floats) -> tuple[Floats, Floats]:
    """Entry and exit distance of rays (3, h, w) from `origin` (3,), both in the frame of a solid centred at 0."""
    flat = {BOX: 3, CYLINDER: 1, ELLIPSOID: 0}[shape]  # the last axes bounded by two planes, the others by a quadric
    entry, leave = np.full_like(rays[0], -np.inf), np.full_like(rays[0], np.inf)
    for k in range(3 - flat, 3):
        inverse = 1 / rays[k]
        middle, reach = -origin[k] * inverse, half[k] * np.abs(inverse)
        entry, leave = np.maximum(entry, middle - reach), np.minimum(leave, middle + reach)
    if flat < 3:
        r, o = rays[: 3 - flat] / half[: 3 - flat, None, None], origin[: 3 - flat] / half[: 3 - flat]
        a, b = (r * r).sum(0), np.tensordot(o, r, 1)
        root = np.sqrt(b * b - a * (o @ o - 1))  # NaN where the ray misses; comparisons with it are false
        entry, leave = np.maximum(entry, (-b - root) / a), np.minimum(leave, (root - b) / a)
    return entry, leave


def _rectangles(scene: Scene, camera: Camera) -> NDArray[np.intp]:
    """Bounds (n, 4) of every part in the image: top, bottom, left, right; the whole image where it passes the eye."""
    corners = np.stack(np.meshgrid((-1, 1), (-1, 1), (-1, 1), indexing="ij")).reshape(3, 8).astype(np.float32)
    reach = (scene.half[:, :, None] * corners).transpose(1, 0, 2)
    points = scene.centre.T[:, :, None] + turned(scene.turn.T[:, :, None], *reach)
    column, row, depth = (a.reshape(-1, 8) for a in camera.project(points.reshape(3, -1)))
    height, width = camera.size
    bounds = np.stack([row.min(1), row.max(1) + 2, column.min(1), column.max(1) + 2], 1)
    bounds[depth.min(1) < 0.02] = 0, height, 0, width
    bounds[depth.max(1) < 0.02] = 0
    return np.clip(bounds, 0, (height, height, width, width)).astype(np.intp)


def cast(scene: Scene, camera: Camera, shadow: bool = False) -> tuple[Floats, NDArray[np.int16]]:
    """z-depth in metres and part index of the first solid along each ray, both (height, width).

    With `shadow`, the room and the lamps are left out and the depth is that of the nearest back face: a surface is in
    shadow where it lies behind one, and as lit faces never are, the comparison needs next to no bias.
    """
    rays, rectangles = camera.rays(), _rectangles(scene, camera)
    depth, part = np.full(camera.size, np.inf, np.float32), np.zeros(camera.size, np.int16)
    with np.errstate(divide="ignore", invalid="ignore"):
        if not shadow:
            depth = interval(BOX, scene.half[0], camera.position - scene.centre[0], rays)[1]
        for k in range(1, len(scene.half)):
            top, bottom, left, right = rectangles[k]
            if bottom <= top or right <= left or (shadow and scene.materials[scene.material[k]].emission > 0):
                continue
            window = slice(top, bottom), slice(left, right)
            back = scene.turn[k] * BACK
            origin = turned(back, *(camera.position - scene.centre[k]))
            entry, leave = interval(scene.shape[k], scene.half[k], origin, turned(back, *rays[:, *window]))
            distance = leave if shadow else entry
            hit = (entry < leave) & (entry > 0) & (distance < depth[window])
            np.copyto(depth[window], distance, where=hit)
            np.copyto(part[window], np.int16(k), where=hit)
    return depth, part


def _bend(shape: NDArray[np.int8], half: Floats, local: Floats, normal: Floats, uv: Floats) -> None:
    """Overwrites normals and texture coordinates where the n points lie on the round side of a solid."""
    unit = local / half
    curved = np.flatnonzero((shape == ELLIPSOID) | (shape == CYLINDER) & (np.hypot(unit[0], unit[1]) > np.abs(unit[2])))
    bent = unit[:, curved] / half[:, curved] * np.where(shape[curved] == CYLINDER, [[1], [1], [0]], 1)
    normal[:, curved] = bent / np.linalg.norm(bent, axis=0)
    uv[:, curved] = np.arctan2(local[1, curved], local[0, curved]) * half[0, curved], local[2, curved]


def surface_of(scene: Scene, camera: Camera, depth: Floats, part: NDArray[np.int16]) -> Surface:
    """Points, normals and texture coordinates of what `cast` found."""
    rays, index = camera.rays().reshape(3, -1), part.ravel()
    point = camera.position[:, None] + rays * depth.ravel()
    turn, half = scene.turn.T[:, index], scene.half.T[:, index]
    local = turned(turn * BACK[:, None], *(point - scene.centre.T[:, index]))
    unit = local / half
    axis = np.abs(unit).argmax(0)
    across = np.array([[1, 2], [0, 2], [0, 1]])[axis].T
    long, short = np.take_along_axis(half, across, 0)
    uv = np.take_along_axis(local, np.where((long < short) & (index > 0), across[::-1], across), 0)  # grain runs along
    normal = np.where(axis == np.arange(3)[:, None], np.sign(unit), np.float32(0))
    side = 2 * axis + (normal.sum(0) > 0)
    _bend(scene.shape[index], half, local, normal, uv)
    normal = turned(turn, *normal) * np.where(index == 0, np.float32(-1), np.float32(1))
    facing = -(normal * rays).sum(0) / np.linalg.norm(rays, axis=0)
    footprint = depth.ravel() / camera.focal / np.sqrt(np.maximum(facing, 0.05))
    material = np.where(index == 0, np.array(scene.faces, np.int16)[side], scene.material[index])
    # Shifted so that texture coordinates are positive and that equal pieces do not look the same.
    return Surface(point, normal, uv + 64 + index % 16 * np.float32(0.37), footprint, material, facing)
