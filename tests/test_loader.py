"""The loader: threads and buffers change nothing in what the loop sees, and whatever goes wrong reaches the loop."""

from __future__ import annotations

import contextlib
import gc
import os
import re
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from trees import SIZE, bts, depth_bytes, members, open_files, packed, vouch, write_tar

from mde_dist.data import dataset as samples_module
from mde_dist.data import loader as loader_module
from mde_dist.data.loader import BatchIndices, DataLoader, Stopped
from mde_dist.data.shards import ShardDataset, open_split
from mde_dist.packing.pack import PackConfig
from mde_dist.utils.errors import RankError, UserError

CPU = torch.device("cpu")
SAMPLES = 20
BATCH = 4


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 20 training pairs, 6 in a shard."""
    base = tmp_path_factory.mktemp("loader")
    packed(bts(base / "tree", SAMPLES, 2), base / "shards", PackConfig(samples_per_shard=6))
    return base / "shards"


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def damage(directory: Path, sample: int, member: str = "image") -> str:
    """Flip one bit of a training sample; returns the name of its shard."""
    row = np.load(directory / "train.index.npy")[sample]
    path = directory / f"train-{int(row['shard']):06d}.tar"
    data = bytearray(path.read_bytes())
    data[int(row[f"{member}_offset"]) + int(row[f"{member}_bytes"]) // 2] ^= 1
    path.write_bytes(data)
    return path.name


def empty_depth(directory: Path, sample: int) -> None:
    """Take every measurement out of a training sample's depth map; all checksums agree."""
    row = np.load(directory / "train.index.npy")[sample]
    path = directory / f"train-{int(row['shard']):06d}.tar"
    content = members(path)
    place = 3 * (sample % 6)
    assert content[place][0].endswith(".depth.blosc")
    content[place] = content[place][0], depth_bytes(np.zeros(SIZE, np.uint16))
    write_tar(path, content)
    vouch(directory)


def draws(samples: np.ndarray, batch: int = BATCH) -> Iterator[BatchIndices]:
    """The samples in batches, the last one ragged; epochs are the samples' places over 20."""
    epochs = np.arange(len(samples)) // SAMPLES
    for start in range(0, len(samples), batch):
        yield epochs[start : start + batch], samples[start : start + batch]


def shuffled(count: int = 50) -> np.ndarray:
    return np.random.default_rng(3).integers(0, SAMPLES, count)


def direct(shards: ShardDataset, sample: int) -> tuple[bytes, bytes]:
    image, depth = np.empty((*SIZE, 3), np.uint8), np.empty(SIZE, np.uint16)
    shards.read_into(sample, image, depth)
    return image.tobytes(), depth.tobytes()


def rows(batch: object) -> list[tuple[bytes, bytes]]:
    images, depths = batch.image.numpy(), batch.depth.numpy()
    return [(images[row].tobytes(), depths[row].tobytes()) for row in range(len(images))]


# --- what the loop sees ---


@pytest.mark.parametrize("threads", [0, 1, 3])
@pytest.mark.parametrize("ahead", [1, 4])
def test_batches_equal_direct_reads_for_any_threads_and_depth(whole: Path, threads: int, ahead: int) -> None:
    order = shuffled(50)
    with open_split(whole, "train") as shards:
        truth = [direct(shards, sample) for sample in range(SAMPLES)]
        assert len(set(truth)) == SAMPLES
        seen, epochs, sizes = [], [], []
        with DataLoader(shards, draws(order), BATCH, CPU, threads, ahead) as loader:
            for batch in loader:
                assert batch.image.dtype == torch.uint8
                assert batch.depth.dtype == torch.uint16
                assert batch.image.shape == (len(batch.sample), *SIZE, 3)
                assert batch.depth.shape == (len(batch.sample), *SIZE)
                assert rows(batch) == [truth[sample] for sample in batch.sample]
                seen += batch.sample.tolist()
                epochs += batch.epoch.tolist()
                sizes.append(len(batch.sample))
        assert seen == order.tolist()
        assert epochs == [0] * 20 + [1] * 20 + [2] * 10
        assert sizes == [4] * 12 + [2]  # the last one is ragged
        assert loader.damaged == {}


