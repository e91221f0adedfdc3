"""The terminal: what it is shown holds names of files, runs and rows, which are neither markup nor commands to it.

And it may go, or lack letters, while a command is at work.
"""

import contextlib
import errno
import io
import multiprocessing
import os
import re
import select
import sys
from typing import Any, Literal, TextIO

from rich.console import Console
from rich.text import Text

# C0 and C1 controls (ESC begins commands to a terminal, CR writes over what stands there), line and paragraph
# separators, what turns the direction of text, and the halves of bytes that are no UTF-8, which cannot be written
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    r"""One line of text, in which what a terminal would obey is written out, as in Python: `\x1b`, `\u202e`."""
    return _UNPRINTABLE.sub(lambda found: _escaped(ord(found[0])), text)


def _escaped(letter: int) -> str:
    if 0xDC80 <= letter <= 0xDCFF:  # as Python keeps a byte of a file's name that is no UTF-8
        letter -= 0xDC00
    return f"\\x{letter:02x}" if letter < 0x100 else f"\\u{letter:04x}"


def printable_lines(text: str) -> str:
    """The same of a text whose line breaks are meant."""
    return "\n".join(map(printable, text.split("\n")))


def say(*lines: str, file: TextIO | io.TextIOBase | None = None) -> None:
    """Print lines, those behind the first one indented, as long as they are: paths and commands stay whole for copying.

    `file`: by default stdout.
    """
    print(*map(printable, lines), sep="\n  ", file=file, flush=True)


def own_rank(name: Literal["RANK", "LOCAL_RANK"]) -> int:
    """Rank of this process, as its launcher says; 0 where it has none, whatever another job left behind.

    A number that is none counts as 0: to find and say so is for `distributed.environment.check_ranks`.
    """
    rank = os.environ.get(name, "0")
    return int(rank) if "WORLD_SIZE" in os.environ and rank.isdecimal() else 0


def alone() -> bool:
    """True where no launcher promised this process any siblings."""
    return os.environ.get("WORLD_SIZE", "1") == "1"


def say_once(text: str, file: TextIO | io.TextIOBase | None = None) -> None:
    """A line that every rank has reason to say, once for all of them. `file`: by default stdout."""
    if own_rank("RANK") == 0:
        say(text, file=file)


_noted = set[str]()


def note_once(kind: str, text: str) -> None:
    """A line on stderr about the first of many files of that kind: once for all ranks and for the workers of a pool."""
    if kind not in _noted and multiprocessing.parent_process() is None:
        say_once(f"note: {text}", sys.stderr)
    _noted.add(kind)


class _PlainConsole(Console):
    def render_str(self, text: str, *args: Any, **options: Any) -> Text:
        return super().render_str(printable_lines(text), *args, **options)


def open_console(file: TextIO | None = None, soft_wrap: bool = False) -> Console:
    """Make the Console on which tables and bars are drawn, by default stdout: the only place that makes one.

    What it is given as str, cells and titles included, is shown letter by letter: `[b]` and `:smile:` are names.
    """
    return _PlainConsole(file=file, markup=False, emoji=False, highlight=False, soft_wrap=soft_wrap)


class Output(io.FileIO):
    """Standard output or error. What it does not take is dropped: nothing that is printed ends a command."""

    lost: OSError | None = None
    """Error that made output be dropped; None where a reader or a terminal is simply gone."""

    def write(self, data: Any) -> int:
        try:
            while (written := super().write(data)) is None:  # another program has made it non-blocking
                select.select([], [self], [])
            return written
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                self.lost = error
            return len(data)


def lasting(stream: TextIO | None) -> tuple[TextIO, Output | None]:
    """sys.stdout or sys.stderr -> one like it to which printing never raises, and its handle.

    It writes what its encoding lacks as backslash and number. Where it was closed before the start it goes nowhere:
    its handle must not be that of the next file. What is no stream of the system's (of a test, a notebook) is left.
    """
    if stream is None:
        return open(os.devnull, "w", encoding="utf-8", errors="replace"), None  # noqa: PTH123  it stays open
    if not isinstance(stream, io.TextIOWrapper) or not isinstance(stream.buffer, io.BufferedWriter | io.FileIO):
        return stream, None
    with contextlib.suppress(OSError):
        stream.flush()
    handle = Output(stream.fileno(), "w", closefd=False)
    buffer = handle if stream.write_through else io.BufferedWriter(handle)  # python -u
    by_line, at_once = stream.line_buffering, stream.write_through
    errors = "backslashreplace"
    return io.TextIOWrapper(buffer, stream.encoding, errors, line_buffering=by_line, write_through=at_once), handle
