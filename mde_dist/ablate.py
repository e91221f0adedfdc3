"""A table of trainings, rows x seeds, that runs by itself -> what each row scores and costs, as table and picture.

    python -m mde_dist.ablate TABLE.toml --output DIR [--jobs N] [--processes P] [--part K/N]

The file names a config for all rows, and what each row changes:

    base = "strong.toml"              # config file beside this one; its values are where every row begins
    seeds = [0, 1, 2]                 # trainings of each row
    [common]                          # of all rows, over the base
    data.shards = "shards/nyuv2"
    train.total_samples = 12_000
    [rows.strong]                     # in this order; the others are held against the first one
    [rows."no average"]
    optim.ema_samples = 0
    [rows.seed]
    base = "seed.toml"                # a row may begin elsewhere

Each training is an ordinary run, DIR/ROW/seed-N, and is scored once, at its end. Whatever is chosen by a table is
chosen on data.eval_split, so name one that is not the test split for choosing. Run again, the command goes on: what is
finished stays, what was begun is taken up again.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from mde_dist.distributed.signals import PreemptionHandler
from mde_dist.utils.cli import Part, option, parse, run_command
from mde_dist.utils.console import open_console, say
from mde_dist.utils.errors import UserError
from mde_dist.utils.io import writing
from mde_dist.utils.progress import clock_time, progress_bar

if TYPE_CHECKING:
    from mde_dist.tools.ablation.runs import Work
    from mde_dist.tools.ablation.table import Table, Training


@dataclass(frozen=True)
class AblateCommand:
    """Train every row of a table with every seed, and say what each row scores, with intervals, and costs."""

    table: tyro.conf.Positional[Path | None] = None
    """TOML file: `base` (a config file), `seeds`, [common] and [rows.NAME]; `base` may be a row's own. Each
    training is evaluated once, at its end: train.evaluate_every is set to train.total_samples."""
    output: Path | None = None
    """Directory of all runs, and of table.md, table.json and table.png, which are written anew after each training."""
    jobs: int | None = option(None, low=1, high=1024)
    """Trainings side by side; None = as many as there are GPUs for, one on a CPU. More than that share the GPUs, which
    small models do not fill by themselves; on a CPU they share its cores."""
    processes: int = option(1, low=1, high=1024)
    """Ranks of each training, one per GPU; on a CPU over gloo."""
    part: Part | None = None
    """Train only every N-th training from the K-th on (K from 0): for job arrays, and several nodes. When all parts are
    done, the same command without --part writes the table."""


def main(argv: list[str]) -> None:
    command = parse(AblateCommand, argv, "python -m mde_dist.ablate")
    if command.table is None or command.output is None:
        raise UserError("name what to train, and where: python -m mde_dist.ablate TABLE.toml --output DIR (see --help)")
    # imported here: torch takes seconds and hundreds of megabytes, which --help and a wrong option do without
    from mde_dist.tools.ablation.runs import Work, check_devices, default_jobs
    from mde_dist.tools.ablation.table import check_begun, read_table

    jobs = default_jobs(command.processes) if command.jobs is None else command.jobs
    check_devices(command.processes)
    table = read_table(command.table, command.output)
    for training in table.trainings:
        check_begun(training)
    with writing(command.output):
        command.output.mkdir(parents=True, exist_ok=True)
    trainings = table.trainings
    if command.part:
        trainings = trainings[command.part[0] :: command.part[1]]
    work = Work(trainings, command.processes, jobs)
    stop = PreemptionHandler()
    with stop.install():
        train(work, table, None if command.part else command.output, stop)
    if stop.signal is not None:
        say("stopped by a signal; the same command goes on from there")
        sys.exit(128 + int(stop.signal))
    finish(work, table, command, command.output)


def train(work: "Work", table: "Table", output: Path | None, stop: PreemptionHandler) -> None:
    """Run what is not finished, and keep table and picture in `output`, if any, up to date."""
    from mde_dist.tools.ablation import report
    from mde_dist.tools.ablation.numbers import gather
    from mde_dist.tools.ablation.runs import run_all

    left = [training for training in work.trainings if not training.finished]
    say(
        f"{len(table.rows)} rows, {len(work.trainings)} trainings, {len(work.trainings) - len(left)} of them finished; "
        f"{work.jobs} side by side with {work.processes} {'rank' if work.processes == 1 else 'ranks'} each"
    )
    began = time.monotonic()

    def ended(training: "Training") -> None:
        tell_ended(training, work, time.monotonic() - began)
        if output and (found := gather(table)):
            report.write(found, table, work.failed, output)

    with progress_bar(open_console(), "training", "samples") as progress:
        run_all(work, stop, progress, ended)


def tell_ended(training: "Training", work: "Work", seconds: float) -> None:
    """Print a line about a training that has ended."""
    from mde_dist.tools.ablation.runs import log_of

    if training.name in work.failed:
        say(f"{training.name}: failed: {work.failed[training.name]}")
    elif training.finished:
        say(f"{training.name}: done after {clock_time(seconds)} in all; log: {log_of(training)}")


def finish(work: "Work", table: "Table", command: AblateCommand, output: Path) -> None:
    """Show what was found, and where it is. Exits with 1 where a training failed."""
    from mde_dist.tools.ablation import report
    from mde_dist.tools.ablation.numbers import gather

    if command.part:
        say(f"part {command.part[0]}/{command.part[1]} is done; without --part the table is written")
    elif found := gather(table):
        made = report.write(found, table, work.failed, output)
        report.show(found, table)
        for path in made:
            say(f"made: {path}")
    for name in work.elsewhere:
        say(f"{name}: another such command is at work at it")
    for name, why in work.failed.items():
        say(f"failed: {name}: {why}", file=sys.stderr)
    if work.failed:
        sys.exit(1)


if __name__ == "__main__":
    run_command(main)
