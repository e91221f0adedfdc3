"""Packing against reading and writing the same bytes, on one core and on two, in turn.

    python benchmarks/packing.py SOURCE [OPTION …]      # options of mde_dist.shard, for example --depth-codec zst

Each round packs SOURCE anew with one worker on one core and with two on two, as the command itself counts pairs and
seconds (workers started, statistics merged, files flushed), and copies as many bytes as that reads and writes: every
input file read, the shards written, one flush per shard. Median (all rounds), pairs/s.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROUNDS = 3


def pack(source: str, options: list[str], output: Path, cores: int) -> float:
    """Pairs/s of the command, start of Python and imports left out."""
    shutil.rmtree(output, ignore_errors=True)
    command = [sys.executable, "-m", "mde_dist.shard", "--source", source, "--output", str(output)]
    said = subprocess.run(
        [*command, "--workers", str(cores), *options],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: os.sched_setaffinity(0, range(cores)),
    ).stdout
    found = re.search(r"(\d[\d,]*) pairs in ([\d.]+) s", said)
    assert found, said
    return int(found[1].replace(",", "")) / float(found[2])


def copy(source: Path, shards: Path, pairs: int) -> float:
    """Pairs/s of reading all files of the source and writing the bytes of the shards."""
    blocks = [tar.read_bytes() for tar in sorted(shards.glob("*.tar"))]
    start = time.perf_counter()
    for path in source.rglob("*"):
        if path.is_file():
            path.read_bytes()
    with tempfile.TemporaryDirectory(dir=shards.parent) as folder:
        for number, block in enumerate(blocks):
            with Path(folder, str(number)).open("wb") as file:
                file.write(block)
                os.fsync(file.fileno())
        return pairs / (time.perf_counter() - start)


def main() -> None:
    source, *options = sys.argv[1:] or sys.exit(__doc__)
    rates: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "shards")
        for _ in range(ROUNDS):
            for cores in (1, 2):
                rates.setdefault(f"{cores} worker(s) on {cores} core(s)", []).append(
                    pack(source, options, output, cores)
                )
            splits = json.loads((output / "manifest.json").read_text())["splits"].values()
            pairs = sum(shard["samples"] for split in splits for shard in split["shards"])
            rates.setdefault("the same bytes read and written", []).append(copy(Path(source), output, pairs))
    for name, found in rates.items():
        print(f"{name:34} {sorted(found)[len(found) // 2]:8.0f} ({', '.join(f'{rate:.0f}' for rate in found)})")


if __name__ == "__main__":
    main()
