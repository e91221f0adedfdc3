"""Fixtures that several test files share: a few rendered rooms as shards, and the real pairs where they are at hand."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
from commands import run, small, start

from mde_dist.packing.pack import PackConfig, pack
from mde_dist.packing.sources import rooms

STARTERS = {"gaps", "multiprocessing", "sandbox", "selenium", "subprocess", "terminals", "warm"}
"""Modules by which test files start processes of their own, as they do by two functions of `commands`."""


def starts_processes(module: ModuleType) -> bool:
    for value in vars(module).values():
        name = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None)
        if value is run or value is start or str(name).partition(".")[0] in STARTERS:
            return True
    return False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as `fast` the tests of files that start no processes, but for those that are marked as something slower."""
    for item in items:
        slower = any(item.get_closest_marker(name) for name in ("distributed", "slow", "long"))
        if not slower and not starts_processes(item.module):
            item.add_marker("fast")


@pytest.fixture(scope="session")
def room_shards(tmp_path_factory) -> Path:
    """30 training and 8 test rooms at 48x64, 8 in a shard (the last one of training is short)."""
    output = tmp_path_factory.mktemp("shards") / "rooms"
    options = PackConfig(size=(48, 64), samples_per_shard=8)
    pack(rooms({"train": 30, "test": 8}), output, options, workers=2, progress=lambda done, total: None)
    return output


@pytest.fixture(scope="session")
def undisturbed(room_shards, tmp_path_factory) -> Path:
    """The directory of a small training on one process, as a user starts it, that nothing happens to."""
    directory = tmp_path_factory.mktemp("undisturbed") / "run"
    done = run("train", run=directory, **small(data_shards=room_shards))
    assert done.returncode == 0, done.stderr
    return directory


@pytest.fixture(scope="module")
def scratch(tmp_path_factory) -> Iterator[Callable[[str], Path]]:
    """Makes directories that go when the tests of the file are done: the checkpoints of a training are large."""
    made = []

    def make(name: str) -> Path:
        made.append(tmp_path_factory.mktemp(name))
        return made[-1]

    yield make
    for directory in made:
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="session")
def nyuv2() -> Path:
    """The folder of real NYU Depth v2 pairs (densedepth/ and bts/), named by MDE_DIST_NYUV2."""
    folder = os.environ.get("MDE_DIST_NYUV2")
    if not folder:
        pytest.skip("MDE_DIST_NYUV2 names no folder of real pairs")
    return Path(folder)


@pytest.fixture(autouse=True, scope="session")
def no_proxy():
    """The servers of the tests are on this machine."""
    os.environ |= {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}


@pytest.fixture
def path_on_disk(tmp_path: Path) -> Iterator[Path]:
    """A temporary folder that does not lie in /dev/shm, for tests that take /dev/shm away."""
    if not tmp_path.is_relative_to("/dev/shm"):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        yield Path(folder)
