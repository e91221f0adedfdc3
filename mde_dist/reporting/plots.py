"""Charts -> where their lines, ticks and words lie, for the SVG of the template."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from mde_dist.reporting.axes import Axis, along_axis, linear, value_axis
from mde_dist.reporting.curves import Chart, Curve, Point, duration

WIDTH, HEIGHT = 360, 216
LEFT, RIGHT, TOP, BOTTOM = 50, 10, 12, 36
SIZE = {"width": WIDTH, "height": HEIGHT, "left": LEFT, "right": RIGHT, "top": TOP, "bottom": BOTTOM}
_MOST_DOTS = 60
_LETTER, _LINE = 6.4, 14.0
"""Width of a letter, about, and height of a line of text."""


@dataclass(frozen=True)
class Dot:
    x: float
    y: float
    text: str
    best: bool


@dataclass(frozen=True)
class Line:
    """A curve in pixels."""

    run: int
    line: str
    band: str
    dots: Sequence[Dot]


@dataclass(frozen=True)
class Reference:
    """A line across the chart, and its name, which begins or ends at a side."""

    y: float
    name: str
    name_y: float
    at_end: bool


@dataclass(frozen=True)
class Plot:
    """A chart in pixels, (0, 0) at the top left."""

    chart: Chart
    along: str
    x_ticks: Sequence[tuple[float, str]]
    y_ticks: Sequence[tuple[float, str]]
    strokes: Sequence[Line]
    references: Sequence[Reference]
    marks: Sequence[tuple[float, int, str]]
    summary: str
    """Summary of the plot in words."""
    data: Mapping[str, Any]
    """Data for the script that tells the values under the pointer."""


def plot(chart: Chart) -> Plot:
    (x_axis, along), y_axis = along_axis(chart), value_axis(chart)
    return Plot(
        chart,
        along,
        [(_x(x_axis, value), text) for value, text in x_axis.ticks],
        [(_y(y_axis, value), text) for value, text in y_axis.ticks],
        [_stroke(chart, curve, x_axis, y_axis) for curve in chart.curves],
        _references(chart, x_axis, y_axis),
        [(_x(x_axis, mark.x), mark.run, mark.text) for mark in chart.marks],
        summary(chart),
        _data(chart, x_axis, y_axis),
    )


def _x(axis: Axis, value: float) -> float:
    return round(LEFT + axis.share(value) * (WIDTH - LEFT - RIGHT), 1)


def _y(axis: Axis, value: float) -> float:
    return round(HEIGHT - BOTTOM - axis.share(value) * (HEIGHT - BOTTOM - TOP), 1)


def _stroke(chart: Chart, curve: Curve, x_axis: Axis, y_axis: Axis) -> Line:
    line, band = [], []
    for stretch in curve.stretches:
        spots = [f"{_x(x_axis, point.x)} {_y(y_axis, point.y)}" for point in stretch]
        line.append("M" + "L".join(spots) + ("h0" if len(spots) == 1 else ""))
        if any(point.high > point.low for point in stretch):
            upper = [f"{_x(x_axis, point.x)} {_y(y_axis, point.high)}" for point in stretch]
            lower = [f"{_x(x_axis, point.x)} {_y(y_axis, point.low)}" for point in reversed(stretch)]
            band.append("M" + "L".join(upper + lower) + "z")
    best, crowded = best_of(chart, curve), len(curve.points) > _MOST_DOTS
    points = [point for point in curve.points if chart.dots and (point.x == best or not crowded)]
    dots = [
        Dot(
            *(_x(x_axis, point.x), _y(y_axis, point.y)),
            f"{curve.name}: {chart.title} {point.y:.4f} after {point.x:,.0f} samples",
            best=point.x == best,
        )
        for point in points
    ]
    return Line(curve.run, "".join(line), "".join(band), dots)


def _references(chart: Chart, x_axis: Axis, y_axis: Axis) -> list[Reference]:
    """Their names stand above, or below where another line is near, at the side that the curves leave more room."""
    spots = [(_x(x_axis, p.x), _y(y_axis, p.y)) for curve in chart.curves for p in _dense(curve)]
    heights = [_y(y_axis, value) for _, value in chart.references]
    found = []
    for (name, _), y in zip(chart.references, heights, strict=True):
        name_y = y + 13 if any(y - _LINE < other < y for other in heights) else y - 4
        reach, middle = _LETTER * len(name), name_y - 4
        beside = [[abs(at - middle) for x, at in spots if x < LEFT + reach]]
        beside += [[abs(at - middle) for x, at in spots if x > WIDTH - RIGHT - reach]]
        left, right = (min(gaps, default=HEIGHT) for gaps in beside)
        found.append(Reference(y, name, name_y, right >= min(left, _LINE)))
    return found


def _dense(curve: Curve) -> Iterator[Point]:
    """Points along the lines of a curve, also where its own are far apart."""
    for stretch in curve.stretches:
        yield from stretch
        for one, other in pairwise(stretch):
            for share in (0.25, 0.5, 0.75):
                y = one.y + share * (other.y - one.y)
                yield Point(one.x + share * (other.x - one.x), y, y, y)


def best_of(chart: Chart, curve: Curve) -> float | None:
    """Position of the best value of a curve."""
    if not chart.better or not curve.points:
        return None
    sign = 1 if chart.better == "lower" else -1
    return min(curve.points, key=lambda point: sign * point.y).x


def summary(chart: Chart) -> str:
    """A chart in words, for those who do not see it."""
    unit = "" if chart.percent or not chart.unit else f" {chart.unit}"
    over = "samples seen" if chart.over == "samples" else "time in training"
    parts = [f"{chart.title} over {over}."]
    for curve in chart.curves:
        points = curve.points
        if not points:
            continue
        low, high = (end(points, key=lambda point: point.y) for end in (min, max))
        parts.append(
            f"{curve.name}: {_said(chart, points[0].y)}{unit} {_place(chart, points[0].x)}, "
            f"{_said(chart, points[-1].y)}{unit} {_place(chart, points[-1].x)}; "
            f"least {_said(chart, low.y)} {_place(chart, low.x)}, most {_said(chart, high.y)} {_place(chart, high.x)}."
            + (f" {curve.lost} values were not finite." if curve.lost else "")
        )
    parts += [f"{name}: {_said(chart, value)}." for name, value in chart.references]
    return " ".join(parts + [f"{mark.text}." for mark in chart.marks])


def _said(chart: Chart, value: float) -> str:
    return f"{100 * value:.3g}%" if chart.percent else f"{value:.4g}"


def _place(chart: Chart, x: float) -> str:
    return f"at {x:,.0f}" if chart.over == "samples" else f"after {duration(x)}"


def _data(chart: Chart, x_axis: Axis, y_axis: Axis) -> dict[str, Any]:
    """`points`: [x, value, its height in pixels] of each point, null where no line joins two."""
    curves = []
    for curve in chart.curves:
        points: list[list[float] | None] = []
        for stretch in curve.stretches:
            points += [None] if points else []
            points += [[_digits(p.x), _digits(p.y), _y(y_axis, p.y)] for p in stretch]
        curves.append({"run": curve.run, "name": curve.name, "points": points})
    return {
        **{"title": chart.title, "over": chart.over, "percent": chart.percent},
        **{"end": x_axis.high, "curves": curves},
        "frame": [LEFT, WIDTH - RIGHT, TOP, HEIGHT - BOTTOM],
    }


def _digits(value: float) -> float:
    return float(f"{value:.6g}")


@dataclass(frozen=True)
class Bar:
    run: int | None
    """None where it is the same for all runs."""
    x: float
    y: float
    width: float
    height: float
    text: str


@dataclass(frozen=True)
class BarPlot:
    """Bars by distance, those of several runs beside each other."""

    title: str
    unit: str
    bars: Sequence[Bar]
    zero: float
    x_ticks: Sequence[tuple[float, str]]
    y_ticks: Sequence[tuple[float, str]]
    summary: str


def bar_plot(
    title: str,
    unit: str,
    edges: Sequence[float],
    columns: Sequence[tuple[int | None, str, Sequence[float | None]]],
    percent: bool = False,
) -> BarPlot | None:
    """`columns`: index and name of a run, and its value between each two edges. None where there is no value."""
    known = [value for _, _, values in columns for value in values if value is not None]
    if not known:
        return None
    room = 1.08 if percent or min(known) >= 0 else 1.15
    axis = linear(min(0.0, min(known) * room), max(0.0, max(known) * room), percent=percent)
    step = (WIDTH - LEFT - RIGHT) / (len(edges) - 1)
    zero, wide = _y(axis, 0.0), step * 0.76 / len(columns)
    bars, said = [], []
    for number, (run, name, values) in enumerate(columns):
        spoken = []
        for index, value in enumerate(values):
            if value is None:
                continue
            top = _y(axis, value)
            shown = f"{100 * value:.1f}%" if percent else f"{value:+.3f}" if axis.low < 0 else f"{value:.3f}"
            shown = f"{shown} {unit}".strip() if not percent else shown
            text = f"{edges[index]:g} to {edges[index + 1]:g} m: {shown}"
            x = LEFT + step * (index + 0.12) + wide * number
            bars.append(
                Bar(run, round(x, 1), min(top, zero), round(wide, 1), round(abs(top - zero), 1), f"{name}, {text}")
            )
            spoken.append(text)
        said.append(f"{name}: {'; '.join(spoken)}.")
    return BarPlot(
        *(title, unit, bars, zero),
        [(round(LEFT + step * index, 1), f"{edge:g}") for index, edge in enumerate(edges)],
        [(_y(axis, value), text) for value, text in axis.ticks],
        f"{title} by true distance. {' '.join(said)}",
    )
