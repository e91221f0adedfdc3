"""A range of values -> an axis: where it begins and ends, and the round numbers on it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mde_dist.reporting.curves import Chart
from mde_dist.utils.visualization import load_matplotlib


@dataclass(frozen=True)
class Axis:
    low: float
    high: float
    ticks: Sequence[tuple[float, str]]
    """Round values within, as text too."""
    log: bool = False

    def share(self, value: float) -> float:
        """0 where the axis begins, 1 where it ends."""
        if self.log:
            return math.log(max(value, self.low * 1e-9) / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


def linear(low: float, high: float, most: int = 5, percent: bool = False) -> Axis:
    """Linear axis from `low` to `high`; a range without extent is given some."""
    if not high - low > 1e-9 * max(abs(low), abs(high)):
        low, high = (0.0, 1.0) if low == high == 0 else (low - abs(low) * 0.1, high + abs(high) * 0.1)
    locator = load_matplotlib().ticker.MaxNLocator(nbins=most, steps=[1, 2, 2.5, 5, 10])
    found = locator.tick_values(low, high)
    inside = [float(value) for value in found if low <= value + 1e-9 * (high - low) and value <= high * (1 + 1e-12)]
    return Axis(low, high, [(value, _percent(value) if percent else plain(value, high)) for value in inside])


def logarithmic(low: float, high: float) -> Axis:
    """Ticks at 1, 2 and 5 times powers of ten, or at the powers alone where these are many."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1, 2, 5), (1, 3), (1,)):
        inside = [step * 10.0**power for power in powers for step in steps if low <= step * 10.0**power <= high]
        if len(inside) <= 6:
            break
    return Axis(low, high, [(value, plain(value, high)) for value in inside[:: -(-len(inside) // 6) or 1]], log=True)


def plain(value: float, largest: float) -> str:
    """A tick's label beside others up to `largest`."""
    if value and abs(largest) < 0.01:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}".replace("-", "−")
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{letter}".replace("-", "−")
    return f"{0.0 if abs(value) < 1e-12 else value:.4g}".replace("-", "−")


def _percent(value: float) -> str:
    return f"{100 * value:.4g}%"


def value_axis(chart: Chart) -> Axis:
    """Range from the least to the greatest value to show, with some room."""
    points = [point for curve in chart.curves for point in curve.points]
    values = [point.low for point in points] + [point.high for point in points]
    values += [value for _, value in chart.references]
    low, high = min(values), max(values)
    if chart.log and low > 0:
        room = (high / low) ** 0.06 if high > low else 2.0
        return logarithmic(low / room, high * room)
    if chart.from_zero and low >= 0:
        least = 0.02 if chart.percent else 0.0  # of next to nothing not even the noise is worth a full height
        return linear(0.0, max(high * 1.08, least), percent=chart.percent)
    room, name = (high - low) * 0.07, (high - low) * 0.05 if chart.references else 0.0
    return linear(low - room, high + room + name, percent=chart.percent)


TIME_UNITS = ((1.0, "s", 120.0), (60.0, "min", 7200.0), (3600.0, "h", 259200.0), (86400.0, "days", math.inf))


def along_axis(chart: Chart) -> tuple[Axis, str]:
    """The horizontal axis, and what it shows in words."""
    furthest = max(point.x for curve in chart.curves for point in curve.points)
    furthest = max([furthest, *(mark.x for mark in chart.marks)])
    if chart.over == "samples":
        return linear(0.0, furthest or 1.0), "samples seen"
    size, unit, _ = next(entry for entry in TIME_UNITS if furthest < entry[2])
    axis = linear(0.0, furthest / size or 1.0)
    return Axis(0.0, axis.high * size, [(value * size, text) for value, text in axis.ticks]), f"{unit} in training"
