"""Signals -> a flag. The loop asks all ranks about it once a step, so that every rank stops at the same one."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)


class StopFlag:
    """Raised by a signal, read by the loop."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def __bool__(self) -> bool:
        return self.signal is not None

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal == signal.SIGINT:
            raise KeyboardInterrupt  # a second Ctrl-C means now
        self.signal = signal.Signals(number)


@contextmanager
def stop_flag() -> Iterator[StopFlag]:
    """Catch the signals of schedulers and of Ctrl-C within the block."""
    flag = StopFlag()
    before = {number: signal.signal(number, flag._handle) for number in STOP_SIGNALS}
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
