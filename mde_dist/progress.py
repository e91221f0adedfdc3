"""Long work over samples, shown: a bar on a terminal, else a plain line every ten seconds."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_PLAIN_SECONDS = 10.0


@contextmanager
def shown(console: Console, doing: str) -> Iterator[Callable[[int, int], None]]:
    """Yields `progress(done, total)`, to be called a few times a second with counts of pairs."""
    columns = (TextColumn(doing), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"))
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None, rate="")
        started = spoken = time.monotonic()

        def progress(done: int, total: int) -> None:
            nonlocal spoken
            now = time.monotonic()
            rate = done / max(now - started, 1e-3)
            bar.update(task, completed=done, total=total, rate=f"{rate:.0f} pairs/s")
            if not console.is_terminal and now - spoken > _PLAIN_SECONDS:
                spoken = now
                left = (total - done) / max(rate, 1e-3)
                print(f"{doing}: {done}/{total} pairs, {rate:.0f} pairs/s, {left:.0f} s left", flush=True)

        yield progress
