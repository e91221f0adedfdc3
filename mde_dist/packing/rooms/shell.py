"""The empty room: materials of its six faces, and its fixtures with the lights they bring."""

from __future__ import annotations

import numpy as np

from mde_dist.packing.rooms.builder import Builder, solid, upright
from mde_dist.packing.rooms.geometry import ELLIPSOID, Camera, turn_matrix, view_axes
from mde_dist.packing.rooms.materials import BRICKS, PILE, PLAIN, PLANKS, SKY, TILES, WALLPAPER, WALLS, WOODS
from mde_dist.packing.rooms.scene import Light


def room_faces(b: Builder) -> list[int]:
    """Materials of -x, +x, -y, +y, floor, ceiling; three walls are alike and the fourth may be an accent."""
    paint = WALLS[b.rng.integers(len(WALLS))]
    wall = b.add((PLAIN, PLAIN, WALLPAPER)[b.rng.integers(3)], paint, b.draw(0.1, 0.3))
    brick = b.add(BRICKS, (0.55, 0.3, 0.2), 0.6)
    accent = (wall, brick, b.add(WALLPAPER, b.colour(0.3), 0.3))[b.rng.choice(3, p=[0.5, 0.25, 0.25])]
    walls = [wall] * 4
    walls[b.rng.integers(4)] = accent
    wood, stone, pile = WOODS[b.rng.integers(4)], b.draw(0.4, 0.75), b.colour(0.2, 0.5)
    options = ((PLANKS, wood, 0.6), (TILES, (stone, stone, stone * 0.93), 0.6), (PILE, pile, 0.6))
    pattern, colour, contrast = options[b.rng.choice(3, p=[0.5, 0.25, 0.25])]
    return [*walls, b.add(pattern, colour, contrast), b.add(PLAIN, (0.85, 0.85, 0.83), 0.1)]


def _skirting(b: Builder, white: int) -> None:
    width, length, _ = b.extent
    corners = ((0.0, 0.0), (width, 0.0), (width, length), (0.0, length))
    for k, (x, y) in enumerate(corners):
        board = solid((0, b.extent[k % 2]), (0, 0.015), (0, 0.09), white)
        b.placed.append((board, x, y, k * np.pi / 2))


def _door(b: Builder, white: int) -> None:
    frame, w, h = b.wood(), b.draw(0.8, 0.95), 2.03
    knob = upright(w / 2 - 0.1, 0.08, 0.03, (1.0, 1.06), b.add(PLAIN, (0.4, 0.35, 0.2)), ELLIPSOID)
    panels = [solid((-w / 2 + 0.14, w / 2 - 0.14), (0, 0.045), z, frame) for z in ((0.2, 0.9), (1.15, 1.85))]
    casing = solid((-w / 2 - 0.07, w / 2 + 0.07), (0, 0.022), (0, h + 0.07), white)
    b.against_wall([casing, solid((-w / 2, w / 2), (0, 0.03), (0, h), frame), *panels, knob], 0.0, grow=0.4)


def _window(b: Builder, white: int) -> list[Light]:
    """Glass with its bars and sill, and the daylight; no light where no wall has room for it."""
    w, low, high, sun = b.draw(0.9, 1.9), b.draw(0.8, 1.0), b.draw(1.9, 2.15), b.draw(0.0, 1.0)
    glass = b.add(SKY, (0.75, 0.9, 1.0), 0.85, glow=0.15 + 2 * sun, measurable=False)
    pane = solid((-w / 2, w / 2), (0, 0.02), (low, high), glass)
    bars = [solid((x - 0.03, x + 0.03), (0, 0.05), (low, high), white) for x in (-w / 2, 0, w / 2)]
    for z, ledge in ((low, 0.1), (high, 0.0)):
        bars.append(solid((-w / 2 - 0.05, w / 2 + 0.05), (0, 0.05 + ledge), (z - 0.03, z + 0.03), white))
    if b.against_wall([pane, *bars], 0.0) < 0:
        return []
    _, x, y, angle = b.placed[-1]
    place = np.array([x, y, (low + high) / 2]) + turn_matrix(angle) @ (0, 0.12, 0)
    view = Camera(place.astype(np.float32), view_axes(angle + np.pi / 2, 0.0, 0.0), (160, 320), 55.0)
    return [Light(view, (2.6 * sun * w, 2.9 * sun * w, 3.2 * sun * w), beam=True)]


def _ceiling_lamp(b: Builder, white: int) -> list[Light]:
    """The lamp on its cord, and what walls and ceiling reflect of it."""
    width, length, height = b.extent
    radius, drop, power = b.draw(0.12, 0.24), b.draw(0.12, 0.45), b.draw(1.0, 3.0)
    x, y, z = b.draw(0.4, 0.6) * width, b.draw(0.4, 0.6) * length, height - drop - 0.1
    bulb = b.add(PLAIN, (1.0, 0.93, 0.8), 0.1, glow=3.0, measurable=False)
    b.placed.append((upright(0, 0, radius, (z - 0.1, z + 0.1), bulb, int(b.rng.integers(1, 3))), x, y, 0.0))
    b.placed.append((upright(0, 0, 0.012, (z + 0.08, height), white), x, y, 0.0))
    down = view_axes(0.0, np.pi / 2, 0.0)
    view = Camera(np.array([x, y, z], np.float32), down, (320, 320), 55.0)
    # Reflections are a second weak lamp opposite: it darkens the floor under furniture.
    opposite = Camera(np.array([width - x, length - y, height - 0.2], np.float32), down, (160, 160), 30.0)
    return [
        Light(view, (1.1 * power, 1.0 * power, 0.84 * power), beam=False),
        Light(opposite, (0.6, 0.58, 0.54), beam=False),
    ]


def add_fixtures(b: Builder) -> list[Light]:
    """Door, window with its daylight, ceiling lamp and skirting boards; returns the lights."""
    white = b.add(PLAIN, (0.75, 0.75, 0.72), 0.2)
    _skirting(b, white)
    _door(b, white)
    return _window(b, white) + _ceiling_lamp(b, white)
