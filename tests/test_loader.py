"""The loader: threads and buffers change nothing in what the loop sees, and whatever goes wrong reaches the loop."""

from __future__ import annotations

import gc
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from trees import SIZE, bts, open_files, packed

from mde_dist.data.loader import Draw, Loader
from mde_dist.data.pack import PackOptions
from mde_dist.data.shards import ShardSet, open_split
from mde_dist.errors import RankError

CPU = torch.device("cpu")
SAMPLES = 20
BATCH = 4


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 20 training pairs, 6 in a shard."""
    base = tmp_path_factory.mktemp("loader")
    packed(bts(base / "tree", SAMPLES, 2), base / "shards", PackOptions(samples_per_shard=6))
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


def draws(samples: np.ndarray, batch: int = BATCH) -> Iterator[Draw]:
    """The samples in batches, the last one ragged; epochs are the samples' places over 20."""
    epochs = np.arange(len(samples)) // SAMPLES
    for start in range(0, len(samples), batch):
        yield epochs[start : start + batch], samples[start : start + batch]


def shuffled(count: int = 50) -> np.ndarray:
    return np.random.default_rng(3).integers(0, SAMPLES, count)


def direct(shards: ShardSet, sample: int) -> tuple[bytes, bytes]:
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
        with Loader(shards, draws(order), BATCH, CPU, threads, ahead) as loader:
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
        with Loader(shards, draws(shuffled(80)), BATCH, CPU, threads, ahead=2) as loader:
            for batch in loader:
                for _ in range(3):
                    for sample in range(SAMPLES):
                        direct(shards, sample)
                    assert rows(batch) == [truth[sample] for sample in batch.sample]


@pytest.mark.parametrize("threads", [0, 2])
@pytest.mark.parametrize("ahead", [1, 3])
def test_it_draws_as_far_ahead_as_it_is_told_and_no_further(whole: Path, threads: int, ahead: int) -> None:
    drawn = 0

    def counted() -> Iterator[Draw]:
        nonlocal drawn
        while True:  # training is one endless stream
            drawn += 1
            yield np.zeros(BATCH, np.int64), np.arange(BATCH)

    with open_split(whole, "train") as shards, Loader(shards, counted(), BATCH, CPU, threads, ahead) as loader:
        for taken in range(1, 6):
            next(loader)
            assert drawn == taken + ahead


def test_no_draws_is_the_end_and_the_end_stays_the_end(whole: Path) -> None:
    with open_split(whole, "train") as shards:
        with Loader(shards, iter([]), BATCH, CPU, 1) as loader:
            assert list(loader) == []
        with Loader(shards, draws(np.arange(6)), BATCH, CPU, 2, ahead=4) as loader:
            assert [len(batch.sample) for batch in loader] == [4, 2]
            assert next(loader, None) is None


# --- damaged samples ---


@pytest.mark.parametrize("member", ["image", "depth"])
def test_a_damaged_sample_is_replaced_by_the_next_one_whatever_the_topology(copy: Path, member: str) -> None:
    with open_split(copy, "train") as shards:
        truth = [direct(shards, sample) for sample in range(SAMPLES)]
        keys = {sample: shards.key(sample) for sample in (5, 8, 9, 19)}
    names = {sample: damage(copy, sample, member) for sample in (5, 8, 9, 19)}  # two in a row, and the very last
    expected = list(truth)
    expected[5], expected[8], expected[9], expected[19] = truth[6], truth[10], truth[10], truth[0]
    order = np.concatenate([np.arange(SAMPLES), shuffled(20)])
    for threads, ahead, size in ((0, 1, 4), (1, 4, 7), (3, 2, 5)):
        with open_split(copy, "train") as shards:
            with Loader(shards, draws(order, size), size, CPU, threads, ahead, max_bad_fraction=0.2) as loader:
                for batch in loader:
                    assert rows(batch) == [expected[sample] for sample in batch.sample]
            assert sorted(loader.damaged) == [5, 8, 9, 19]  # each is noted once, however often it was drawn
            for sample, words in loader.damaged.items():
                assert names[sample] in words
                assert keys[sample] in words
                assert member in words


