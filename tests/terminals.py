"""A terminal as a user sees it: the commands on a real pseudo-terminal, and what is on its screen."""

import fcntl
import os
import select
import struct
import termios
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pyte
from commands import environment
from warm import Warm, warm_start

_STRAY = ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE")  # rich heeds them


class Terminal:
    """One with so many rows and columns. Use it in a `with`; what ran there has to have ended by then."""

    def __init__(self, rows: int = 24, columns: int = 80):
        self._master, self._slave = os.openpty()
        fcntl.ioctl(self._slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self._screen = pyte.HistoryScreen(columns, rows, history=10_000)
        self._stream = pyte.ByteStream(self._screen)
        self.written = b""
        """All that came."""
        self.frames: list[str] = []
        """What the screen showed, one after the other."""

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._slave)
        os.close(self._master)

    def start(self, module: str, *arguments: Any, before: Callable[[], object] | None = None, **options: Any) -> Warm:
        """A command that has this terminal for its own. Names in capitals are variables of its environment."""
        changes = {"TERM": "xterm-256color"} | {name: options.pop(name) for name in list(options) if name.isupper()}
        env = {name: value for name, value in environment(**changes).items() if name in changes or name not in _STRAY}
        first = partial(take_terminal, os.ttyname(self._slave), before)
        return warm_start(module, *arguments, env=env, before=first, **options)

    def run(self, module: str, *arguments: Any, **options: Any) -> int:
        """A command to its end -> its exit code."""
        with self.start(module, *arguments, **options) as process:
            return self.end(process)

    def end(self, process: Warm, seconds: float = 120) -> int:
        """Look on until the command has ended -> its exit code."""
        self.wait(lambda: process.poll() is not None, seconds=seconds)
        self._read(0.05)
        assert process.returncode is not None
        return process.returncode

    def wait(self, condition: Callable[[], object], process: Warm | None = None, seconds: float = 120) -> None:
        """Look on until something is so."""
        end = time.monotonic() + seconds
        while not condition():
            assert process is None or process.poll() is None, f"it ended by itself:\n{self.all}"
            assert time.monotonic() < end, f"waited in vain:\n{self.all}"
            self._read(0.05)

    def press(self, keys: bytes) -> None:
        os.write(self._master, keys)

    @property
    def text(self) -> str:
        """The screen as it is."""
        return "\n".join(line.rstrip() for line in self._screen.display).rstrip()

    @property
    def all(self) -> str:
        """The screen, and the lines that have left it at its upper end."""
        gone = (
            "".join(line[column].data for column in range(self._screen.columns)) for line in self._screen.history.top
        )
        return "\n".join([*(line.rstrip() for line in gone), self.text])

    @property
    def cursor_is_shown(self) -> bool:
        return not self._screen.cursor.hidden

    @property
    def settings(self) -> list[Any]:
        """Echo, lines, control characters: all that termios knows."""
        return termios.tcgetattr(self._slave)

    def _read(self, seconds: float) -> None:
        while select.select([self._master], [], [], seconds)[0]:
            data = os.read(self._master, 1 << 16)
            self.written += data
            self._stream.feed(data)
            if not self.frames or self.frames[-1] != self.text:
                self.frames.append(self.text)
            seconds = 0.0


def take_terminal(name: str, then: Callable[[], object] | None) -> None:
    """A `before`: make a terminal this session's own, with its Ctrl-C, and write there."""
    terminal = os.open(name, os.O_RDWR)
    fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)
    for number in range(3):
        os.dup2(terminal, number)
    os.close(terminal)
    if then is not None:
        then()
