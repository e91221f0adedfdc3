"""Open files, a limited number at once, shared by threads: a data set may have more shards than a process may open."""

import contextlib
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass


@dataclass
class _Handle:
    file: int
    users: int = 0
    forgotten: bool = False


class FileDescriptorCache:
    """File descriptors by number, opened when asked for; the least recently used beyond `limit` are closed."""

    def __init__(self, open_file: Callable[[int], int], limit: int):
        """`open_file(number)` may take its time: other numbers are served meanwhile."""
        self._open, self._limit = open_file, limit
        self._handles: OrderedDict[int, _Handle] = OrderedDict()
        self._lock = threading.Lock()
        self._closed = False

    @contextlib.contextmanager
    def use(self, number: int) -> Iterator[int]:
        """A descriptor that stays open within the block. Raises OSError, also once the handles are closed."""
        handle = self._take(number)
        try:
            yield handle.file
        finally:
            with self._lock:
                handle.users -= 1
                if handle.forgotten and not handle.users:
                    os.close(handle.file)
                self._trim()

    def forget(self, number: int) -> None:
        """Have the file opened anew for the next user."""
        with self._lock:
            handle = self._handles.pop(number, None)
            if handle is not None:
                handle.forgotten = True
                if not handle.users:
                    os.close(handle.file)

    def close(self) -> None:
        """Close all files; those in use are closed when their users have done."""
        with self._lock:
            self._closed = True
            self._trim()

    def _take(self, number: int) -> _Handle:
        with self._lock:
            if self._closed:
                raise OSError("the shards are closed")
            handle = self._handles.get(number)
            if handle is not None:
                handle.users += 1
                self._handles.move_to_end(number)
                return handle
        file = self._open(number)
        with self._lock:
            handle = self._handles.setdefault(number, _Handle(file))
            if handle.file != file:  # another thread was faster
                os.close(file)
            handle.users += 1
            if self._closed:
                handle.users -= 1
                self._trim()
                raise OSError("the shards are closed")
            return handle

    def _trim(self) -> None:
        for number, handle in list(self._handles.items()):
            if len(self._handles) <= (0 if self._closed else self._limit):
                return
            if not handle.users:
                os.close(self._handles.pop(number).file)
