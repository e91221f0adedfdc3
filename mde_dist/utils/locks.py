"""Locks between processes: flock, or where a file system has none, a file that only one process can make.

Such a file, NAME.held, names its holder. The system frees no file of a process that was killed, so whoever finds one
asks whether its holder lives. Of this machine's processes the system tells. One on another machine, or in another
container, touches its file every few seconds, and is taken for dead after a minute without: a requeued job has to go
on with nobody there to remove a file. A holder that stood still for that long, and lost its lock, ends at once.
"""

import errno
import fcntl
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple

from mde_dist.utils.console import note_once, say
from mde_dist.utils.errors import UserError
from mde_dist.utils.io import UNSUPPORTED

POLL = 0.1
"""Seconds between looks at a lock that somebody else holds."""
BEAT = 5.0
"""Seconds between two touches of a lock file by its holder."""
SILENCE = 60.0
"""Seconds without a touch after which a holder on another machine is taken for dead."""
_NO_FLOCK = UNSUPPORTED | {errno.ENOLCK}


class Taken(UserError):
    """Another process holds the lock."""


@contextmanager
def locked(path: Path, taken: str, shared: bool = False, wait: bool = False) -> Iterator[None]:
    """Hold the lock file at `path`, which is made if need be, with its folder; a process that dies holds it no longer.

    `shared`: others may hold it likewise. `wait`: until it is free. Raises Taken with the text `taken` and the one who
    holds it alone, and OSError.
    """
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+", encoding="utf-8", errors="replace") as file:
            lock = Lock(file, path, shared)
            _take(lock, file, taken, wait)
            try:
                if not is_at(file, path):  # whoever held it before has removed it, or its folder
                    continue
                file.truncate(0)
                file.write("" if shared else _name())
                file.flush()
                try:
                    yield
                finally:
                    with suppress(OSError):
                        if not shared and is_at(file, path):  # its folder may have been renamed
                            path.unlink()
                return
            finally:
                lock.release()


def _take(lock: "Lock", file: IO[str], taken: str, wait: bool) -> None:
    """Raises Taken or OSError."""
    began, said = time.monotonic(), False
    while not (got := lock.take()):
        lives = got is False
        if lives and not wait:
            raise Taken(_held(taken, file))
        if not said and (lives or time.monotonic() - began > 1):
            why = "for it" if lives else f"up to {SILENCE:.0f} s to see whether it is alive"
            say(f"{_held(taken, file)}; waiting {why}")
            said = True
        time.sleep(POLL)


def _held(taken: str, file: IO[str]) -> str:
    """`taken` and who holds the lock file, where it tells."""
    file.seek(0)
    try:
        return f"{taken} ({file.read().strip()})".removesuffix(" ()")
    except OSError:  # CIFS: what is locked cannot be read
        return taken


def is_at(file: IO, path: Path) -> bool:
    """True while an open file is still the one of that name."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


class Lock:
    """The lock of an open file at `path`. Threads and processes that hold it exclude one another."""

    def __init__(self, file: IO, path: Path, shared: bool = False):
        self._file, self._path, self._shared = file, path, shared
        self._beside: _Beside | None = None

    def take(self) -> bool | None:
        """Without waiting. True: it is ours, until `release`. False: another one holds it. None: whether one does is
        not known yet, ask again soon. Raises OSError."""
        if self._beside is None:
            try:
                fcntl.flock(self._file, (fcntl.LOCK_SH if self._shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                return False
            except OSError as error:
                if error.errno not in _NO_FLOCK:
                    raise
                beside = _beside(self._path)
                what = f"{self._path}: its file system has no locks ({error.strerror})"
                note_once("flock", f"{what}; {beside.name} stands for one")
                self._beside = _Beside(beside, self._shared)
        return self._beside.take()

    def release(self) -> None:
        if self._beside is None:
            fcntl.flock(self._file, fcntl.LOCK_UN)  # closing is not enough where a child has inherited the descriptor
        else:
            self._beside.release()


def has_flock(file: IO) -> bool:
    """True where the file system of an open file, which nobody else knows of, has locks. Raises OSError."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _NO_FLOCK:
            raise
        return False
    return True


def holder_beside(path: Path) -> str | None:
    """Tell who holds the lock at `path` alone where it is one of files; takes seconds for one on another machine."""
    watch, until = _Watch(), time.monotonic() + 2 * BEAT
    while (found := _look(_beside(path))) and time.monotonic() < until:
        dead = watch.dead(found)
        if dead is not None:
            return None if dead else found.text.partition("\n")[0]
        time.sleep(POLL)
    return None


