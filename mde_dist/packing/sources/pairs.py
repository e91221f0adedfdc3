"""Model of a source: pairs of image and depth by split, and their readers."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from mde_dist.data.depth import DepthScale
from mde_dist.data.images import hxw
from mde_dist.utils.folders import NOT_UTF8, is_utf8

DepthMap = Literal["raw", "filled"]
"""Depth as the sensor measured it, with holes; or with its holes filled in."""
AS_GIVEN = "as given"


class BadPair(Exception):
    """A pair that cannot be used; the message names the file and what is wrong with it."""


@dataclass(frozen=True)
class Pair:
    """One image and its depth map, not read yet. A reader that needs more than two names has its own kind of pair."""

    key: str
    """Name in the shards: unique, without dot, slash or white space."""
    scene: str
    image: str
    """Name below the source's root: a path in a folder or an archive, an entry of an array, or `room:SEED`."""
    depth: str


@dataclass(frozen=True)
class Split:
    pairs: tuple[Pair, ...]
    scale: DepthScale
    depth_map: str = AS_GIVEN
    """`raw`, `filled`, or `as given` where the layout does not say."""


@dataclass(frozen=True)
class RawPair:
    """A pair as read: image uint8 (height, width, 3), depth uint16 millimetres (height, width)."""

    image: np.ndarray
    depth: np.ndarray
    jpeg: bytes | None = None
    """The source's own bytes where they are an upright baseline RGB JPEG, so that they can be stored as they are."""
    image_format: str = ""
    depth_format: str = ""
    """Format in which each is stored, in words: `JPEG`, `8-bit PNG`, `float32 array`."""
    orientation: int = 1
    """EXIF orientation of the image's file, 1..8; `image` is upright always."""
    stray_bytes: bool = False
    """True for a JPEG with stray bytes, see `images.decode_jpeg`."""


class Reader(Protocol):
    """Reads the pairs of one kind of source. Serves several threads at once, and travels to other processes."""

    def read(self, pair: Any, scale: DepthScale) -> RawPair:
        """Raises BadPair with the path and what is wrong. What image and depth have in common is checked behind it."""

    def missing(self, pair: Any) -> list[Path]:
        """The files of the pair that are not there."""

    def stamp(self, pair: Any) -> list[Any]:
        """Values that change when a source file of the pair does, as JSON takes them. Raises OSError."""


@dataclass(frozen=True)
class Source:
    """A recognised data set: its layout and the pairs of each split."""

    layout: str
    root: Path
    """Folder or file that the names of the pairs start from."""
    splits: Mapping[str, Split]
    reader: Reader
    notes: tuple[str, ...] = ()
    """Decisions that were made while it was recognised, a line each, for the user to check."""

    def read(self, pair: Pair, scale: DepthScale) -> RawPair:
        """Read and check one pair, which may be all holes. Raises BadPair with the path and what is wrong.

        The image is turned as its EXIF data say; the depth map is taken to be upright already.
        """
        if not is_utf8(pair.image):
            raise BadPair(f"{self.path_of(pair.image)}: {NOT_UTF8}")
        raw = self.reader.read(pair, scale)
        if raw.image.shape[:2] != raw.depth.shape:
            shown = hxw(raw.image.shape)
            if raw.orientation >= 5:  # a quarter turn
                shown += (
                    f" when it is turned as its EXIF data say (orientation {raw.orientation}), and nothing says "
                    "whether the depth is to be turned as well; store both upright, without that entry"
                )
            image, depth = self.path_of(pair.image), self.path_of(pair.depth)
            raise BadPair(f"{depth} is {hxw(raw.depth.shape)}, but its image {image} is {shown}")
        return raw

    def path_of(self, name: str) -> Path:
        """Path of an image or depth map of a pair, for the user to find it."""
        return self.root / name

    def missing(self, pair: Pair) -> list[Path]:
        """The files of the pair that are not there, or whose name cannot be written into a shard."""
        return self.reader.missing(pair) if is_utf8(pair.image) else [self.path_of(pair.image)]

    def stamp(self, pair: Pair) -> list[Any]:
        """Values that change when a source file of the pair does. Raises OSError."""
        return [pair.image, pair.depth, *self.reader.stamp(pair)]
