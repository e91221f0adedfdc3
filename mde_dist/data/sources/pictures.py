"""Pairs of two picture files: an image of any common format, and a depth map of one channel."""

import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from ..depth import DepthScale, to_millimetres
from ..manifest import MAX_SIDE
from .pairs import BadPair, Pair, RawPair
from .tree import Tree, Unreadable

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
_DAMAGE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning)
"""What decoders raise. A warning too: sides are checked here, and PIL would print its own before."""
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)


class PictureReader:
    """Reads pairs whose names are picture files of a tree."""

    def __init__(self, tree: Tree):
        self.tree = tree

    def read(self, pair: Pair, scale: DepthScale) -> RawPair:
        image, jpeg, image_format = decode_image(self._bytes(pair.image), self.tree.root / pair.image)
        depth, depth_format = decode_depth(self._bytes(pair.depth), self.tree.root / pair.depth, scale)
        return RawPair(image, depth, jpeg, image_format, depth_format)

    def missing(self, pair: Pair) -> list[Path]:
        return [self.tree.root / name for name in (pair.image, pair.depth) if not self.tree.is_file(name)]

    def stamp(self, pair: Pair) -> list[Any]:
        return [self.tree.stamp(name) for name in (pair.image, pair.depth)]

    def _bytes(self, name: str) -> bytes:
        try:
            return self.tree.read(name)
        except Unreadable as error:
            raise BadPair(f"{self.tree.root / name} cannot be read ({error})") from None


def decode_image(data: bytes, path: Path) -> tuple[np.ndarray, bytes | None, str]:
    """RGB uint8 (height, width, 3), the bytes themselves where they are a baseline RGB JPEG, and the format's name.

    Raises BadPair with `path`.
    """
    try:
        if _is_baseline_rgb_jpeg(data):
            _check_sides(*simplejpeg.decode_jpeg_header(data)[:2])
            return simplejpeg.decode_jpeg(data, colorspace="RGB"), data, "JPEG"
        with Image.open(io.BytesIO(data)) as picture:
            _check_sides(picture.height, picture.width)
            return np.asarray(picture.convert("RGB")), None, str(picture.format)
    except _DAMAGE as error:
        raise BadPair(f"{path} is not a readable image ({reason(error)})") from None


def decode_depth(data: bytes, path: Path, scale: DepthScale) -> tuple[np.ndarray, str]:
    """uint16 millimetres (height, width) and how they were stored. Raises BadPair with `path`."""
    try:
        with Image.open(io.BytesIO(data)) as picture:
            _check_sides(picture.height, picture.width)
            mode, kind, stored = picture.mode, picture.format, np.asarray(picture)
    except _DAMAGE as error:
        raise BadPair(f"{path} is not a readable depth map ({reason(error)})") from None
    if mode not in ("L", "I;16", "I;16B", "I"):
        raise BadPair(f"{path} is a {mode} picture; a depth map has one channel of 8 or 16 bits")
    bits = 8 if mode == "L" else 16
    check_bits(bits, path, scale)
    return to_millimetres(stored, scale), f"{bits}-bit {kind}"


def check_bits(bits: int, path: Path, scale: DepthScale) -> None:
    """A map of other bits than its layout declares is in another unit. Raises BadPair."""
    if scale.bits and bits != scale.bits:
        raise BadPair(
            f"{path} is {bits}-bit, but the layout declares {scale.bits}-bit depth ({scale.reason}); "
            "if it is right, give metres per stored unit: --depth-scale SPLIT=VALUE"
        )


def depth_bits(tree: Tree, name: str) -> int | None:
    """Bits of a depth map, 8 or 16, from its head; None where it is missing. Raises Unreadable or OSError."""
    if not tree.is_file(name):
        return None
    with Image.open(io.BytesIO(tree.read(name))) as picture:
        return 8 if picture.mode in ("L", "P", "1") else 16


def reason(error: Exception) -> str:
    """Why a picture cannot be read, in words that are the same in every run (PIL's own name an address in memory)."""
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return f"it claims more pixels than {MAX_SIDE}x{MAX_SIDE}"
    return "of no known format" if isinstance(error, UnidentifiedImageError) else str(error)


def _check_sides(height: int, width: int) -> None:
    """Before anything is decoded: a head of a few bytes can claim gigabytes. Raises ValueError."""
    if max(height, width) > MAX_SIDE:
        raise ValueError(f"it claims {height}x{width} pixels; {MAX_SIDE} is the largest side")


def _is_baseline_rgb_jpeg(data: bytes) -> bool:
    """True for a three-component JPEG in baseline mode (SOF0), which every decoder reads at full speed."""
    if data[:2] != b"\xff\xd8":
        return False
    place = 2
    while place + 10 <= len(data) and data[place] == 0xFF:
        marker, length = data[place + 1], int.from_bytes(data[place + 2 : place + 4], "big")
        if marker == 0xC0:
            return data[place + 9] == 3 and simplejpeg.decode_jpeg_header(data)[2] == "YCbCr"
        if marker in (0xC1, 0xC2, 0xC3, 0xDA):
            return False
        place += 2 + length
    return False