@pytest.mark.parametrize("threads", [1, 3])
def test_a_batch_stays_as_it_is_while_the_loop_holds_it(whole: Path, threads: int) -> None:
    """Meanwhile the threads have all the time they want to fill what they may fill."""
    with open_split(whole, "train") as shards:
        truth = [direct(shards, sample) for sample in range(SAMPLES)]
        with DataLoader(shards, draws(shuffled(80)), BATCH, CPU, threads, ahead=2) as loader:
            for batch in loader:
                for _ in range(3):
                    for sample in range(SAMPLES):
                        direct(shards, sample)
                    assert rows(batch) == [truth[sample] for sample in batch.sample]


@pytest.mark.parametrize("threads", [0, 2])
@pytest.mark.parametrize("ahead", [1, 3])
def test_it_draws_as_far_ahead_as_it_is_told_and_no_further(whole: Path, threads: int, ahead: int) -> None:
    drawn = 0

    def counted() -> Iterator[BatchIndices]:
        nonlocal drawn
        while True:  # training is one endless stream
            drawn += 1
            yield np.zeros(BATCH, np.int64), np.arange(BATCH)

    with open_split(whole, "train") as shards, DataLoader(shards, counted(), BATCH, CPU, threads, ahead) as loader:
        for taken in range(1, 6):
            next(loader)
            assert drawn == taken + ahead


def test_no_draws_is_the_end_and_the_end_stays_the_end(whole: Path) -> None:
    with open_split(whole, "train") as shards:
        with DataLoader(shards, iter([]), BATCH, CPU, 1) as loader:
            assert list(loader) == []
        with DataLoader(shards, draws(np.arange(6)), BATCH, CPU, 2, ahead=4) as loader:
            assert [len(batch.sample) for batch in loader] == [4, 2]
            assert next(loader, None) is None


# --- damaged samples ---


@pytest.mark.parametrize("member", ["image", "depth"])
def test_a_damaged_sample_is_replaced_by_one_a_shard_further_on_whatever_the_topology(copy: Path, member: str) -> None:
    """7 samples further on, as shards have 6, round the end; and 7 more where that one is damaged as well."""
    bad = (5, 8, 12, 19)
    with open_split(copy, "train") as shards:
        truth = [direct(shards, sample) for sample in range(SAMPLES)]
        keys = {sample: shards.key(sample) for sample in bad}
    names = {sample: damage(copy, sample, member) for sample in bad}
    expected = list(truth)
    expected[5], expected[8], expected[12], expected[19] = truth[6], truth[15], truth[6], truth[6]  # 5 -> 12 -> 19 -> 6
    order = np.concatenate([np.arange(SAMPLES), shuffled(20)])
    for threads, ahead, size in ((0, 1, 4), (1, 4, 7), (3, 2, 5)):
        said: list[str] = []
        with open_split(copy, "train") as shards:
            options = {"replace": True, "say": said.append}
            with DataLoader(shards, draws(order, size), size, CPU, threads, ahead, **options) as loader:
                for batch in loader:
                    assert rows(batch) == [expected[sample] for sample in batch.sample]
                    assert batch.replaced == np.isin(batch.sample, bad).sum()  # each time it is drawn
            assert sorted(loader.damaged) == list(bad)  # each is noted once, however often it was drawn
            for sample, words in loader.damaged.items():
                assert names[sample] in words
                assert keys[sample] in words
                assert member in words
            assert sorted(said) == sorted(
                f"damaged sample, replaced by another: {it}" for it in loader.damaged.values()
            )


@pytest.mark.parametrize("threads", [0, 3])
def test_without_replacement_the_first_damaged_sample_ends_it(copy: Path, threads: int) -> None:
    name = damage(copy, 9)
    with (
        open_split(copy, "train") as shards,
        DataLoader(shards, draws(np.arange(SAMPLES)), BATCH, CPU, threads) as loader,
    ):
        for first in (0, 4):  # the batches before it are whole
            batch = next(loader)
            assert batch.sample[0] == first
            assert batch.replaced == 0
        with pytest.raises(RankError) as error:
            next(loader)
    said = str(error.value)
    assert name in said
    assert "image fails its checksum" in said
    assert f"--verify {copy}" in said
    assert loader.damaged == {}


