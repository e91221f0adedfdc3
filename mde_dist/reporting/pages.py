"""The parts of a report -> one HTML page that needs nothing else: no network, and no script but its own."""

import base64
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from mde_dist import __version__
from mde_dist.evaluation.metrics import PROTOCOLS
from mde_dist.evaluation.results import short_hash
from mde_dist.reporting import tables
from mde_dist.reporting.axes import Axis
from mde_dist.reporting.curves import Chart, score_charts, speed_charts, training_charts
from mde_dist.reporting.extremes import BestWorst, extremes
from mde_dist.reporting.history import Run, RunPoint
from mde_dist.reporting.panels import SnapshotSeries, bars, films
from mde_dist.reporting.plots import SIZE, BarPlot, Plot, plot
from mde_dist.reporting.styles import style
from mde_dist.reporting.where import HeatMap, breakdown_of, distance_plots, heat_maps
from mde_dist.utils.errors import UserError
from mde_dist.utils.paths import command_line

_FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Group:
    """Runs that were scored on the same images under the same protocol: only these share a chart of scores."""

    title: str
    """Title that names the runs and their protocol; empty where there is one group only."""
    runs: Sequence[RunPoint]
    metrics: Sequence[str]
    """Metrics of the protocol."""
    scores: Sequence[tables.Score]
    plots: Sequence[Plot]
    distance: Sequence[BarPlot]
    heat: tuple[Sequence[HeatMap], Axis] | None
    scenes: tables.Scenes | None
    images: tables.ImageTable | None


@dataclass
class Report:
    """Content of the page."""

    runs: Sequence[Run]
    groups: Sequence[Group]
    films: Sequence[SnapshotSeries]
    training: Sequence[Plot]
    speed: Sequence[Plot]
    clock: Sequence[Plot]
    """The same over time."""
    extremes: Sequence[tuple[int, Run, BestWorst]]
    missing: list[str] = field(default_factory=list)
    """Lines about what the page leaves out, and why."""


def groups_of(runs: Sequence[Run]) -> list[list[RunPoint]]:
    """Runs by what they were scored by; those that were not scored yet are in none."""
    found: dict[tuple[Any, ...], list[RunPoint]] = {}
    for index, run in enumerate(runs):
        if run.last is not None:
            mark = short_hash(run.fingerprint) if run.fingerprint else run.manifest("eval_manifest")
            found.setdefault((run.protocol, run.last.values.get("images"), mark), []).append((index, run))
    return list(found.values())


def charts_of(runs: Sequence[Run]) -> tuple[list[Chart], list[Chart]]:
    """Charts of how well runs learn, and of how fast, to be drawn as PNG files."""
    scores = [chart for group in groups_of(runs) for chart in score_charts(group, str(group[0][1].protocol))]
    return scores + training_charts(list(enumerate(runs))), speed_charts(list(enumerate(runs)))


def collect(runs: Sequence[Run]) -> Report:
    """Collect the content of the page: read the runs, and predict where shards and weights can be read."""
    members = groups_of(runs)
    speed = speed_charts(list(enumerate(runs)))
    report = Report(
        runs=runs,
        groups=[_group(group, len(members) > 1) for group in members],
        films=films(runs),
        training=[plot(chart) for chart in training_charts(list(enumerate(runs)))],
        speed=[plot(chart) for chart in speed if chart.over == "samples"],
        clock=[plot(chart) for chart in speed if chart.over == "time"],
        extremes=[],
    )
    found = []
    for index, run in enumerate(runs):
        who = f"{run.name}: " if len(runs) > 1 else ""
        report.missing += [who + note for note in (*run.notes, *_lacking(run))]
        if run.record is not None:
            try:
                found.append((index, run, extremes(run)))
            except UserError as error:
                report.missing.append(f"{who}no pictures of its best and worst images: {error}")
    report.extremes = found
    return report