@pytest.mark.parametrize("threads", [0, 2])
def test_more_damage_than_the_quota_ends_the_run(copy: Path, threads: int) -> None:
    bad = (2, 7, 13)
    names = [damage(copy, sample) for sample in bad]
    with open_split(copy, "train") as shards:
        with Loader(shards, draws(np.arange(SAMPLES)), BATCH, CPU, threads, 1, max_bad_fraction=0.15) as loader:
            assert sum(len(batch.sample) for batch in loader) == SAMPLES  # three of twenty are within it
        with (
            Loader(shards, draws(np.arange(SAMPLES)), BATCH, CPU, threads, 1, max_bad_fraction=0.14) as loader,
            pytest.raises(RankError) as error,
        ):
            for _batch in loader:
                pass
    said = str(error.value)
    assert "3 damaged samples" in said
    assert "max_bad_fraction = 0.14" in said
    assert any(name in said for name in names)
    assert "\n" not in said


@pytest.mark.parametrize("threads", [0, 3])
def test_without_a_quota_the_first_damaged_sample_ends_it(copy: Path, threads: int) -> None:
    name = damage(copy, 9)
    with open_split(copy, "train") as shards, Loader(shards, draws(np.arange(SAMPLES)), BATCH, CPU, threads) as loader:
        for first in (0, 4):  # the batches before it are whole
            assert next(loader).sample[0] == first
        with pytest.raises(RankError) as error:
            next(loader)
    said = str(error.value)
    assert name in said
    assert "image fails its checksum" in said


@pytest.mark.parametrize("threads", [0, 2])
def test_eight_damaged_in_a_row_end_the_run_whatever_the_quota(copy: Path, threads: int) -> None:
    for sample in range(3, 11):
        damage(copy, sample)
    with open_split(copy, "train") as shards:
        with Loader(shards, draws(np.array([4])), 1, CPU, threads, max_bad_fraction=1.0) as loader:
            assert rows(next(loader)) == [direct(shards, 11)]  # the eighth after seven that are damaged
        with (
            Loader(shards, draws(np.array([3])), 1, CPU, threads, max_bad_fraction=1.0) as loader,
            pytest.raises(RankError, match="8 damaged samples in a row"),
        ):
            next(loader)


def test_zero_quota_ends_the_run_at_the_first(copy: Path) -> None:
    damage(copy, 0)
    with (
        open_split(copy, "train") as shards,
        Loader(shards, draws(np.arange(4)), 4, CPU, 1, 1, 0.0) as loader,
        pytest.raises(RankError, match="1 damaged samples"),
    ):
        next(loader)


# --- errors and endings ---


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_an_error_in_a_decoding_thread_reaches_the_loop(whole: Path, threads: int) -> None:
    """A draw that is larger than the batch buffer: a mistake of the program, not damage."""
    too_many = iter([(np.zeros(4, np.int64), np.arange(4)), (np.zeros(6, np.int64), np.arange(6))])
    with open_split(whole, "train") as shards, Loader(shards, too_many, BATCH, CPU, threads) as loader:
        assert len(next(loader).sample) == 4
        with pytest.raises(IndexError):
            next(loader)
    assert loader.damaged == {}


def test_an_error_in_the_draws_reaches_the_loop(whole: Path) -> None:
    def broken() -> Iterator[Draw]:
        yield np.zeros(4, np.int64), np.arange(4)
        raise ZeroDivisionError("no more")

    with (
        open_split(whole, "train") as shards,
        Loader(shards, broken(), BATCH, CPU, 2) as loader,
        pytest.raises(ZeroDivisionError),
    ):
        list(loader)


def our_threads() -> list[str]:
    return sorted(thread.name for thread in threading.enumerate() if thread.name.startswith("decode-"))


@pytest.mark.parametrize("how", ["early", "end", "error", "unused", "damage"])
def test_leaving_it_ends_its_threads_and_closes_its_files(copy: Path, how: str) -> None:
    if how == "damage":
        damage(copy, 1)
    try:
        with (
            open_split(copy, "train") as shards,
            Loader(shards, draws(shuffled(400) if how == "early" else np.arange(SAMPLES)), BATCH, CPU, 3, 4) as loader,
        ):
            assert our_threads() == ["decode-0", "decode-1", "decode-2"]
            assert sum(file.endswith(".tar") for file in open_files(copy)) == 4
            if how != "unused":
                for batch in loader:
                    assert len(batch.sample) == BATCH
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
