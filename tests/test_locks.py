"""Locks and flushes where the file system has none: real processes, of which some are killed, under gaps.py."""

import contextlib
import errno
import fcntl
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from gaps import run_with_gaps

from mde_dist.utils import locks
from mde_dist.utils.io import write_atomic
from mde_dist.utils.locks import Taken, locked


def forked(function: Callable[..., None], *arguments: object) -> int:
    """Call it in a child of its own -> its number."""
    child = os.fork()
    if child == 0:
        try:
            function(*arguments)
        finally:
            os._exit(0)
    return child


def hold(path: Path, shared: bool, ready: int) -> None:
    with locked(path, "taken", shared):
        os.write(ready, b"x")
        time.sleep(60)


@contextlib.contextmanager
def holder(path: Path, shared: bool = False) -> Iterator[int]:
    """A process that holds the lock until it is killed at the end, and stays a zombie."""
    told, ready = os.pipe()
    child = forked(hold, path, shared, ready)
    assert os.read(told, 1) == b"x"
    try:
        yield child
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)


def is_taken(path: Path, shared: bool = False) -> str:
    """Who has it, or nothing."""
    try:
        with locked(path, "taken", shared):
            return ""
    except Taken as error:
        return str(error)


# --- a lock of files does what flock does ---


def take_and_kill(folder: str, *errors: str) -> None:
    for error in errors:
        path = Path(folder, error, "new/.lock")
        assert not is_taken(path)  # and says that it is one of files, before children of ours might
        _take_and_kill(path)
    Path(folder, "gapless").mkdir()
    with locked(Path(folder, "gapless/.lock"), "taken"):
        assert [path.name for path in Path(folder, "gapless").iterdir()] == [".lock"]


def _take_and_kill(path: Path) -> None:
    with holder(path) as child:
        assert is_taken(path).startswith(f"taken (process {child} on ")
        assert is_taken(path, shared=True)
    assert not is_taken(path)
    with holder(path, shared=True):
        assert is_taken(path) == "taken"
        assert not is_taken(path, shared=True)
    assert not is_taken(path)
    with locked(path, "taken"), pytest.raises(Taken), locked(path, "taken"):  # another thread of ours might
        pass
    with locked(path, "taken"):
        path.parent.rename(path.parent.with_name("moved"))
        assert not is_taken(path)  # another folder by now
    assert not list(path.parent.iterdir())


def test_a_lock_of_files_excludes_shares_and_is_free_once_its_holder_is_killed(tmp_path):
    errors = ("ENOSYS", "ENOLCK", "EOPNOTSUPP")
    said = run_with_gaps(take_and_kill, [f"flock:{error}:{tmp_path / error}" for error in errors], tmp_path, *errors)
    assert said.count("has no locks") == 1


def wait_for_a_sign(folder: str) -> None:
    locks.POLL, locks.BEAT, locks.SILENCE = 0.05, 0.4, 1.5
    path = Path(folder, ".lock")
    with holder(path) as child:
        time.sleep(1.2 * locks.SILENCE)
        assert f"process {child} on" in is_taken(path)  # it is touched all the time
        assert f"process {child} on" in str(locks.holder_beside(path))
        os.kill(child, signal.SIGSTOP)
        assert locks.holder_beside(path) is None
        began = time.monotonic()
        with locked(path, "taken"):
            assert time.monotonic() - began > locks.SILENCE - locks.BEAT
            os.kill(child, signal.SIGCONT)
            ended = os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
            assert ended and ended.si_status == 2  # it does not go on beside us
            assert is_taken(path)
    path.with_name(".lock.held").touch()  # by one that died before it could write its name
    assert not is_taken(path)


def test_a_holder_elsewhere_is_taken_for_dead_once_it_is_silent_and_ends_if_it_was_not(tmp_path):
    rules = [f"flock:ENOLCK:{tmp_path}", "open:EACCES:/proc/sys/kernel/random/boot_id"]  # nobody knows where he is
    said = run_with_gaps(wait_for_a_sign, rules, tmp_path)
    assert "this process has stood still" in said


def hammer(folder: str) -> None:
    """Four processes take a lock at once, one of them is killed at any moment and followed by another."""
    locks.POLL, locks.SILENCE = 0.001, 2.0  # silent is only who is killed between making his file and writing to it
    draw, workers, log, until = random.Random(0), list[int](), Path(folder, "judge"), time.monotonic() + 60
    while min(map(log.read_text().count, "sa")) < 25 and time.monotonic() < until:
        workers += [forked(take_often, Path(folder)) for _ in range(4 - len(workers))]
        entries = log.stat().st_size
        while log.stat().st_size == entries and time.monotonic() < until:
            time.sleep(0.03 * draw.random())
        os.kill(victim := workers.pop(draw.randrange(4)), signal.SIGKILL)
        if draw.random() < 0.5:  # the others remain as zombies
            os.waitpid(victim, 0)
    for worker in workers:
        os.kill(worker, signal.SIGKILL)
        os.waitpid(worker, 0)
    with locked(Path(folder, "gap/.lock"), "taken", wait=True):
        assert time.monotonic() < until


def take_often(folder: Path) -> None:
    """A real lock, outside, tells whether two are at it."""
    draw = random.Random(os.getpid())
    while True:
        shared = draw.random() < 0.3
        kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        with (
            contextlib.suppress(Taken),
            locked(folder / "gap/.lock", "taken", shared),
            (folder / "judge").open() as judge,
        ):
            try:
                fcntl.flock(judge, kind | fcntl.LOCK_NB)
            except BlockingIOError:
                write_atomic(folder / "overlap", "")
            time.sleep(0.002 * draw.random())
            with (folder / "judge").open("a") as log:
                log.write("s" if shared else "a")
        time.sleep(0.002 * draw.random())


def test_no_two_ever_hold_a_lock_of_files_whoever_is_killed(tmp_path):
    (tmp_path / "judge").touch()
    run_with_gaps(hammer, [f"flock:ENOSYS:{tmp_path}/gap"], tmp_path)
    assert not (tmp_path / "overlap").exists()


# --- what else a file system may lack ---


def write_and_read(folder: str) -> None:
    import h5py  # here, as the other processes of this file have no time for it

    from mde_dist.packing.sources.hdf5 import array, opened

    for name in "ab":
        write_atomic(Path(folder, "flushless", name), name)
    with pytest.raises(OSError, match="Input/output") as failed:
        write_atomic(Path(folder, "broken/a"), "a")
    assert failed.value.errno == errno.EIO
    path = Path(folder, "flushless/a.h5")
    with h5py.File(Path(folder, "a.h5"), "w") as file:
        file["depth"] = [0.0, 1.0, 2.0]
    Path(folder, "a.h5").rename(path)
    with opened(path, path) as entries:
        assert array(entries, "depth", path)[()].tolist() == [0, 1, 2]


def test_what_cannot_be_flushed_is_written_and_said_once_and_hdf5_is_read_without_locks(tmp_path):
    for name in ("flushless", "broken"):
        (tmp_path / name).mkdir()
    at = tmp_path / "flushless"
    rules = [f"fsync-dir:EINVAL:{at}", f"fsync:EOPNOTSUPP:{at}", f"flock:ENOLCK:{at}", f"fcntl:ENOLCK:{at}"]
    said = run_with_gaps(write_and_read, [*rules, f"fsync-dir:EIO:{tmp_path / 'broken'}"], tmp_path)
    assert said.count("power cut") == 1
    assert [(at / name).read_text() for name in "ab"] == ["a", "b"]
