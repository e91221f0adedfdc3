"""Jobs over worker processes, with a count of the samples done so far.

Workers are spoken to over pipes: semaphores and shared memory would need a /dev/shm, which containers and sandboxes may
not have, or not let be written.
"""

import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext, SpawnContext
from typing import Any, TypeVar

Result = TypeVar("Result")
Progress = Callable[[int, int], None]
"""Called a few times a second with the samples done and their total."""

_TICK = 0.2  # seconds between two counts of samples


class WorkerLost(Exception):
    """A worker was killed."""


def run_jobs(
    function: Callable[..., Result], jobs: Iterable[tuple[Any, ...]], workers: int, progress: Progress, total: int
) -> Iterator[Result]:
    """`function(*job)` for every job, in any order, as they are done. What a job raises is raised here.

    The function counts its samples with `count`. Raises WorkerLost where a worker is killed. However it ends, no worker
    is left: jobs that were begun are done first, except after WorkerLost and Ctrl-C.
    """
    waiting, busy, done, told = list(jobs)[::-1], list[Connection](), 0, 0.0
    with _started(function, min(workers, len(waiting))) as idle:
        while waiting or busy:
            while waiting and idle:
                busy.append(idle.pop())
                _give(busy[-1], waiting.pop())
            ready, results = wait(busy, _TICK), []
            for worker in [worker for worker in busy if worker in ready]:
                samples, finished, result = _hear(worker)
                done += samples
                if finished:
                    busy.remove(worker)
                    idle.append(worker)
                    results.append(result)
            if time.monotonic() - told > _TICK or not (waiting or busy):
                told = time.monotonic()
                progress(done, total)
            for result in results:
                if isinstance(result, Exception):
                    raise result
                yield result


@contextmanager
def _started(function: Callable[..., Any], number: int) -> Iterator[list[Connection]]:
    """Yields a pipe to each of so many new workers, which end with the block."""
    workers = []
    try:
        with _interrupted_later():
            context = _context(function.__module__)
            for _ in range(number):
                ours, theirs = context.Pipe()
                process = context.Process(target=_work, args=(function, theirs))
                process.start()
                theirs.close()
                workers.append((process, ours))
        yield [ours for _, ours in workers]
    except (KeyboardInterrupt, WorkerLost):
        for process, _ in workers:
            process.terminate()  # or their jobs would be waited for
        raise
    finally:
        for _, ours in workers:
            with suppress(OSError):
                ours.send(None)
        for process, ours in workers:
            with ours, suppress(EOFError, OSError):
                while True:
                    ours.recv_bytes()
            process.join()


def _context(module: str) -> ForkServerContext | SpawnContext:
    """A server forks workers in a moment. Where no folder takes its socket, each worker starts by itself."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([module])
    try:
        forkserver.ensure_running()
    except OSError:
        return multiprocessing.get_context("spawn")
    return context


@contextmanager
def _interrupted_later() -> Iterator[None]:
    """Processes that are started in the block never hear of Ctrl-C, which a terminal sends to all of them and which
    they would answer with tracebacks. This one hears of it at the end: no process is left half started."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # which processes inherit
    in_main, heard = threading.current_thread() is threading.main_thread(), []
    if in_main:  # other threads get it where this one has blocked it
        handler = signal.signal(signal.SIGINT, lambda number, frame: heard.append(number))
    try:
        yield
    finally:
        if in_main:
            signal.signal(signal.SIGINT, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if heard:  # also where the server of processes, which may have been about to start, has ended by it
            signal.raise_signal(signal.SIGINT)


def _give(worker: Connection, job: tuple[Any, ...]) -> None:
    try:
        worker.send(job)
    except OSError:
        raise WorkerLost from None


def _hear(worker: Connection) -> tuple[int, bool, Any]:
    """-> samples done since it was last heard of, whether its job is done, and what that returned or raised."""
    try:
        return worker.recv()
    except (EOFError, OSError):
        raise WorkerLost from None


@dataclass
class _Link:
    """A worker's pipe to the process that started it."""

    pipe: Connection
    samples: int = 0
    """Done, and not told yet."""
    told: float = 0.0

    def tell(self, finished: bool = False, result: Any = None) -> None:
        self.pipe.send((self.samples, finished, result))
        self.samples, self.told = 0, time.monotonic()


_link: _Link | None = None  # of this process, where it is a worker


def _work(function: Callable[..., Any], pipe: Connection) -> None:
    global _link
    _link = _Link(pipe)
    threading.Thread(target=_end_with_parent, name="parent", daemon=True).start()
    while (job := pipe.recv()) is not None:
        try:
            result = function(*job)
        except Exception as error:
            error.add_note(traceback.format_exc())
            result = error
        _link.tell(True, result)


def _end_with_parent() -> None:
    """A worker whose parent was killed would do its job to the end, however long that takes."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def count(samples: int) -> None:
    """Note that so many more samples are done; outside a worker nobody listens."""
    if _link is not None:
        _link.samples += samples
        if time.monotonic() - _link.told > _TICK:
            _link.tell()
