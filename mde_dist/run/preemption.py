"""Signals -> a flag. The loop asks all ranks about it once a step, so that every rank stops at the same one."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
_LAUNCHERS = ("TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION")  # set by torchrun and by `accelerate launch`


class StopFlag:
    """Raised by a signal, or by the death of the launcher; read by the loop."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        # ranks live in sessions of their own: a launcher that is killed leaves them training on, unseen
        self._launcher = os.getppid() if any(name in os.environ for name in _LAUNCHERS) else None

    def __bool__(self) -> bool:
        if self.signal is None and self._launcher is not None and os.getppid() != self._launcher:
            self.signal = signal.SIGTERM
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
