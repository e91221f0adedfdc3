"""The stream measured over many small pairs: packing, memory of a rank over an epoch, and the time of a resume.

    python benchmarks/stream.py DIR [PAIRS]

Makes small pairs in DIR (48x64; first PAIRS / 10, then PAIRS = 48,000 of them), packs them with `mde_dist.shard`, and
prints what benchmarks/README.md quotes. What is compared runs in turn, several rounds, each in a process of its own.
Rates against their limit, of any shards: `python -m mde_dist.bench loader`.
"""

import itertools
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

SIZE = (48, 64)
BATCH = 32
ROUNDS = 3


def make_pairs(folder: Path, pairs: int) -> None:
    """A plain folder of images and 16-bit depth: windows of one noisy slope, no two alike."""
    from PIL import Image

    draw = np.random.default_rng(0)
    y, x = np.mgrid[:600, :800]
    picture = (128 + 60 * np.sin(x / 17) + 50 * np.cos(y / 23))[..., None] + draw.normal(0, 8, (600, 800, 3))
    depth = 1500 + 3 * x + 2 * y + draw.integers(0, 40, x.shape)
    for split in ("train", "test"):
        for kind in ("images", "depth"):
            (folder / split / kind).mkdir(parents=True)
        for number in range(pairs if split == "train" else 8):
            top, left = number % 550, number * 7 % 730
            window = slice(top, top + SIZE[0]), slice(left, left + SIZE[1])
            image = Image.fromarray(np.clip(picture[window] + number % 29, 0, 255).astype(np.uint8))
            image.save(folder / f"{split}/images/{number:06d}.jpg", quality=92)
            Image.fromarray((depth[window] + number % 997).astype(np.uint16)).save(
                folder / f"{split}/depth/{number:06d}.png", compress_level=1
            )


def shards_of(directory: Path, pairs: int) -> Path:
    shards, source = directory / f"shards-{pairs}", directory / f"pairs-{pairs}"
    if not shards.is_dir():
        if not source.is_dir():
            make_pairs(source, pairs)
        start = time.monotonic()
        command = ["-m", "mde_dist.shard", "--source", source, "--layout", "folder", "--output", shards]
        subprocess.run([sys.executable, *map(str, command)], check=True)
        print(f"packed {pairs} pairs in {time.monotonic() - start:.0f} s, start and end included")
    return shards


# --- what runs in a process of its own: each prints one line of JSON ---


def epoch(shards: str, threads: str) -> dict[str, float]:
    """The memory that one epoch through order and loader takes."""
    import torch

    from mde_dist.data.loader import DataLoader
    from mde_dist.data.sampler import GlobalSampler
    from mde_dist.data.shards import open_split

    with open_split(shards, "train") as split:
        order = GlobalSampler(len(split), split.block, 4, seed=0)
        starts = range(0, len(split) - BATCH + 1, BATCH)
        draws = (order.at(np.arange(first, first + BATCH)) for first in starts)
        early = 0.0
        with DataLoader(split, draws, BATCH, torch.device("cpu"), int(threads), 3) as batches:
            for number, _ in enumerate(batches):
                if number == len(starts) // 10:
                    early = memory()
        return {"early": early, "peak": memory()}


def resume(shards: str, position: str) -> dict[str, float]:
    """Milliseconds from an open split to its first batch, threads and buffers included."""
    import torch

    from mde_dist.data.loader import DataLoader
    from mde_dist.data.sampler import GlobalSampler
    from mde_dist.data.shards import open_split

    with open_split(shards, "train") as split:
        times = []
        for _ in range(30):
            start = time.perf_counter()
            order = GlobalSampler(len(split), split.block, 4, seed=0)
            draws = (order.at(np.arange(first, first + BATCH)) for first in itertools.count(int(position), BATCH))
            with DataLoader(split, draws, BATCH, torch.device("cpu"), 2, 3) as batches:
                next(batches)
                times.append(1000 * (time.perf_counter() - start))
        return {"ms": float(np.median(times))}


def memory() -> float:
    """Megabytes of this process at most so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def alone(name: str, *arguments: object) -> dict[str, float]:
    """A measurement in a fresh process."""
    command = [sys.executable, __file__, "--measure", name, *map(str, arguments)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def rounds(measurements: dict[str, tuple], value: str) -> dict[str, list[float]]:
    """Each measurement once per round, in turn."""
    found: dict[str, list[float]] = {name: [] for name in measurements}
    for _ in range(ROUNDS):
        for name, call in measurements.items():
            found[name].append(alone(*call)[value])
    return found


def show(title: str, found: dict[str, list[float]], unit: str) -> None:
    print(f"\n{title}")
    for name, values in found.items():
        print(
            f"  {name:34} {float(np.median(values)):10.1f} {unit}   ({', '.join(f'{value:.1f}' for value in values)})"
        )


def main(directory: Path, pairs: int) -> None:
    few, many = shards_of(directory, pairs // 10), shards_of(directory, pairs)
    for shards in (few, many):
        found = alone("epoch", shards, 2)
        print(f"  {shards.name}: {found['early']:.1f} MB at most in the first tenth, {found['peak']:.1f} MB in all")
    places = {f"at sample {place:,}": ("resume", many, place) for place in (0, pairs + pairs // 2, 10_000_000)}
    show("from an open split to the first batch, ms", rounds(places, "ms"), "ms")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        measure = {"epoch": epoch, "resume": resume}[sys.argv[2]]
        print(json.dumps(measure(*sys.argv[3:])))
    else:
        main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 48_000)
