"""What a measurement comes to: tables, the machine that they hold for, what limits, and what to change.

Shown as text, and written as JSON.
"""

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.table import Table as Drawn

from mde_dist import __version__
from mde_dist.training.config import Config, as_json
from mde_dist.utils.console import open_console, say
from mde_dist.utils.errors import UserError
from mde_dist.utils.io import write_atomic, writing

_WIDTH = 140  # columns of a table where it goes to a file, unless COLUMNS says otherwise
_NONE = "-"


@dataclass(frozen=True)
class Timing:
    """How long, and where to."""

    seconds: float = 5
    """For which each row of the table is measured, over all rounds."""
    rounds: int = 3
    """Parts of that time; the rows take turns, and the median counts."""
    json: Path | None = None
    """Write the result, with each round, into this file as well."""

    def check(self) -> None:
        """Raises UserError."""
        if not 0 < self.seconds <= 3600:
            raise UserError(f"seconds = {self.seconds:g}: must be more than 0 and at most 3600")
        if not 1 <= self.rounds <= 100:
            raise UserError(f"rounds = {self.rounds}: must be 1 to 100")
        if self.json is not None and not self.json.absolute().parent.is_dir():
            raise UserError(f"json = {self.json}: {self.json.absolute().parent} is no directory")


@dataclass(frozen=True)
class Column:
    """A column: what it shows of each row."""

    key: str
    """In the rows."""
    title: str
    form: str = ""
    """Of its numbers, as for `format`: `,.0f`, `.1%`; what is None is shown as a dash."""

    def text(self, row: Mapping[str, Any]) -> str:
        value = row.get(self.key)
        if value is None:
            return _NONE
        return value if isinstance(value, str) else format(value, self.form)


@dataclass
class Table:
    """Rows, which may hold more than what the columns show: all of it goes into the JSON."""

    title: str
    columns: Sequence[Column]
    rows: list[dict[str, Any]]
    """Of JSON's types; None where something could not be measured."""


@dataclass
class Result:
    """One word of the command, measured."""

    name: str
    """That word."""
    tables: dict[str, Table]
    """Key in the JSON -> table, in the order in which they are shown."""
    limit: str
    """What limits, in a few words with the figure that says so."""
    advice: str = ""
    """What to change; empty where nothing is wrong."""
    device: str = "cpu"
    """Name of the device; of `device_name`."""
    config: Config | None = None
    notes: list[str] = field(default_factory=list)
    """What else to know, a line each, under the tables."""

    @property
    def verdict(self) -> str:
        return f"limit: {self.limit}" + (f"; try {self.advice}" if self.advice else "")

    def show(self) -> None:
        """Print it all; the verdict is the last line."""
        for table in self.tables.values():
            show_table(table)
        for note in self.notes:
            say(note)
        say(self.verdict)

    def as_json(self) -> dict[str, Any]:
        """All that is known, of JSON's types."""
        record: dict[str, Any] = {"bench": self.name, "machine": machine() | {"device": self.device}}
        record |= {name: table.rows for name, table in self.tables.items()}
        record |= {"limit": self.limit, "advice": self.advice, "notes": self.notes}
        return record | {"config": None if self.config is None else as_json(self.config)}

    def save(self, path: Path) -> None:
        """Raises UserError."""
        with writing(path):
            write_atomic(path, json.dumps(self.as_json(), indent=1) + "\n")


def show_table(table: Table) -> None:
    """Print a table; on no terminal as wide as COLUMNS says, or wide enough for all columns."""
    console = open_console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _WIDTH
    drawn = Drawn(title=table.title, title_justify="left")
    for place, column in enumerate(table.columns):
        drawn.add_column(column.title, justify="right" if place else "left")
    for row in table.rows:
        drawn.add_row(*(column.text(row) for column in table.columns))
    console.print(drawn)


def over_rounds(name: str, values: Sequence[float]) -> dict[str, Any]:
    """What the rounds of a row come to: its median under `name`, all under `name_rounds`, in words under `spread`."""
    low, high = min(values), max(values)
    digits = 0 if high >= 100 else 1
    words = _NONE if len(values) == 1 else f"{low:,.{digits}f} to {high:,.{digits}f}"
    return {name: median(values), f"{name}_rounds": list(values), "spread": words}


def middle(values: Sequence[float]) -> float | None:
    """Their median; None of none."""
    return median(values) if values else None


def ratio(value: float | None, base: float | None) -> float | None:
    """None where one is not known, or nothing to divide by."""
    return value / base if value is not None and base else None


def cores_at_hand() -> list[int]:
    """Numbers of the cores that this process may use; second threads of a physical core come last."""
    allowed = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    return sorted(allowed, key=lambda core: (_place_among_siblings(core), core))


def _place_among_siblings(core: int) -> int:
    try:
        text = Path(f"/sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list").read_text("utf-8")
        siblings = [int(number) for number in text.strip().replace("-", ",").split(",")]
    except (OSError, ValueError):
        return 0
    return siblings.index(core) if core in siblings else 0


def device_name(device: torch.device) -> str:
    """As its maker calls it; of a CPU with the number of threads that torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    threads = torch.get_num_threads()
    return f"{cpu_name()}, {threads} thread{'s' if threads > 1 else ''}"


def cpu_name() -> str:
    """Model of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def machine() -> dict[str, Any]:
    """What the figures hold for."""
    cores = cores_at_hand()
    return {
        "cpu": cpu_name(),
        "cores": len(cores),
        "physical_cores": sum(_place_among_siblings(core) == 0 for core in cores),
        "load": os.getloadavg()[0],
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "gpus": torch.cuda.device_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "mde_dist": __version__,
    }


def plain_config(options: Config) -> Config:
    """The config of training alone, of options that are more."""
    return Config(**{item.name: getattr(options, item.name) for item in fields(Config)})
