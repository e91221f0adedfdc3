"""Packing against its limits, on one core and on two, in turn.

    python benchmarks/packing.py SOURCE [--rounds N] [--against CHECKOUT] [OPTION …]

OPTIONs are those of mde_dist.shard, for example --depth-codec zst. Each round packs SOURCE anew with one worker on one
core and with two on two: first by the whole command's clock, then as the command itself counts pairs and seconds
(workers started, statistics merged, files flushed; imports and the look at the source left out). Beside it, on one
core:

    bare loop   depth of every pair decoded, in millimetres, encoded, and written with the image's own bytes
    copy        every file of SOURCE read and the bytes of the shards written

each with one flush per shard. --against packs with the code of another checkout as well. Median (all rounds), pairs/s.
"""

import argparse
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

HERE = Path(__file__).parents[1]


def pack(checkout: Path, source: str, options: list[str], output: Path, cores: int) -> tuple[float, float]:
    """Pairs/s of the whole command, and as it counts them."""
    shutil.rmtree(output, ignore_errors=True)
    command = [sys.executable, "-m", "mde_dist.shard", "--source", source, "--output", str(output)]
    start = time.perf_counter()
    said = subprocess.run(
        [*command, "--workers", str(cores), *options],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        cwd=checkout,
        preexec_fn=lambda: os.sched_setaffinity(0, range(cores)),
    ).stdout
    seconds = time.perf_counter() - start
    found = re.search(r"(\d[\d,]*) pairs in ([\d.]+) s", said)
    assert found, said
    pairs = int(found[1].replace(",", ""))
    return pairs / seconds, pairs / float(found[2])


def write(folder: Path, shards: Iterable[Iterable[bytes]]) -> None:
    for number, blocks in enumerate(shards):
        with Path(folder, str(number)).open("wb") as file:
            file.writelines(blocks)
            file.flush()
            os.fsync(file.fileno())


def copy(source: Path, shards: Path, pairs: int) -> float:
    """Pairs/s of reading all files of the source and writing the bytes of the shards."""
    blocks = [[tar.read_bytes()] for tar in sorted(shards.glob("*.tar"))]
    start = time.perf_counter()
    for path in source.rglob("*") if source.is_dir() else [source]:
        if path.is_file():
            path.read_bytes()
    with tempfile.TemporaryDirectory(dir=shards.parent) as folder:
        write(Path(folder), blocks)
        return pairs / (time.perf_counter() - start)


def bare(source: Path, codec: str, per_shard: int, place: Path) -> float:
    """Pairs/s of decoding and encoding depth and writing it with the image's bytes, nothing else; of plain files."""
    import numpy as np
    from PIL import Image

    from mde_dist.data import depth
    from mde_dist.packing.sources import open_source

    opened = open_source(source)
    pairs = [(split.scale, pair) for split in opened.splits.values() for pair in split.pairs]

    def members(scale: depth.DepthScale, image: Path, target: Path) -> Iterable[bytes]:
        with Image.open(io.BytesIO(target.read_bytes())) as picture:
            millimetres = depth.to_millimetres(np.asarray(picture), scale)
        return image.read_bytes(), depth.encode(millimetres, codec)

    start = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=place) as folder:
        groups = (pairs[first : first + per_shard] for first in range(0, len(pairs), per_shard))
        write(
            Path(folder),
            (
                (
                    data
                    for scale, pair in group
                    for data in members(scale, *map(opened.path_of, (pair.image, pair.depth)))
                )
                for group in groups
            ),
        )
        return len(pairs) / (time.perf_counter() - start)


def bare_apart(*arguments: str) -> float:
    """`bare` in a process of its own on one core."""
    command = [sys.executable, __file__, "--bare", *arguments]
    said = subprocess.run(
        command,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(HERE)},
        preexec_fn=lambda: os.sched_setaffinity(0, [0]),
    ).stdout
    return float(said)


def main() -> None:
    if sys.argv[1:2] == ["--bare"]:
        source, codec, per_shard, place = sys.argv[2:]
        print(bare(Path(source), codec, int(per_shard), Path(place)))
        return
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--against", type=Path)
    known, options = parser.parse_known_args()
    source = known.source.resolve()
    checkouts = {"": HERE} | ({f", {known.against.name}": known.against} if known.against else {})
    rates: dict[str, list[float]] = {}

    def note(name: str, rate: float) -> None:
        rates.setdefault(name, []).append(rate)

    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "shards")
        for _ in range(known.rounds):
            for name, checkout in checkouts.items():
                for cores in (1, 2):
                    whole, counted = pack(checkout, str(source), options, output, cores)
                    note(f"{cores} on {cores} core(s), whole command{name}", whole)
                    note(f"{cores} on {cores} core(s), as it counts{name}", counted)
            manifest = json.loads((output / "manifest.json").read_text())
            shards = [shard["samples"] for split in manifest["splits"].values() for shard in split["shards"]]
            if source.is_dir():
                note("bare loop on 1 core", bare_apart(str(source), manifest["codec"], str(max(shards)), folder))
            note("copy on 1 core", copy(source, output, sum(shards)))
    for name, found in rates.items():
        print(f"{name:44} {sorted(found)[len(found) // 2]:8.1f} ({', '.join(f'{rate:.1f}' for rate in found)})")


if __name__ == "__main__":
    main()
