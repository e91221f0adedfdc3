"""Metres <-> stored bytes: the one place that knows depth units and codecs.

In memory depth is float32 metres; in a shard and in a batch it is uint16 millimetres. 0 means "no measurement" in both.
"""

import io
import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
import zstandard
from PIL import Image

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
    """Bits of a stored value that the source declares, 8 or 16; 0 = not declared."""
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
    with Image.open(io.BytesIO(data)) as picture:
        stored = np.asarray(picture)
    if stored.shape != out.shape or picture.mode not in ("I;16", "I"):
        raise ValueError(f"depth is {picture.mode} {stored.shape}, expected 16-bit {out.shape}")
    out[...] = stored


def png_bytes(millimetres: np.ndarray) -> bytes:
    """uint16 (height, width) -> a 16-bit grey PNG."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(millimetres)).save(buffer, format="PNG")
    return buffer.getvalue()


_local = threading.local()  # a zstd context serves one thread at a time


def _decode_zstd(data: bytes | memoryview, out: np.ndarray) -> None:
    try:
        context = _local.context
    except AttributeError:
        context = _local.context = zstandard.ZstdDecompressor()
    try:
        plain = context.decompress(data, max_output_size=out.nbytes)
    except zstandard.ZstdError as error:
        raise ValueError(f"depth does not decompress: {error}") from None
    if len(plain) != out.nbytes:
        raise ValueError(f"depth holds {len(plain)} bytes, expected {out.nbytes} for {out.shape}")
    out.reshape(-1)[...] = np.frombuffer(plain, dtype="<u2")


def resize_depth(depth: Any, size: tuple[int, int]) -> Any:
    """(…, height, width) depth -> (…, *size), each target taking the valid value of its footprint nearest its centre.

    Averaging would invent depths between a chair and the wall behind it. A target is a hole (0) only where its whole
    footprint is. Works alike on NumPy arrays and torch tensors, in any unit.
    """
    rows, row_steps = _nearest(depth.shape[-2], size[0])
    columns, column_steps = _nearest(depth.shape[-1], size[1])
    steps = sorted((abs(y) + abs(x), y, x) for y in row_steps for x in column_steps)
    result = None
    for _, y, x in steps:
        row = np.clip(rows + y, 0, depth.shape[-2] - 1)
        column = np.clip(columns + x, 0, depth.shape[-1] - 1)
        candidate = depth[..., row[:, None], column[None, :]]
        result = candidate if result is None else result + (result == 0) * candidate
    return result


def _nearest(source: int, target: int) -> tuple[np.ndarray, range]:
    """For each target cell the source cell under its centre, and the steps to its neighbours inside the footprint."""
    ratio = source / target
    centre = np.minimum(((np.arange(target) + 0.5) * ratio).astype(np.int64), source - 1)
    reach = max(int(np.ceil(ratio)), 1)
    return centre, range(-(reach // 2), (reach + 1) // 2)