@pytest.mark.parametrize("threads", [0, 2])
def test_eight_damaged_candidates_end_the_run(copy: Path, threads: int) -> None:
    for step in range(1, 9):
        damage(copy, (3 + 7 * step) % SAMPLES)
    with open_split(copy, "train") as shards:
        options = {"replace": True, "say": lambda line: None}
        with DataLoader(shards, draws(np.array([10 + 7])), 1, CPU, threads, **options) as loader:
            batch = next(loader)  # the eighth, after seven that are damaged
            assert rows(batch) == [direct(shards, (3 + 7 * 9) % SAMPLES)]
            assert batch.replaced == 1
        with (
            DataLoader(shards, draws(np.array([10])), 1, CPU, threads, **options) as loader,
            pytest.raises(RankError, match=r"train-000001\.tar: damaged, and so are the 7 to replace it; .*--verify"),
        ):
            next(loader)


@pytest.mark.parametrize("threads", [0, 2])
def test_where_the_last_shard_holds_one_sample_a_damaged_one_is_replaced_all_the_same(
    tmp_path: Path, threads: int
) -> None:
    """One shard further on is once round: n = block + 1."""
    packed(bts(tmp_path / "tree", 4, 2), tmp_path / "shards", PackConfig(samples_per_shard=3))
    damage(tmp_path / "shards", 1)
    with open_split(tmp_path / "shards", "train") as shards:
        whole = {sample: direct(shards, sample) for sample in (0, 2, 3)}
        with DataLoader(shards, draws(np.arange(4)), 4, CPU, threads, replace=True, say=lambda line: None) as loader:
            batch = next(loader)
            assert batch.replaced == 1
            assert [rows(batch)[sample] for sample in whole] == list(whole.values())
            assert rows(batch)[1] in whole.values()


