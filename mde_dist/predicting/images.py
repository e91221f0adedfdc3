"""Image files -> RGB pixels as a viewer shows them: turned as the camera was held, on white where transparent."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

from ..data.manifest import MAX_SIDE
from ..data.sources import BadPair, reason
from ..data.sources.pictures import decode_image

_TURNS: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: lambda image: image[:, ::-1],
    3: lambda image: image[::-1, ::-1],
    4: lambda image: image[::-1],
    5: lambda image: image.swapaxes(0, 1),
    6: lambda image: np.rot90(image, -1),
    7: lambda image: image[::-1, ::-1].swapaxes(0, 1),
    8: lambda image: np.rot90(image),
}
"""EXIF orientation -> what brings the picture upright; 1 is upright."""


class Unreadable(Exception):
    """An image that cannot be read; the message names it and says why."""


def read_image(path: Path) -> np.ndarray:
    """RGB uint8 (height, width, 3), to be written to; of several pictures in a file the first. Raises Unreadable.

    JPEGs are decoded as for training and scoring: the same pixels.
    """
    try:
        data = path.read_bytes()
        with Image.open(io.BytesIO(data)) as picture:
            if max(picture.size) > MAX_SIDE:
                raise ValueError(f"it claims {picture.height}x{picture.width} pixels; {MAX_SIDE} is the largest side")
            turn = _TURNS.get(picture.getexif().get(ExifTags.Base.Orientation, 1))
            image = decode_image(data, path)[0] if picture.format == "JPEG" else _flatten(picture)
    except BadPair as error:
        raise Unreadable(str(error)) from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise Unreadable(f"{path} is not a readable image ({reason(error)})") from None
    return np.require(turn(image) if turn else image, requirements=("C", "W"))


def is_depth_map(path: Path) -> bool:
    """Whether a file is a PNG of 16-bit grey: in a folder of images a depth map rather than one of them."""
    if path.suffix.lower() != ".png":
        return False
    try:
        with path.open("rb") as file:
            head = file.read(26)
    except OSError:
        return False  # said when it is read
    return head[:8] == b"\x89PNG\r\n\x1a\n" and head[24:26] == b"\x10\x00"


def _flatten(picture: Image.Image) -> np.ndarray:
    """A picture of any mode -> RGB uint8. Raises ValueError, and what PIL raises of damage."""
    if picture.mode == "F":
        raise ValueError("its values are floats, and nothing says which of them is white")
    if picture.mode.startswith("I"):  # 16 bits; PIL would cut them off at 255
        grey = (np.clip(np.asarray(picture), 0, 65535) / 257).round().astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    if picture.has_transparency_data:
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture.convert("RGBA"))
    return np.asarray(picture.convert("RGB"))
