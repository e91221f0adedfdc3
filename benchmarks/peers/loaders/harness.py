"""What the scripts of this folder share: their command line, the clock, and the proof of what they deliver.

    python with_NAME.py prepare PAIRS OUT     # PAIRS/images/*.jpg and PAIRS/depth/*.png (16 bits, mm) -> own format
    python with_NAME.py run OUT --batch B --workers W --seconds S
    python with_NAME.py run OUT --batch B --workers W --check FILE.npz --pairs N

`run` prints a line of JSON at its end. This module and its folder know the standard library and NumPy only.
"""

import argparse
import json
import time
import zlib
from collections.abc import Callable, Iterator
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

Batches = Iterator[tuple[Any, Any]]
"""Without end: uint8 images (batch, height, width, 3) or (batch, 3, height, width), and the float32 metres of the same
pairs (batch, height, width)."""
_WARM = 0.5  # seconds from the first batch to the clock: what was decoded ahead while all started is used up
_SHOWN = 2  # batches that the proof keeps whole


def files(pairs: Path) -> list[tuple[Path, Path]]:
    """(JPEG, 16-bit PNG) of every pair, in order."""
    return [(image, pairs / "depth" / f"{image.stem}.png") for image in sorted((pairs / "images").iterdir())]


class Shuffled:
    """Numbers of `samples` pairs without end, each epoch shuffled anew: a sampler that restarts no workers."""

    def __init__(self, samples: int):
        self._samples = samples

    def __iter__(self) -> Iterator[int]:
        draw = np.random.default_rng(0)
        while True:
            yield from draw.permutation(self._samples).tolist()


def measure(stream: Batches, batch: int, seconds: float, ahead: int) -> dict[str, Any]:
    """Pairs/s of a stream that runs evenly: as much is decoded ahead when the clock stops as when it starts."""
    next(stream)  # workers, compilation and shuffle buffers are there once it has come
    warm = time.perf_counter()
    for _ in islice(stream, ahead):
        pass
    while time.perf_counter() - warm < _WARM:
        next(stream)
    start, done = time.perf_counter(), 0
    while (spent := time.perf_counter() - start) < seconds:
        next(stream)
        done += batch
    return {"rate": done / spent}


def prove(stream: Batches, pairs: int, file: Path) -> dict[str, Any]:
    """Write the first batches, and a checksum of every depth map of as many samples as there are pairs."""
    images, depths, sums = list[np.ndarray](), list[np.ndarray](), list[int]()
    for image, depth in stream:
        image, depth = np.asarray(image).copy(), np.asarray(depth).copy()  # their buffers may be used again
        sums += [zlib.crc32(one.tobytes()) for one in depth]
        if len(images) < _SHOWN:
            images.append(image)
            depths.append(depth)
        if len(sums) >= pairs:
            break
    np.savez(file, image=np.concatenate(images), depth=np.concatenate(depths), sums=np.array(sums, np.int64))
    return {}


def main(
    prepare: Callable[[Path, Path], None], batches: Callable[[Path, int, int], Batches], packages: tuple[str, ...]
) -> None:
    """A script's command line. `batches`: folder, batch, workers -> its stream; `packages`: whose versions to name."""
    parser = argparse.ArgumentParser()
    words = parser.add_subparsers(dest="word", required=True)
    word = words.add_parser("prepare")
    word.add_argument("pairs", type=Path)
    word.add_argument("out", type=Path)
    word = words.add_parser("run")
    word.add_argument("out", type=Path)
    word.add_argument("--batch", type=int, required=True)
    word.add_argument("--workers", type=int, required=True)
    word.add_argument("--seconds", type=float, default=0.0)
    word.add_argument("--check", type=Path)
    word.add_argument("--pairs", type=int, default=0)
    options = parser.parse_args()
    if options.word == "prepare":
        prepare(options.pairs, options.out)
        return
    stream = batches(options.out, options.batch, options.workers)
    if options.check is not None:
        found = prove(stream, options.pairs, options.check)
    else:
        found = measure(stream, options.batch, options.seconds, 4 * options.workers)
    found["versions"] = ", ".join(f"{name} {version(name)}" for name in packages)
    print(json.dumps(found), flush=True)
