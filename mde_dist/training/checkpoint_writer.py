"""Writing while the loop goes on: one job at a time, in a thread of its own."""

import threading
from collections.abc import Callable
from types import TracebackType
from typing import TypeVar

from mde_dist.utils.console import say
from mde_dist.utils.errors import UserError

T = TypeVar("T")


class AsyncCheckpointWriter:
    """Use it in a `with`, which leaves no job behind."""

    def __init__(self, on_error: Callable[[UserError], None]):
        """`on_error`: called, in the thread, with the error of a job that failed."""
        self.error: UserError | None = None
        """Error of the last job; None where it succeeded."""
        self._on_error = on_error
        self._label: object = None
        self._thread: threading.Thread | None = None
        self._crash: BaseException | None = None

    def submit(self, label: object, copy: Callable[[], T], write: Callable[[T], object]) -> None:
        """Take a copy once the job before is done, and write it while the caller goes on.

        What was last written, or is being written, under the same label is left as it is.
        """
        if label == self._label and self.error is None:
            return
        self._join()
        self._label = label
        self._thread = threading.Thread(target=self._work, args=(write, copy()), name="saver")
        self._thread.start()

    def finish(self) -> None:
        """Wait for the job. Raises UserError where it failed."""
        self._join()
        if self.error is not None:
            raise self.error

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
        if self._crash is not None:
            raise self._crash

    def _work(self, write: Callable[[T], object], copy: T) -> None:
        try:
            write(copy)
            self.error = None
        except UserError as error:
            self.error = error
            self._on_error(error)
        except BaseException as error:  # an error of ours, which the loop has to hear of
            self._crash = error

    def __enter__(self) -> "AsyncCheckpointWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._thread is not None:
            self._thread.join()
        if self.error is not None and error is not None and error is not self.error:
            say(f"error: {self.error}")  # the run ends for another reason, which must not hide this one
