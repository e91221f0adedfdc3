"""What a run says while it works: a progress bar or plain lines, and metrics.jsonl. Rank 0 only."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ..files import write_atomic

PLAIN_SECONDS = 5.0
"""Least time between progress lines where the output is no terminal."""


class Monitor:
    """Use it in a `with`. With `path=None` (ranks other than 0) it says and writes nothing."""

    def __init__(self, path: Path | None, samples_seen: int, evaluated: int, total: int):
        """`path`: metrics.jsonl; lines from after `samples_seen` (evaluations: after `evaluated`) are dropped:
        a run that was cut off wrote them, and they will be written again."""
        self._quiet = path is None
        self._total = total
        self._spoken = 0.0
        self._console = Console(quiet=self._quiet, highlight=False, soft_wrap=True)
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
            disable=self._quiet or not self._console.is_terminal,
        )
        self._task = self._bar.add_task("", total=total, completed=samples_seen, text="")
        self._file = None
        if path is not None:
            keep_until(path, samples_seen, evaluated)
            self._file = path.open("a")

    def __enter__(self) -> "Monitor":
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._bar.stop()
        if self._file is not None:
            self._file.close()

    def say(self, text: str) -> None:
        """A line for the user."""
        self._console.print(text, markup=False)

    def record(self, **values: Any) -> None:
        """A line of metrics.jsonl."""
        if self._file is not None:
            self._file.write(json.dumps(values) + "\n")
            self._file.flush()

    def step(self, samples_seen: int, **values: Any) -> None:
        """A line of metrics.jsonl about a step; moves the bar, or without a terminal prints a line now and then."""
        self.record(samples=samples_seen, **values)
        if self._quiet:
            return
        speed = f"{values['images_per_second']:.1f} images/s, {values['data_wait']:.0%} waiting for data"
        text = f"loss {values['loss']:.4f}, {speed}"
        self._bar.update(self._task, completed=samples_seen, text=text)
        now = time.monotonic()
        if not self._console.is_terminal and now - self._spoken > PLAIN_SECONDS:
            self._spoken = now
            self.say(f"samples {samples_seen}/{self._total} {text}")


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


class Account:
    """Where the time goes, since the last `restart`."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self._since, self._wait, self._images = time.perf_counter(), 0.0, 0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time spent in the block is time without data."""
        start = time.perf_counter()
        yield
        self._wait += time.perf_counter() - start

    def step(self, images: int) -> None:
        self._images += images

    def rates(self) -> dict[str, float]:
        """images_per_second over all ranks, and data_wait, the share of time spent waiting for data."""
        seconds = max(time.perf_counter() - self._since, 1e-9)
        return {"images_per_second": round(self._images / seconds, 2), "data_wait": round(self._wait / seconds, 4)}
