"""All checks of a training in their order, the time that it will take, and the verdict."""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence

from accelerate import Accelerator
from rich.table import Table
from rich.text import Text

from mde_dist.distributed.environment import Ignored
from mde_dist.tools.diagnostics.data import check_samples, check_shards, judge_loader, measure_loader
from mde_dist.tools.diagnostics.machine import (
    check_clocks,
    check_devices,
    check_environment,
    check_minimums,
    check_open_files,
    check_scratch,
    check_versions,
)
from mde_dist.tools.diagnostics.panel import RankSurvey, Row
from mde_dist.tools.diagnostics.run_dir import check_cache, check_disk, check_run
from mde_dist.tools.diagnostics.step import Measured, check_divides, check_network, measure_step
from mde_dist.training.config import Config
from mde_dist.utils.console import open_console, say

_STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}
_WIDTH = 140  # columns of the table where it goes to a file, unless COLUMNS says otherwise


def examine(config: Config, accelerator: Accelerator, ignored: Sequence[Ignored]) -> tuple[list[Row], str]:
    """All checks, on all ranks -> the rows, and in words how long the training will take ("" where unknown).

    `ignored`: what was found in this rank's environment.
    """
    with progress_words(accelerator.is_main_process) as tell, contextlib.ExitStack() as opened:
        panel = RankSurvey(accelerator, tell)
        config = check_divides(panel, config)
        check_versions(panel)
        check_minimums(panel)
        check_environment(panel, ignored)
        check_devices(panel)
        check_clocks(panel)
        splits = check_shards(panel, config, opened)
        check_open_files(panel, sum(split.most_open for split in splits or ()))
        check_scratch(panel)
        start = check_run(panel, config, splits)
        speeds, batch = None, None
        if splits:
            if any(split.remote for split in splits):
                check_cache(panel, config.data.cache_options.directory.expanduser())
            check_samples(panel, config, splits)
            supply = measure_loader(panel, config, splits[0], start or 0)
            speeds, batch = supply.speeds, supply.batch
        size = config.data.size or (splits[0].size if splits else (240, 320))
        measured = measure_step(panel, config, size, batch)
        check_network(panel, measured)
        if splits and speeds and measured.whole:
            judge_loader(panel, config, splits[0], speeds, measured.whole)
        check_disk(panel, config, measured.checkpoint, refused=start is None)
        return panel.rows, duration(config, accelerator, measured, speeds, start or 0)


def duration(
    config: Config, accelerator: Accelerator, measured: Measured, speeds: Sequence[float] | None, start: int
) -> str:
    """`speeds`: images per second of the loader of each rank; `start`: samples that are done."""
    left = max(0, config.train.total_samples - start)
    if not measured.whole or not left:
        return "" if left else f"all {config.train.total_samples:,} samples are done"
    seconds = measured.whole / config.train.batch_size  # of an image, over all ranks
    if speeds:
        load = 1 / (min(speeds) * len(speeds))  # the ranks go at the pace of the slowest
        # a GPU computes while the CPU decodes; on a CPU both take their time from the same cores
        seconds = max(seconds, load) if accelerator.device.type != "cpu" else seconds + load
    minutes, rest = divmod(round(left * seconds), 60)
    hours, minutes = divmod(minutes, 60)
    clock = f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
    return f"{left:,} samples at {1 / seconds:.3g} images/s: about {clock} + evaluations"


@contextlib.contextmanager
def progress_words(speaks: bool) -> Iterator[Callable[[str], None]]:
    """Yields what shows the word that it is given until the next one comes; off a terminal, a line each."""
    console = open_console()
    if not speaks:
        yield lambda word: None
    elif console.is_terminal:
        with console.status("") as status:
            yield lambda word: status.update(Text(f"checking: {word}"))
    else:
        yield lambda word: say(f"checking: {word}")


def show(rows: Sequence[Row], estimate: str) -> None:
    """The table, what to expect, and the verdict in one line."""
    console = open_console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _WIDTH
    table = Table()
    for column in ("check", "result", "what was found", "what to do"):
        table.add_column(column)
    for row in rows:
        style = _STYLES[row.result]
        table.add_row(row.check, Text(row.result, style), row.found, row.advice)
    console.print(table)
    if estimate:
        say(estimate)
    say(verdict(rows))


def verdict(rows: Sequence[Row]) -> str:
    failed = [row.check for row in rows if row.result == "fail"]
    warned = [row.check for row in rows if row.result == "warn"]
    if failed:
        return f"not ready: {_count(failed, 'problem')} ({', '.join(failed)})"
    if warned:
        return f"ready, with {_count(warned, 'warning')} ({', '.join(warned)})"
    return "ready: nothing stands in the way"


def _count(names: Sequence[str], what: str) -> str:
    return f"{len(names)} {what}{'s' if len(names) > 1 else ''}"
