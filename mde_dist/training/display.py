"""The lower end of a terminal while a training works: scores, current numbers, bars."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from mde_dist.training.scores import Scores
from mde_dist.utils.progress import Bar, Bars

_HEIGHT = 16  # rows of a terminal that has room for the table
_GAP = "   "


class Display:
    """Drawn by rich a few times a second, from what it was told last."""

    def __init__(self, bar: Bar, scores: Scores):
        self.bar, self.scores = bar, scores
        self.task: Bar | None = None
        """Bar of the work between steps."""
        self.values: Mapping[str, Any] = {}
        """Values of the last step that was logged."""
        self.finished = False
        """True for the last drawing."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        complete = self.finished and self.bar.done == self.bar.total  # then the command's summary has the table
        if self.scores and not complete and options.size.height >= _HEIGHT:
            yield ""
            yield self.scores.table()
        yield ""
        yield from map(Text, join_lines(step_text(self.values, speed=False), options.max_width))
        yield Bars(self.bar, *([self.task] if self.task else []))


def step_text(values: Mapping[str, Any], speed: bool) -> list[str]:
    """Format the values of a logged step, without the time left; `speed` adds the throughput."""
    if not values:
        return []
    parts = ["loss not finite" if values["loss"] is None else f"loss {values['loss']:.4f}"]
    parts.append(f"lr {values['lr']:.2e}")
    if speed:
        parts.append(f"{values['images_per_second']:.1f} images/s")
    parts.append(f"{values['data_wait']:.0%} waiting for data")
    if "mfu" in values:
        parts.append(f"MFU {values['mfu']:.1%}")
    if values.get("slower", 0) > 0.05:
        parts.append(f"rank {values['slowest_rank']} is {values['slower']:.0%} slower than the mean")
    return [*parts, f"{values['memory_gb']:.1f} GB"]


def join_lines(parts: Sequence[str], width: int) -> Iterator[str]:
    """Join the parts into lines of at most `width` characters."""
    line = ""
    for part in parts:
        if line and len(line) + len(_GAP) + len(part) > width:
            yield line
            line = part
        else:
            line = f"{line}{_GAP}{part}" if line else part
    if line:
        yield line
