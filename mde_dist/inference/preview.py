"""A picture to look at: the image, its depth in colours beside it, and what the colours mean in metres."""

import math
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mde_dist.utils.visualization import colorize

_SIDES = 320, 800  # pixels within which the longer side of the image is brought
_LEAST_HEIGHT = 120  # pixels of the picture, so that the numbers of a flat image find room
_GAP, _BAR, _NUMBERS, _TEXT = (
    8,
    16,
    56,
    13,
)  # pixels: between things, the bar's width, the numbers beside it, their size
_LINE = 34  # pixels between two numbers, at least


def side_by_side(image: np.ndarray, depth: np.ndarray, metres: tuple[float, float] | None = None) -> np.ndarray:
    """RGB uint8 (height, width, 3), depth float32 metres (height, width) -> RGB uint8 of a size to look at.

    `metres`: nearest and farthest of the colours; by default those that 98 % of this map lie within.
    """
    height, width = _shown_size(*depth.shape)
    depth = np.asarray(Image.fromarray(depth).resize((width, height), Image.Resampling.BILINEAR))
    low, high = metres or (float(edge) for edge in np.percentile(depth, (1, 99)))
    canvas = Image.new("RGB", (2 * width + 2 * _GAP + _BAR + _NUMBERS, max(height, _LEAST_HEIGHT)), "white")
    small = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR, reducing_gap=2)
    canvas.paste(small, (0, 0))
    canvas.paste(Image.fromarray(colorize(depth, low, high)), (width + _GAP, 0))
    _draw_bar(canvas, 2 * width + 2 * _GAP, low, high)
    return np.asarray(canvas)


def _shown_size(height: int, width: int) -> tuple[int, int]:
    longer = max(height, width)
    scale = min(max(longer, _SIDES[0]), _SIDES[1]) / longer
    return max(1, round(height * scale)), max(1, round(width * scale))


def _draw_bar(canvas: Image.Image, left: int, low: float, high: float) -> None:
    """The colours from low (at the bottom) to high, with numbers in metres."""
    top, bottom = _TEXT // 2, canvas.height - _TEXT // 2 - 1
    bar = np.linspace(high, low, bottom - top + 1, dtype=np.float32)[:, None].repeat(_BAR, axis=1)
    canvas.paste(Image.fromarray(colorize(bar, low, high)), (left, top))
    draw = ImageDraw.Draw(canvas)
    for metres in round_numbers(low, high, (bottom - top) // _LINE):
        y = bottom - (metres - low) / max(high - low, 1e-6) * (bottom - top)
        draw.line([(left + _BAR, y), (left + _BAR + 3, y)], "black")
        draw.text((left + _BAR + 6, y), f"{metres:g} m", "black", _font(), anchor="lm")


def round_numbers(low: float, high: float, most: int) -> list[float]:
    """Up to about `most` numbers of few digits within low..high, evenly spaced; its ends where there are none."""
    least = max(high - low, 1e-6) / max(most, 1)
    power = 10.0 ** math.floor(math.log10(least))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    numbers = [round(number * step, 9) for number in range(first, last + 1)]
    return numbers if len(numbers) > 1 else [round(low, 3), round(high, 3)]


@cache
def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(_TEXT)
