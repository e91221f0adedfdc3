"""Long work, shown: on a terminal a bar that is drawn a few times a second, elsewhere a plain line now and then."""

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from mde_dist.utils.console import say

PLAIN_SECONDS = 5.0
"""Least time between plain lines."""
FRAMES = 3
"""Drawings a second of what is live."""
_SPACING, _POINTS = 0.5, 64  # seconds between points, and points: the rate is that of the last half minute
_ROOM = 4  # columns behind the bars: the ^C that a terminal echoes there must not begin a new line


def is_screen(console: Console) -> bool:
    """Say whether earlier output can be drawn over: on a terminal that is not dumb, whatever colours are forced."""
    return console.is_interactive and sys.stdout.isatty()


def clock_time(seconds: float) -> str:
    """H:MM:SS."""
    return str(timedelta(seconds=round(seconds)))


class Bar:
    """A piece of work: how far it is, how fast it goes, how long it will take. Written by one thread, read by any."""

    def __init__(
        self,
        description: str,
        unit: str,
        done: int = 0,
        total: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        """`description`: one word; `unit`: of the counts `done` and `total` (None = not known yet), in the plural."""
        self.description, self.unit, self.done, self.total = description, unit, done, total
        self._clock, self._began = clock, clock()
        self._points: deque[tuple[float, int]] = deque(maxlen=_POINTS)
        self._rate_before: float | None = None

    def update(self, done: int, total: int) -> None:
        """Set how much is done. Cheap."""
        point = self._clock(), done
        self.done, self.total = done, total
        if len(self._points) == 1 and self._points[0][1] == done:
            self._points[0] = point  # what precedes the first piece, such as the start of workers, is no work
        elif len(self._points) > 1 and point[0] - self._points[-2][0] < _SPACING:
            self._points[-1] = point
        else:
            self._points.append(point)

    def pause(self) -> None:
        """Pause for other work: until this goes on and has a rate again, the last rate holds."""
        self._rate_before = self.rate
        self._points.clear()

    @property
    def elapsed(self) -> float:
        """Seconds since it began."""
        return self._clock() - self._began

    @property
    def rate(self) -> float | None:
        """Units per second; None where it is not known yet."""
        points = list(self._points)
        if len(points) < 2 or points[-1][1] <= points[0][1]:
            return self._rate_before
        (begin, first), (end, last) = points[0], points[-1]
        return (last - first) / max(end - begin, 1e-6)

    @property
    def left(self) -> float | None:
        """Seconds until the end; None where there is no rate yet."""
        rate = self.rate
        return None if rate is None or self.total is None else (self.total - self.done) / rate

    def __str__(self) -> str:
        """A plain line."""
        parts = [f"{self.description}: {self.done}/{self.total} {self.unit}"]
        if self.rate is not None:
            parts.append(f"{_number(self.rate)} {self.unit}/s")
        if self.left is not None:
            parts.append(f"{clock_time(self.left)} left")
        return ", ".join(parts)


class Bars:
    """Bars one below the other, as wide as the terminal; where it is narrow they say less."""

    def __init__(self, *bars: Bar):
        self.bars: Sequence[Bar] = bars

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = options.max_width - _ROOM
        table = Table.grid(padding=(0, 1, 0, 0), pad_edge=False, expand=True)
        table.width = width
        table.add_column(no_wrap=True)
        table.add_column(ratio=1)
        columns = [column for column in _COLUMNS if width >= column.least]
        for column in columns:
            table.add_column(justify="right", no_wrap=True, min_width=column.width)
        for bar in self.bars:
            drawn = ProgressBar(bar.total, bar.done, pulse=bar.total is None)
            table.add_row(bar.description, drawn, *(Text(column.text(bar)) for column in columns))
        yield table


@dataclass(frozen=True)
class _Column:
    """Column beside a bar."""

    text: Callable[[Bar], str]
    width: int
    """Least number of characters, so that the bar does not change its length all the time."""
    least: int
    """Width of a terminal that has room for it."""


def _count(bar: Bar) -> str:
    if bar.total is None:
        return ""
    total = f"{bar.total:,}"
    return f"{bar.done:>{len(total)},}/{total} {bar.unit}"


_COLUMNS = (
    _Column(_count, 0, 0),
    _Column(lambda bar: "" if bar.rate is None else f"{_number(bar.rate)}/s", 7, 45),
    _Column(lambda bar: clock_time(bar.elapsed), 7, 70),
    _Column(lambda bar: "" if bar.left is None or bar.done == bar.total else f"{clock_time(bar.left)} left", 12, 55),
)


def _number(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.1f}"


class PlainLines:
    """A plain line about a bar now and then; the first one when it has lasted a while."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock, self._last = clock, clock()

    def due(self) -> bool:
        """Say whether it is time for a line; if so, the next is due PLAIN_SECONDS later."""
        now = self._clock()
        if now - self._last < PLAIN_SECONDS:
            return False
        self._last = now
        return True


@contextmanager
def progress_bar(
    console: Console, description: str, unit: str, clock: Callable[[], float] = time.monotonic
) -> Iterator[Callable[[int, int], None]]:
    """Yields `progress(done, total)`, to be called a few times a second with counts of `unit`.

    What is printed within the block stands above the bar, in lines as long as they are.
    """
    bar = Bar(description, unit, clock=clock)
    if not is_screen(console):
        lines = PlainLines(clock)

        def progress(done: int, total: int) -> None:
            bar.update(done, total)
            if lines.due():
                say(str(bar))

        yield progress
        return
    before, console.soft_wrap = console.soft_wrap, True
    live = Live(Bars(bar), console=console, refresh_per_second=FRAMES)
    try:
        live.start(refresh=True)  # Ctrl-C in the midst of it has to give the cursor back, too
        yield bar.update
    finally:
        live.transient = bar.total is None  # there was nothing to do
        live.stop()
        console.soft_wrap = before
