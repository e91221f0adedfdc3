"""Lossless codecs for depth, side by side: bytes of a map, and milliseconds of one core to decode and encode it.

    python benchmarks/codecs.py NAME=GLOB [NAME=GLOB …]     # 16-bit PNG in mm, or 8-bit PNG as densedepth has them

All decode into a buffer that is there; rounds in turn, median. The codecs of the shards are blosc (LZ4-HC 4, bytes
shuffled), zst (zstd 3) and png; the rest needs lz4 and imagecodecs, and is left out where they are not installed.
"""

import glob
import sys
import time
from collections.abc import Callable

import numpy as np
from numcodecs import blosc, zstd
from PIL import Image

from mde_dist.data.depth import DENSEDEPTH_8BIT, decode, encode, to_millimetres

Codec = tuple[Callable[[np.ndarray], bytes], Callable[[bytes, np.ndarray], object]]
ROUNDS, SECONDS, MAPS = 7, 0.03, 12


def ours(name: str) -> Codec:
    return lambda depth: encode(depth, name), lambda data, out: decode(data, name, out)


def in_blosc(inner: bytes, level: int, filtered: int) -> Codec:
    return lambda depth: blosc.compress(depth, inner, level, filtered), blosc.decompress


def in_zstd(level: int) -> Codec:
    return lambda depth: zstd.compress(np.ascontiguousarray(depth), level), zstd.decompress


def in_planes() -> Codec:
    """High bytes, then low bytes, as zstd 3; put together by NumPy."""

    def split(depth: np.ndarray) -> bytes:
        return zstd.compress(np.ascontiguousarray(np.moveaxis(depth.view(np.uint8).reshape(*depth.shape, 2), -1, 0)), 3)

    def join(data: bytes, out: np.ndarray) -> None:
        pairs, planes = out.view(np.uint8).reshape(*out.shape, 2), np.empty((2, *out.shape), np.uint8)
        zstd.decompress(data, planes)
        pairs[..., 0], pairs[..., 1] = planes

    return split, join


def differences(codec: Codec) -> Codec:
    """Each row as its difference to the one above, which NumPy sums up again."""

    def down(depth: np.ndarray) -> bytes:
        return codec[0](np.concatenate([depth[:1], np.diff(depth, axis=0)]))

    def up(data: bytes, out: np.ndarray) -> None:
        steps = np.empty_like(out)
        codec[1](data, steps)
        np.cumsum(steps, axis=0, dtype=np.uint16, out=out)

    return down, up


def codecs() -> dict[str, Codec]:
    found = {
        "blosc (LZ4-HC 4, bytes shuffled)": ours("blosc"),
        "zst (zstd 3)": ours("zst"),
        "png": ours("png"),
        "blosc, LZ4-HC 9": in_blosc(b"lz4hc", 9, blosc.SHUFFLE),
        "blosc, LZ4-HC 4, bits shuffled": in_blosc(b"lz4hc", 4, blosc.BITSHUFFLE),
        "blosc, LZ4-HC 4, not shuffled": in_blosc(b"lz4hc", 4, blosc.NOSHUFFLE),
        "blosc, LZ4 (fast)": in_blosc(b"lz4", 5, blosc.SHUFFLE),
        "blosc, zstd 7": in_blosc(b"zstd", 7, blosc.SHUFFLE),
        "zstd 9": in_zstd(9),
        "zstd 19": in_zstd(19),
        "zstd 3, high and low bytes apart": in_planes(),
        "zstd 3, differences of rows": differences(in_zstd(3)),
        "blosc, LZ4-HC 4, differences of rows": differences(in_blosc(b"lz4hc", 4, blosc.SHUFFLE)),
        "not compressed": (
            lambda depth: depth.tobytes(),
            lambda data, out: out.data.cast("B").__setitem__(slice(None), data),
        ),
    }
    try:
        import imagecodecs

        found["LERC"] = (
            lambda depth: imagecodecs.lerc_encode(depth, level=0),
            lambda d, out: imagecodecs.lerc_decode(d, out=out),
        )
        found["JPEG-LS"] = imagecodecs.jpegls_encode, lambda data, out: imagecodecs.jpegls_decode(data, out=out)
    except ImportError:
        pass
    return found


def maps_of(pattern: str) -> list[np.ndarray]:
    """A dozen of the files, evenly spaced, uint16 millimetres."""
    files = sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207
    if not files:
        sys.exit(f"no file matches {pattern}")
    chosen = [np.asarray(Image.open(file)) for file in files[:: -(-len(files) // MAPS)]]
    return [to_millimetres(m, DENSEDEPTH_8BIT) if m.dtype == np.uint8 else m.astype(np.uint16) for m in chosen]


def timed(call: Callable[[int], object], count: int) -> float:
    """Milliseconds a call, over all of `count` at least once."""
    start, calls = time.perf_counter(), 0
    while calls < count or time.perf_counter() - start < SECONDS:
        call(calls % count)
        calls += 1
    return 1e3 * (time.perf_counter() - start) / calls


def main() -> None:
    sets = {name: maps_of(pattern) for name, _, pattern in (given.partition("=") for given in sys.argv[1:])}
    if not sets:
        sys.exit(__doc__)
    print("| KB, ms to decode, ms to encode | " + " | ".join(sets) + " |\n|---|" + "---|" * len(sets))
    rows, encoded, spent = codecs(), {}, {}
    for (name, codec), (kind, maps) in ((row, kind) for row in rows.items() for kind in sets.items()):
        start = time.perf_counter()
        encoded[name, kind] = [bytes(codec[0](depth)) for depth in maps]
        cost = 1e3 * (time.perf_counter() - start) / len(maps)
        spent[name, kind] = cost, []
        for depth, data in zip(maps, encoded[name, kind], strict=True):
            out = np.zeros_like(depth)
            codec[1](data, out)
            assert (out == depth).all(), f"{name} is not lossless"
    for _ in range(ROUNDS):
        for (name, kind), (_, times) in spent.items():
            out, data = np.empty_like(sets[kind][0]), encoded[name, kind]
            times.append(timed(lambda k, name=name, data=data, out=out: rows[name][1](data[k], out), len(data)))
    for name in rows:
        cells = [
            f"{np.mean([len(data) for data in encoded[name, kind]]) / 1e3:.1f}, "
            f"{np.median(spent[name, kind][1]):.2f}, {spent[name, kind][0]:.1f}"
            for kind in sets
        ]
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
