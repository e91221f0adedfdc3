"""The terminal: what it is shown holds names of files, runs and rows, which are neither markup nor commands to it."""

import re
from io import TextIOBase
from typing import Any, TextIO

from rich.console import Console
from rich.text import Text

# C0 and C1 controls (ESC begins commands to a terminal, CR writes over what stands there), line and paragraph
# separators, what turns the direction of text, and the halves of bytes that are no UTF-8, which cannot be written
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    r"""One line of text, in which what a terminal would obey is written out, as in Python: `\x1b`, `\u202e`."""
    return _UNPRINTABLE.sub(lambda found: _escaped(ord(found[0])), text)


def _escaped(letter: int) -> str:
    return f"\\x{letter:02x}" if letter < 0x100 else f"\\u{letter:04x}"


def printable_lines(text: str) -> str:
    """The same of a text whose line breaks are meant."""
    return "\n".join(map(printable, text.split("\n")))


def say(*lines: str, file: TextIO | TextIOBase | None = None) -> None:
    """Print lines, those behind the first one indented, as long as they are: paths and commands stay whole for copying.

    `file`: by default stdout.
    """
    print(*map(printable, lines), sep="\n  ", file=file, flush=True)


class _PlainConsole(Console):
    def render_str(self, text: str, *args: Any, **options: Any) -> Text:
        return super().render_str(printable_lines(text), *args, **options)


def open_console(file: TextIO | None = None, soft_wrap: bool = False) -> Console:
    """Where tables and bars are drawn, by default stdout: the only place that makes a Console.

    What it is given as str, cells and titles included, is shown letter by letter: `[b]` and `:smile:` are names.
    """
    return _PlainConsole(file=file, markup=False, emoji=False, highlight=False, soft_wrap=soft_wrap)
