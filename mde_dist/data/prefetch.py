"""Shards of a server come to this node before the loop needs them: the order is known, so nothing has to be guessed."""

import queue
import threading
from collections import deque
from collections.abc import Iterable, Iterator

from mde_dist.data.dataset import DepthDataset
from mde_dist.data.storage.remote import Cancelled
from mde_dist.utils.errors import UserError

Stage = tuple[int, Iterable[int]]
"""Stream position where a stretch of the order ends, and the numbers of the shards that it reads."""

AHEAD = 2
"""Stages that are fetched beyond the one that is being read."""
_CONNECTIONS = 4


class Prefetch:
    """Fetches the shards of the coming stages in threads of its own. Use it in a `with`, which leaves none behind."""

    def __init__(self, samples: DepthDataset, stages: Iterator[Stage]):
        self._samples, self._stages, self._closed = samples, stages, False
        self._ends: deque[int] = deque()  # of the stages that are asked for
        self._work: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        count = _CONNECTIONS if samples.remote else 0
        self._threads = [threading.Thread(target=self._fetch, name=f"prefetch-{i}", daemon=True) for i in range(count)]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> "Prefetch":
        return self

    def __exit__(self, *_: object) -> None:
        self._closed = True
        self._samples.join_workers(self._threads, self._work)

    def advance(self, position: int) -> None:
        """The loader draws samples from this stream position on."""
        while self._ends and self._ends[0] <= position:
            self._ends.popleft()
        while self._threads and len(self._ends) <= AHEAD:
            stage = next(self._stages, None)
            if stage is None:
                return
            end, shards = stage
            self._ends.append(end)
            for shard in shards:
                self._work.put(shard)

    def _fetch(self) -> None:
        while (shard := self._work.get()) is not None and not self._closed:
            try:
                self._samples.prefetch(shard)
            except (UserError, Cancelled):
                continue  # the reader of this shard meets the same and says so; until then the loop goes on
