"""Image files to predict, read as the images of training and scoring are."""

from pathlib import Path

import numpy as np

from mde_dist.data.images import UnreadableImage, decode_image
from mde_dist.utils.io import leads_nowhere


class Unreadable(Exception):
    """An image that cannot be read; the message names it and says why."""


def read_image(path: Path) -> np.ndarray:
    """Read an image as `open_image` does; returns the pixels only."""
    return open_image(path)[0]


def open_image(path: Path) -> tuple[np.ndarray, bool]:
    """RGB uint8 (height, width, 3), upright, to be written to; of several pictures in a file the first. And whether it
    is a JPEG with stray bytes, see `decode_jpeg`. Raises Unreadable.
    """
    try:
        image = decode_image(path.read_bytes())
    except UnreadableImage as error:
        raise Unreadable(f"{path} is not a readable image ({error})") from None
    except OSError as error:
        why = "a link that leads nowhere" if leads_nowhere(path) else error.strerror
        raise Unreadable(f"{path} cannot be read ({why})") from None
    return np.require(image.pixels, requirements="W"), image.stray_bytes


def is_depth_map(path: Path) -> bool:
    """Say whether a file is a PNG of 16-bit grey: in a folder of images a depth map rather than one of them."""
    if path.suffix.lower() != ".png":
        return False
    try:
        with path.open("rb") as file:
            head = file.read(26)
    except OSError:
        return False  # said when it is read
    return head[:8] == b"\x89PNG\r\n\x1a\n" and head[24:26] == b"\x10\x00"
