"""Metres <-> stored bytes: the one place that knows depth units and codecs.

In memory depth is float32 metres; in a shard and in a batch it is uint16 millimetres. 0 means "no measurement" in both.
Scores are taken of the counts themselves: most of them have no exact float in metres.
"""

import io
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numcodecs import blosc, zstd
from PIL import Image, UnidentifiedImageError

COUNTS_PER_METRE = 1000
"""Resolution of the uint16 depth that a shard and a batch hold."""
CODECS = ("blosc", "zst", "png")
_LZ4HC_LEVEL = 4  # sizes hardly fall beyond it, packing times double with every two levels
_ZSTD_LEVEL = 3  # levels 1 to 9 decode at the same speed; 3 packs fast
_BLOSC_HEADER = struct.Struct("<4BIII")  # versions, flags, item size; bytes plain, of a block, compressed
blosc.use_threads = False  # the loader has its own
_MAX_MILLIMETRES = np.iinfo(np.uint16).max


@dataclass(frozen=True)
class DepthScale:
    """Rule from a source's stored values to metres: metres = (value + offset) * metres_per_unit; value 0 is a hole."""

    metres_per_unit: float
    """Metres that one stored unit stands for."""
    offset: float = 0.0
    """Added before scaling: 0.5 puts a value of a floor quantiser into the middle of its bin."""
    max_metres: float = np.inf
    """Upper end of the source's range, metres; what lies above is held there."""
    bits: int = 0
    """Bits of a stored value that the source declares: 8, 16, or 32 for floats of any width; 0 = not declared."""
    reason: str = "declared by the layout"
    """Reason for this scale, in words, for the user to check."""

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
    stored = np.asarray(stored)
    if stored.dtype in (np.uint8, np.uint16):  # a look at a table takes a seventh of the time
        return _table(stored.dtype, scale)[stored]
    return _computed(stored, scale)


@lru_cache(maxsize=16)
def _table(dtype: np.dtype, scale: DepthScale) -> np.ndarray:
    """Table from each stored value of a small type to its depth."""
    return _computed(np.arange(np.iinfo(dtype).max + 1), scale)


def _computed(stored: np.ndarray, scale: DepthScale) -> np.ndarray:
    value = stored.astype(np.float64)
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

    `blosc`: LZ4-HC over little-endian row-major values whose bytes are shuffled, in the format of c-blosc; `zst`: zstd
    over the values as they are. Both without the shape, which is that of the image beside them. `png`: 16-bit grey PNG,
    for interchange. benchmarks/codecs.md says what each costs.
    """
    if millimetres.dtype != np.uint16 or millimetres.ndim != 2:
        raise ValueError(f"depth must be uint16 (height, width), not {millimetres.dtype} {millimetres.shape}")
    if codec == "png":
        return png_bytes(millimetres)
    plain = np.ascontiguousarray(millimetres, dtype="<u2")
    if codec == "blosc":
        return blosc.compress(plain, b"lz4hc", _LZ4HC_LEVEL, blosc.SHUFFLE)
    if codec == "zst":
        return zstd.compress(plain, _ZSTD_LEVEL)
    raise ValueError(f"unknown depth codec {codec!r}; known: {', '.join(CODECS)}")


def decode(data: bytes | memoryview, codec: str, out: np.ndarray) -> None:
    """Decode into `out`, a contiguous uint16 (height, width) array. Raises ValueError where the bytes do not fit it."""
    if codec in _INTO:
        _INTO[codec](data, out)
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


def _decode_blosc(data: bytes | memoryview, out: np.ndarray) -> None:
    if len(data) < _BLOSC_HEADER.size:
        raise ValueError("depth is no blosc buffer")
    # c-blosc is not told how long its input is: both lengths have to be right before it may look
    plain, _, compressed = _BLOSC_HEADER.unpack_from(data)[4:]
    if compressed != len(data):
        raise ValueError(f"depth says it has {compressed} bytes, of which {len(data)} are there")
    if plain != out.nbytes:
        raise ValueError(f"depth holds {plain} bytes, expected {out.nbytes} for {out.shape}")
    try:
        blosc.decompress(data, out)
    except RuntimeError as error:
        raise ValueError(f"depth does not decompress: {error}") from None


def _decode_zstd(data: bytes | memoryview, out: np.ndarray) -> None:
    stated = _zstd_content_size(data)
    if stated not in (None, out.nbytes):  # fewer bytes would leave the end of the map as it was
        raise ValueError(f"depth holds {stated} bytes, expected {out.nbytes} for {out.shape}")
    try:
        zstd.decompress(data, out)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"depth does not decompress: {error}") from None


def _zstd_content_size(frame: bytes | memoryview) -> int | None:
    """Size of the content that the header of a zstd frame names, bytes; None where it names none (RFC 8878,
    3.1.1.1)."""
    descriptor = frame[4] if len(frame) > 4 else 0
    single_segment, dictionary = descriptor >> 5 & 1, (0, 1, 2, 4)[descriptor & 3]
    width = (single_segment, 2, 4, 8)[descriptor >> 6]
    start = 5 + (1 - single_segment) + dictionary
    size = int.from_bytes(frame[start : start + width], "little") + (256 if width == 2 else 0)
    return size if width else None


_INTO = {"blosc": _decode_blosc, "zst": _decode_zstd}


def resize_depth(depth: Any, size: tuple[int, int]) -> Any:
    """(…, height, width) depth -> (…, *size), each target taking the valid value of its footprint nearest its centre.

    Averaging would invent depths between a chair and the wall behind it. A target is a hole (0) only where its whole
    footprint is. In any unit.
    """
    return first_valid(depth, footprints(tuple(depth.shape[-2:]), size))


def first_valid(depth: Any, steps: Iterable[tuple[Any, Any]]) -> Any:
    """Pick for each target the first of its candidates that is no hole. Works alike on NumPy arrays and torch tensors.

    `steps`: as `footprints` gives them, or the same as tensors on the depth's device.
    """
    result = None
    for rows, columns in steps:
        candidate = depth[..., rows, columns]
        result = candidate if result is None else result + (result == 0) * candidate
    return result


@lru_cache(maxsize=64)
def footprints(source: tuple[int, int], target: tuple[int, int]) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
    """The source cells under each target cell, nearest to its centre first: rows (height, 1), columns (1, width)."""
    sides = [_Footprints(*lengths) for lengths in zip(source, target, strict=True)]
    steps = sorted((y * y + x * x, y, x) for y in sides[0].steps for x in sides[1].steps)
    return tuple((sides[0].at(y)[:, None], sides[1].at(x)[None, :]) for _, y, x in steps)


class _Footprints:
    """Source cells under each target cell, along one side; in integers, so rounding loses no edge."""

    def __init__(self, source: int, target: int):
        index = np.arange(target)
        self._first = index * source // target
        self._last = -(-(index + 1) * source // target) - 1
        self._centre = (2 * index + 1) * source // (2 * target)
        reach = -(-source // (2 * target))
        self.steps = range(-reach, reach + 1)

    def at(self, step: int) -> np.ndarray:
        """Source cell for each target cell: `step` from its centre, held within its footprint."""
        return np.clip(self._centre + step, self._first, self._last)
