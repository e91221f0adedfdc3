"""metrics.jsonl: a line for every start, step that is logged, baseline and evaluation of a run, each of them once."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from mde_dist.utils.console import say
from mde_dist.utils.errors import UserError
from mde_dist.utils.io import write_atomic, writing

MOST = 1 << 53
"""Samples: more are no float."""
_LARGEST = 1e100
"""Largest value taken: sums and ratios of larger ones might not be finite."""
_NAMED = 3  # bad lines that are named by their number


class JsonlLogger:
    """metrics.jsonl, open for more lines."""

    def __init__(self, path: Path, samples_seen: int, evaluated: int, on_error: Callable[[UserError], None]):
        """Lines that `truncate_after` does not keep are dropped. `on_error`: called when no more can be written.

        Raises UserError.
        """
        self.error: UserError | None = None
        """Reason why the last lines could not be written; they are kept and tried again with the next."""
        self._on_error = on_error
        self._pending = b""
        with writing(path):
            self.kept = truncate_after(path, samples_seen, evaluated)
            """The lines that were there."""
            self._file: BinaryIO = path.open("ab", buffering=0)

    def write(self, record: dict[str, Any]) -> None:
        self._pending += json.dumps(record).encode() + b"\n"
        try:
            while self._pending:  # a disk that fills takes a part
                self._pending = self._pending[self._file.write(self._pending) :]
            self.error = None
        except OSError as error:
            before, self.error = self.error, UserError(f"{self._file.name}: cannot be written ({error.strerror})")
            if before is None:
                self._on_error(self.error)

    def finish(self) -> None:
        """Raises UserError where lines are lacking."""
        if self.error is not None:
            raise self.error

    def close(self) -> None:
        self._file.close()


def truncate_after(path: Path, samples_seen: int, evaluated: int) -> list[dict[str, Any]]:
    """Drop the lines that the checkpoint to go on from knows nothing of, at sample 0 all of them -> the others.

    A run that was cut off wrote them, and they will be written again. Lines that are no records go as well; they are
    said.
    """
    if not path.is_file():
        return []
    records, note = read_lines(path) if samples_seen else ([], "")  # a run that begins anew scores the baselines again
    if note:
        say(f"note: {note}")
    kept = [r for r in records if r["samples"] <= (evaluated if "evaluation" in r else samples_seen)]
    write_atomic(path, "".join(json.dumps(record) + "\n" for record in kept))
    return kept


def read_records(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl that are records, in their order. Raises OSError."""
    return read_lines(path)[0]


def read_lines(path: Path) -> tuple[list[dict[str, Any]], str]:
    """The records of a metrics.jsonl, and a line about those of its lines that are none; empty where there are none.

    A record is a table with `samples`, a count. One that has an `evaluation` has `abs_rel` and `images` as numbers, one
    that has a `start` has a table there. Raises OSError.
    """
    *lines, rest = path.read_bytes().split(b"\n")
    found = [_record(line) for line in lines]
    bad = [str(number) for number, record in enumerate(found, 1) if record is None]
    last = _record(rest)  # of a line that was cut off nothing is said: the process died while writing it
    note = ""
    if bad:
        named = ", ".join(bad[:_NAMED]) + (f" and {len(bad) - _NAMED} more" if bad[_NAMED:] else "")
        note = f"{path}: line{'s' if bad[1:] else ''} {named}: no record, left out"
    return [record for record in (*found, last) if record is not None], note


def number(value: object) -> float | None:
    """A number that can be drawn, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if not abs(value) < _LARGEST:  # of nan, too
        return None
    return float(value) if abs(value) > 1 / _LARGEST else 0.0


def _record(line: bytes) -> dict[str, Any] | None:
    """The record in a line, which may hold anything."""
    try:
        record = json.loads(line.decode(), parse_constant=lambda name: None)  # JSON knows no nan
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or type(record.get("samples")) is not int or not 0 <= record["samples"] <= MOST:
        return None
    if not isinstance(record.get("start", {}), dict):
        return None
    names = [record[name] for name in ("evaluation", "baseline") if name in record]
    scored = not names or None not in (number(record.get("abs_rel")), number(record.get("images")))
    return record if scored and all(isinstance(name, str) for name in names) else None
