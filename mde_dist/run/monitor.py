"""What a run says while it works: a progress bar or plain lines, and metrics.jsonl."""

import json
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from ..errors import UserError
from ..files import write_atomic, writing

PLAIN_SECONDS = 5.0
"""Least time between progress lines where the output is no terminal."""


class Monitor:
    """Use it in a `with`. Ranks other than 0 have `path=None`: no metrics.jsonl and no bar."""

    def __init__(
        self,
        path: Path | None,
        samples_seen: int,
        evaluated: int,
        total: int,
        complain: Callable[[UserError], None] = lambda error: None,
    ):
        """`path`: metrics.jsonl; lines from after `samples_seen` (evaluations: after `evaluated`) are dropped:
        a run that was cut off wrote them, and they will be written again. `complain`: called when it can no longer be
        written. Raises UserError."""
        self.error: UserError | None = None
        """Why the last lines of metrics.jsonl could not be written; they are kept and tried again with the next."""
        self._complain = complain
        self._total = total
        self._spoken = 0.0
        console = Console(highlight=False, soft_wrap=True)
        self._plain = not console.is_terminal
        self._bar = Progress(
            TextColumn("{task.fields[doing]}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=path is None or self._plain,
        )
        self._task = self._bar.add_task("", total=total, completed=samples_seen, doing="training", text="")
        self._second: TaskID | None = None
        self._file: BinaryIO | None = None
        self._pending = b""
        if path is not None:
            with writing(path):
                keep_until(path, samples_seen, evaluated)
                self._file = path.open("ab", buffering=0)

    def __enter__(self) -> "Monitor":
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._bar.stop()
        if self._file is not None:
            self._file.close()

    def say(self, text: str) -> None:
        """A line for the user: above the bar, and in this rank's log."""
        print(text, flush=True)

    def phase(self, doing: str) -> Callable[[int, int], None]:
        """Something done between steps -> `progress(done, images)`; it is over where both are equal, or with the next
        step or phase."""
        self._end_phase()
        spoken = time.monotonic()
        self._second = task = self._bar.add_task("", total=None, doing=doing, text="")

        def progress(done: int, images: int) -> None:
            nonlocal spoken
            if self._second != task:
                return
            self._bar.update(task, completed=done, total=images)
            now = time.monotonic()
            if self._plain and now - spoken > PLAIN_SECONDS:
                spoken = now
                self.say(f"{doing}: {done}/{images} images")
            if done == images:
                self._end_phase()

        return progress

    def _end_phase(self) -> None:
        if self._second is not None:
            self._bar.remove_task(self._second)
            self._second = None

    def moved(self, samples_seen: int) -> None:
        """The training has come so far; cheap enough for every step: nothing is written or printed."""
        self._bar.update(self._task, completed=samples_seen)

    def record(self, **values: Any) -> None:
        """A line of metrics.jsonl."""
        if self._file is None:
            return
        self._pending += json.dumps(values).encode() + b"\n"
        try:
            while self._pending:  # a disk that fills takes a part
                self._pending = self._pending[self._file.write(self._pending) :]
            self.error = None
        except OSError as error:
            before, self.error = self.error, UserError(f"{self._file.name}: cannot be written ({error.strerror})")
            if before is None:
                self._complain(self.error)

    def finish(self) -> None:
        """Raises UserError where metrics.jsonl lacks lines."""
        if self.error is not None:
            raise self.error

    def step(self, samples_seen: int, **values: Any) -> None:
        """A line of metrics.jsonl about a step; moves the bar, or without a terminal prints a line now and then."""
        self._end_phase()
        self.record(samples=samples_seen, **values)
        text = progress_text(values)
        self._bar.update(self._task, completed=samples_seen, text=text)
        now = time.monotonic()
        if self._plain and now - self._spoken > PLAIN_SECONDS:
            self._spoken = now
            self.say(f"samples {samples_seen}/{self._total} {text}")


def progress_text(values: Mapping[str, Any]) -> str:
    """What a line of metrics.jsonl about a step says to the user."""
    loss = "not finite" if values["loss"] is None else f"{values['loss']:.4f}"
    parts = [f"loss {loss}", f"{values['images_per_second']:.1f} images/s"]
    parts.append(f"{values['data_wait']:.0%} waiting for data")
    if "mfu" in values:
        parts.append(f"MFU {values['mfu']:.1%}")
    if values.get("slower", 0) > 0.05:
        parts.append(f"rank {values['slowest_rank']} is {values['slower']:.0%} slower than the mean")
    parts.append(f"{values['memory_gb']:.1f} GB")
    if values["seconds_left"] is not None:
        parts.append(f"{timedelta(seconds=values['seconds_left'])} left")
    return ", ".join(parts)


def keep_until(path: Path, samples_seen: int, evaluated: int) -> None:
    """Drop the lines of metrics.jsonl that the checkpoint to go on from knows nothing of; at sample 0 all of them."""
    if path.is_file():
        kept = (r for r in read_records(path) if r["samples"] <= (evaluated if "evaluation" in r else samples_seen))
        # a run that begins anew scores the baselines again
        write_atomic(path, "".join(json.dumps(record) + "\n" for record in kept if samples_seen))


def read_records(path: Path) -> list[dict[str, Any]]:
    """The whole lines of metrics.jsonl."""
    records = []
    for line in path.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break  # cut off in mid-line: the process died while writing it
    return records
