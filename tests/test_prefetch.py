"""Shards of a server are here before the loop needs them."""

import itertools
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from servers import Fault, FileServer

from mde_dist.data.config import CacheOptions
from mde_dist.data.loader import DataLoader
from mde_dist.data.prefetch import AHEAD, Prefetch
from mde_dist.data.sampler import GlobalSampler
from mde_dist.data.shards import open_split
from mde_dist.packing.pack import PackConfig, pack
from mde_dist.packing.sources import rooms

SAMPLES, PER_SHARD, WINDOW = 48, 2, 2


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Path:
    """24 shards of two rooms."""
    output = tmp_path_factory.mktemp("server") / "rooms"
    options = PackConfig(size=(24, 32), samples_per_shard=PER_SHARD)
    pack(rooms({"train": SAMPLES, "test": 1}), output, options, workers=2, progress=lambda done, total: None)
    return output


@pytest.fixture
def server(served):
    with FileServer(served) as server:
        yield server


def cache(tmp_path: Path) -> CacheOptions:
    return CacheOptions(tmp_path / "cache", 10**9, patience=3.0)


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def tars(server: FileServer) -> set[str]:
    return {path for path in server.requests if path.endswith(".tar")}


def whole(options: CacheOptions) -> set[str]:
    return {path.name for path in options.directory.iterdir() if len(path.name) == 64}


def test_coming_windows_are_fetched_without_the_loop_and_nothing_beyond(server, tmp_path):
    order, options = GlobalSampler(SAMPLES, PER_SHARD, WINDOW, seed=1), cache(tmp_path)
    with open_split(server.url, "train", options) as shards:
        stages = [(end, shards.shards_of(ranges)) for end, ranges in itertools.islice(order.windows(0), 8)]
        with Prefetch(shards, iter(stages)) as prefetch:
            for position, last in ((0, AHEAD), (1, AHEAD), (stages[0][0], AHEAD + 1), (stages[2][0], AHEAD + 3)):
                prefetch.advance(position)
                numbers = [number for _, wanted in stages[: last + 1] for number in wanted]
                names = {shards.info.shards[number].name for number in numbers}
                until(lambda names=names: tars(server) == names)
                digests = {shards.info.shards[number].sha256 for number in numbers}
                until(lambda digests=digests: digests <= whole(options))
    assert set(server.requests.values()) == {1}


def test_a_loop_does_not_need_the_server_for_what_it_could_foresee(server, tmp_path):
    """Once the coming windows are here the server may go: every sample of theirs still arrives."""
    order, options = GlobalSampler(SAMPLES, PER_SHARD, WINDOW, seed=2), cache(tmp_path)
    with open_split(server.url, "train", options) as shards:
        stages = ((end, shards.shards_of(ranges)) for end, ranges in order.windows(0))
        coming = list(itertools.islice(order.windows(0), 1 + AHEAD))
        needed = {shards.info.shards[n].sha256 for _, ranges in coming for n in shards.shards_of(ranges)}
        with Prefetch(shards, stages) as prefetch:

            def draws():
                for first in itertools.count(0, 2):
                    prefetch.advance(first)
                    yield order.at(np.arange(first, first + 2))

            with DataLoader(shards, draws(), 2, torch.device("cpu"), threads=1, ahead=1) as loader:
                next(loader)
                until(lambda: needed <= whole(options))
                server.fail(Fault(status=503))
                for first in range(2, coming[-1][0] - 4, 2):
                    assert next(loader).sample.tolist() == order.at(np.arange(first, first + 2))[1].tolist()


def test_a_resume_begins_with_the_window_of_its_position(server, tmp_path):
    order, options = GlobalSampler(SAMPLES, PER_SHARD, WINDOW, seed=3), cache(tmp_path)
    with open_split(server.url, "train", options) as shards:
        stages = ((end, shards.shards_of(ranges)) for end, ranges in order.windows(10**9 + 17))
        wanted = [
            n for _, ranges in itertools.islice(order.windows(10**9 + 17), 1 + AHEAD) for n in shards.shards_of(ranges)
        ]
        with Prefetch(shards, stages) as prefetch:
            prefetch.advance(10**9 + 17)
            until(lambda: tars(server) == {shards.info.shards[number].name for number in wanted})


def test_what_the_server_refuses_does_not_end_the_prefetching(server, tmp_path):
    options = cache(tmp_path)
    with open_split(server.url, "train", options) as shards:
        server.fail(Fault(status=404), path="train-000000.tar")
        with Prefetch(shards, iter([(2, [0]), (4, [1]), (6, [2])])) as prefetch:
            prefetch.advance(0)
            until(lambda: {shards.info.shards[number].sha256 for number in (1, 2)} <= whole(options))


@pytest.mark.parametrize("how", ["slow", "failing", "done"])
def test_leaving_it_at_any_moment_leaves_no_thread(server, tmp_path, how):
    faults = {"slow": Fault(rate=2000), "failing": Fault(status=500), "done": Fault()}
    with open_split(server.url, "train", cache(tmp_path)) as shards:
        server.fail(faults[how])
        with Prefetch(shards, shards.in_order()) as prefetch:
            prefetch.advance(0)
            until(lambda: len(tars(server)) == 3)
        assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def test_shards_of_a_directory_need_none_of_it(served):
    with open_split(served, "train") as shards, Prefetch(shards, shards.in_order()) as prefetch:
        prefetch.advance(0)
        assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("prefetch")]
