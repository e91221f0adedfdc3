"""`bench scaling`: `bench train` on 1, 2, … ranks of this node, and the gain of each one more."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from mde_dist.distributed.process_group import SEVERAL
from mde_dist.tools.benchmarking.harness import (
    Column,
    Result,
    Table,
    Timing,
    available_cores,
    chosen_counts,
    cpu_name,
    train_config,
)
from mde_dist.training.config import Config, to_toml
from mde_dist.training.setup import check_batch
from mde_dist.utils.console import say
from mde_dist.utils.errors import UserError
from mde_dist.utils.paths import as_typed
from mde_dist.utils.user import temporary_folder

_WELL = 0.9  # efficiency from which on nothing needs to change
_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")  # variables of a launcher around this process


@dataclass(frozen=True)
class _Own(Timing):
    ranks: tuple[int, ...] = ()
    """Numbers of ranks; none given = powers of two up to the GPUs, or without one up to the cores."""


@dataclass(frozen=True)
class Options(Config, _Own):
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


def measure(options: Options) -> Result:
    """Raises UserError."""
    config, gpus = train_config(options), torch.cuda.device_count()
    counts = chosen_counts(options.ranks, gpus or len(available_cores()), "ranks")
    configs = [at_ranks(config, ranks, counts[-1]) for ranks in counts]
    rows, device = list[dict[str, Any]](), ""
    with tempfile.TemporaryDirectory(prefix="mde_dist-bench-", dir=temporary_folder()) as folder:
        for ranks, its in zip(counts, configs, strict=True):
            say(f"measuring {ranks} rank{'s' if ranks > 1 else ''}, batch {its.train.batch_size}")
            record = launch(its, ranks, options, Path(folder))
            device = record["machine"]["device"]
            rows.append(scaling_row(record["train"], rows[0] if rows else None))
    limit, advice = diagnose(rows, bool(gpus))
    where = f"{gpus} x {device}" if gpus else f"{cpu_name()}, {len(available_cores())} cores"
    return Result(
        "scaling",
        {"scaling": Table(f"scaling: the same share per rank, {where}", COLUMNS, rows)},
        limit,
        advice,
        where,
        config,
    )


def at_ranks(config: Config, ranks: int, most: int) -> Config:
    """The config for so many ranks of `most`. Raises UserError where the batch does not divide."""
    check_batch(config, most)
    batch = config.train.batch_size // most * ranks
    its = replace(config, train=replace(config.train, batch_size=batch), debug=False, debug_from=None)
    check_batch(its, ranks)
    return its


def command_line(ranks: int, arguments: Sequence[str]) -> list[str]:
    """Command that starts `bench train` on so many ranks."""
    start = ["-m", "mde_dist.bench", "train", *arguments]
    if ranks == 1:
        return [sys.executable, *start]
    _, _, *shape = SEVERAL.format(n=ranks).split()
    shape = shape[: shape.index("-m")]
    # said, or accelerate asks its own config file; a free port, so that nothing beside it is in the way
    shape += ["--main_process_port", "0", "--mixed_precision", "no", "--dynamo_backend", "no"]
    return [sys.executable, "-m", "accelerate.commands.launch", *shape, *start]


def run_to_end(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if name not in _LAUNCHER}
    return subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", env=env)


def launch(config: Config, ranks: int, options: Options, folder: Path) -> dict[str, Any]:
    """Run `bench train` -> its JSON. Raises UserError where it failed."""
    told, found = folder / f"{ranks}.toml", folder / f"{ranks}.json"
    told.write_text(to_toml(config), "utf-8")
    arguments = ["--config", as_typed(told), "--json", as_typed(found)]
    arguments += ["--seconds", str(options.seconds), "--rounds", str(options.rounds)]
    done = run_to_end(command_line(ranks, arguments))
    if done.returncode or not found.is_file():
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        error = next((line for line in lines if line.startswith("error")), lines[-1] if lines else "no word")
        failed = f"bench train, ranks {ranks}, ended with exit code {done.returncode}"
        raise UserError(f"{failed}: {error.removeprefix('error: ')}")
    return json.loads(found.read_text("utf-8"))


def scaling_row(measured: Sequence[dict[str, Any]], base: dict[str, Any] | None) -> dict[str, Any]:
    """Row of one number of ranks, from the rows of `bench train`. `base`: row of the fewest ranks."""
    both, steps, *rest = measured
    base = base or both
    shown = [column.key for column in COLUMNS if column.key in both]
    row = {key: both[key] for key in (*shown, "cpu", "memory_gb")} | {"loader_rate": rest[-1]["rate"]}
    row["speed_up"] = both["rate"] / base["rate"] * base["ranks"]
    row["efficiency"] = row["speed_up"] / both["ranks"]
    row["exposed"] = max(0.0, 1 - rest[0]["ms"] / steps["ms"]) if len(rest) > 1 else None
    return row | {"train": list(measured)}


def diagnose(rows: Sequence[dict[str, Any]], gpus: bool) -> tuple[str, str]:
    """-> the bottleneck of more ranks, advice."""
    fewest, most = rows[0], rows[-1]
    ranks = most["ranks"]
    if len(rows) == 1:
        return f"not known from {ranks} rank{'s' if ranks > 1 else ''} alone", "--ranks 1 2, where there are so many"
    against = f"that of {fewest['ranks']}" if fewest["ranks"] > 1 else "one"
    gain = most["rate"] / fewest["rate"]
    facts = f"{ranks} ranks do {gain:.2f} times the images/s of {against}, efficiency {most['efficiency']:.0%}"
    if not gpus:
        return f"the cores, which all ranks share on a CPU: {facts}", "a device per rank: this says nothing about those"
    if most["efficiency"] >= _WELL:
        return f"hardly anything: {facts}", ""
    if most["data_wait"] > max(0.02, most["exposed"] or 0.0):
        limit = f"the loaders, {most['data_wait']:.0%} of the time a device waits: {facts}"
        return limit, "python -m mde_dist.bench loader"
    fewer = "a larger --train.batch-size or --train.grad-accum-steps"
    limit = f"summing gradients, {most['exposed'] or 0:.0%} of a step: {facts}"
    return limit, f"{fewer}, a faster link between the devices (nvidia-smi topo -m)"
