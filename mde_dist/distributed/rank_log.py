"""Each rank's output in a file of its own, RUN/logs/rank-N.log, appended over restarts; the terminal shows rank 0."""

import faulthandler
import io
import os
import socket
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from mde_dist.utils.console import open_console, say
from mde_dist.utils.errors import UserError

LOGS = "logs"

_log: TextIO | None = None  # of this process, while `redirect_to_rank_log` lasts
_terminal: TextIO | None = None  # where stderr went before
_opened = False  # whether there has been one


def log_path(run: Path, rank: int) -> Path:
    return run / LOGS / f"rank-{rank}.log"


def log_was_opened() -> bool:
    """True once this rank has opened its log; then so have the others, or nearly."""
    return _opened


@contextmanager
def redirect_to_rank_log(run: Path, rank: int, world: int) -> Iterator[None]:
    """Within the block what is printed goes to the rank's log, on rank 0 to the terminal as well.

    Elsewhere also what libraries in C print, and the traceback that ends the process. A log that cannot be written (a
    full disk) is done without. Raises UserError where the file cannot be opened.
    """
    global _log, _terminal, _opened
    path = log_path(run, rank)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        log = path.open("a", buffering=1, encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None
    outputs, handles = (sys.stdout, sys.stderr), (os.dup(1), os.dup(2))
    only_log, restore = _Tee(log, None), True
    sys.stdout, sys.stderr = (only_log, only_log) if rank else (_Tee(log, shown) for shown in outputs)
    written_as: dict[str, Any] = {"encoding": outputs[1].encoding, "errors": "backslashreplace"}
    _log, _terminal, _opened = log, os.fdopen(handles[1], "w", buffering=1, closefd=False, **written_as), True
    if rank:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    faulthandler.enable(log)  # a crash in native code says where
    start = f"{time.strftime('%F %T')}, rank {rank} of {world}, process {os.getpid()} on {socket.gethostname()}"
    say(f"--- {start}", file=only_log)
    try:
        yield
    except UserError as error:
        if error.__cause__ is not None:
            traceback.print_exception(error.__cause__, file=only_log)
        say(f"error: {error}", file=only_log)
        raise
    except BaseException:
        if rank:
            restore = False  # the terminal would show the tracebacks of all ranks at once
        else:
            traceback.print_exc(file=only_log)
        raise
    finally:
        faulthandler.disable()
        _log = _terminal = None
        if restore:
            sys.stdout, sys.stderr = outputs
            for number, handle in enumerate(handles, 1):
                os.dup2(handle, number)
        for handle in handles:
            os.close(handle)


def emergency_print(text: str, terminal: bool) -> None:
    """Say something from any thread just before the process ends: in the log, and where wanted on the terminal."""
    for stream in (_log, (_terminal or sys.stderr) if terminal else None):
        if stream is not None:
            with suppress(OSError, ValueError):
                if stream.isatty():  # below what may be drawn there, which has hidden the cursor
                    print(file=stream)
                    open_console(stream).show_cursor()
                say(text, file=stream)


class _Tee(io.TextIOBase):
    """Text for a log, and for what was there before it."""

    def __init__(self, log: TextIO, shown: TextIO | None):
        self._log, self._shown = log, shown

    def write(self, text: str) -> int:
        with suppress(OSError):
            self._log.write(text)
        if self._shown is not None:
            self._shown.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._log.flush()
        if self._shown is not None:
            self._shown.flush()

    def isatty(self) -> bool:
        return self._shown is not None and self._shown.isatty()

    def fileno(self) -> int:
        return (self._shown or self._log).fileno()
