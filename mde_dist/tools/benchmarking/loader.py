"""`bench loader`: pairs/s of the loader, core by core, against the bare decoders, and the disk that they lie on."""

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mde_dist.data.shards import ShardDataset, open_split
from mde_dist.distributed.process_group import init_distributed
from mde_dist.tools.benchmarking.pinned import Answer, pinned
from mde_dist.tools.benchmarking.result import (
    Column,
    Result,
    Table,
    Timing,
    cores_at_hand,
    device_name,
    middle,
    over_rounds,
    plain_config,
    ratio,
)
from mde_dist.tools.diagnostics.panel import in_words
from mde_dist.training.config import Config
from mde_dist.training.setup import make_sample
from mde_dist.utils.errors import UserError

_LOW_SHARE = 0.7  # of the bare decoders, below which something else than they is what takes the time

_BUSY = 0.85  # of a core, below which others have it: the disk was looked at before


@dataclass(frozen=True)
class Own(Timing):
    cores: tuple[int, ...] = ()
    """Numbers of cores to measure on, with a decoding thread each; none given = powers of two up to all at hand."""


@dataclass(frozen=True)
class Options(Config, Own):
    """How many pairs a second the loader gives on 1, 2, … cores, which share of the bare decoders' rate that is, and
    what the disk would give: order, reading, checking, decoding, batches on the device that trains. Takes every option
    of mde_dist.train, and measures the shards and batches that it would train on."""


def bench(options: Options) -> Result:
    """Raises UserError."""
    cores = cores_at_hand()
    counts = chosen_counts(options.cores, len(cores), "cores")
    with init_distributed(options.train.precision) as accelerator:  # which knows the device
        make_sample(options, accelerator)
        device, name = accelerator.device, device_name(accelerator.device)
    data = options.data
    with open_split(data.shards, data.train_split, data.cache_options) as shards:
        place: dict[str, Any] = {"place": data.shards, "split": data.train_split, "window": data.shuffle_shards}
        place |= {"cache": [str(data.cache), data.cache_options.limit, data.remote_timeout], "seed": options.train.seed}
        batch = max(1, options.train.batch_size // options.train.grad_accum_steps)
        how = {"batch": batch, "ahead": data.prefetch_batches, "device": str(device), "timeout": data.read_timeout}
        with contextlib.ExitStack() as opened:
            bare = opened.enter_context(pinned("reading", "limit", cores[:1], **place))
            loaders = [
                opened.enter_context(pinned("reading", "loader", cores[:n], **place, **how, threads=n)) for n in counts
            ]
            disk = opened.enter_context(pinned("reading", "disk", cores, **place, threads=counts[-1]))
            for ask in (bare, *loaders, disk):  # which also waits until all have started, on the same cores
                ask(0.01)
            seconds = options.seconds / options.rounds
            rounds = [[ask(seconds) for ask in (bare, *loaders, disk)] for _ in range(options.rounds)]
        limits, *found, disks = zip(*rounds, strict=True)
        table = rates(counts, limits, found)
        reads = disk_rates(disks)
        limit, advice = judge(options, shards, table, reads)
        return Result(
            "loader",
            {
                "loader": Table(f"loader: {about(shards)}", COLUMNS, table),
                "disk": Table(f"reads alone, {counts[-1]} at a time", DISK_COLUMNS, reads),
            },
            limit,
            advice,
            name,
            plain_config(options),
        )


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
    Column("memory_mb", "peak MB", ",.0f"),
)
DISK_COLUMNS = (
    Column("what", "pages"),
    Column("rate", "pairs/s", ",.0f"),
    Column("spread", "rounds"),
    Column("mb_per_second", "MB/s", ",.0f"),
)


def chosen_counts(given: Sequence[int], most: int, what: str) -> list[int]:
    """How many to measure on: those given, or powers of two and `most`. Raises UserError."""
    for count in given:
        if not 1 <= count <= most:
            raise UserError(f"{what} = {count}: must be 1 to {most}, which is what is at hand")
    return sorted(set(given)) or sorted({2**n for n in range(most.bit_length())} | {most})


