"""Errors of an evaluation: by distance as bars, by position in the image as a map."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mde_dist.reporting.axes import Axis, linear
from mde_dist.reporting.history import Run, number
from mde_dist.reporting.plots import BarPlot, bar_plot
from mde_dist.utils.visualization import ERROR_COLORS, color_map, load_matplotlib

_NOTHING = "#808080"


@dataclass(frozen=True)
class Breakdown:
    """Breakdown of the errors from a record's `where`, see evaluation.breakdown."""

    edges: Sequence[float]
    """Edges of the bins of true distance, metres."""
    share: Sequence[float]
    """Share of all scored pixels in each bin."""
    abs_rel: Sequence[float | None]
    bias: Sequence[float | None]
    """Metres; positive = predicted too far."""
    cells: Sequence[Sequence[float | None]]
    """abs_rel in each cell of the image, row by row."""


def breakdown_of(run: Run) -> Breakdown | None:
    """Read the breakdown of a run's last evaluation; None where it has none."""
    try:
        found = run.record["where"][run.protocol] if run.record else None
        return _read(found) if found else None
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        return None


def _read(found: Mapping[str, Any]) -> Breakdown:
    distance, cells = found["distance"], found["position"]["abs_rel"]
    edges = [float(edge) for edge in distance["edges"]]
    pixels = [int(count) for count in distance["pixels"]]
    abs_rel, bias = ([number(value) for value in distance[name]] for name in ("abs_rel", "bias"))
    grid = [[number(value) for value in row] for row in cells]
    if not grid or not grid[0] or {len(row) for row in grid} != {len(grid[0])} or len(grid) * len(grid[0]) > 10_000:
        raise ValueError("positions are no table")
    if len(edges) < 2 or len(edges) > 100 or {len(pixels), len(abs_rel), len(bias)} != {len(edges) - 1}:
        raise ValueError("bins of distance do not fit their edges")
    total = sum(pixels) or 1
    return Breakdown(edges, [count / total for count in pixels], abs_rel, bias, grid)


def distance_plots(found: Sequence[tuple[int, str, Breakdown]]) -> list[BarPlot]:
    """Places and names of runs that were scored on the same images -> their bars side by side."""
    edges = found[0][2].edges
    found = [entry for entry in found if entry[2].edges == edges]
    plots = [
        bar_plot("abs_rel", "", edges, [(index, name, there.abs_rel) for index, name, there in found]),
        bar_plot("bias, too far is above 0", "m", edges, [(index, name, there.bias) for index, name, there in found]),
        bar_plot("share of the pixels", "", edges, [(None, "all runs", found[0][2].share)], percent=True),
    ]
    return [plot for plot in plots if plot is not None]


@dataclass(frozen=True)
class Cell:
    row: int
    column: int
    color: str
    text: str


@dataclass(frozen=True)
class HeatMap:
    """abs_rel by position in the image, of one run."""

    name: str
    rows: int
    columns: int
    cells: Sequence[Cell]
    summary: str


def heat_maps(found: Sequence[tuple[int, str, Breakdown]]) -> tuple[Sequence[HeatMap], Axis] | None:
    """One map per run, and the scale of all of them; None where no cell was scored."""
    values = [value for _, _, there in found for row in there.cells for value in row if value is not None]
    if not values:
        return None
    axis = linear(min(values), max(values), most=4)
    return [_heat_map(name, there.cells, axis) for _, name, there in found], axis


def _heat_map(name: str, grid: Sequence[Sequence[float | None]], axis: Axis) -> HeatMap:
    colors, to_hex = color_map(ERROR_COLORS), load_matplotlib().colors.to_hex
    cells = []
    for row, line in enumerate(grid):
        for column, value in enumerate(line):
            spot = f"row {row + 1}, column {column + 1}"
            text = f"{spot}: not scored" if value is None else f"{spot}: abs_rel {value:.3f}"
            cells.append(Cell(row, column, _NOTHING if value is None else to_hex(colors(axis.share(value))), text))
    known = [(value, row, column) for row, line in enumerate(grid) for column, value in enumerate(line) if value]
    said = ""
    if known:
        (low, *at), (high, *there) = min(known), max(known)
        said = f" Least {low:.3f} in row {at[0] + 1}, column {at[1] + 1}, most {high:.3f} in row {there[0] + 1}, "
        said += f"column {there[1] + 1}."
    summary = f"{name}: abs_rel by position, in {len(grid)} rows and {len(grid[0])} columns of the image.{said}"
    return HeatMap(name, len(grid), len(grid[0]), cells, summary)
