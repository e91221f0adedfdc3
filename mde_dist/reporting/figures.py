"""Charts -> PNG files, drawn with matplotlib."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mde_dist.reporting.axes import along_axis, value_axis
from mde_dist.reporting.curves import Chart
from mde_dist.reporting.plots import plot
from mde_dist.reporting.styles import style
from mde_dist.utils.visualization import figure_file, literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLUMNS = 3


def draw_charts(path: Path, charts: Sequence[Chart], title: str) -> None:
    """Draw all charts in one picture, three in a row."""
    rows = -(-len(charts) // _COLUMNS)
    height = 2.9 * rows + 0.8
    with figure_file(path, (12, height), dpi=90) as figure:
        # by hand: matplotlib's own search for a layout takes longer than all the rest
        figure.subplots_adjust(0.05, 0.8 / height, 0.985, 1 - 0.75 / height, wspace=0.2, hspace=0.48)
        figure.suptitle(literal(title), y=1 - 0.15 / height)
        axes = figure.subplots(rows, _COLUMNS, squeeze=False).reshape(-1)
        for axis, chart in zip(axes, charts, strict=False):
            _draw(axis, chart)
        for axis in axes[len(charts) :]:
            axis.set_visible(False)
        if any(len(chart.curves) > 1 for chart in charts):
            pairs = (pair for axis in axes for pair in zip(*axis.get_legend_handles_labels(), strict=True))
            drawn = {label: line for line, label in pairs}
            figure.legend(drawn.values(), drawn, loc="lower center", ncols=4, fontsize=9, frameon=False)


def _draw(axis: "Axes", chart: Chart) -> None:
    (x_axis, along), y_axis = along_axis(chart), value_axis(chart)
    for curve in chart.curves:
        look = style(curve.run)
        line: dict[str, Any] = {"color": look.light, "linewidth": 1.6, "dashes": look.dash or (None, None)}
        line |= {"marker": look.marker if chart.dots else "", "markersize": 4.5}
        for number, stretch in enumerate(curve.stretches):
            xs = [point.x for point in stretch]
            if len(stretch) == 1:
                line["marker"] = look.marker
            axis.plot(xs, [point.y for point in stretch], label="" if number else literal(curve.name), **line)
            low, high = [point.low for point in stretch], [point.high for point in stretch]
            axis.fill_between(xs, low, high, color=look.light, alpha=0.18, linewidth=0)
    for (name, value), at in zip(chart.references, plot(chart).references, strict=True):
        axis.axhline(value, color="0.4", linestyle=":", linewidth=1.2)
        side, gap = ("right", -3) if at.at_end else ("left", 3)
        up, edge = (2, "bottom") if at.name_y < at.y else (-2, "top")
        position = (float(at.at_end), value), (gap, up), ("axes fraction", "data"), "offset points"
        axis.annotate(name, *position, fontsize=7, color="0.25", ha=side, va=edge)
    for mark in chart.marks:
        axis.axvline(mark.x, color=style(mark.run).light, linestyle=(0, (1, 2)), linewidth=1)
    if y_axis.log:
        axis.set_yscale("log")
    axis.set_ylim(y_axis.low, y_axis.high)
    axis.set_xlim(x_axis.low, x_axis.high * 1.02)
    axis.set_yticks([value for value, _ in y_axis.ticks], [text for _, text in y_axis.ticks])
    axis.set_yticks([], minor=True)
    axis.set_xticks([value for value, _ in x_axis.ticks], [text for _, text in x_axis.ticks])
    unit, better = chart.unit and f", {chart.unit}", chart.better and f" ({chart.better} is better)"
    axis.set_title(f"{chart.title}{unit}{better}", fontsize=10)
    axis.set_xlabel(along, fontsize=9)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.3)
