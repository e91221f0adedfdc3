"""Image files -> pixels as a viewer shows them: upright, on white where transparent. The one place that decodes them.

Formats are always named: PIL would hand PostScript, whatever the file is called, to Ghostscript, another program.
"""

import io
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import simplejpeg
from PIL import ExifTags, Image, UnidentifiedImageError

from mde_dist.data.manifest import MAX_SIDE

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM")
"""PIL's names of what an image may be, whatever its suffix. JPEG includes MPO, the JPEGs of many phones."""
DEPTH_FORMATS = ("PNG", "TIFF")
"""Formats of a depth map: those that hold 16 bits as they were stored; PIL stretches the values of a PGM."""

_TURNS: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda image: image,
    2: lambda image: image[:, ::-1],
    3: lambda image: image[::-1, ::-1],
    4: lambda image: image[::-1],
    5: lambda image: image.swapaxes(0, 1),
    6: lambda image: np.rot90(image, -1),
    7: lambda image: image[::-1, ::-1].swapaxes(0, 1),
    8: lambda image: np.rot90(image),
}
"""EXIF orientation -> what brings the stored pixels upright."""
_POINTERS = {b"/annex/objects/": "git-annex", b"version https://git-lfs.": "Git LFS"}
"""First bytes of small files that stand for a content that was not fetched -> whose they are."""
_JPEG = b"\xff\xd8"
"""First bytes of every JPEG."""
_STRAY = re.compile(r"(\d+) extraneous bytes before marker 0xd9$")
"""libjpeg's words about bytes between the last pixel and the end marker. They are of its first warning, and nothing is
read behind that marker: where it says this, nothing else is wrong."""
_MOST_STRAY = 16
"""Most of such bytes that are tolerated. Cameras and tools leave them behind; in the middle of a picture a damaged byte
makes libjpeg lose its place, and the tail that it then has no use for is longer in nearly all cases."""
# what PIL prints of damaged EXIF data, with a place in its own source, concerns no pixel; too large is an error here
warnings.filterwarnings("ignore", category=UserWarning, module="PIL")
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)


def hxw(shape: tuple[int, ...]) -> str:
    """Height and width, pixels, in words: 480x640."""
    return f"{shape[0]}x{shape[1]}"


class UnreadableImage(Exception):
    """An image or depth map that cannot be decoded; the message says why, without its name."""


@dataclass(frozen=True)
class DecodedImage:
    """An image as a viewer shows it."""

    pixels: np.ndarray
    """RGB uint8 (height, width, 3), contiguous."""
    format: str
    """`JPEG`, `PNG` …"""
    orientation: int
    """EXIF orientation of the stored image, 1..8; 1 is upright. `pixels` are upright always."""
    shown_as_stored: bool
    """True for an upright baseline RGB JPEG, whose bytes every decoder reads at full speed, and alike."""
    stray_bytes: bool = False
    """True for a JPEG with a few bytes between its last pixel and its end marker, which viewers pass over."""


def decode_image(data: bytes) -> DecodedImage:
    """The bytes of an image file of any mode -> RGB; of several pictures in a file the first. Raises UnreadableImage.

    JPEGs are decoded as the loader decodes those of shards: the same pixels. Of CMYK ones PIL makes RGB, which it does
    of a file that is cut off as well, so they are looked at first.
    """
    with _reasons():
        stray = False
        if data.startswith(_JPEG):
            height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
            _check_sides(height, width)
            inks = colours in ("CMYK", "YCCK")
            pixels, stray = decode_jpeg(data, colorspace="CMYK" if inks else "RGB")
            if not inks:
                orientation = jpeg_orientation(data)
                as_stored = orientation == 1 and colours == "YCbCr" and _is_baseline(data)
                return DecodedImage(_turned(pixels, orientation), "JPEG", orientation, as_stored, stray)
        with open_image(data, IMAGE_FORMATS) as picture:
            orientation, pixels = _orientation(picture), _rgb(picture)
            left = _orientation(picture)  # PIL turns TIFFs itself while it decodes them
            return DecodedImage(_turned(pixels, left), str(picture.format), orientation, False, stray)


def decode_jpeg(
    data: bytes | memoryview, buffer: np.ndarray | None = None, colorspace: str = "RGB"
) -> tuple[np.ndarray, bool]:
    """The bytes of a JPEG -> RGB uint8 (height, width, 3) as stored, and whether it has stray bytes.

    `buffer`: where to decode to. Raises ValueError where libjpeg has anything else to say: the rest of a picture that
    ends early is grey.
    """
    try:
        return simplejpeg.decode_jpeg(data, colorspace=colorspace, buffer=buffer), False
    except ValueError as error:
        found = _STRAY.search(str(error))
        if found is None or int(found[1]) > _MOST_STRAY:
            raise
    return simplejpeg.decode_jpeg(data, colorspace=colorspace, buffer=buffer, strict=False), True


