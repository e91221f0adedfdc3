"""Jobs over worker processes, with a count of the samples done so far."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from contextlib import contextmanager
from typing import Any, TypeVar

Result = TypeVar("Result")
Progress = Callable[[int, int], None]
"""Called a few times a second with the samples done and their total."""


def run_jobs(
    function: Callable[..., Result], jobs: Iterable[tuple[Any, ...]], workers: int, progress: Progress, total: int
) -> Iterator[Result]:
    """`function(*job)` for every job, in any order, as they are done. What a job raises is raised here.

    The function counts its samples with `count`. Raises BrokenProcessPool where a worker is killed.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([function.__module__])
    done = context.Value("q", 0)
    with ProcessPoolExecutor(workers, context, initializer=_set_counter, initargs=(done,)) as pool:
        try:
            with _interrupted_later():
                pending = {pool.submit(function, *job) for job in jobs}
            while pending:
                finished, pending = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
                progress(done.value, total)
                for future in finished:
                    yield future.result()
        except KeyboardInterrupt:
            for worker in multiprocessing.active_children():
                worker.terminate()  # or their jobs would be waited for
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


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
    if heard:
        signal.raise_signal(signal.SIGINT)


_counter: Any = None  # samples done, shared by the workers


def _set_counter(counter: Any) -> None:
    global _counter
    _counter = counter
    threading.Thread(target=_end_with_parent, name="parent", daemon=True).start()


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for its next job for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def count(samples: int) -> None:
    """Note that so many more samples are done; outside a worker nobody listens."""
    if _counter is not None:
        with _counter.get_lock():
            _counter.value += samples
