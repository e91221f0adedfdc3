"""`bench loader`: pairs/s of the loader, core by core, against the bare decoders and the disk."""

import contextlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from mde_dist.data.shards import ShardDataset, open_split
from mde_dist.distributed.process_group import init_distributed
from mde_dist.tools.benchmarking.harness import (
    Column,
    Result,
    Table,
    Timing,
    available_cores,
    chosen_counts,
    device_name,
    interleave,
    over_rounds,
    train_config,
)
from mde_dist.tools.benchmarking.reading import Figures, decode_only, load, read_only
from mde_dist.tools.diagnostics.panel import format_bytes
from mde_dist.training.config import Config
from mde_dist.training.setup import make_sample

_LOW_SHARE = 0.7  # of the bare decoders, below which something else than they is what takes the time
_BUSY = 0.85  # of a core, below which others have it: the disk was looked at before


@dataclass(frozen=True)
class _Own(Timing):
    cores: tuple[int, ...] = ()
    """Numbers of cores to measure on, with a decoding thread each; none given = powers of two up to all available."""


@dataclass(frozen=True)
class Options(Config, _Own):
    """Pairs a second that the loader gives on 1, 2, … cores, its share of the bare decoders' rate, and pairs a second
    that the disk gives. The loader is that of training: order, reading, checking, decoding, batches on the device.
    Takes every option of mde_dist.train, and measures the shards and batches that it would train on."""


COLUMNS = (
    Column("what", "cores"),
    Column("rate", "pairs/s", ",.0f"),
    Column("spread", "rounds"),
    Column("per_core", "per core", ",.0f"),
    Column("share", "of the limit", ".0%"),
    Column("speed_up", "speed-up", ".2f"),
    Column("pair_kb", "KB/pair", ",.0f"),
    Column("mb_per_second", "MB/s", ",.0f"),
    Column("cores_busy", "cores busy", ".2f"),
)
DISK_COLUMNS = (Column("what", "pages"), Column("rate", "pairs/s", ",.0f"), Column("spread", "rounds"))


def measure(options: Options) -> Result:
    """Raises UserError."""
    config, cores = train_config(options), available_cores()
    counts = chosen_counts(options.cores, len(cores), "cores")
    with init_distributed(config.train.precision) as accelerator:
        make_sample(config, accelerator)
        device, name = accelerator.device, device_name(accelerator.device)
    data = config.data
    with contextlib.ExitStack() as opened:
        shards = opened.enter_context(open_split(data.shards, data.train_split, data.cache_options))
        cases: dict[str, Callable[[float], Figures]] = {"limit": decode_only(config, shards, cores[0])}
        for count in counts:
            cases[str(count)] = opened.enter_context(load(config, shards, device, cores[:count]))
        cases["disk"] = read_only(config, shards, counts[-1])
        found = interleave(cases, options.rounds, options.seconds)
        rows = loader_rows(counts, found["limit"], [found[str(count)] for count in counts])
        reads = disk_rows(found["disk"])
        limit, advice = diagnose(config, shards, rows, reads)
    size, (height, width) = sum(shard.bytes for shard in shards.info.shards), shards.size
    title = f"loader: {len(shards):,} pairs of {height}x{width}, {format_bytes(size)}, depth as {shards.manifest.codec}"
    tables = {
        "loader": Table(title, COLUMNS, rows),
        "disk": Table(f"reads alone, {counts[-1]} at a time", DISK_COLUMNS, reads),
    }
    return Result("loader", tables, limit, advice, name, config)


def loader_rows(
    counts: Sequence[int], bare: Sequence[Figures], found: Sequence[Sequence[Figures]]
) -> list[dict[str, Any]]:
    """Rows of the bare decoders and of the loader on so many cores, from the figures of all rounds."""
    rows, size = list[dict[str, Any]](), bare[0]["pair_bytes"]
    for cores, figures in zip([1, *counts], [bare, *found], strict=True):
        row: dict[str, Any] = {"what": str(cores) if rows else "limit: bare decoding on 1", "cores": cores}
        row |= over_rounds("rate", [one["rate"] for one in figures])
        row |= {"per_core": row["rate"] / cores, "pair_kb": size / 1e3, "mb_per_second": row["rate"] * size / 1e6}
        rows.append(row)
        row["share"] = row["per_core"] / rows[0]["rate"]
        if len(rows) > 1:
            row["speed_up"] = row["rate"] / rows[1]["per_core"]
            row["cores_busy"] = median(one["cores_busy"] for one in figures)
    return rows


def disk_rows(figures: Sequence[Figures]) -> list[dict[str, Any]]:
    """Rows of reads of dropped pages and of pages in memory."""
    rows = []
    for kind, words in (("cold", "dropped from memory first"), ("warm", "in memory")):
        known = [one[kind] for one in figures if one[kind] is not None]
        rows.append({"what": words, "kind": kind, **(over_rounds("rate", known) if known else {"rate": None})})
    return rows


def diagnose(
    config: Config, shards: ShardDataset, rows: Sequence[dict[str, Any]], reads: Sequence[dict[str, Any]]
) -> tuple[str, str]:
    """-> the bottleneck of the loader, advice."""
    _, *rows = rows
    best = max(rows, key=lambda row: row["rate"])
    cores = f"{best['cores']} core{'s' if best['cores'] > 1 else ''}"
    waits = f"a device that takes more than {best['rate']:,.0f} images/s waits"
    cold = reads[0]["rate"]
    if cold is not None and cold < best["rate"]:
        rates = f"{cold:,.0f} pairs/s where they are not in memory, {best['rate']:,.0f} on {cores} where they are"
        size = sum(shard.bytes for shard in shards.info.shards)
        advice = "a local or faster disk (for shards of a server: --data.cache), or smaller shards"
        if size < free_memory() / 2:
            advice = f"nothing for long runs: all {format_bytes(size)} stay in memory after the first epoch"
        return f"the disk, {rates}; {waits}", advice
    tips, (height, width) = list[str](), config.data.size or shards.size
    if best["cores"] < rows[-1]["cores"]:
        tips.append(f"--data.threads {best['cores']}: more only get in the way of one another")
    elif config.data.threads < best["cores"]:
        tips.append(f"--data.threads {best['cores']} instead of {config.data.threads}, with one rank")
    if height * width < shards.size[0] * shards.size[1]:
        tips.append(f"shards packed at training size (mde_dist.shard --size {height}x{width})")
    if shards.manifest.codec == "png":
        tips.append("shards packed without PNG, which takes longest to decode")
    if rows[0]["cores"] == 1 and rows[0]["cores_busy"] < _BUSY:  # of more, threads may wait for one another
        limit = f"other work on these cores: of one, the loader had {rows[0]['cores_busy']:.0%}"
        return f"{limit}; {waits}", "again on a machine, or in a job, that has its cores for itself"
    if best["share"] < _LOW_SHARE:
        limit = f"the work around the decoders, which leaves {best['share']:.0%} of their rate on {cores}"
        return f"{limit}; {waits}", ", ".join([*tips, "larger pairs or fewer cores per rank"])
    limit = f"decoding, {best['rate']:,.0f} pairs/s on {cores}, {best['share']:.0%} of what bare decoders give"
    return f"{limit}; {waits}", ", ".join([*tips, "more cores per device"])


def free_memory() -> int:
    """Bytes that files could take up in memory."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text("utf-8").splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, ValueError, KeyError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
