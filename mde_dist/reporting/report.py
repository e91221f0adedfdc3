"""Runs -> report.html and the pictures beside it."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mde_dist.reporting.figures import draw_charts
from mde_dist.reporting.history import Run, read_runs
from mde_dist.reporting.pages import Report, charts_of, collect, render
from mde_dist.reporting.panels import last_panels
from mde_dist.utils.console import say
from mde_dist.utils.errors import UserError
from mde_dist.utils.io import write_atomic, writing
from mde_dist.utils.paths import command_line
from mde_dist.utils.visualization import draw_panels, own_style

NAME = "report.html"


def scored_lines(run: Run) -> Iterator[dict[str, Any]]:
    """The lines of metrics.jsonl that hold scores."""
    for what, lines in (("baseline", run.baselines), ("evaluation", run.evaluations)):
        for line in lines:
            if {"abs_rel", "images"} <= line.values.keys():
                yield {what: line.kind, **line.values, "samples": line.samples, "images": int(line.values["images"])}


def draw_report(run: Path) -> list[Path]:
    """Draw the report of one run into its directory; returns the paths. Raises UserError."""
    return write_report(read_runs([run]))


def write_report(runs: Sequence[Run], output: Path | None = None, tell: Callable[[str], None] = say) -> list[Path]:
    """Write the page at `output` (see ReportCommand) and the pictures beside it; returns their paths.

    `tell` takes a line on each thing that the page leaves out. Raises UserError.
    """
    page = output or (runs[0].path / NAME if len(runs) == 1 else Path(NAME))
    if page.is_dir() or not page.absolute().parent.is_dir():
        raise UserError(f"--output {page}: must be the name of a file in a folder that is there")
    with own_style():  # the ticks of the page are matplotlib's, too
        report = collect(runs)
        for line in report.missing:
            tell(f"note: {line}")
        where = ("--output", output) if output else ()
        text = render(report, command_line("report", "--run", *(run.path for run in runs), *where))
        with writing(page):
            write_atomic(page, text)
            return [page, *draw_pictures(report, page)]


def draw_pictures(report: Report, page: Path) -> Iterator[Path]:
    """The PNG files beside the page."""
    prefix = "" if page.name == NAME else f"{page.stem}-"
    title = ", ".join(run.name for run in report.runs)
    for name, charts in zip(("curves", "speed"), charts_of(report.runs), strict=True):
        if charts:
            path = page.with_name(f"{prefix}{name}.png")
            draw_charts(path, charts, title)
            yield path
    panels = [panel for film in report.films for panel in last_panels(film)]
    if panels:
        path = page.with_name(f"{prefix}panels.png")
        draw_panels(path, panels, f"{title}: held-out images")
        yield path
