"""Pairs of two picture files: an image of any common format, and a depth map of one channel."""

from pathlib import Path
from typing import Any

import numpy as np

from mde_dist.data.depth import DepthScale, to_millimetres
from mde_dist.data.images import DEPTH_FORMATS, UnreadableImage, decode_grey, decode_image, open_image
from mde_dist.packing.sources.pairs import BadPair, Pair, RawPair
from mde_dist.packing.sources.tree import Tree, Unreadable


class PictureReader:
    """Reads pairs whose names are picture files of a tree."""

    def __init__(self, tree: Tree):
        self.tree = tree

    def read(self, pair: Pair, scale: DepthScale) -> RawPair:
        data = self._bytes(pair.image)
        try:
            image = decode_image(data)
        except UnreadableImage as error:
            raise BadPair(f"{self.tree.root / pair.image} is not a readable image ({error})") from None
        depth, depth_format = decode_depth(self._bytes(pair.depth), self.tree.root / pair.depth, scale)
        jpeg = data if image.shown_as_stored else None
        return RawPair(image.pixels, depth, jpeg, image.format, depth_format, image.orientation, image.stray_bytes)

    def missing(self, pair: Pair) -> list[Path]:
        return [self.tree.root / name for name in (pair.image, pair.depth) if not self.tree.is_file(name)]

    def stamp(self, pair: Pair) -> list[Any]:
        return [self.tree.stamp(name) for name in (pair.image, pair.depth)]

    def _bytes(self, name: str) -> bytes:
        try:
            return self.tree.read(name)
        except Unreadable as error:
            raise BadPair(f"{self.tree.root / name} cannot be read ({error})") from None


def decode_depth(data: bytes, path: Path, scale: DepthScale) -> tuple[np.ndarray, str]:
    """uint16 millimetres (height, width) and how they were stored. Raises BadPair with `path`."""
    try:
        stored, mode, kind = decode_grey(data)
    except UnreadableImage as error:
        raise BadPair(f"{path} is not a readable depth map ({error})") from None
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


def depth_bits(tree: Tree, name: str) -> int:
    """Bits of a depth map, 8 or 16, from its head. Raises Unreadable or UnreadableImage."""
    with open_image(tree.read(name), DEPTH_FORMATS) as picture:
        return 8 if picture.mode in ("L", "P", "1") else 16
