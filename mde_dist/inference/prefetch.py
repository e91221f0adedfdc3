"""Work that other threads do beside the loop. Decoders, encoders and files let go of the interpreter."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")


@contextmanager
def threads(number: int) -> Iterator[Executor]:
    """A pool of threads. When the block is left, what they are at is finished, and what waits is not begun."""
    pool = ThreadPoolExecutor(number)
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def in_order(calls: Iterable[Callable[[], T]], pool: Executor, ahead: int) -> Iterator[T]:
    """Yield the result of each call, in order, while up to `ahead` more are running or done. An error of a call is
    raised here."""
    waiting: deque[Future[T]] = deque()
    for call in calls:
        waiting.append(pool.submit(call))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
