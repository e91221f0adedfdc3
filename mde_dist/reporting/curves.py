"""Runs -> the curves of their report: what is drawn against what, with gaps where there is nothing and nowhere else."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

from mde_dist.evaluation.metrics import HIGHER_IS_BETTER, PROTOCOLS
from mde_dist.reporting.history import Line, Run, RunPoint
from mde_dist.training.config import LossConfig
from mde_dist.training.losses import UNITS

MOST_POINTS = 600
"""Most points of a curve; more are drawn as means of equally many lines in turn, with a band from the least to the
greatest."""
Pair = tuple[float, float | None]
"""Position, and the value there; None = not finite."""


@dataclass(frozen=True)
class Point:
    x: float
    y: float
    low: float
    high: float
    """Least and greatest of the values that `y` is the mean of."""


@dataclass(frozen=True)
class Curve:
    """Curve of one run in a chart."""

    run: int
    """Index among the runs of the page, which decides its colour."""
    name: str
    stretches: Sequence[Sequence[Point]]
    """Points that a line joins; between two stretches there is none."""
    lost: int
    """Values that were not finite."""

    @property
    def points(self) -> list[Point]:
        return [point for stretch in self.stretches for point in stretch]


@dataclass(frozen=True)
class RestartMarker:
    """A start of a run after the first one."""

    x: float
    run: int
    text: str


@dataclass(frozen=True)
class Chart:
    """Values of runs over samples seen, or over time."""

    title: str
    unit: str
    over: Literal["samples", "time"]
    curves: Sequence[Curve]
    references: Sequence[tuple[str, float]] = ()
    """Name and value of what is the same all along."""
    marks: Sequence[RestartMarker] = ()
    better: Literal["", "lower", "higher"] = ""
    log: bool = False
    from_zero: bool = False
    percent: bool = False
    """Values are shares."""
    dots: bool = False
    """Each point is worth seeing, as an evaluation is."""


@dataclass(frozen=True)
class _Kind:
    """A value of the lines about steps."""

    value: str
    title: str
    unit: str = ""
    log: bool = False
    """On a logarithmic scale where the values span much; otherwise from 0 on, as all others."""
    percent: bool = False


_TRAINING = (
    _Kind("lr", "Learning rate"),
    _Kind("grad_norm", "Gradient norm", log=True),
)
_SPEED = (
    _Kind("images_per_second", "Throughput", "images/s"),
    _Kind("data_wait", "Waiting for data", "share of the time", percent=True),
    _Kind("memory_gb", "Memory per device, peak", "GB"),
    _Kind("mfu", "Use of the device (MFU)", "share of its peak", percent=True),
)
_MUCH = 8.0


def score_charts(runs: Sequence[RunPoint], protocol: str) -> list[Chart]:
    """One chart per metric of evaluations under one protocol. `runs`: with their indices on the page."""
    first = ("abs_rel", "delta1", "rmse")
    metrics = [name for name in first if name in PROTOCOLS[protocol].metrics]
    metrics += [name for name in PROTOCOLS[protocol].metrics if name not in first]
    charts = (_score_chart(runs, metric) for metric in metrics)
    return [chart for chart in charts if any(curve.stretches for curve in chart.curves)]


def _score_chart(runs: Sequence[RunPoint], metric: str) -> Chart:
    curves = [_curve(index, run, run.evaluations, metric, _samples) for index, run in runs]
    return Chart(
        *(metric, _UNITS.get(metric, ""), "samples", curves, _references([run for _, run in runs], metric)),
        better="higher" if metric in HIGHER_IS_BETTER else "lower",
        dots=True,
    )


_UNITS = {"rmse": "m", "sq_rel": "m"}


def _references(runs: Sequence[Run], metric: str) -> list[tuple[str, float]]:
    """Scores of the constant baselines; once where runs agree on it."""
    found: dict[tuple[str, float], list[str]] = {}
    for run in runs:
        for line in run.baselines:
            if metric in line.values:
                found.setdefault((line.kind, line.values[metric]), []).append(run.name)
    return [
        (name if len(owners) == len(runs) else f"{name} ({', '.join(owners)})", value)
        for (name, value), owners in found.items()
    ]


def training_charts(runs: Sequence[RunPoint]) -> list[Chart]:
    """Loss, learning rate and gradient norm over samples seen. Losses of two kinds have a chart each."""
    by_loss: dict[tuple[str, str], list[RunPoint]] = {}
    for index, run in runs:
        by_loss.setdefault(_loss_of(run), []).append((index, run))
    charts = []
    for (words, unit), same in by_loss.items():
        title = "Training loss" if len(by_loss) == 1 else f"Training loss ({words})"
        charts += _step_charts(same, [_Kind("loss", title, unit, log=True)], "samples")
    return charts + _step_charts(runs, _TRAINING, "samples")


def _loss_of(run: Run) -> tuple[str, str]:
    """The loss of a run in words, and its unit. A config from before a field has its default."""
    kind, focus, gradient = (
        run.config.get(f"loss.{name}", getattr(LossConfig, name))
        for name in ("kind", "silog_lambda", "gradient_weight")
    )
    words = f"{kind}, focus {focus}" if kind == "silog" else str(kind)
    return (f"{words}, gradient {gradient}", "") if gradient else (words, UNITS.get(str(kind), ""))


def speed_charts(runs: Sequence[RunPoint]) -> list[Chart]:
    """Throughput, wait for data and memory, over samples seen and then over time."""
    over_samples = _step_charts(runs, _SPEED, "samples")
    return over_samples + _step_charts([(index, run) for index, run in runs if run.starts], _SPEED, "time")


def _step_charts(runs: Sequence[RunPoint], kinds: Iterable[_Kind], over: Literal["samples", "time"]) -> list[Chart]:
    marks = [mark for index, run in runs for mark in restarts(index, run, over)]
    charts = []
    for kind in kinds:
        curves = [
            _curve(index, run, run.steps, kind.value, time_in_training(run) if over == "time" else _samples)
            for index, run in runs
        ]
        values = [point.y for curve in curves for point in curve.points]
        if values:
            log = kind.log and min(values) > 0 and max(values) / min(values) > _MUCH
            look = {"log": log, "from_zero": not log, "percent": kind.percent}
            charts.append(Chart(kind.title, kind.unit, over, curves, (), marks, "", **look))
    return charts


def _curve(
    index: int, run: Run, lines: Sequence[Line], value: str, where: Callable[[Line], tuple[int, float | None]]
) -> Curve:
    """`where`: a line -> the stretch that it belongs to, and its index along the chart."""
    known = [(where(line), line.values.get(value)) for line in lines]
    pairs = [(stretch, (x, y)) for (stretch, x), y in known if x is not None]
    groups = [[pair for _, pair in group] for _, group in groupby(pairs, key=lambda item: item[0])]
    if not any(y is not None for group in groups for _, y in group):
        return Curve(index, run.name, [], 0)
    return Curve(index, run.name, downsample(groups), sum(y is None for group in groups for _, y in group))


def downsample(groups: Sequence[Sequence[Pair]]) -> list[list[Point]]:
    """Values along a chart, in groups that no line joins -> at most about MOST_POINTS points, in stretches."""
    size = max(1, -(-sum(map(len, groups)) // MOST_POINTS))
    stretches: list[list[Point]] = []
    for group in groups:
        stretches.append([])
        for begin in range(0, len(group), size):
            finite = [(x, y) for x, y in group[begin : begin + size] if y is not None]
            if finite:
                xs, ys = zip(*finite, strict=True)
                stretches[-1].append(Point(math.fsum(xs) / len(xs), math.fsum(ys) / len(ys), min(ys), max(ys)))
            else:
                stretches.append([])
    return [stretch for stretch in stretches if stretch]


def _samples(line: Line) -> tuple[int, float | None]:
    return 0, line.samples


def time_in_training(run: Run) -> Callable[[Line], tuple[int, float | None]]:
    """A line -> its start of the run, and the seconds of training until then: pauses between two starts are left out,
    and so is work that was lost with them."""
    begun, sums = [began for began, _ in run.spans()], _sums(run)

    def where(line: Line) -> tuple[int, float | None]:
        if line.time is None or not begun:
            return line.attempt, None
        return line.attempt, sums[line.attempt] + max(0.0, line.time - begun[line.attempt])

    return where


def _sums(run: Run) -> list[float]:
    """Seconds in training before each start, and at last in all."""
    sums = [0.0]
    for began, ended in run.spans():
        sums.append(sums[-1] + ended - began)
    return sums


def restarts(index: int, run: Run, over: Literal["samples", "time"]) -> list[RestartMarker]:
    """Positions at which the run was resumed after a stop; a start without progress is left out."""
    spans, sums = run.spans(), _sums(run)
    return [
        RestartMarker(
            start.samples if over == "samples" else sums[number],
            index,
            f"{run.name}: went on at sample {start.samples:,}, "
            f"{duration(max(0.0, start.time - spans[number - 1][1]))} after the last line before",
        )
        for number, start in enumerate(run.starts)
        if number and start.samples < run.samples
    ]


def duration(seconds: float) -> str:
    """Format a duration in the two largest units."""
    whole = round(seconds)
    for unit, size, below, least in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if whole >= size:
            rest = whole % size // least
            return f"{whole // size} {unit}" + (f" {rest} {below}" if rest else "")
    return f"{whole} s"
