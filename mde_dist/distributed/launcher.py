"""The launcher of this process, torchrun or `accelerate launch`: no rank outlives it.

Ranks live in sessions of their own. A launcher that is killed leaves them behind: training on, unseen, or asleep in the
rendezvous that nobody else comes to. Imports take seconds, so the launcher may be gone before a rank can look.
"""

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mde_dist.distributed.rank_log import emergency_print
from mde_dist.utils.errors import UserError

PARENT = "MDE_DIST_PARENT"
"""Environment variable: the id of a process of ours that started this one, and that it is not to outlive either."""
_ELASTIC = "TORCHELASTIC_RUN_ID"  # set by torchrun, and by `accelerate launch` for several processes
_LAUNCHED = (_ELASTIC, "ACCELERATE_MIXED_PRECISION")  # the latter by `accelerate launch` for one process; or left over
_TICK = 0.5  # seconds between two looks
_NO_STORE = 10.0  # seconds for which the rendezvous refuses connections until its host counts as dead


@contextmanager
def watched_launcher() -> Iterator[threading.Event]:
    """Within the block the death of the launcher is a SIGTERM to this process, as the launcher itself would send it.

    A training that catches signals answers with a checkpoint; anything else ends at once, whatever it waits for. Yields
    an event to set once this process has joined its siblings; until then a rendezvous whose host is dead ends it
    as well. Raises UserError where the launcher has died before.
    """
    launchers, joined, done = find_launchers(), threading.Event(), threading.Event()

    def watch() -> None:
        refused_since = None
        while not done.wait(_TICK):
            gone = launchers.difference(ancestors())
            if gone:
                _terminate(f"the process that started this one ({min(gone)}) is gone")
                return
            refused_since = None if joined.is_set() or not _store_refuses() else refused_since or time.monotonic()
            if refused_since and time.monotonic() - refused_since > _NO_STORE:
                _terminate(f"the launcher at {os.environ['MASTER_ADDR']}, which the others meet at, is gone")
                return

    thread = threading.Thread(target=watch, name="launcher", daemon=True)
    if launchers:
        thread.start()
    try:
        yield joined
    finally:
        done.set()
        if launchers:
            thread.join()


def find_launchers() -> set[int]:
    """Process ids of those that this one is not to outlive. Raises UserError where its launcher has died already."""
    found = {int(os.environ[PARENT])} if PARENT in os.environ else set()
    if any(name in os.environ for name in _LAUNCHED):
        launcher = next(filter(_may_launch, ancestors()), None)
        if launcher is not None:
            found.add(launcher)
        elif _ELASTIC in os.environ:
            raise UserError("the launcher that started this process is gone; start it anew")
    return found


def ancestors() -> Iterator[int]:
    """Process ids from the parent upwards, as far as they can be seen."""
    process = os.getppid()
    while process > 0:
        yield process
        try:
            status = Path(f"/proc/{process}/stat").read_bytes()
        except OSError:  # it is gone; or there is no /proc
            return
        process = int(status.rpartition(b")")[2].split()[1])


def _may_launch(process: int) -> bool:
    """True where a process is this user's and has loaded torch, as launchers have.

    Orphans are adopted by the first process of a system or container, or by one on the way there, which have not.
    A launcher itself may be the first process of a container.
    """
    if not Path("/proc/self").is_dir():
        return process != 1
    proc = Path(f"/proc/{process}")
    try:
        if proc.stat().st_uid != os.geteuid():
            return False
        try:
            return b"libtorch" in (proc / "maps").read_bytes()
        except PermissionError:  # it has privileges that this process has not
            return b"python" in (proc / "cmdline").read_bytes()
    except OSError:
        return False


def _store_refuses() -> bool:
    """True where nobody listens at the address at which the launcher listened before it started its ranks."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return False  # then rank 0 does, once it has come so far
    try:
        with socket.create_connection((os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])), timeout=_TICK):
            return False
    except ConnectionRefusedError:
        return True
    except OSError:
        return False  # a slow network


def _terminate(why: str) -> None:
    emergency_print(
        f"rank {os.environ.get('RANK', '0')}: {why}: stopping", terminal=os.environ.get("LOCAL_RANK", "0") == "0"
    )
    os.kill(os.getpid(), signal.SIGTERM)