class _Beside:
    """A lock of files: `alone`, of one who holds it alone, and `alone`.TOKEN of each who shares it.

    `alone` is made by one only. Who shares it makes his own first and then looks for `alone`; who wants it alone makes
    that first and then looks for the others: so one of two at least sees the other, and gives way.
    """

    def __init__(self, alone: Path, shared: bool):
        token = secrets.token_hex(8)
        self._alone, self._shared = alone, shared
        self._mine = alone.with_name(f"{alone.name}.{token}") if shared else alone
        self._text = f"{_name()}\n{json.dumps([_machine(), os.getpid(), _start(os.getpid()), token])}\n"
        self._watches: dict[Path, _Watch] = {}
        self._breaker: _Beside | None = None
        self._released = threading.Event()

    def take(self) -> bool | None:
        """See Lock.take."""
        try:
            self._make()
        except FileExistsError:
            return False if self._free(self._alone) is False else None
        verdict: bool | None = None
        try:
            others = [self._alone] if self._shared else self._sharers()
            verdict = next((free for free in map(self._free, others) if not free), True)
        finally:
            if not verdict:
                self.release()
        if verdict:
            self._released = threading.Event()
            threading.Thread(target=self._beat, args=(self._released,), name="lock", daemon=True).start()
        return verdict

    def release(self) -> None:
        self._released.set()
        with suppress(OSError):
            if (found := _look(self._mine)) and found.text == self._text:
                self._mine.unlink()

    def _make(self) -> None:
        with self._mine.open("x", encoding="utf-8") as file:
            try:
                file.write(self._text)
                file.flush()
            except OSError:
                self._mine.unlink()
                raise

    def _sharers(self) -> list[Path]:
        return [path for path in self._alone.parent.iterdir() if path.name.startswith(f"{self._alone.name}.")]

    def _free(self, path: Path) -> bool | None:
        """True where nobody holds it by the file `path`, that of a dead holder being removed; otherwise as `take`."""
        found = _look(path)
        if found is None:
            return True
        dead = self._watches.setdefault(path, _Watch()).dead(found)
        if not dead:
            return dead
        if path != self._alone:  # a name that is never used again
            path.unlink(missing_ok=True)
            return True
        # another one may see the same and be quicker: what is removed must not be his. So only who has a lock of its
        # own for it, which may be left behind and found likewise, removes it, after one more look
        self._breaker = self._breaker or _Beside(path.with_name(f"{path.name}~"), shared=False)
        if not self._breaker.take():
            return None
        try:
            if _look(path) == found:
                path.unlink()
        finally:
            self._breaker.release()
        return None  # it may be another one's by now

    def _beat(self, released: threading.Event) -> None:
        while not released.wait(BEAT):
            with suppress(OSError):  # the next one may come through
                found = _look(self._mine)
                if found is None:  # gone with its folder, or removed by hand
                    return
                if found.text != self._text:
                    if released.is_set():
                        return
                    who = found.text.partition("\n")[0]
                    say(f"error: {self._mine} was taken by {who}: this process has stood still", file=sys.stderr)
                    os._exit(2)
                os.utime(self._mine)


class _Seen(NamedTuple):
    text: str
    touched: int
    """Nanoseconds."""


def _look(path: Path) -> _Seen | None:
    """The file of a holder; None where there is none. Raises OSError."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:  # opening asks an NFS server anew
            return _Seen(file.read(), os.fstat(file.fileno()).st_mtime_ns)
    except FileNotFoundError:
        return None


@dataclass
class _Watch:
    """The file of one holder, look by look."""

    seen: _Seen | None = None
    since: float = 0.0
    last: float = 0.0

    def dead(self, found: _Seen) -> bool | None:
        """True: its holder has died. False: it lives. None: not known yet."""
        gone = _gone(found.text)
        if gone is not None:
            return gone
        before, now = self.seen, time.monotonic()
        if found != before or now - self.last > BEAT:  # a file system, or we, that stood still prove nothing
            self.since = now
        self.seen, self.last = found, now
        if before is not None and found.text == before.text and found != before:
            return False
        return True if now - self.since > SILENCE else None


def _gone(text: str) -> bool | None:
    """True where the process that a holder's file names has died, False where it lives, None where we cannot tell."""
    try:
        machine, pid, start, _ = json.loads(text.splitlines()[1])
        if not (start and machine) or machine != _machine():
            return None
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # another user's
        pass
    except (ValueError, TypeError, IndexError, OverflowError):  # not written to its end
        return None
    now = _start(pid)
    return None if now is None else now != start


def _start(pid: int) -> str | None:
    """Start of a process of this machine, in ticks since its boot; empty for one that has ended and not been waited
    for, None where the system does not tell."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text("utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    ended = fields[0] in "ZX" and int(fields[17]) <= 1  # its other threads may be in a last write
    return "" if ended else fields[19]


def _machine() -> list[str]:
    """Host, boot and container: all within which a process has its number to itself; empty where that is not known."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text("utf-8").strip()
        return [socket.gethostname(), boot, str(Path("/proc/self/ns/pid").readlink())]
    except OSError:
        return []


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.name}.held")


def _name() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"
