"""Metres <-> stored bytes: the one place that knows depth units and codecs.

In memory depth is float32 metres; in a shard and in a batch it is uint16 millimetres. 0 means "no measurement" in both.
"""

import io
import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
import zstandard
from PIL import Image, UnidentifiedImageError

CODECS = ("zst", "png")
_ZSTD_LEVEL = 3  # levels 1 to 9 decode at the same speed; 3 packs fast and is 18 % larger than PNG
_MAX_MILLIMETRES = np.iinfo(np.uint16).max


@dataclass(frozen=True)
class DepthScale:
    """How a source's stored values become metres: metres = (value + offset) * metres_per_unit; value 0 is a hole."""

    metres_per_unit: float
    """Metres that one stored unit stands for."""
    offset: float = 0.0
    """Added before scaling: 0.5 puts a value of a floor quantiser into the middle of its bin."""
    max_metres: float = np.inf
    """Upper end of the source's range, metres; what lies above is held there."""
    bits: int = 0
    """Bits of a stored value that the source declares: 8, 16, or 32 for floats of any width; 0 = not declared."""
    reason: str = "declared by the layout"
    """Why this scale, in words, for the user to check."""

    def __str__(self) -> str:
        shown = f"(v + {self.offset:g})" if self.offset else "v"
        return f"metres = {shown} * {self.metres_per_unit:.6g} ({self.reason})"


MILLIMETRES = DepthScale(1e-3, bits=16, reason="16-bit millimetres, declared by the layout")
DENSEDEPTH_8BIT = DepthScale(
    10 / 255, 0.5, 10.0, 8, "8-bit floor-quantised 0..10 m, declared by the layout; bin centres, which have no bias"
)


def to_millimetres(stored: np.ndarray, scale: DepthScale) -> np.ndarray:
    """Stored values of any integer or float type -> uint16 millimetres of the same shape.

    Holes (0, negative, not finite) become 0; what lies beyond 65.535 m cannot be stored and becomes a hole as well.
    """
    value = np.asarray(stored, dtype=np.float64)
    valid = np.isfinite(value) & (value > 0)
    metres = (np.where(valid, value, 0.0) + scale.offset) * scale.metres_per_unit
    millimetres = np.rint(np.minimum(metres, scale.max_metres) * 1000)
    valid &= millimetres <= _MAX_MILLIMETRES
    # a measurement under half a millimetre is still a measurement, not a hole
    return np.where(valid, np.maximum(millimetres, 1), 0).astype(np.uint16)


def metres_to_millimetres(metres: np.ndarray) -> np.ndarray:
    """float metres -> uint16 millimetres, rounded; holes stay 0."""
    return to_millimetres(metres, DepthScale(1.0))


def to_metres(millimetres: np.ndarray) -> np.ndarray:
    """uint16 millimetres -> float32 metres, 0 stays 0."""
    return millimetres.astype(np.float32) / np.float32(1000)


def encode(millimetres: np.ndarray, codec: str) -> bytes:
    """uint16 (height, width) millimetres -> bytes of the codec, without loss.

    `zst`: zstd over little-endian row-major values; the shape is that of the image beside it.
    `png`: 16-bit grey PNG, for interchange.
    """
    if millimetres.dtype != np.uint16 or millimetres.ndim != 2:
        raise ValueError(f"depth must be uint16 (height, width), not {millimetres.dtype} {millimetres.shape}")
    if codec == "zst":
        plain = np.ascontiguousarray(millimetres, dtype="<u2")
        return zstandard.ZstdCompressor(level=_ZSTD_LEVEL, write_checksum=False).compress(plain.data)
    if codec == "png":
        return png_bytes(millimetres)
    raise ValueError(f"unknown depth codec {codec!r}; known: {', '.join(CODECS)}")


def decode(data: bytes | memoryview, codec: str, out: np.ndarray) -> None:
    """Decode into `out`, a contiguous uint16 (height, width) array. Raises ValueError where the bytes do not fit it."""
    if codec == "zst":
        _decode_zstd(data, out)
        return
    if codec != "png":
        raise ValueError(f"unknown depth codec {codec!r}; known: {', '.join(CODECS)}")
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as picture:
            if picture.size != out.shape[::-1] or not picture.mode.startswith("I"):
                raise ValueError(f"depth is {picture.mode} {picture.size[::-1]}, expected 16-bit {out.shape}")
            out[...] = np.asarray(picture)
    except UnidentifiedImageError:
        raise ValueError("depth is not a PNG") from None
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"depth does not decode: {error}") from None


def png_bytes(millimetres: np.ndarray, level: int = 6) -> bytes:
    """uint16 (height, width) -> a 16-bit grey PNG; `level` of compression, 1 to 9."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(millimetres)).save(buffer, format="PNG", compress_level=level)
    return buffer.getvalue()


_local = threading.local()  # a zstd context serves one thread at a time


def _decode_zstd(data: bytes | memoryview, out: np.ndarray) -> None:
    try:
        context = _local.context
    except AttributeError:
        context = _local.context = zstandard.ZstdDecompressor()
    try:
        # what the frame claims is checked before memory is given to it
        size = zstandard.get_frame_parameters(data).content_size
        if size not in (out.nbytes, zstandard.CONTENTSIZE_UNKNOWN):
            raise ValueError(f"depth holds {size} bytes, expected {out.nbytes} for {out.shape}")
        plain = context.decompress(data, max_output_size=out.nbytes)
    except zstandard.ZstdError as error:
        raise ValueError(f"depth does not decompress: {error}") from None
    if len(plain) != out.nbytes:  # one value would fill the whole map
        raise ValueError(f"depth holds {len(plain)} bytes, expected {out.nbytes} for {out.shape}")
    out.reshape(-1)[...] = np.frombuffer(plain, dtype="<u2")


def resize_depth(depth: Any, size: tuple[int, int]) -> Any:
    """(…, height, width) depth -> (…, *size), each target taking the valid value of its footprint nearest its centre.

    Averaging would invent depths between a chair and the wall behind it. A target is a hole (0) only where its whole
    footprint is. Works alike on NumPy arrays and torch tensors, in any unit.
    """
    rows, columns = _Footprints(depth.shape[-2], size[0]), _Footprints(depth.shape[-1], size[1])
    steps = sorted((y * y + x * x, y, x) for y in rows.steps for x in columns.steps)
    result = None
    for _, y, x in steps:
        candidate = depth[..., rows.at(y)[:, None], columns.at(x)[None, :]]
        result = candidate if result is None else result + (result == 0) * candidate
    return result


class _Footprints:
    """Which source cells lie under each target cell, along one side; in integers, so rounding loses no edge."""

    def __init__(self, source: int, target: int):
        index = np.arange(target)
        self._first = index * source // target
        self._last = -(-(index + 1) * source // target) - 1
        self._centre = (2 * index + 1) * source // (2 * target)
        reach = -(-source // (2 * target))
        self.steps = range(-reach, reach + 1)

    def at(self, step: int) -> np.ndarray:
        """For each target cell the source cell `step` from its centre, held within its footprint."""
        return np.clip(self._centre + step, self._first, self._last)