def stray_in_words(count: int) -> str:
    """A line about images with stray bytes, for the end of a command."""
    had, were, them = ("1 image", "was", "it") if count == 1 else (f"{count:,} images", "were", "them")
    return f"{had} had stray bytes before the end marker and {were} read as viewers show {them}"


def decode_grey(data: bytes) -> tuple[np.ndarray, str, str]:
    """The bytes of a depth map -> its stored values (height, width), PIL's mode and format. Raises UnreadableImage.

    Upright, as an image is, where it has an EXIF orientation itself.
    """
    with open_image(data, DEPTH_FORMATS) as picture:
        mode, stored = picture.mode, np.asarray(picture)
        return _turned(stored, _orientation(picture)), mode, str(picture.format)


@contextmanager
def open_image(data: bytes, formats: tuple[str, ...]) -> Iterator[Image.Image]:
    """An image of one of the formats; its pixels are decoded when they are asked for. Raises UnreadableImage, also in
    place of what is raised in the block."""
    with _reasons():
        try:
            picture = Image.open(io.BytesIO(data), formats=formats)
        except UnidentifiedImageError:  # its own words have an address in memory
            raise UnreadableImage(_unknown(data, formats)) from None
        with picture:
            _check_sides(picture.height, picture.width)
            yield picture


def _check_sides(height: int, width: int) -> None:
    """Before anything is decoded: a head of a few bytes can claim gigabytes. Raises ValueError."""
    if max(height, width) > MAX_SIDE:
        raise ValueError(f"it claims {height}x{width} pixels; {MAX_SIDE} is the largest side")


def jpeg_orientation(data: bytes) -> int:
    """EXIF orientation of a JPEG, 1..8; 1 where it has none that can be read."""
    if b"Exif\0" not in data and b"tiff:Orientation" not in data:  # the second is XMP's
        return 1
    try:
        with Image.open(io.BytesIO(data), formats=["JPEG"]) as picture:
            return _orientation(picture)
    except Exception:  # of what stands beside the pixels, they are whole
        return 1


def _orientation(picture: Image.Image) -> int:
    """EXIF orientation of an opened picture, 1..8."""
    try:
        value = picture.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged EXIF data are no damage to the pixels
        return 1
    return value if isinstance(value, int) and value in _TURNS else 1


def _turned(image: np.ndarray, orientation: int) -> np.ndarray:
    return np.ascontiguousarray(_TURNS[orientation](image))


def _rgb(picture: Image.Image) -> np.ndarray:
    """A picture of any mode -> RGB uint8 (height, width, 3). Raises ValueError, and what PIL raises of damage."""
    if picture.mode == "F":
        raise ValueError("its values are floats, and nothing says which of them is white")
    if picture.mode.startswith("I"):  # 16 bits; PIL would cut them off at 255
        return np.repeat(_grey16(picture)[..., None], 3, axis=2)
    if picture.has_transparency_data:
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture.convert("RGBA"))
    return np.asarray(picture.convert("RGB"))


def _grey16(picture: Image.Image) -> np.ndarray:
    """Grey values 0..65535 -> uint8. Raises ValueError where there are others."""
    values = np.asarray(picture)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError(f"its values are {values.min()} to {values.max()}, and nothing says which of them is white")
    grey = (values / 257).round().astype(np.uint8)
    grey[values == picture.info.get("transparency", -1)] = 255
    return grey


@contextmanager
def _reasons() -> Iterator[None]:
    """Whatever a decoder raises becomes UnreadableImage, in words that are the same in every run."""
    try:
        yield
    except UnreadableImage:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise UnreadableImage(f"it claims more pixels than {MAX_SIDE}x{MAX_SIDE}") from None
    except Exception as error:  # decoders promise no kinds
        raise UnreadableImage(" ".join(str(error).split()) or type(error).__name__) from None


def _unknown(data: bytes, formats: tuple[str, ...]) -> str:
    """Reason why bytes are in none of the formats."""
    for head, whose in _POINTERS.items():
        if data.startswith(head):
            return f"it only stands for a file of {whose} that was not fetched"
    return f"of no known format; known are {', '.join(formats)}"


def _is_baseline(data: bytes) -> bool:
    """True for a three-component JPEG in baseline mode (SOF0), which every decoder reads at full speed."""
    position = len(_JPEG)
    while position + 10 <= len(data) and data[position] == 0xFF:
        marker, length = data[position + 1], int.from_bytes(data[position + 2 : position + 4], "big")
        if marker == 0xC0:
            return data[position + 9] == 3
        if marker in (0xC1, 0xC2, 0xC3, 0xDA):
            return False
        position += 2 + length
    return False
