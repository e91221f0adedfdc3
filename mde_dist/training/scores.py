"""A small table: last and best evaluation of a run, the constant baselines, and the blog's figures."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from mde_dist.utils.console import open_console, say
from mde_dist.utils.jsonl import number

BLOG = {"abs_rel": 0.179, "delta1": 0.73}
"""Scores that the recipe behind this project reports on NYU Depth v2: for orientation, under another protocol."""
_METRICS = ("abs_rel", "delta1", "rmse")


class Scores:
    """Evaluations of a run, collected from the lines of metrics.jsonl for the table."""

    def __init__(self, records: Iterable[Mapping[str, Any]] = ()):
        self.baselines: list[Mapping[str, Any]] = []
        self.last: Mapping[str, Any] | None = None
        """The last evaluation."""
        self.best: Mapping[str, Any] | None = None
        """The one with the least abs_rel."""
        for record in records:
            self.add(record)

    def add(self, record: Mapping[str, Any]) -> None:
        """Any line; those about steps and starts are passed over."""
        if "baseline" in record:
            self.baselines.append(record)
        elif "evaluation" in record:
            self.last = record
            if self.best is None or record["abs_rel"] < self.best["abs_rel"]:
                self.best = record

    def __bool__(self) -> bool:
        return bool(self.baselines or self.last)

    def table(self) -> Table:
        """Rows of the model where it was evaluated, of the baselines, and of the blog."""
        rows: list[tuple[str, Mapping[str, Any]]] = []
        if self.last and self.best:
            rows += [(f"model at sample {self.last['samples']}", self.last)]
            rows += [(f"best, at sample {self.best['samples']}", self.best)]
        rows += [(record["baseline"], record) for record in self.baselines]
        values = [(title, {name: number(record.get(name)) for name in _METRICS}) for title, record in rows]
        names = [name for name in _METRICS if any(known[name] is not None for _, known in values)]
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), title_justify="left")
        table.add_column("")
        for name in names:
            table.add_column(name, justify="right", no_wrap=True)
        for title, known in values:
            table.add_row(title, *("" if known[name] is None else f"{known[name]:.4f}" for name in names))
        blog = (str(BLOG.get(name, "")) for name in names)
        table.add_row("the blog's ResNet18, NYU Depth v2", *blog, style="dim")
        return table


def show_scores(run: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Print the table of a run from the lines of its metrics.jsonl; nothing where it was not evaluated yet."""
    scores = Scores(records)
    if scores.last:
        say(f"{run}: {scores.last['evaluation']} protocol, {scores.last['images']} images")  # whole, for copying
        open_console().print(scores.table())