@pytest.mark.parametrize("threads", [0, 2])
def test_damaged_samples_are_named_up_to_a_limit_and_counted_beyond_it(
    copy: Path, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    assert loader_module._NAMED == 100
    monkeypatch.setattr(loader_module, "_NAMED", 3)
    bad = (0, 2, 4, 11, 15)
    for sample in bad:
        damage(copy, sample)
    said: list[str] = []
    with open_split(copy, "train") as shards:
        options = {"replace": True, "say": said.append}
        with DataLoader(shards, draws(np.arange(SAMPLES)), BATCH, CPU, threads, **options) as loader:
            assert sum(batch.replaced for batch in loader) == len(bad)
        assert len(loader.damaged) == len(said) == 3
        assert set(loader.damaged) < set(bad)


@pytest.mark.parametrize("threads", [0, 2])
def test_a_depth_map_without_a_measurement_is_damage_for_training_only(copy: Path, threads: int) -> None:
    with open_split(copy, "train") as shards:
        truth = {sample: direct(shards, sample) for sample in (2, 9)}
    empty_depth(copy, 2)
    with open_split(copy, "train") as shards:
        with DataLoader(shards, draws(np.array([2])), 1, CPU, threads, replace=True, say=lambda line: None) as loader:
            batch = next(loader)
            assert rows(batch) == [truth[9]]
            assert batch.replaced == 1
            assert "train-000000.tar, key " in loader.damaged[2]
            assert "depth has no valid pixel" in loader.damaged[2]
        with DataLoader(shards, draws(np.array([2])), 1, CPU, threads) as loader:
            batch = next(loader)
            assert rows(batch) == [(truth[2][0], bytes(len(truth[2][1])))]
            assert batch.replaced == 0


# --- reads that do not come back ---


def hang(directory: Path, shard: str) -> Path:
    """Put a FIFO in the place of a shard of an open split: its first read blocks in the system, as on a dead disk."""
    path = directory / shard
    path.unlink()
    os.mkfifo(path)
    return path


@contextlib.contextmanager
def hanging(path: Path) -> Iterator[None]:
    """Whoever is stuck on the FIFO comes free at the end of the block, and is gone."""
    try:
        yield
    finally:
        end = time.monotonic() + 10
        while our_threads():
            with contextlib.suppress(OSError):  # nobody is waiting on the other side just now
                os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
            assert time.monotonic() < end, "a thread is left behind"
            time.sleep(0.01)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaving waits for stuck threads as long as a test can."""
    monkeypatch.setattr(samples_module, "_LEAVE_AFTER", 0.3)


@pytest.mark.parametrize("replace", [False, True])
def test_a_read_that_hangs_ends_in_an_error_that_names_shard_and_seconds(
    copy: Path, quick: None, replace: bool
) -> None:
    with open_split(copy, "train") as shards, hanging(hang(copy, "train-000001.tar")):
        options = {"replace": replace, "timeout": 0.6}
        with DataLoader(shards, draws(np.arange(SAMPLES)), BATCH, CPU, 2, ahead=1, **options) as loader:
            assert len(next(loader).sample) == BATCH  # of the shard before
            started = time.monotonic()
            with pytest.raises(RankError) as error:
                next(loader)
            assert 0.4 < time.monotonic() - started < 3
            leaving = time.monotonic()
        assert time.monotonic() - leaving < 3  # two threads are stuck, and it ends all the same
    said = str(error.value)
    assert str(copy / "train-000001.tar") in said
    assert re.search(r"a read has not come back for \d s", said)
    assert "data.read_timeout" in said
    assert "\n" not in said


def test_stop_ends_the_wait_for_a_read_that_hangs(copy: Path, quick: None) -> None:
    stop = threading.Event()
    with (
        open_split(copy, "train") as shards,
        hanging(hang(copy, "train-000000.tar")),
        DataLoader(shards, draws(np.arange(SAMPLES)), BATCH, CPU, 2, stop=stop.is_set) as loader,
    ):
        timer = threading.Timer(0.4, stop.set)
        timer.start()
        started = time.monotonic()
        with pytest.raises(Stopped):
            next(loader)
        assert 0.3 < time.monotonic() - started < 3
        timer.join()
    assert not issubclass(Stopped, UserError)  # nobody's mistake


def test_stop_does_not_keep_from_the_loop_what_is_ready(whole: Path) -> None:
    with open_split(whole, "train") as shards:
        truth = [direct(shards, sample) for sample in range(SAMPLES)]
        for threads in (0, 2):
            with DataLoader(shards, draws(np.arange(8)), BATCH, CPU, threads, stop=lambda: True) as loader:
                time.sleep(0.3 if threads else 0)
                assert [rows(batch) for batch in loader] == [truth[:4], truth[4:8]]


def test_long_waits_are_said_and_each_time_after_twice_as_long(
    copy: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader_module, "_SAY_AFTER", 0.4)
    monkeypatch.setattr(loader_module, "_POLL", 0.02)
    said: list[str] = []
    with (
        open_split(copy, "train") as shards,
        hanging(hang(copy, "train-000000.tar")),
        DataLoader(shards, draws(np.arange(4)), 4, CPU, 1, timeout=2.4, say=said.append) as loader,
        pytest.raises(RankError),
    ):
        next(loader)
    assert len(said) == 3  # after 0.4, 0.8 and 1.6 s
    assert all(re.fullmatch(rf"waiting for {copy / 'train-000000.tar'} for \d s now", line) for line in said)


def test_a_read_that_comes_back_late_is_as_good_as_any(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that wakes up: no error, no damage, one word about the wait."""
    monkeypatch.setattr(loader_module, "_SAY_AFTER", 0.2)
    said: list[str] = []
    slow = threading.Event()
    with open_split(copy, "train") as shards:
        truth = [direct(shards, sample) for sample in range(SAMPLES)]
        read = shards.read_into

        def late(sample: int, image: np.ndarray, depth: np.ndarray) -> None:
            if sample == 5 and not slow.is_set():
                slow.set()
                time.sleep(0.9)
            read(sample, image, depth)

        monkeypatch.setattr(shards, "read_into", late)
        options = {"replace": True, "timeout": 30.0, "say": said.append}
        with DataLoader(shards, draws(np.arange(SAMPLES)), BATCH, CPU, 2, **options) as loader:
            for batch in loader:
                assert rows(batch) == [truth[sample] for sample in batch.sample]
                assert batch.replaced == 0
        assert loader.damaged == {}
    assert said
    assert all(line.startswith(f"waiting for {copy / 'train-000000.tar'} for ") for line in said)


def test_many_slow_reads_are_no_time_out_as_long_as_each_comes_back(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time-out is one of a single read, not of a batch."""
    with open_split(copy, "train") as shards:
        read = shards.read_into

        def slow(sample: int, image: np.ndarray, depth: np.ndarray) -> None:
            time.sleep(0.15)
            read(sample, image, depth)

        monkeypatch.setattr(shards, "read_into", slow)
        with DataLoader(shards, draws(np.arange(8), 8), 8, CPU, 1, timeout=0.8) as loader:
            assert len(next(loader).sample) == 8  # in 1.2 s


# --- errors and endings ---


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_an_error_in_a_decoding_thread_reaches_the_loop(whole: Path, threads: int) -> None:
    """A draw that is larger than the batch buffer: a mistake of the program, not damage."""
    too_many = iter([(np.zeros(4, np.int64), np.arange(4)), (np.zeros(6, np.int64), np.arange(6))])
    with open_split(whole, "train") as shards, DataLoader(shards, too_many, BATCH, CPU, threads) as loader:
        assert len(next(loader).sample) == 4
        with pytest.raises(IndexError):
            next(loader)
    assert loader.damaged == {}


def test_an_error_in_the_draws_reaches_the_loop(whole: Path) -> None:
    def broken() -> Iterator[BatchIndices]:
        yield np.zeros(4, np.int64), np.arange(4)
        raise ZeroDivisionError("no more")

    with (
        open_split(whole, "train") as shards,
        DataLoader(shards, broken(), BATCH, CPU, 2) as loader,
        pytest.raises(ZeroDivisionError),
    ):
        list(loader)


def our_threads() -> list[str]:
    return sorted(thread.name for thread in threading.enumerate() if thread.name.startswith("decode-"))


@pytest.mark.parametrize("how", ["early", "end", "error", "unused", "damage"])
def test_leaving_it_ends_its_threads_and_closes_its_files(copy: Path, how: str) -> None:
    if how == "damage":
        damage(copy, 1)
    order = shuffled(400) if how == "early" else np.arange(SAMPLES)
    try:
        with open_split(copy, "train") as shards, DataLoader(shards, draws(order), BATCH, CPU, 3, 4) as loader:
            assert our_threads() == ["decode-0", "decode-1", "decode-2"]
            assert not [file for file in open_files(copy) if file.endswith(".tar")]  # nothing is drawn yet
            if how != "unused":
                for batch in loader:
                    assert len(batch.sample) == BATCH
                    assert [file for file in open_files(copy) if file.endswith(".tar")]
                    if how == "early":
                        break
                    if how == "error":
                        raise KeyError("in the loop")
    except (KeyError, RankError):
        assert how in ("error", "damage")
    assert our_threads() == []
    assert not [file for file in open_files(copy) if file.endswith(".tar")]
    del shards, loader  # the map of the index may live as long as they do
    gc.collect()
    assert open_files(copy) == []


def test_after_leaving_it_the_split_can_be_read_and_loaded_again(whole: Path) -> None:
    with open_split(whole, "train") as shards:
        truth = [direct(shards, sample) for sample in range(SAMPLES)]
        for _ in range(2):
            with DataLoader(shards, draws(np.arange(SAMPLES)), BATCH, CPU, 2) as loader:
                assert [row for batch in loader for row in rows(batch)] == truth
        assert direct(shards, 3) == truth[3]
