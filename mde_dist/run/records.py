"""metrics.jsonl: a line for every start, step that is logged, baseline and evaluation of a run, each of them once."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import UserError
from ..files import write_atomic, writing


class RecordFile:
    """metrics.jsonl, open for more lines."""

    def __init__(self, path: Path, samples_seen: int, evaluated: int, complain: Callable[[UserError], None]):
        """Lines that `keep_until` does not keep are dropped. `complain`: called when no more can be written.

        Raises UserError.
        """
        self.error: UserError | None = None
        """Why the last lines could not be written; they are kept and tried again with the next."""
        self._complain = complain
        self._pending = b""
        with writing(path):
            self.kept = keep_until(path, samples_seen, evaluated)
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
                self._complain(self.error)

    def finish(self) -> None:
        """Raises UserError where lines are lacking."""
        if self.error is not None:
            raise self.error

    def close(self) -> None:
        self._file.close()


def keep_until(path: Path, samples_seen: int, evaluated: int) -> list[dict[str, Any]]:
    """Drop the lines that the checkpoint to go on from knows nothing of, at sample 0 all of them -> the others.

    A run that was cut off wrote them, and they will be written again.
    """
    if not path.is_file():
        return []
    records = read_records(path) if samples_seen else []  # a run that begins anew scores the baselines again
    kept = [r for r in records if r["samples"] <= (evaluated if "evaluation" in r else samples_seen)]
    write_atomic(path, "".join(json.dumps(record) + "\n" for record in kept))
    return kept


def read_records(path: Path) -> list[dict[str, Any]]:
    """The whole lines of metrics.jsonl."""
    records = []
    for line in path.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break  # cut off in mid-line: the process died while writing it
    return records
