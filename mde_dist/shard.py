"""Dataset folder -> shards.

    python -m mde_dist.shard --source DIR --output DIR

    python -m mde_dist.shard --source DIR --dry-run

    python -m mde_dist.shard --verify DIR | --repair DIR | --index DIR

Recognises NYU Depth v2 as people have it (densedepth, bts and NeWCRFs lists, HDF5 files and tars of them, the labelled
.mat file, Marigold's files, plain folders, any of these folders as a ZIP) and the embedded rendered rooms, checks that
its depths are metres of an indoor data set, and packs it into WebDataset tars with an index and a manifest.
"""

import os
import re
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console

from mde_dist.packing.claim import refuse_full
from mde_dist.packing.holdout import make_val_split
from mde_dist.packing.inspect import Layout, given_lists, given_scales, open_checked
from mde_dist.packing.maintenance import index_shards, show_packed, verify_shards
from mde_dist.packing.pack import PackConfig, pack, pack_part
from mde_dist.packing.sources import DepthMap
from mde_dist.utils.cli import Part, Size, option, parse, run_command, words_of
from mde_dist.utils.console import open_console, say
from mde_dist.utils.errors import UserError
from mde_dist.utils.paths import as_typed, command_line, whole_path
from mde_dist.utils.progress import progress_bar
from mde_dist.utils.urls import is_remote

_CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class ShardConfig:
    """Pack a folder of image and depth pairs into WebDataset shards."""

    output: Path | None = None
    """Directory for the shards, such as a mounted volume; it must not hold anything yet."""
    source: Path | None = None
    """Folder of the data set, its ZIP as downloaded, or nyu_depth_v2_labeled.mat. Not needed for --layout rooms. Images
    are turned as their EXIF data say, and laid on white where they are transparent; depth is taken as upright."""
    layout: Layout | None = None
    """Layout of the source; None = recognise it. rooms = the embedded sample, rendered here."""
    size: Size | None = None
    """Resize image and depth once, here, instead of in every epoch; None = keep the source's size."""
    samples_per_shard: int = option(256, low=1, high=1e9)
    """Pairs in a tar."""
    workers: int = option(_CORES, low=1, high=1024)
    """Processes that read, encode and write. The bytes do not depend on it."""
    limit: int | None = option(None, low=1, high=1e9)
    """Pack the first N pairs of each split only."""
    validation: Annotated[float | None, tyro.conf.arg(metavar="SHARE")] = None
    """Hold whole rooms (all scenes of a room) with this share of the training pairs out of split train into a split
    val, to choose on with --data.eval-split val, so that the test pairs are left for the end; for example 0.15."""
    skip_bad: bool = False
    """Leave out pairs that are missing, unreadable or mismatched, and count them, instead of stopping."""
    part: Part | None = None
    """Pack only shard K of every N (K from 0), and publish nothing: for job arrays. When all parts are done, the same
    command without --part publishes them, byte for byte as if it had packed alone. All are given the same options
    and the same source."""
    depth_scale: tuple[str, ...] = ()
    """SPLIT=METRES per stored unit (or just METRES for all splits), overruling layout and checks."""
    list: tuple[str, ...] = ()
    """SPLIT=FILE, train or test: a list of pairs that is not in the data set under its published name; also .gz."""
    depth_map: DepthMap | None = None
    """raw (with holes) or filled, where the data set has both; None = the layout's own, which the output names."""
    depth_codec: Literal["blosc", "zst", "png"] = "blosc"
    """Codec of the depth, always lossless: blosc decodes about 25 times as fast as png, zst seven times and is smaller
    where holes are filled; png is for interchange."""
    jpeg_quality: Annotated[int, tyro.conf.arg(metavar="1..100")] = option(95, low=1, high=100)
    """JPEG quality of images that are resized, turned upright, or no baseline JPEG; the others keep their own bytes."""
    dry_run: bool = False
    """Pack nothing: say what the source was recognised as, in which units and with how many holes, draw eight pairs,
    and name what packing would refuse (exit code 2 then)."""
    preview: Path | None = None
    """Picture file (PNG) of a dry run; None = preview.png in the current directory."""
    verify: Path | None = None
    """Instead of packing: check every byte of the shards in this directory (sizes, counts, sha256, headers, checksums,
    pictures). Exit code 1 where something is wrong."""
    repair: Path | None = None
    """Instead of packing: verify, move what is damaged to DIR/quarantine, and keep the whole samples."""
    index: Path | None = None
    """Instead of packing: make index and manifest for WebDataset tars that were packed elsewhere: KEY.jpg with
    KEY.depth.zst or KEY.depth.png in uint16 millimetres. --skip-bad leaves out what cannot be used."""