def rates(counts: Sequence[int], limits: Sequence[Answer], found: Sequence[Sequence[Answer]]) -> list[dict[str, Any]]:
    """Rows of the bare decoders and of the loader on so many cores, from the answers of all rounds."""
    bare = over_rounds("rate", [answer["rate"] for answer in limits])
    size = limits[0]["pair_bytes"]

    def row(what: str, cores: int, rate: dict[str, Any], answers: Sequence[Answer]) -> dict[str, Any]:
        return {
            "what": what,
            "cores": cores,
            **rate,
            "per_core": rate["rate"] / cores,
            "share": rate["rate"] / (cores * bare["rate"]),
            "pair_kb": size / 1e3,
            "mb_per_second": rate["rate"] * size / 1e6,
            "cores_busy": middle([answer["cores_busy"] for answer in answers if "cores_busy" in answer]),
            "memory_mb": max(answer["memory"] for answer in answers) / 1e6,
        }

    rows = [row("limit: bare decoding on 1", 1, bare, limits)]
    for cores, answers in zip(counts, found, strict=True):
        rate = over_rounds("rate", [answer["rate"] for answer in answers])
        rows.append(row(str(cores), cores, rate, answers))
        rows[-1]["speed_up"] = ratio(rate["rate"], rows[1]["rate"] / rows[1]["cores"])
    return rows


def disk_rates(answers: Sequence[Answer]) -> list[dict[str, Any]]:
    """Rows of reads of dropped pages and of pages in memory."""
    rows = []
    for kind, words in (("cold", "dropped from memory first"), ("warm", "in memory")):
        known = [answer for answer in answers if answer[kind] is not None]
        rate = over_rounds("rate", [answer[kind] for answer in known]) if known else {"rate": None}
        size = over_rounds("mb_per_second", [answer[f"{kind}_bytes"] / 1e6 for answer in known]) if known else {}
        rows.append({"what": words, "kind": kind, **size, **rate})
    return rows


def about(shards: ShardDataset) -> str:
    size = sum(shard.bytes for shard in shards.info.shards)
    height, width = shards.size
    return f"{len(shards):,} pairs of {height}x{width}, {in_words(size)}, depth as {shards.manifest.codec}"


def judge(
    options: Config, shards: ShardDataset, table: Sequence[dict[str, Any]], reads: Sequence[dict[str, Any]]
) -> tuple[str, str]:
    """-> what limits the loader, and what to change."""
    _, *rows = table
    best = max(rows, key=lambda row: row["rate"])
    cores = f"{best['cores']} core{'s' if best['cores'] > 1 else ''}"
    waits = f"a device that takes more than {best['rate']:,.0f} images/s waits"
    cold = reads[0]["rate"]
    size = sum(shard.bytes for shard in shards.info.shards)
    if cold is not None and cold < best["rate"]:
        what = (
            f"the disk, {cold:,.0f} pairs/s where they are not in memory, {best['rate']:,.0f} on {cores} where they are"
        )
        if size < free_memory() / 2:
            return (
                f"{what}; {waits}",
                f"nothing for long runs: all {in_words(size)} stay in memory after the first epoch",
            )
        return f"{what}; {waits}", "a local or faster disk (for shards of a server: --data.cache), or smaller shards"
    tips = []
    if best["cores"] < rows[-1]["cores"]:
        tips.append(f"--data.threads {best['cores']}: more only get in the way of one another")
    elif options.data.threads < best["cores"]:
        tips.append(f"--data.threads {best['cores']} instead of {options.data.threads}, with one rank")
    height, width = options.data.size or shards.size
    if height * width < shards.size[0] * shards.size[1]:
        tips.append(f"shards packed at training size (mde_dist.shard --size {height}x{width})")
    if shards.manifest.codec == "png":
        tips.append("shards packed without PNG, which takes longest to decode")
    if rows[0]["cores"] == 1 and rows[0]["cores_busy"] < _BUSY:  # of more, threads may wait for one another
        what = f"other work on these cores: of one, the loader had {rows[0]['cores_busy']:.0%}"
        return f"{what}; {waits}", "again on a machine, or in a job, that has its cores for itself"
    if best["share"] < _LOW_SHARE:
        what = f"the work around the decoders, which leaves {best['share']:.0%} of their rate on {cores}"
        return f"{what}; {waits}", ", ".join([*tips, "larger pairs or fewer cores per rank"])
    what = f"decoding, {best['rate']:,.0f} pairs/s on {cores}, {best['share']:.0%} of what bare decoders give"
    return f"{what}; {waits}", ", ".join([*tips, "more cores per device"])


def free_memory() -> int:
    """Bytes that files could take up in memory."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text("utf-8").splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, ValueError, KeyError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
