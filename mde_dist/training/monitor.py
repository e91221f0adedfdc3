"""Output of a run: a live display or plain lines, and metrics.jsonl."""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.live import Live

from mde_dist.training.display import Display, step_text
from mde_dist.training.scores import Scores
from mde_dist.utils.console import open_console, say
from mde_dist.utils.errors import UserError
from mde_dist.utils.jsonl import JsonlLogger
from mde_dist.utils.progress import FRAMES, Bar, PlainLines, clock_time, is_screen


class ProgressMonitor:
    """Use it in a `with`. Ranks other than 0 have `path=None`: no metrics.jsonl, and plain lines for their logs."""

    def __init__(
        self,
        path: Path | None,
        samples_seen: int,
        evaluated: int,
        total: int,
        on_error: Callable[[UserError], None] = lambda error: None,
        live: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ):
        """`path`: metrics.jsonl; lines from after `samples_seen` (evaluations: after `evaluated`) are dropped.
        `on_error`: called when it can no longer be written. `live`: draw where there is a terminal. Raises UserError.
        """
        self._clock = clock
        self._records = JsonlLogger(path, samples_seen, evaluated, on_error) if path is not None else None
        self._bar = Bar("training", "samples", samples_seen, total, clock)
        self._display = Display(self._bar, Scores(self._records.kept if self._records else ()))
        # the very stdout of now: the logs will put something before it that leads back to the display
        console = open_console(file=sys.stdout, soft_wrap=True)
        self._live: Live | None = None
        if path is not None and live and is_screen(console):
            self._live = Live(self._display, console=console, refresh_per_second=FRAMES)
        self._lines: PlainLines | None = None  # of the steps: the first one is due at once

    def __enter__(self) -> "ProgressMonitor":
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._end_display()
        if self._records is not None:
            self._records.close()

    def print(self, text: str) -> None:
        """A line for the user: above the display, and in this rank's log."""
        say(text)

    def log(self, **values: Any) -> None:
        """A line of metrics.jsonl; evaluations and baselines appear in the table."""
        if self._records is not None:
            self._records.write(values)
        self._display.scores.add(values)

    def task(self, description: str) -> Callable[[int, int], None]:
        """Something done between steps -> `progress(done, images)`; it is over where both are equal, or with the next
        step or task."""
        self._end_task()
        bar, lines = Bar(description, "images", clock=self._clock), PlainLines(self._clock)
        self._bar.pause()
        self._display.task = bar

        def progress(done: int, images: int) -> None:
            bar.update(done, images)
            if self._live is None and lines.due():
                self.print(str(bar))
            if done == images and self._display.task is bar:
                self._end_task()

        return progress

    def update(self, samples_seen: int) -> None:
        """Show the progress; cheap enough for every step: nothing is written or printed."""
        self._end_task()
        self._bar.update(samples_seen, self._bar.total or samples_seen)

    def step(self, samples_seen: int, **values: Any) -> None:
        """A line of metrics.jsonl about a step; without a display it prints a line now and then."""
        self.log(samples=samples_seen, **values)
        self.update(samples_seen)
        self._display.values = values
        if self._live is None and (self._lines is None or self._lines.due()):
            self._lines = self._lines or PlainLines(self._clock)
            self.print(f"samples {samples_seen}/{self._bar.total} {progress_text(values)}")

    def finish(self) -> None:
        """No more steps: what is printed from now on stands below the display. Raises UserError where metrics.jsonl
        lacks lines."""
        self._end_display()
        if self._records is not None:
            self._records.finish()

    def _end_task(self) -> None:
        if self._display.task is not None:
            self._display.task = None
            self._bar.pause()

    def _end_display(self) -> None:
        self._end_task()
        self._display.finished = True
        if self._live is not None:
            self._live.stop()


def progress_text(values: dict[str, Any]) -> str:
    """Text of a plain line about a step."""
    left = values["seconds_left"]
    return ", ".join(step_text(values, speed=True) + ([f"{clock_time(left)} left"] if left is not None else []))
