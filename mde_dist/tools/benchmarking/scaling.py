"""`bench scaling`: `bench train` on 1, 2, … ranks of this node, and what each one more brings."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from mde_dist.distributed.process_group import SEVERAL
from mde_dist.tools.benchmarking.loader import chosen_counts
from mde_dist.tools.benchmarking.pinned import own_environment
from mde_dist.tools.benchmarking.result import Column, Result, Table, Timing, cores_at_hand, cpu_name, plain_config
from mde_dist.training.config import Config, to_toml
from mde_dist.training.setup import check_batch
from mde_dist.utils.console import say
from mde_dist.utils.errors import UserError
from mde_dist.utils.paths import as_typed
from mde_dist.utils.user import temporary_folder

_WELL = 0.9  # efficiency from which on nothing needs to change


@dataclass(frozen=True)
class Own(Timing):
    ranks: tuple[int, ...] = ()
    """Numbers of ranks; none given = powers of two up to the GPUs, or without one up to the cores."""
    strong: bool = False
    """The same global batch on all numbers of ranks, in place of the same share per rank."""


@dataclass(frozen=True)
class Options(Config, Own):
    """Images a second on 1, 2, … ranks of this node, each number of them measured by `bench train` under `accelerate
    launch`. The most ranks train the config as it is, fewer of them with the same share per rank. Takes every option
    of mde_dist.train."""


COLUMNS = (
    Column("ranks", "ranks"),
    Column("batch", "global batch"),
    Column("rate", "images/s", ",.1f"),
    Column("spread", "rounds"),
    Column("speed_up", "speed-up", ".2f"),
    Column("efficiency", "efficiency", ".0%"),
    Column("ms", "ms/step", ",.1f"),
    Column("data_wait", "waits for data", ".1%"),
    Column("all_reduce_ms", "all-reduce ms", ",.1f"),
    Column("all_reduce_share", "of a step", ".0%"),
    Column("exposed", "not hidden", ".0%"),
)


def bench(options: Options) -> Result:
    """Raises UserError."""
    config, gpus = plain_config(options), torch.cuda.device_count()
    counts = chosen_counts(options.ranks, gpus or len(cores_at_hand()), "ranks")
    configs = [at_ranks(config, ranks, counts[-1], options.strong) for ranks in counts]
    rows, device = list[dict[str, Any]](), ""
    with tempfile.TemporaryDirectory(prefix="mde_dist-bench-", dir=temporary_folder()) as folder:
        for ranks, its in zip(counts, configs, strict=True):
            say(f"measuring {ranks} rank{'s' if ranks > 1 else ''}, batch {its.train.batch_size}")
            record = launched(its, ranks, options, Path(folder))
            device = record["machine"]["device"]
            rows.append(row(record["train"], rows[0] if rows else None))
    kind = "the same global batch" if options.strong else "the same share per rank"
    limit, advice = judge(rows, bool(gpus))
    where = f"{gpus} x {device}" if gpus else f"{cpu_name()}, {len(cores_at_hand())} cores"
    tables = {"scaling": Table(f"scaling: {kind}, {where}", COLUMNS, rows)}
    return Result("scaling", tables, limit, advice, where, config)


def at_ranks(config: Config, ranks: int, most: int, strong: bool) -> Config:
    """The config for so many ranks of `most`. Raises UserError where the batch does not divide."""
    check_batch(config, most)
    batch = config.train.batch_size if strong else config.train.batch_size // most * ranks
    its = replace(config, train=replace(config.train, batch_size=batch))
    check_batch(its, ranks)
    return its


def command(ranks: int, arguments: Sequence[str]) -> list[str]:
    """The line that starts `bench train` on so many ranks."""
    start = ["-m", "mde_dist.bench", "train", *arguments]
    if ranks == 1:
        return [sys.executable, *start]
    _, _, *shape = SEVERAL.format(n=ranks).split()
    shape = shape[: shape.index("-m")]
    # said, or accelerate asks its own config file; a free port, so that nothing beside it is in the way
    shape += ["--main_process_port", "0", "--mixed_precision", "no", "--dynamo_backend", "no"]
    return [sys.executable, "-m", "accelerate.commands.launch", *shape, *start]


def to_its_end(line: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(line, capture_output=True, encoding="utf-8", errors="replace", env=own_environment())


def launched(config: Config, ranks: int, options: Options, folder: Path) -> dict[str, Any]:
    """What `bench train` found. Raises UserError where it failed."""
    told, found = folder / f"{ranks}.toml", folder / f"{ranks}.json"
    told.write_text(to_toml(replace(config, debug=False, debug_from=None)), "utf-8")
    arguments = ["--config", as_typed(told), "--json", as_typed(found)]
    arguments += ["--seconds", str(options.seconds), "--rounds", str(options.rounds)]
    done = to_its_end(command(ranks, arguments))
    if done.returncode or not found.is_file():
        said = [line for line in done.stderr.splitlines() if line.strip()]
        error = next((line for line in said if line.startswith("error")), said[-1] if said else "no word")
        raise UserError(
            f"bench train, ranks {ranks}, ended with exit code {done.returncode}: {error.removeprefix('error: ')}"
        )
    return json.loads(found.read_text("utf-8"))


def row(measured: Sequence[dict[str, Any]], base: dict[str, Any] | None) -> dict[str, Any]:
    """From the rows of `bench train`: those of training, and what more ranks than the fewest bring."""
    both, steps, *rest = measured
    ranks = both["ranks"]
    least = base or {"ranks": ranks, "rate": both["rate"]}
    speed_up = both["rate"] / least["rate"] * least["ranks"]
    keys = (
        "ranks",
        "batch",
        "rate",
        "spread",
        "ms",
        "data_wait",
        "all_reduce_ms",
        "all_reduce_share",
        "cpu",
        "memory_gb",
    )
    found = {key: both[key] for key in keys}
    found |= {"speed_up": speed_up, "efficiency": speed_up / ranks, "loader_rate": rest[-1]["rate"]}
    found["exposed"] = max(0.0, 1 - rest[0]["ms"] / steps["ms"]) if len(rest) > 1 else None
    return found | {"train": list(measured)}


def judge(rows: Sequence[dict[str, Any]], gpus: bool) -> tuple[str, str]:
    """-> what limits more ranks, and what to change."""
    fewest, most = rows[0], rows[-1]
    ranks = most["ranks"]
    if len(rows) == 1:
        return f"not known from {ranks} rank{'s' if ranks > 1 else ''} alone", "--ranks 1 2, where there are so many"
    against = f"that of {fewest['ranks']}" if fewest["ranks"] > 1 else "one"
    gain = most["rate"] / fewest["rate"]
    what = f"{ranks} ranks do {gain:.2f} times the images/s of {against}, efficiency {most['efficiency']:.0%}"
    if not gpus:
        return f"the cores, which all ranks share on a CPU: {what}", "a device per rank: this says nothing about those"
    if most["efficiency"] >= _WELL:
        return f"hardly anything: {what}", ""
    if most["data_wait"] > max(0.02, most["exposed"] or 0.0):
        return (
            f"the loaders, {most['data_wait']:.0%} of the time a device waits: {what}",
            "python -m mde_dist.bench loader",
        )
    advice = "a larger --train.batch-size or --train.grad-accum-steps, a faster link between the devices"
    advice += " (nvidia-smi topo -m)"
    return f"summing gradients, {most['exposed'] or 0:.0%} of a step: {what}", advice
