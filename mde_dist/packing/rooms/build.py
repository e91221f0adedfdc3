"""One room from its seed: shell, furniture, and the pose of the camera in it."""

from __future__ import annotations

import numpy as np

from mde_dist.packing.rooms.builder import Builder, solid
from mde_dist.packing.rooms.furniture import FREE, ROOMS, SMALL
from mde_dist.packing.rooms.geometry import Camera, Floats, intrinsics, turned, view_axes
from mde_dist.packing.rooms.materials import PILE, STRIPES, painting
from mde_dist.packing.rooms.scene import Light, Scene, cast
from mde_dist.packing.rooms.shell import add_fixtures, room_faces


def _add_furniture(b: Builder) -> None:
    """A room's pieces of furniture and five small ones, as many as find a place."""
    pieces = [*ROOMS[b.rng.integers(len(ROOMS))], *(SMALL[k] for k in b.rng.integers(len(SMALL), size=5))]
    for piece in pieces:
        parts = piece(b)
        if piece in FREE and b.rng.random() < 0.6:
            x, y = (b.draw(0.15, 0.85) * side for side in b.extent[:2])
            b.place(parts, x, y, b.draw(0, 2 * np.pi))
        else:
            b.against_wall(parts, b.draw(0.02, 0.06))


def _add_rug(b: Builder) -> None:
    w, d = b.draw(1.2, 2.2), b.draw(0.9, 1.6)
    rug = b.add((STRIPES, PILE)[b.rng.integers(2)], b.colour(0.2), 0.7)
    x, y = b.draw(0.35, 0.65) * b.extent[0], b.draw(0.35, 0.65) * b.extent[1]
    b.placed.append((solid((-w / 2, w / 2), (-d / 2, d / 2), (0, 0.012), rug), x, y, b.draw(-0.3, 0.3)))


def _add_pictures(b: Builder) -> None:
    for _ in range(3):
        w, h, z = b.draw(0.15, 0.4), b.draw(0.15, 0.35), b.draw(1.45, 1.65)
        art = b.add(painting, b.colour(0.6), 0.9)
        canvas = solid((0.03 - w, w - 0.03), (0, 0.025), (z - h + 0.03, z + h - 0.03), art)
        b.against_wall([solid((-w, w), (0, 0.02), (z - h, z + h), b.wood()), canvas], 0.0)


def _assemble(b: Builder, faces: list[int], lights: list[Light]) -> Scene:
    """Turn the builder's collected parts into arrays, with the camera in the middle for now."""
    room = solid((0, b.extent[0]), (0, b.extent[1]), (0, b.extent[2]), 0)
    parts, xs, ys, angles = zip((room, 0.0, 0.0, 0.0), *b.placed, strict=True)
    turn = np.stack([np.cos(angles), np.sin(angles)], 1)
    centre = turned(turn.T, *np.array([part.centre for part in parts]).T).T + np.stack([xs, ys, np.zeros(len(xs))], 1)
    return Scene(
        centre.astype(np.float32),
        np.array([part.half for part in parts], np.float32),
        turn.astype(np.float32),
        np.array([part.shape for part in parts], np.int8),
        np.array([part.material for part in parts], np.int16),
        b.materials,
        faces,
        lights,
        np.array([b.extent[0] / 2, b.extent[1] / 2, 1.5], np.float32),
        view_axes(0.0, 0.2, 0.0),
    )


def _occupied(b: Builder, spot: Floats) -> bool:
    """Say whether `spot` is inside a piece or its claim, or within a quarter of a metre of it."""
    return any(
        (spot[:2] > low[:2] - 0.25).all() and (spot[:2] < high[:2] + 0.25).all() and low[2] < 1.9
        for low, high in b.claims
    )


def _dullness(scene: Scene, camera: Camera, wish: float) -> float:
    """Penalty of a view: its distance from showing depth around `wish` metres, with little too near, bare or
    unmeasurable."""
    depth, part = cast(scene, camera)
    middle, near = float(np.median(depth)), float((depth < 0.7).mean())
    bare, blind = float((part == 0).mean()), float(np.isin(scene.material[part], scene.unmeasurable()).mean())
    distance = 0.4 * max(wish - middle, 0) + max(1.4 - middle, 0) + max(middle - 4.5, 0)
    return distance + (10 * max(near - 0.1, 0) + 2 * max(bare - 0.6, 0) + 10 * max(blind - 0.06, 0))


def _choose_view(b: Builder, scene: Scene) -> None:
    """Tries poses of a person standing in the room and keeps the one with the best spread of depth."""
    best, lens, wish = np.inf, intrinsics((24, 32))[0], b.draw(1.7, 3.8)
    for attempt in range(200):
        if best < (0.05 if attempt < 20 else 10):
            break
        spot = np.array([b.draw(0.35, side - 0.35) for side in b.extent[:2]] + [b.draw(1.2, 1.8)], np.float32)
        if _occupied(b, spot):
            continue
        aim = np.array([b.draw(0.25, 0.75) * side for side in b.extent[:2]]) - spot[:2]
        yaw, pitch = float(np.arctan2(aim[1], aim[0])) + b.draw(-0.3, 0.3), float(b.rng.normal(0.22, 0.12))
        axes = view_axes(yaw, min(max(pitch, -0.1), 0.5), float(b.rng.normal(0, 0.025)))
        loss = _dullness(scene, Camera(spot, axes, (24, 32), lens), wish)
        if loss < best:
            best, scene.position, scene.axes = loss, spot, axes


def build_scene(seed: int) -> Scene:
    """The room of a seed, with the camera's pose; independent of the size it is rendered at."""
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, 0])))
    b = Builder(rng, (rng.uniform(2.5, 6.0), rng.uniform(3.0, 8.0), rng.uniform(2.3, 3.0)))
    faces = room_faces(b)
    lights = add_fixtures(b)
    _add_furniture(b)
    if b.rng.random() < 0.5:
        _add_rug(b)
    _add_pictures(b)
    scene = _assemble(b, faces, lights)
    _choose_view(b, scene)
    return scene
