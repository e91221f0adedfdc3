"""Pairs as the tar shards that WebDataset made usual: KEY.jpg and KEY.depth.png side by side."""

import tarfile
from pathlib import Path

import harness

_SHARDS = 8  # at least one per worker


def prepare(pairs: Path, out: Path) -> None:
    out.mkdir(parents=True)
    for number in range(_SHARDS):
        with tarfile.open(out / f"pairs-{number:03}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for image, depth in harness.files(pairs)[number::_SHARDS]:
                tar.add(image, f"{image.stem}.jpg")
                tar.add(depth, f"{image.stem}.depth.png")


def shards(out: Path) -> list[str]:
    """Those that hold a pair."""
    found = sorted(path for path in out.iterdir() if path.suffix == ".tar")
    return [str(path) for path in found if path.stat().st_size > 10_240]  # the size of an empty tar
