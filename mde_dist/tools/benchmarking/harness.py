"""Harness of the measurements: cases that take turns, tables, the machine, the bottleneck with advice, JSON."""

import contextlib
import json
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import torch
from rich.table import Table as RichTable

from mde_dist import __version__
from mde_dist.training.config import Config, as_json
from mde_dist.utils.cli import option
from mde_dist.utils.console import open_console, say
from mde_dist.utils.errors import UserError
from mde_dist.utils.io import write_atomic, writing

T = TypeVar("T")

_WIDTH = 140  # columns of a table where it goes to a file, unless COLUMNS says otherwise
_NONE = "-"


@dataclass(frozen=True)
class Timing:
    """Options of every measurement."""

    seconds: float = option(5.0, low=1e-3, high=3600)
    """For which each row of the table is measured, over all rounds."""
    rounds: int = option(3, low=1, high=100)
    """Parts of that time; the rows take turns, and the median counts."""
    json: Path | None = None
    """Write the result, with each round, into this file as well."""

    def check(self) -> None:
        """Raises UserError."""
        if self.json is not None and not self.json.absolute().parent.is_dir():
            raise UserError(f"json = {self.json}: {self.json.absolute().parent} is no directory")


def train_config(options: Config) -> Config:
    """The config of training alone, of options that are more."""
    return Config(**{item.name: getattr(options, item.name) for item in fields(Config)})


def chosen_counts(given: Sequence[int], most: int, name: str) -> list[int]:
    """Counts to measure on: those given, or powers of two and `most`. Raises UserError."""
    for count in given:
        if not 1 <= count <= most:
            raise UserError(f"{name} = {count}: must be 1 to {most}, as many as there are here")
    return sorted(set(given)) or sorted({2**n for n in range(most.bit_length())} | {most})


# --- rounds ---


def interleave(cases: Mapping[str, Callable[[float], T]], rounds: int, seconds: float) -> dict[str, list[T]]:
    """Measure the cases in turn, every second round backwards -> answers of each, by round.

    A case takes the seconds to measure for; all its rounds together take `seconds`.
    """
    found: dict[str, list[T]] = {name: [] for name in cases}
    for number in range(rounds):
        for name in list(cases)[:: 1 if number % 2 == 0 else -1]:
            found[name].append(cases[name](seconds / rounds))
    return found


def over_rounds(name: str, values: Sequence[float]) -> dict[str, Any]:
    """The median of the rounds under `name`, all of them under `name_rounds`, their range in words under `spread`."""
    low, high = min(values), max(values)
    digits = 0 if high >= 100 else 1
    words = _NONE if len(values) == 1 else f"{low:,.{digits}f} to {high:,.{digits}f}"
    return {name: median(values), f"{name}_rounds": list(values), "spread": words}


def ratio(value: float | None, base: float | None) -> float | None:
    """A quotient; None where a number is not known or the base is 0."""
    return value / base if value is not None and base else None


def wait_for(device: torch.device) -> None:
    """Wait until the device has done all its work."""
    if device.type in ("cuda", "mps", "xpu"):
        getattr(torch, device.type).synchronize()


# --- tables and results ---


@dataclass(frozen=True)
class Column:
    """A column of a table."""

    key: str
    """In the rows."""
    title: str
    form: str = ""
    """Formats of its numbers, as for `format`: `,.0f`, `.1%`; None is shown as a dash."""

    def text(self, row: Mapping[str, Any]) -> str:
        value = row.get(self.key)
        if value is None:
            return _NONE
        return value if isinstance(value, str) else format(value, self.form)


@dataclass
class Table:
    """Rows, which may hold more than the columns show: all of it goes into the JSON."""

    title: str
    columns: Sequence[Column]
    rows: list[dict[str, Any]]
    """Values of JSON's types; None where something could not be measured."""

    def show(self) -> None:
        """Print it; to a file as wide as COLUMNS says, or wide enough for all columns."""
        console = open_console()
        if not console.is_terminal and "COLUMNS" not in os.environ:
            console.width = _WIDTH
        drawn = RichTable(title=self.title, title_justify="left")
        for place, column in enumerate(self.columns):
            drawn.add_column(column.title, justify="right" if place else "left")
        for row in self.rows:
            drawn.add_row(*(column.text(row) for column in self.columns))
        console.print(drawn)


@dataclass
class Result:
    """Result of one word of the command."""

    name: str
    """That word."""
    tables: dict[str, Table]
    """Key in the JSON -> table, in the order in which they are shown."""
    limit: str
    """The bottleneck, in a few words with the figure that shows it."""
    advice: str
    """Change to make; empty where nothing is wrong."""
    device: str = "cpu"
    """Name of the device; of `device_name`."""
    config: Config | None = None
    notes: list[str] = field(default_factory=list)
    """Remarks under the tables, a line each."""

    def show(self) -> None:
        """Print it all; the bottleneck is the last line."""
        for table in self.tables.values():
            table.show()
        for note in self.notes:
            say(note)
        say(f"limit: {self.limit}" + (f"; try {self.advice}" if self.advice else ""))

    def as_json(self) -> dict[str, Any]:
        """Everything known, of JSON's types."""
        record: dict[str, Any] = {"bench": self.name, "machine": machine() | {"device": self.device}}
        record |= {name: table.rows for name, table in self.tables.items()}
        record |= {"limit": self.limit, "advice": self.advice, "notes": self.notes}
        return record | {"config": None if self.config is None else as_json(self.config)}

    def save(self, path: Path) -> None:
        """Write the JSON. Raises UserError."""
        with writing(path):
            write_atomic(path, json.dumps(self.as_json(), indent=1) + "\n")


# --- the machine ---


def available_cores() -> list[int]:
    """Numbers of the cores that this process may use."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


@contextlib.contextmanager
def on_cores(cores: Sequence[int]) -> Iterator[None]:
    """Keep this thread, and the threads and processes that it starts, on these cores; where the system can."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def device_name(device: torch.device) -> str:
    """Name that its maker gives it; of a CPU with the number of threads that torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    threads = torch.get_num_threads()
    return f"{cpu_name()}, {threads} thread{'s' if threads > 1 else ''}"


def cpu_name() -> str:
    """Model of the processor."""
    lines: list[str] = []
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def machine() -> dict[str, Any]:
    """Description of the machine that the figures hold for."""
    return {
        "cpu": cpu_name(),
        "cores": len(available_cores()),
        "load": os.getloadavg()[0],
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "gpus": torch.cuda.device_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "mde_dist": __version__,
    }