def main(argv: list[str]) -> None:
    config = parse(ShardConfig, argv, "python -m mde_dist.shard")
    check(config)
    console = open_console()
    directory = config.verify or config.repair
    if directory:
        sys.exit(verify_shards(console, directory, config.workers, mend=bool(config.repair)))
    elif config.index:
        index_shards(console, config.index, config.workers, config.skip_bad, given_scales(config.depth_scale))
    elif config.dry_run:
        look(config)
    elif config.output:
        pack_source(console, config, config.output)


def look(config: ShardConfig) -> None:
    """Say what packing would pack, and what it would refuse. Raises UserError."""
    from mde_dist.packing.dry_run import (  # takes matplotlib, which every packing process would import, too
        PREVIEW,
        dry_run,
    )

    dry_run(
        root=config.source,
        layout=config.layout,
        depth_scale=config.depth_scale,
        lists=config.list,
        depth_map=config.depth_map,
        options=pack_options(config),
        preview=config.preview or PREVIEW,
        then=packing_command(config),
    )


def packing_command(config: ShardConfig) -> str:
    """The command that packs what a dry run looks at."""
    name = config.source.resolve().stem if config.source else "rooms"
    output = config.output or Path("shards", name)
    lists = tuple(f"{split}={as_typed(whole_path(file))}" for split, file in given_lists(config.list).items())
    return command_line("shard", *words_of(replace(config, dry_run=False, preview=None, output=output, list=lists)))


def pack_source(console: Console, config: ShardConfig, output: Path) -> None:
    """Say what the source is, pack it, and show what came of it. Raises UserError."""
    source, probes = open_checked(config.source, config.layout, config.depth_scale, config.list, config.depth_map)
    if config.validation:
        say(*make_val_split(source, config.validation).describe())
    before = output.absolute().with_name(f".{output.absolute().name}.partial")
    if before.is_dir():
        say(f"note: {before} is what an earlier version left of a packing; nothing reads it, so remove it")
    started = time.monotonic()
    options = pack_options(config)
    with progress_bar(console, "packing", "pairs") as progress:
        if config.part:
            count = pack_part(source, output, options, config.workers, progress, part=config.part, probes=probes)
        else:
            manifest = pack(source, output, options, config.workers, progress, probes=probes)
    if config.part:
        say(f"part {config.part[0]}/{config.part[1]} of {output}: {count} shards; without --part they are published")
        return
    show_packed(console, manifest, output, time.monotonic() - started)


def pack_options(config: ShardConfig) -> PackConfig:
    return PackConfig(
        size=config.size,
        samples_per_shard=config.samples_per_shard,
        codec=config.depth_codec,
        jpeg_quality=config.jpeg_quality,
        limit=config.limit,
        skip_bad=config.skip_bad,
        validation=config.validation,
    )


def check(config: ShardConfig) -> None:
    """Refuse impossible values. Raises UserError."""
    others = [name for name in ("output", "verify", "repair", "index") if getattr(config, name) is not None]
    if config.dry_run and others in ([], ["output"]):
        others = ["output"]  # where a dry run names one, it is where the packing would go
    elif len(others) != 1 or config.dry_run:
        named = [f"--{name}" for name in (["dry-run"] if config.dry_run else []) + others]
        raise UserError(
            f"name one thing to do, not {' and '.join(named) or 'none'}: --output DIR to pack a data set, --dry-run to "
            "look at it first, or --verify, --repair or --index DIR for shards that are there"
        )
    if config.part and (config.output is None or config.dry_run):
        raise UserError("--part is for packing: name the --output, and leave out --dry-run")
    if config.preview and not config.dry_run:
        raise UserError(f"--preview {config.preview}: it is the picture of a dry run; add --dry-run")
    if is_remote(re.sub(":/+", "://", str(getattr(config, others[0])))):
        raise UserError(
            f"--{others[0]} takes a directory; shards are made and kept in one, and then copied to their server, "
            "for example with: aws s3 sync DIR s3://BUCKET/NAME"
        )
    if config.output is None and not config.dry_run:
        return
    if config.source is None and config.layout != "rooms":
        raise UserError("--source DIR is missing: the folder of the data set (or --layout rooms for the embedded one)")
    if config.layout == "rooms" and (config.source is not None or config.depth_scale):
        raise UserError("--layout rooms is rendered, in metres: leave out --source and --depth-scale")
    if config.validation is not None and not 0 < config.validation < 1:
        raise UserError(f"--validation {config.validation:g}: must be a share between 0 and 1, such as 0.15")
    if config.output:
        refuse_full(config.output)


if __name__ == "__main__":
    run_command(main)
