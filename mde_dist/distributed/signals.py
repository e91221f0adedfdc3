"""Signals -> a flag. The loop asks all ranks about it once a step, so that every rank stops at the same one."""

import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TypeVar

_SCHEDULER_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
_TERMINAL_SIGNALS = (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)  # Ctrl-C, a closed window, Ctrl-\
STOP_SIGNALS = _SCHEDULER_SIGNALS + _TERMINAL_SIGNALS
_LEFT_IGNORED = (signal.SIGHUP, signal.SIGQUIT)  # where they are when the run starts, as under nohup

T = TypeVar("T")
_POLL = 0.1  # seconds between two looks at the flag


class PreemptionHandler:
    """Flag that a signal to this process or (see heartbeat.py) to another rank raises."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        """The first one that came."""
        self._interrupted = False

    def __bool__(self) -> bool:
        return self.signal is not None

    @contextmanager
    def install(self) -> Iterator[None]:
        """Within the block the signals of schedulers and terminals raise the flag; after one did, or an error,
        they do no more harm."""
        ignored = {number for number in _LEFT_IGNORED if signal.getsignal(number) == signal.SIG_IGN}
        before = {number: signal.signal(number, self._handle) for number in STOP_SIGNALS if number not in ignored}
        ending = True
        try:
            with self._wakeup_thread():
                yield
            ending = self.signal is not None
        finally:
            for number, handler in before.items():
                # what is left to do after a stop takes seconds: a second signal must not cut it; nor must that of a
                # launcher, which ends all ranks once one has, cut what this one has to say about a failure
                signal.signal(number, signal.SIG_IGN if ending and number != signal.SIGINT else handler)

    @contextmanager
    def _wakeup_thread(self) -> Iterator[None]:
        """Note signals at once, in a thread that a wake-up descriptor tells of them.

        Python runs a handler in the main thread only after native code returns. A collective returns only when the
        other ranks take part, and they may be waiting for this one.
        """
        reader, writer = socket.socketpair()
        writer.setblocking(False)
        before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)

        def listen() -> None:
            while number := reader.recv(1)[0]:
                if number in STOP_SIGNALS:
                    self._note(number)

        thread = threading.Thread(target=listen, name="signals", daemon=True)
        thread.start()
        try:
            yield
        finally:
            signal.set_wakeup_fd(before)
            writer.send(b"\0")
            thread.join()
            reader.close()
            writer.close()

    def _note(self, number: int) -> None:
        if self.signal is None:
            self.signal = signal.Signals(number)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._interrupted:
            raise KeyboardInterrupt  # a second Ctrl-C means now
        self._interrupted = self._interrupted or number == signal.SIGINT
        self._note(number)


def unless_stopped(stop: PreemptionHandler, action: Callable[[], T]) -> T | None:
    """The result of an action that may wait for a server or a disk; None as soon as the flag is raised before.

    The action has a thread of its own: nobody asks the flag while a read hangs. One that is left behind dies with the
    process. Raises what the action raises.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def act() -> None:
        try:
            results.append(action())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=act, name="action", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(_POLL)
        if stop:
            return None
    for error in errors:
        raise error
    return results[0]