def _lacking(run: Run) -> Iterator[str]:
    """Lines about what a run does not tell, by design of an older version or because it just began."""
    if not run.evaluations:
        yield "not evaluated yet: no scores"
    elif run.snapshots is None:
        yield "no pictures of held-out images were kept while it trained"
    if not run.steps:
        yield "no step was logged yet"
    elif not run.starts:
        yield "its lines have no times (an older version wrote them): nothing is drawn over time"


def _group(runs: Sequence[RunPoint], several: bool) -> Group:
    first = runs[0][1]
    protocol = str(first.protocol)
    broken_down = [(index, run.name, there) for index, run in runs if (there := breakdown_of(run)) is not None]
    names, mark = (
        ", ".join(run.name for _, run in runs),
        f", fingerprint {short_hash(first.fingerprint)}" if first.fingerprint else "",
    )
    title = f"{names}: {protocol} protocol{mark}"
    return Group(
        title if several else "",
        runs,
        PROTOCOLS[protocol].metrics,
        tables.scores(runs),
        [plot(chart) for chart in score_charts(runs, protocol)],
        distance_plots(broken_down) if broken_down else [],
        heat_maps(broken_down) if broken_down else None,
        tables.scene_table(runs),
        tables.image_table(runs),
    )


def render(report: Report, command: str) -> str:
    """`command`: what makes the page again."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER),
        autoescape=True,  # keys, scenes and paths come from files
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    runs, several = report.runs, len(report.runs) > 1
    styles = [style(number) for number in range(len(runs))]
    css = (_FOLDER / "style.css").read_text("utf-8") + environment.get_template("runs.css.j2").render(styles=styles)
    js = (_FOLDER / "script.js").read_text("utf-8")
    return environment.get_template("template.html.j2").render(
        **{"report": report, "runs": runs, "several": several, "places": list(enumerate(runs)), "styles": styles},
        **{"css": Markup(css), "js": Markup(js), "hashes": {"css": _csp_hash(css), "js": _csp_hash(js)}},
        **{"tables": tables, "bars": bars(), "size": SIZE, "version": __version__},
        title=f"{len(runs)} runs side by side" if several else runs[0].name,
        leads=[tables.headline(run) for run in runs],
        parts=list(_parts(report)),
        starts=[tables.starts(run) for run in runs],
        facts=tables.as_table([tables.run_info(run) for run in runs]),
        differing=tables.differing(runs),
        command=command,
        next_commands=list(next_commands(runs)),
    )


def _parts(report: Report) -> Iterator[tuple[str, str]]:
    """Anchor and name of the parts that the page has."""
    there = {
        ("scores", "Scores"): True,
        ("depth", "Depth"): report.films,
        ("curves", "Metrics"): any(group.plots for group in report.groups),
        ("training", "Training"): report.training,
        ("extremes", "Best and worst"): report.extremes,
        ("where", "Errors"): any(group.distance or group.heat or group.scenes for group in report.groups),
        ("images", "Images"): any(group.images for group in report.groups),
        ("run", "What was run"): True,
    }
    yield from (part for part, shown in there.items() if shown)


def _csp_hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def next_commands(runs: Sequence[Run]) -> Iterator[tuple[str, str]]:
    """Yield purpose and command."""
    for run in runs:
        who, its = (f" ({run.name})" if len(runs) > 1 else ""), ("--run", run.path)
        if not run.finished:
            words = ("--config", run.path / "config.toml", *its)  # which may have been moved
            yield f"go on{who}", command_line("train", *words, launcher="accelerate launch")
            continue
        yield f"score it{who}", command_line("evaluate", *its, "--protocols", "eigen", "full", "blog")
        yield f"use it{who}", command_line("predict", *its, "--output", "depth", then="IMAGE …")
        yield f"take it elsewhere{who}", command_line("export", *its, "--output", "model")
    records = [run.path / "evaluations/last.json" for run in runs if run.record is not None]
    if len(records) > 1:
        yield "tell whether they differ", command_line("evaluate", "--compare", *records[:2])
