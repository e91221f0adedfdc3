"""Materials: colours mixed by procedural patterns, which fade to their mean where pixels cannot resolve them.

A pattern is a function of metres along the face (twice) and of the footprint, the metres of surface under one pixel.
Colours are linear.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from mde_dist.packing.rooms.geometry import Floats, Pair

Rgb = tuple[float, float, float]
Pattern = Callable[[Floats, Floats, Floats], Floats]  # metres along the face, twice, and footprint -> mixing weight

NOISE_TEXELS, NOISE_LEVELS = 512, 7
WOODS = ((0.42, 0.24, 0.12), (0.55, 0.36, 0.19), (0.2, 0.11, 0.06), (0.68, 0.54, 0.37), (0.8, 0.8, 0.8))
WALLS = ((0.78, 0.76, 0.7), (0.7, 0.62, 0.48), (0.52, 0.62, 0.66), (0.6, 0.66, 0.52), (0.72, 0.54, 0.46))


@dataclass(frozen=True)
class Material:
    """Two linear colours mixed by a pattern; `emission` makes it a lamp, `measurable` is false for glass."""

    pattern: Pattern
    low: Rgb
    high: Rgb
    emission: float = 0.0
    measurable: bool = True


@lru_cache(maxsize=1)
def _noise_tiles() -> Floats:
    """Periodic 1/f noise of unit variance, (levels, texels, texels); each level keeps half the band of the last."""
    rng = np.random.default_rng(7)
    fy, fx = np.fft.fftfreq(NOISE_TEXELS)[:, None], np.fft.rfftfreq(NOISE_TEXELS)
    radius = np.hypot(fx, fy) + 1.0 / NOISE_TEXELS
    spectrum = np.fft.rfft2(rng.standard_normal((NOISE_TEXELS, NOISE_TEXELS))) / radius**0.9 * (radius > 0.012)
    levels = [np.fft.irfft2(spectrum * np.exp(-((radius * 2.0**k) ** 2) * 4)) for k in range(NOISE_LEVELS)]
    return (np.stack(levels) / levels[0].std()).astype(np.float32)


def _noise(u: Floats, v: Floats, fp: Floats, fu: float, fv: float) -> Floats:
    """Band-limited noise with `fu` and `fv` texels per metre; detail smaller than the footprint `fp` is left out."""
    level = np.clip(np.frexp(fp * max(fu, fv))[1], 0, NOISE_LEVELS - 1)
    row = (v * fv).astype(np.int32) % NOISE_TEXELS
    return _noise_tiles().ravel()[
        (level * NOISE_TEXELS + row) * NOISE_TEXELS + (u * fu).astype(np.int32) % NOISE_TEXELS
    ]


def _fade(fp: Floats, period: float) -> Floats:
    """1 where a pattern of this period (metres) is resolved, 0 where it would alias."""
    return np.clip(2 - 3 * fp / period, 0, 1)


def _tone(i: Floats, j: Floats | float, fp: Floats, period: float, salt: int = 0) -> Floats:
    """Random value in 0..1 per cell (i, j), going to its mean where cells are not resolved."""
    cell: NDArray[np.uint32] = (i * 157 + j * 311 + salt * 7919).astype(np.uint32) * np.uint32(2654435761)
    mixed = (cell ^ cell >> np.uint32(15)) * np.uint32(2246822519)
    return 0.5 + ((mixed >> np.uint32(22)).astype(np.float32) / 1023 - 0.5) * _fade(fp, period)


def _line(x: Floats, period: float, width: float, fp: Floats) -> Floats:
    """Box-filtered coverage of lines `width` wide, one every `period` metres."""
    phase = x / period
    distance = np.abs(phase - np.round(phase)) * period
    sharp = np.clip((width / 2 - distance) / fp + 0.5, 0, 1) * np.minimum(1, width / fp)
    return width / period + (sharp - width / period) * _fade(fp, period)


def _laid(width: float, length: float, joint: float, grain: Pair, joint_mix: float = 0.1) -> Pattern:
    """Rows of planks, tiles or bricks: each its own tone, `joint` metres apart, every row shifted against the next."""

    def pattern(u: Floats, v: Floats, fp: Floats) -> Floats:
        row = np.floor(v / width)
        along = u if width == length else u + row % 7 * np.float32(0.39 * length)
        gap = np.maximum(_line(v, width, joint, fp), _line(along, length, joint, fp))
        piece = 0.2 + 0.6 * _tone(row, np.floor(along / length), fp, width) + 0.12 * _noise(u, v, fp, *grain)
        return piece + (joint_mix - piece) * gap

    return pattern


def _grained(mean: float, amplitude: float, fu: float, fv: float) -> Pattern:
    """Noise alone: paint, cloth, or wood where it is stretched along the grain."""
    return lambda u, v, fp: mean + amplitude * _noise(u, v, fp, fu, fv)


def _striped(period: float, width: float, upright: bool) -> Pattern:
    return lambda u, v, fp: (
        0.15 + 0.7 * _line(u if upright else v, period, width, fp) + 0.07 * _noise(u, v, fp, 130, 130)
    )


def book_spines(u: Floats, v: Floats, fp: Floats) -> Floats:
    spine = np.floor(u / 0.035)
    return np.stack([_tone(spine, 0.0, fp, 0.03, salt) for salt in range(3)]) * (1 - 0.6 * _line(u, 0.035, 0.005, fp))


def painting(u: Floats, v: Floats, fp: Floats) -> Floats:
    shared = _noise(u, v, fp, 50, 50)
    return np.stack([0.45 + 0.3 * shared + 0.15 * _noise(u + k, v, fp, 40, 40) for k in (1, 2, 3)])


PLAIN, CLOTH, PILE = _grained(0.75, 0.07, 90, 90), _grained(0.5, 0.17, 180, 180), _grained(0.5, 0.2, 120, 120)
WOOD, SKY = _grained(0.55, 0.2, 10, 110), _grained(0.8, 0.15, 40, 40)
PLANKS, TILES = _laid(0.13, 1.2, 0.006, (12, 150)), _laid(0.33, 0.33, 0.009, (60, 60), -0.2)
BRICKS = _laid(0.08, 0.24, 0.012, (150, 150), 1.4)
STRIPES, WALLPAPER = _striped(0.12, 0.05, upright=False), _striped(0.22, 0.1, upright=True)
