"""Parts of a room: solids, and the builder that draws, paints and places them without collision."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from mde_dist.packing.rooms.geometry import BOX, CYLINDER, Floats, Pair, turn_matrix
from mde_dist.packing.rooms.materials import CLOTH, STRIPES, WOOD, WOODS, Material, Pattern, Rgb


@dataclass(frozen=True)
class Part:
    """One solid: centre and half extents in metres in its piece's frame (x along the wall, y away from it)."""

    centre: tuple[float, float, float]
    half: tuple[float, float, float]
    material: int
    shape: int = BOX


def solid(x: Pair, y: Pair, z: Pair, material: int, shape: int = BOX) -> Part:
    """The solid that fills these spans."""
    lows, highs = zip(x, y, z, strict=True)
    centre = tuple((a + b) / 2 for a, b in zip(lows, highs, strict=True))
    half = tuple((b - a) / 2 for a, b in zip(lows, highs, strict=True))
    return Part((centre[0], centre[1], centre[2]), (half[0], half[1], half[2]), material, shape)


def upright(x: float, y: float, radius: float, z: Pair, material: int, shape: int = CYLINDER) -> Part:
    """The solid of this radius around an upright axis."""
    return solid((x - radius, x + radius), (y - radius, y + radius), z, material, shape)


@dataclass
class Builder:
    """Collects materials and placed parts; `claims` are the (low, high) corners of what already stands somewhere."""

    rng: np.random.Generator
    extent: Rgb  # room size in metres
    materials: list[Material] = field(default_factory=list)
    placed: list[tuple[Part, float, float, float]] = field(default_factory=list)  # part, x, y, angle
    claims: list[tuple[Floats, Floats]] = field(default_factory=list)

    def draw(self, low: float, high: float) -> float:
        return float(self.rng.uniform(low, high))

    def colour(self, low: float = 0.05, high: float = 0.7) -> Rgb:
        grey = self.draw(low, high)
        r, g, b = np.clip(grey + self.rng.uniform(-0.25, 0.25, 3), 0.03, 0.85).tolist()
        return r, g, b

    def add(
        self, pattern: Pattern, high: Rgb, contrast: float = 0.5, glow: float = 0.0, measurable: bool = True
    ) -> int:
        r, g, b = (channel * (1 - contrast) for channel in high)
        self.materials.append(Material(pattern, (r, g, b), high, glow, measurable))
        return len(self.materials) - 1

    def wood(self) -> int:
        return self.add(WOOD, WOODS[self.rng.integers(len(WOODS))], 0.45)

    def fabric(self) -> int:
        return self.add((CLOTH, CLOTH, STRIPES)[self.rng.integers(3)], self.colour(), self.draw(0.4, 0.7))

    def place(self, parts: Sequence[Part], x: float, y: float, angle: float, grow: float = 0.0) -> bool:
        """Puts a piece at (x, y) turned by `angle`, unless it would leave the room or run into another piece."""
        turn = turn_matrix(angle)
        centre = np.array([part.centre for part in parts]) @ turn.T + (x, y, 0)
        half = np.array([part.half for part in parts]) @ np.abs(turn).T
        low, high = (centre - half).min(0), (centre + half).max(0)
        if (low < -0.01).any() or (high > np.array(self.extent) + 0.01).any():
            return False
        if any((low < b).all() and (high > a).all() for a, b in self.claims):
            return False
        self.claims.append((low - grow, high + grow))
        self.placed += [(part, x, y, angle) for part in parts]
        return True

    def against_wall(self, parts: Sequence[Part], gap: float, grow: float = 0.0, tries: int = 12) -> int:
        """Puts a piece with its back to a random wall (0..3 for -y, +x, +y, -x); -1 where none has room for it."""
        width, length, _ = self.extent
        for _ in range(tries):
            wall, along = int(self.rng.integers(4)), self.draw(0, 1)
            x = (along * width, width - gap, along * width, gap)[wall]
            y = (gap, along * length, length - gap, along * length)[wall]
            if self.place(parts, x, y, wall * np.pi / 2, grow):
                return wall
        return -1
