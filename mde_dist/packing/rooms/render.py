"""Picture and measurement of a room: light on its surfaces, the camera's image, the depth sensor's map."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mde_dist.packing.rooms.build import build_scene
from mde_dist.packing.rooms.geometry import Camera, Floats, intrinsics
from mde_dist.packing.rooms.scene import Light, Scene, Surface, cast, surface_of

KINECT_BASELINE = 0.075  # m between projector and infrared camera
KINECT_RANGE = (0.45, 10.0)  # m


def _albedo(scene: Scene, surface: Surface) -> tuple[Floats, Floats]:
    """Reflectance and emission, both (3, n), one material at a time."""
    albedo, emission = np.empty_like(surface.point), np.zeros_like(surface.point)
    order = np.argsort(surface.material, kind="stable")
    numbers, starts = np.unique(surface.material[order], return_index=True)
    for number, where in zip(numbers, np.split(order, starts[1:]), strict=True):
        material = scene.materials[number]
        mix = material.pattern(*surface.uv[:, where], surface.footprint[where])
        low, high = np.array([material.low, material.high], np.float32)[:, :, None]
        colour = np.clip(low + (high - low) * mix, 0.01, 1)
        albedo[:, where], emission[:, where] = colour, colour * np.float32(material.emission)
    return albedo, emission


def _ambient(scene: Scene, surface: Surface) -> Floats:
    """Share (n,) of ambient light that reaches each point: less of it near the room's edges and corners."""
    gap = np.minimum(surface.point, scene.extent[:, None] - surface.point)
    return (1 - 0.5 * np.exp(gap / np.float32(-0.3)) * (1 - np.abs(surface.normal))).prod(0)


def _direct(scene: Scene, surface: Surface, light: Light) -> Floats:
    """Irradiance (n,) from a light, without its colour: Lambert's cosine, fall-off by distance, soft shadow."""
    towards = light.view.position[:, None] - surface.point
    square = (towards * towards).sum(0)
    cosine = np.maximum((surface.normal * towards).sum(0), 0) / np.sqrt(square)
    column, row, z = light.view.project(surface.point)
    if light.beam:
        cosine *= np.maximum(z, 0) / np.sqrt(square)
    nearest, _ = cast(scene, light.view, shadow=True)
    height, width = light.view.size
    lit = np.zeros_like(z)
    for dy, dx in ((-0.9, 0.3), (-0.3, -0.9), (0.3, 0.9), (0.9, -0.3)):
        x, y = (column + (0.5 + dx)).astype(np.int32), (row + (0.5 + dy)).astype(np.int32)
        seen = (x >= 0) & (x < width) & (y >= 0) & (y < height) & (z > 0)
        at = np.where(seen, y * width + x, 0)
        lit += np.where(seen, z < nearest.ravel()[at] + 0.01, True)
    return cosine * lit / (4 * (square + 0.3))


def _shade(scene: Scene, surface: Surface) -> Floats:
    """Radiance (3, n)."""
    albedo, emission = _albedo(scene, surface)
    light = np.array([[0.16], [0.155], [0.145]], np.float32) * _ambient(scene, surface)
    for lamp in scene.lights:
        light = light + np.array(lamp.power, np.float32)[:, None] * _direct(scene, surface, lamp)
    return albedo * light + emission


def _photograph(radiance: Floats, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Radiance (3, height, width) -> 8-bit image (height, width, 3) as an automatic camera would take it."""
    _, height, width = radiance.shape
    wide = np.pad(radiance, ((0, 0), (1, 1), (0, 0)), mode="edge")
    tall = np.pad((wide[:, :-2] + 4 * wide[:, 1:-1] + wide[:, 2:]) / 6, ((0, 0), (0, 0), (1, 1)), mode="edge")
    soft = (tall[:, :, :-2] + 4 * tall[:, :, 1:-1] + tall[:, :, 2:]) / 6  # the lens; also softens jagged edges
    x, y = np.linspace(-1, 1, width, dtype=np.float32), np.linspace(-1, 1, height, dtype=np.float32)[:, None]
    vignette = 1 - np.float32(rng.uniform(0.05, 0.2)) * (x * x + y * y) / 2
    balance = np.exp(rng.normal(0, 0.05, 3)).astype(np.float32)[:, None, None]
    exposure = np.float32(rng.uniform(0.25, 0.45) / np.median(soft[1]))
    tone = np.sqrt(1 - np.exp(-soft * balance * (vignette * exposure)))  # film shoulder, then gamma 2
    tone += np.float32(rng.uniform(0.004, 0.015)) * rng.standard_normal(tone.shape, np.float32)
    return np.ascontiguousarray((np.clip(tone, 0, 1) * 255 + 0.5).astype(np.uint8).transpose(1, 2, 0))


def _measure(depth: Floats, solid: NDArray[np.bool_], focal: float, rng: np.random.Generator) -> Floats:
    """Exact depth (height, width) -> a structured-light sensor's: noise by z squared, and 0 where it sees nothing."""
    height, width = depth.shape
    column, row = np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32)[:, None]
    # The projector stands to the right: it does not reach what lies left of and behind a nearer surface.
    seen_at = column - focal * KINECT_BASELINE / depth
    lit = np.minimum.accumulate(seen_at[:, ::-1], axis=1)[:, ::-1] > seen_at - 0.5
    valid = solid & lit & (depth > KINECT_RANGE[0]) & (depth < KINECT_RANGE[1])
    for x, y, r in zip(*rng.random((3, 8)), strict=True):
        radius = (0.004 + 0.035 * r**3) * width
        valid &= (column - x * width) ** 2 + 2 * (row - y * height) ** 2 > radius * radius
    edge = max(1, round(width / 160))
    frame = np.zeros_like(valid)
    frame[edge:-edge, edge:-edge] = True
    noise = np.float32(1.4e-3) * rng.standard_normal(depth.shape, np.float32) * depth * depth
    return np.where(valid & frame, depth + noise, np.float32(0))


def render_room(seed: int, size: tuple[int, int] = (240, 320)) -> tuple[NDArray[np.uint8], Floats]:
    """Image uint8 (height, width, 3) RGB and depth float32 (height, width) in metres, 0 = no measurement.

    A pure function of a non-negative seed and the size in pixels; the seed alone decides the room and the view.
    """
    scene = build_scene(seed)
    camera = Camera(scene.position, scene.axes, size, intrinsics(size)[0])
    depth, part = cast(scene, camera)
    surface = surface_of(scene, camera, depth, part)
    solid = ~np.isin(surface.material, scene.unmeasurable()) & (surface.facing > 0.1)
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, 1])))
    image = _photograph(_shade(scene, surface).reshape(3, *size), rng)
    return image, _measure(depth, solid.reshape(size), camera.focal, rng)
