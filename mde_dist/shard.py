"""Dataset folder -> shards.

    python -m mde_dist.shard --source DIR --output DIR

Recognises NYU Depth v2 as people have it (densedepth, bts, plain folders) and the embedded rendered rooms, checks that
its depths are metres of an indoor data set, and packs it into WebDataset tars with an index and a manifest.
"""

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from .command import Size, parse, run_command
from .data.depth import DepthScale
from .data.pack import PackOptions, pack
from .data.probe import Probe, check_units, probe
from .data.sources import Source, open_source
from .errors import UserError

Layout = Literal["densedepth", "bts", "folder", "rooms"]


@dataclass(frozen=True)
class ShardConfig:
    """Pack a folder of image and depth pairs into WebDataset shards."""

    output: Path
    """Directory for the shards; it must not hold any yet."""
    source: Path | None = None
    """Folder of the data set. Not needed for --layout rooms."""
    layout: Layout | None = None
    """How the source is laid out; None = recognise it. rooms = the embedded sample, rendered here."""
    size: Size | None = None
    """Resize image and depth once, here, instead of in every epoch; None = keep the source's size."""
    samples_per_shard: int = 256
    """Pairs in a tar."""
    workers: int = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    """Processes that read, encode and write. The bytes do not depend on it."""
    limit: int | None = None
    """Pack the first N pairs of each split only."""
    skip_bad: bool = False
    """Leave out pairs that are missing, unreadable or mismatched, and count them, instead of stopping."""
    depth_scale: tuple[str, ...] = ()
    """SPLIT=METRES per stored unit (or just METRES for all splits), overruling layout and checks."""
    depth_codec: Literal["zst", "png"] = "zst"
    """How depth is stored, always lossless: zst decodes about seven times as fast, png is for interchange."""
    jpeg_quality: Annotated[int, tyro.conf.arg(metavar="1..100")] = 95
    """Of images that are resized or are no baseline JPEG; the others keep their own bytes."""


def main(argv: list[str]) -> None:
    config = parse(ShardConfig, argv, "python -m mde_dist.shard")
    check(config)
    console = Console()
    scales = given_scales(config.depth_scale)
    source = open_source(config.source or Path(), config.layout, scales)
    probes = probe(source)
    say(f"{source.root}: layout {source.layout}")
    for name, split in source.splits.items():
        height, width = probes[name].size
        say(
            f"  {name}: {len(split.pairs):,} pairs, {height}x{width}, median {probes[name].median:.2f} m, "
            f"holes {probes[name].holes:.1%} (from a few); {split.scale}"
        )
    check_units(source, probes, list(scales))
    started = time.monotonic()
    manifest = pack_with_progress(console, source, config, probes)
    show(console, manifest, config.output, time.monotonic() - started)


def check(config: ShardConfig) -> None:
    """Refuse impossible values. Raises UserError."""
    if config.source is None and config.layout != "rooms":
        raise UserError("--source DIR is missing: the folder of the data set (or --layout rooms for the embedded one)")
    if config.layout == "rooms" and (config.source is not None or config.depth_scale):
        raise UserError("--layout rooms is rendered, in metres: leave out --source and --depth-scale")
    for name in ("samples_per_shard", "workers", "limit"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be at least 1")
    if not 1 <= config.jpeg_quality <= 100:
        raise UserError(f"--jpeg-quality {config.jpeg_quality}: must be 1 to 100")
    if config.output.exists() and (not config.output.is_dir() or any(config.output.iterdir())):
        raise UserError(f"--output {config.output} is there already and not empty; choose another, or remove it first")


def given_scales(arguments: tuple[str, ...]) -> dict[str, DepthScale]:
    """`SPLIT=METRES` or `METRES` arguments -> scales by split, "" for all. Raises UserError."""
    scales = {}
    for argument in arguments:
        split, _, number = argument.rpartition("=")
        try:
            value = float(number)
        except ValueError:
            value = 0.0
        if not 0 < value < 1000:
            raise UserError(f"--depth-scale {argument}: expected SPLIT=METRES per stored unit, such as train=0.001")
        scales[split] = DepthScale(value, reason="given by --depth-scale")
    return scales


def pack_with_progress(
    console: Console, source: Source, config: ShardConfig, probes: Mapping[str, Probe]
) -> dict[str, Any]:
    """Pack under a progress bar; where the output is no terminal, a plain line every ten seconds."""
    options = PackOptions(
        config.size,
        config.samples_per_shard,
        config.depth_codec,
        config.jpeg_quality,
        config.limit,
        config.skip_bad,
    )
    columns = (TextColumn("packing"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"))
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None, rate="")
        started = spoken = time.monotonic()

        def progress(done: int, total: int) -> None:
            nonlocal spoken
            now = time.monotonic()
            rate = done / max(now - started, 1e-3)
            bar.update(task, completed=done, total=total, rate=f"{rate:.0f} pairs/s")
            if not console.is_terminal and now - spoken > 10:
                spoken = now
                left = (total - done) / max(rate, 1e-3)
                print(f"packed {done}/{total} pairs, {rate:.0f} pairs/s, {left:.0f} s left", flush=True)

        return pack(source, config.output, options, config.workers, progress, probes)


def show(console: Console, manifest: dict[str, Any], output: Path, seconds: float) -> None:
    """The table of what was packed, and the command to run next."""
    height, width = manifest["image_size"]
    table = Table(title=f"{output} ({height}x{width}, depth as {manifest['codec']})", title_justify="left")
    for column in ("split", "pairs", "shards", "MB", "metres: min, median, mean, max", "holes"):
        table.add_column(column, justify="left" if column == "split" else "right")
    splits = manifest["splits"]
    for name, split in splits.items():
        size = sum(shard["bytes"] for shard in split["shards"]) / 1e6
        metres = "  ".join(f"{split['depth'][what]:.3f}" for what in ("min", "median", "mean", "max"))
        holes = f"{split['depth']['holes']:.1%}"
        table.add_row(name, f"{split['samples']:,}", f"{len(split['shards']):,}", f"{size:.1f}", metres, holes)
    console.print(table)
    for name, split in splits.items():
        if split["reencoded_images"]:
            say(
                f"{name}: {split['reencoded_images']:,} images stored as new JPEG (resized, or no baseline JPEG before)"
            )
        if split["skipped"]:
            say(f"{name}: {len(split['skipped']):,} pairs skipped:", *split["skipped"][:10])
    pairs = sum(split["samples"] for split in splits.values())
    say(f"{pairs:,} pairs in {seconds:.1f} s, {pairs / seconds:.0f} pairs/s")
    say(f"next: accelerate launch -m mde_dist.train --data.shards {output}")


def say(*lines: str) -> None:
    """Plain lines, as long as they are: paths and commands stay whole for copying."""
    print(*lines, sep="\n  ", flush=True)


if __name__ == "__main__":
    run_command(main)
