"""Pieces of furniture, each a function that draws its sizes and colours and returns its solids.

A piece stands in its own frame: x along the wall, y away from it, z up, its back at y = 0.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from mde_dist.packing.rooms.builder import Builder, Part, solid, upright
from mde_dist.packing.rooms.geometry import ELLIPSOID
from mde_dist.packing.rooms.materials import CLOTH, PILE, PLAIN, STRIPES, WOOD, book_spines


def _legs(width: float, depth: float, height: float, material: int, thick: float = 0.05) -> list[Part]:
    xs, ys = (-width / 2, width / 2 - thick), (0.0, depth - thick)
    return [solid((x, x + thick), (y, y + thick), (0, height), material) for x in xs for y in ys]


def _clutter(b: Builder, width: float, depth: float, top: float) -> list[Part]:
    """Up to three small things on a surface, in separate thirds of its width so that they do not meet."""
    parts = []
    for k in np.flatnonzero(b.rng.random(3) < 0.5):
        x, y, r, h = width * (k - 1) / 3, b.draw(0.35, 0.65) * depth, b.draw(0.05, 0.11), b.draw(0.06, 0.3)
        parts.append(upright(x, y, r, (top, top + h), b.add(PLAIN, b.colour(), 0.3), int(b.rng.integers(3))))
    return parts


def _table(b: Builder) -> list[Part]:
    w, d, h, wood = b.draw(0.9, 1.7), b.draw(0.6, 0.9), b.draw(0.68, 0.78), b.wood()
    return [solid((-w / 2, w / 2), (0, d), (h - 0.04, h), wood), *_legs(w, d, h - 0.04, wood), *_clutter(b, w, d, h)]


def _chair(b: Builder) -> list[Part]:
    w, h, wood, seat = b.draw(0.4, 0.48), b.draw(0.85, 1.05), b.wood(), b.fabric()
    posts = [solid((x, x + 0.04), (0, 0.04), (0.45, h), wood) for x in (-w / 2, w / 2 - 0.04)]
    back = solid((-w / 2 + 0.04, w / 2 - 0.04), (0.005, 0.03), (h - 0.3, h - 0.03), wood)
    return [solid((-w / 2, w / 2), (0, w), (0.42, 0.47), seat), *_legs(w, w, 0.42, wood, 0.04), *posts, back]


def _dining(b: Builder) -> list[Part]:
    """Table with chairs on both long sides, their fronts pushed under it a little."""
    parts = _table(b)
    depth = 2 * parts[0].half[1]
    for part in _chair(b):
        (x, y, z), away = part.centre, -0.3
        for shift in (-parts[0].half[0] / 2, parts[0].half[0] / 2):
            parts.append(Part((x + shift, y + away, z), part.half, part.material))
            parts.append(Part((shift - x, depth - away - y, z), part.half, part.material))
    return parts


def _sofa(b: Builder) -> list[Part]:
    w, d, seat, cloth, pillow = b.draw(1.4, 2.2), b.draw(0.8, 0.95), b.draw(0.38, 0.46), b.fabric(), b.fabric()
    arms = [solid((x, x + 0.18), (0, d), (0.05, seat + 0.18), cloth) for x in (-w / 2, w / 2 - 0.18)]
    inner = w / 2 - 0.18
    cushions = [solid(side, (0.22, d + 0.02), (seat - 0.14, seat), cloth) for side in ((-inner, -0.01), (0.01, inner))]
    base = solid((-w / 2 + 0.02, w / 2 - 0.02), (0.02, d - 0.04), (0.05, seat - 0.15), cloth)
    back = solid((-inner, inner), (0, 0.24), (0.05, seat + 0.4), cloth)
    x = b.draw(-inner + 0.25, inner - 0.25)
    loose = solid((x - 0.2, x + 0.2), (0.22, 0.4), (seat, seat + 0.36), pillow, ELLIPSOID)
    return [base, back, *arms, *cushions, loose]


def _bed(b: Builder) -> list[Part]:
    w, top, wood, sheet, cover = b.draw(0.9, 1.7), b.draw(0.45, 0.6), b.wood(), b.fabric(), b.fabric()
    linen = b.add(PLAIN, (0.8, 0.8, 0.78), 0.2)
    pillows = [(0.0, w * 0.38)] if w < 1.2 else [(-w / 4, w * 0.2), (w / 4, w * 0.2)]
    return [
        solid((-w / 2 - 0.03, w / 2 + 0.03), (0, 0.05), (0, b.draw(0.8, 1.1)), wood),
        solid((-w / 2, w / 2), (0.05, 2.02), (0.08, top - 0.18), wood),
        solid((-w / 2 + 0.02, w / 2 - 0.02), (0.05, 2.0), (top - 0.18, top), sheet),
        solid((-w / 2 - 0.015, w / 2 + 0.015), (b.draw(0.6, 1.0), 2.04), (top - 0.24, top + 0.03), cover),
        *(solid((x - r, x + r), (0.08, 0.5), (top - 0.02, top + 0.13), linen, ELLIPSOID) for x, r in pillows),
    ]


def _shelf(b: Builder) -> list[Part]:
    w, d, h, wood = b.draw(0.7, 1.2), b.draw(0.28, 0.38), b.draw(1.5, 2.1), b.wood()
    books, levels = b.add(book_spines, (0.7, 0.6, 0.5), 0.93), int(b.rng.integers(4, 6))
    parts = [solid((x, x + 0.025), (0, d), (0, h), wood) for x in (-w / 2, w / 2 - 0.025)]
    parts.append(solid((-w / 2, w / 2), (0, 0.01), (0.05, h), wood))
    for z in np.linspace(0.06, h - 0.02, levels + 1).tolist():
        parts.append(solid((-w / 2, w / 2), (0, d), (z - 0.012, z + 0.012), wood))
        if z < h - 0.1:
            x = -w / 2 + 0.03
            end = x + (w - 0.06) * b.draw(0.3, 1.0)
            parts.append(solid((x, end), (0.01, d * b.draw(0.6, 0.85)), (z + 0.012, z + b.draw(0.19, 0.27)), books))
    return parts


def _cupboard(b: Builder) -> list[Part]:
    """Wardrobe, chest or low cabinet: a body with doors set on its front, sometimes a television on a low one."""
    w, d, h, wood = b.draw(0.7, 1.6), b.draw(0.38, 0.6), float(b.rng.choice([0.5, 0.85, 1.9])), b.wood()
    h, n = h * b.draw(0.9, 1.1), int(b.rng.integers(2, 4))
    doors = [(-w / 2 + k * w / n + 0.012, -w / 2 + (k + 1) * w / n - 0.012) for k in range(n)]
    parts = [solid((-w / 2, w / 2), (0, d), (0.04, h), wood)]
    parts += [solid(door, (d, d + 0.018), (0.1, h - 0.03), wood) for door in doors]
    if h > 0.6:
        return parts + (_clutter(b, w, d, h) if h < 1.2 else [])
    black, screen = b.add(PLAIN, (0.02, 0.02, 0.025), 0.2), (h + 0.05, h + 0.05 + w * 0.47)
    parts.append(solid((-0.15, 0.15), (d * 0.3, d * 0.7), (h, h + 0.05), black))
    return [*parts, solid((-w * 0.42, w * 0.42), (d * 0.45, d * 0.55), screen, black)]


def _cartons(b: Builder) -> list[Part]:
    parts, z = [], 0.0
    for k in range(int(b.rng.integers(1, 4))):
        w, d, h = b.draw(0.25, 0.5) - 0.05 * k, b.draw(0.25, 0.45) - 0.05 * k, b.draw(0.2, 0.4)
        paint = b.add(PLAIN, (0.5, 0.36, 0.2) if b.rng.random() < 0.6 else b.colour(), 0.3)
        parts.append(solid((-w / 2, w / 2), (0, d), (z, z + h), paint))
        z += h
    return parts


def _plant(b: Builder) -> list[Part]:
    pot, leaf = b.add(PLAIN, b.colour(0.3), 0.3), b.add(PILE, (0.12, 0.3, 0.07), 0.9)
    stem, h = b.add(WOOD, (0.25, 0.16, 0.08)), b.draw(0.5, 1.2)
    parts = [upright(0, 0.25, 0.15, (0, 0.3), pot), upright(0, 0.25, 0.02, (0.3, h), stem)]
    for angle in np.linspace(0, 5, 6).tolist():
        x, y, z, r = 0.12 * np.cos(angle), 0.25 + 0.1 * np.sin(angle), h + b.draw(-0.15, 0.3), b.draw(0.08, 0.14)
        parts.append(upright(x, y, r, (z - r * 0.8, z + r * 1.2), leaf, ELLIPSOID))
    return parts


def _floor_lamp(b: Builder) -> list[Part]:
    steel, h = b.add(PLAIN, (0.15, 0.15, 0.15)), b.draw(1.3, 1.7)
    shade = b.add(CLOTH, (0.9, 0.75, 0.5), 0.3, glow=b.draw(0.3, 0.9))
    pole = upright(0, 0.22, 0.015, (0.03, h), steel)
    return [upright(0, 0.22, 0.14, (0, 0.03), steel), pole, upright(0, 0.22, 0.19, (h - 0.05, h + 0.22), shade)]


def _ball(b: Builder) -> list[Part]:
    r = b.draw(0.1, 0.3)
    return [upright(0, r, r, (0, 2 * r), b.add(STRIPES, b.colour(0.3), 0.7), ELLIPSOID)]


Piece = Callable[[Builder], list[Part]]
SMALL: tuple[Piece, ...] = (_chair, _cartons, _plant, _floor_lamp, _ball, _shelf, _cupboard)
ROOMS: tuple[tuple[Piece, ...], ...] = (
    (_sofa, _cupboard, _shelf),
    (_bed, _cupboard, _table),
    (_dining, _cupboard, _shelf),
    (_table, _chair, _shelf, _shelf),
    (_sofa, _sofa, _table),
)
FREE: tuple[Piece, ...] = (_dining, _chair, _cartons, _ball)  # these may stand in the middle of the room
