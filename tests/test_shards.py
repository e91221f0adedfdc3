"""The shard format: what was packed is what is read, and damage to any byte is noticed and named."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from trees import SIZE, bts, jpeg_bytes, millimetres, open_files, packed, picture

from mde_dist.data.config import CacheOptions
from mde_dist.data.dataset import DamagedSample
from mde_dist.data.manifest import INDEX, Manifest
from mde_dist.data.shards import ShardDataset, open_split
from mde_dist.data.store import open_store
from mde_dist.packing.pack import PackConfig
from mde_dist.utils.errors import UserError


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 7 training pairs with holes (3, 3, 1) and 4 test pairs (3, 1)."""
    base = tmp_path_factory.mktemp("shards")
    packed(bts(base / "tree", 7, 4), base / "shards")
    return base / "shards"


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def manifest_of(directory: Path) -> Manifest:
    return open_store(directory, CacheOptions())[0]


def buffers(size: tuple[int, int] = SIZE) -> tuple[np.ndarray, np.ndarray]:
    return np.full((*size, 3), 77, np.uint8), np.full(size, 77, np.uint16)


def flip(path: Path, place: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1 << bit
    path.write_bytes(data)


def row_of(directory: Path, split: str, sample: int) -> tuple[Path, dict[str, int]]:
    """The tar of a sample and its index row."""
    index = np.load(directory / f"{split}.index.npy")
    row = {name: int(index[sample][name]) for name in index.dtype.names}
    manifest = json.loads((directory / "manifest.json").read_text())
    return directory / manifest["splits"][split]["shards"][row["shard"]]["name"], row


def edit(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = directory / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def refused(directory: Path, split: str = "train") -> str:
    """The message with which opening ends: one line that names the directory."""
    with pytest.raises(UserError) as error, open_split(directory, split):
        pass
    said = str(error.value)
    assert "\n" not in said
    assert str(directory) in said
    return said


# --- reading ---


@pytest.mark.parametrize("codec", ["blosc", "zst", "png"])
def test_every_sample_is_what_was_packed(tmp_path: Path, codec: str) -> None:
    packed(bts(tmp_path / "tree", 7, 4), tmp_path / "shards", PackConfig(samples_per_shard=3, codec=codec))
    for split, first, holes in (("train", 0, 0.3), ("test", 100, 0.0)):
        seen = set()
        with open_split(tmp_path / "shards", split) as shards:
            assert shards.size == SIZE
            for sample in reversed(range(len(shards))):  # at random, not as a stream
                image, depth = buffers()
                shards.read_into(sample, image, depth)
                record = shards.meta(sample)
                number = int(record["source"][-9:-4])
                assert shards.key(sample) == "-".join(record["source"].removesuffix(".jpg").split("/")[-2:])
                assert record["split"] == split
                assert np.array_equal(depth, millimetres(first + number, holes=holes))
                with Image.open(io.BytesIO(jpeg_bytes(picture(first + number)))) as judge:
                    assert np.abs(image.astype(int) - np.asarray(judge)).max() <= 3
                seen.add(number)
        assert seen == set(range(7 if split == "train" else 4))


def test_counts_come_from_the_manifest(whole: Path) -> None:
    manifest = manifest_of(whole)
    assert manifest.location == str(whole)
    assert manifest.sha256 == hashlib.sha256((whole / "manifest.json").read_bytes()).hexdigest()
    assert (manifest.codec, manifest.size, manifest.layout, list(manifest.splits)) == (
        "blosc",
        SIZE,
        "bts",
        ["train", "test"],
    )
    with open_split(whole, "train") as train, open_split(whole, "test") as test:
        assert (len(train), train.block) == (7, 3)
        assert (len(test), test.block) == (4, 3)
        assert 0.2 < train.info.depth["holes"] < 0.4


def test_reading_from_several_threads_at_once(whole: Path) -> None:
    with open_split(whole, "train") as shards:
        alone = []
        for sample in range(7):
            image, depth = buffers()
            shards.read_into(sample, image, depth)
            alone.append((image.tobytes(), depth.tobytes()))
        wrong: list[object] = []

        def work(seed: int) -> None:
            try:
                image, depth = buffers()
                for sample in np.random.default_rng(seed).integers(0, 7, 200).tolist():
                    shards.read_into(sample, image, depth)
                    if (image.tobytes(), depth.tobytes()) != alone[sample]:
                        wrong.append(sample)
            except Exception as error:  # the main thread has to hear of it
                wrong.append(error)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []


def test_closing_leaves_no_file_open(whole: Path) -> None:
    assert open_files(whole) == []
    with open_split(whole, "train") as shards:
        assert not [name for name in open_files(whole) if name.endswith(".tar")]  # they are opened when they are read
        for sample in range(7):
            shards.read_into(sample, *buffers())
        assert [Path(name).name for name in open_files(whole) if name.endswith(".tar")] == [
            "train-000000.tar",
            "train-000001.tar",
            "train-000002.tar",
        ]
    assert open_files(whole) == []
    shards.close()  # a second time does no harm


def test_a_failed_opening_leaves_no_file_open(copy: Path) -> None:
    (copy / "train-000002.tar").unlink()
    refused(copy)
    assert open_files(copy) == []


# --- damaged samples ---


@pytest.mark.parametrize("member", ["image", "depth"])
def test_a_flipped_bit_is_a_damaged_sample_with_shard_and_key(copy: Path, member: str) -> None:
    tar, row = row_of(copy, "train", 4)
    start, size = row[f"{member}_offset"], row[f"{member}_bytes"]
    with open_split(copy, "train") as shards:
        key = shards.key(4)
    for place, bit in ((start, 0), (start + size // 2, 3), (start + size - 1, 7)):
        flip(tar, place, bit)
        with open_split(copy, "train") as shards:
            with pytest.raises(DamagedSample) as error:
                shards.read_into(4, *buffers())
            said = str(error.value)
            assert tar.name in said
            assert key in said
            assert member in said
            for other in (0, 1, 2, 3, 5, 6):  # nothing else suffers
                shards.read_into(other, *buffers())
        flip(tar, place, bit)
    with open_split(copy, "train") as shards:
        shards.read_into(4, *buffers())


@pytest.mark.parametrize("member", ["image", "depth"])
def test_the_header_before_a_member_is_checked_with_it(copy: Path, member: str) -> None:
    """Every byte of it: name, size, the tar's own checksum, the padding at its end."""
    tar, row = row_of(copy, "train", 4)
    start = row[f"{member}_offset"] - 512
    for place in (0, 99, 124, 148, 155, 156, 300, 511):
        flip(tar, start + place, 1)
        with open_split(copy, "train") as shards:
            with pytest.raises(DamagedSample, match=f"{tar.name}, key .*{member} fails its checksum"):
                shards.read_into(4, *buffers())
            for other in (3, 5):
                shards.read_into(other, *buffers())
        flip(tar, start + place, 1)
    with open_split(copy, "train") as shards:
        shards.read_into(4, *buffers())


def test_a_flipped_bit_in_the_record_is_a_damaged_sample(copy: Path) -> None:
    tar, row = row_of(copy, "test", 1)
    flip(tar, row["meta_offset"] + 3)
    with open_split(copy, "test") as shards:
        shards.read_into(1, *buffers())  # image and depth are whole
        with pytest.raises(DamagedSample, match=r"test-000000\.tar"):
            shards.meta(1)


def test_a_shard_cut_while_it_is_open_is_a_damaged_sample(copy: Path) -> None:
    tar, row = row_of(copy, "train", 2)
    with open_split(copy, "train") as shards:
        shards.read_into(0, *buffers())
        os.truncate(tar, row["image_offset"] + 10)
        with pytest.raises(DamagedSample, match=tar.name):
            shards.read_into(2, *buffers())
        shards.read_into(0, *buffers())


@pytest.mark.parametrize("how", ["cut", "gone", "folder"])
def test_a_shard_that_is_cut_or_gone_before_its_first_read_is_a_damaged_sample(copy: Path, how: str) -> None:
    """The directory is open, but shards are opened when a sample of theirs is first asked for."""
    tar, row = row_of(copy, "train", 2)
    with open_split(copy, "train") as shards:
        if how == "cut":
            os.truncate(tar, row["image_offset"] + 10)
        else:
            tar.unlink()
            if how == "folder":
                tar.mkdir()
        for sample in (0, 2):
            with pytest.raises(DamagedSample, match=tar.name):
                shards.read_into(sample, *buffers())
            with pytest.raises(DamagedSample, match=tar.name):
                shards.meta(sample)
        shards.read_into(6, *buffers())


@pytest.mark.parametrize("size", [(32, 24), (24, 31), (25, 32), (12, 32)])
def test_a_manifest_with_another_image_size_does_not_pass_for_the_data(copy: Path, size: tuple[int, int]) -> None:
    edit(copy, lambda manifest: manifest.update(image_size=size))
    with open_split(copy, "train") as shards:
        assert shards.size == size
        with pytest.raises(DamagedSample):
            shards.read_into(0, *buffers(size))
        if size != (32, 24):  # which has as many pixels
            with pytest.raises(UserError, match=r"train\.mean\.blosc"):
                shards.mean_map()


# --- directories that cannot be right ---


def test_a_directory_without_manifest_says_how_to_pack(tmp_path: Path) -> None:
    for directory in (tmp_path, tmp_path / "nowhere"):
        said = refused(directory)
        assert "python -m mde_dist.shard" in said
        assert f"--output {directory}" in said


def test_an_unknown_split_names_those_there_are(whole: Path) -> None:
    said = refused(whole, "validation")
    assert "'validation'" in said
    assert "train, test" in said


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[]", b"null", b"17", b'"text"', b"{}", b"\xff\xfe\x00", b'{"format": 1}']
)
def test_a_manifest_that_is_none(copy: Path, data: bytes) -> None:
    (copy / "manifest.json").write_bytes(data)
    assert "manifest.json" in refused(copy)


def test_a_manifest_cut_anywhere_is_refused(copy: Path) -> None:
    whole = (copy / "manifest.json").read_bytes()
    for length in range(0, len(whole) - 2, 97):
        (copy / "manifest.json").write_bytes(whole[:length])
        assert "manifest.json" in refused(copy)


def test_another_format_or_version_names_both(copy: Path) -> None:
    for version in (1, 3):
        edit(copy, lambda manifest, version=version: manifest.update(version=version))
        said = refused(copy)
        assert f"mde_dist.shards {version}" in said
        assert "this version reads mde_dist.shards 2" in said
        assert f"--index {copy}" in said  # which makes a new one from the tars
    edit(copy, lambda manifest: manifest.update(version=2, format="wids"))
    assert "wids" in refused(copy)


def test_an_unknown_codec_names_those_it_reads(copy: Path) -> None:
    edit(copy, lambda manifest: manifest.update(codec="lerc"))
    said = refused(copy)
    assert "'lerc'" in said
    assert "blosc, zst, png" in said


@pytest.mark.parametrize("name", ["../outside.tar", "/etc/passwd", "sub/train.tar", "..", "."])
@pytest.mark.parametrize("what", ["shard", "index", "mean_map"])
def test_a_file_outside_the_directory_is_never_opened(copy: Path, what: str, name: str) -> None:
    def change(manifest: dict[str, Any]) -> None:
        split = manifest["splits"]["train"]
        if what == "shard":
            split["shards"][0]["name"] = name
        elif what == "index":
            split["index"]["name"] = name
        else:
            split["mean_map"]["name"] = name

    shutil.copy(copy / "train-000000.tar", copy.parent / "outside.tar")
    (copy / "sub").mkdir()
    shutil.copy(copy / "train-000000.tar", copy / "sub/train.tar")
    edit(copy, change)
    refused(copy)


def leaves(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths to all keys and items of a JSON document."""
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [found for key, child in children for found in [(*path, key), *leaves(child, (*path, key))]]


@pytest.mark.parametrize("value", ["gone", None, "text", -3, [], {}, 1.5], ids=repr)
def test_a_manifest_with_one_wrong_value_never_ends_in_a_traceback(copy: Path, value: object) -> None:
    """Each key in turn is taken away or given a value of another kind: all is as before, or it is a UserError."""
    manifest = json.loads((copy / "manifest.json").read_text())
    broken = []
    for path in leaves(manifest):
        changed = json.loads(json.dumps(manifest))
        node = changed
        for key in path[:-1]:
            node = node[key]
        if value == "gone":
            del node[path[-1]]
        else:
            node[path[-1]] = value
        (copy / "manifest.json").write_text(json.dumps(changed))
        for split in ("train", "test"):
            try:
                with open_split(copy, split) as shards:
                    assert shards.block >= 1
                    assert len(shards) in (7, 4)
                    shards.mean_map()
                    for sample in range(len(shards)):
                        shards.key(sample)
                        shards.read_into(sample, *buffers(shards.size))
            except (UserError, DamagedSample):
                pass
            except Exception as error:  # collected, so that one run shows all
                broken.append(f"{'.'.join(map(str, path))} = {value!r}: {type(error).__name__}: {error}")
    assert broken == []


# --- files that are not what the manifest names ---


def test_a_missing_shard(copy: Path) -> None:
    (copy / "train-000001.tar").unlink()
    said = refused(copy)
    assert "train-000001.tar" in said
    assert "No such file" in said
    with open_split(copy, "test") as shards:  # the other split is whole
        shards.read_into(0, *buffers())


@pytest.mark.parametrize("change", [-1, -512, +1, +10240])
def test_a_shard_cut_or_grown(copy: Path, change: int) -> None:
    path = copy / "train-000001.tar"
    size = path.stat().st_size
    os.truncate(path, size + change)
    said = refused(copy)
    assert "train-000001.tar" in said
    assert str(size) in said
    assert str(size + change) in said


def test_an_index_that_is_missing_cut_flipped_or_exchanged(copy: Path) -> None:
    path = copy / "train.index.npy"
    whole = path.read_bytes()
    damages: list[bytes | None] = [
        None,
        b"",
        whole[:60],
        whole[:-1],
        whole + b"\0",
        (copy / "test.index.npy").read_bytes(),
    ]
    for place in (0, 8, 60, 127, 130, len(whole) // 2, len(whole) - 1):  # magic, header and rows
        damaged = bytearray(whole)
        damaged[place] ^= 4
        damages.append(bytes(damaged))
    for data in damages:
        path.unlink(missing_ok=True)
        if data is not None:
            path.write_bytes(data)
        assert "train.index.npy" in refused(copy)
    path.write_bytes(whole)
    open_split(copy, "train").close()


def vouch(directory: Path, what: str = "index", split: str = "train") -> None:
    """Make the manifest name the file as it is now, as one does who packs by other means."""
    path = directory / json.loads((directory / "manifest.json").read_text())["splits"][split][what]["name"]
    now = {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    edit(directory, lambda manifest: manifest["splits"][split][what].update(now))


def test_an_index_of_pickled_objects_is_refused_without_running_them(copy: Path) -> None:
    """Even where the manifest has been made to name it."""
    ran = copy / "ran"

    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (ran,)

    path = copy / "train.index.npy"
    np.save(path, np.array([Trap()] * 7, dtype=object), allow_pickle=True)
    vouch(copy)
    ran.unlink(missing_ok=True)
    refused(copy)
    assert not ran.exists()


def test_an_index_of_another_length_or_type_is_refused_even_with_its_hash(copy: Path) -> None:
    path = copy / "train.index.npy"
    rows = np.load(path)
    for other in (rows[:-1], np.concatenate([rows, rows[:1]]), np.zeros(7), rows.view(np.uint8)):
        np.save(path, other)
        vouch(copy)
        assert "train.index.npy: not an index of this many samples" in refused(copy)


def test_an_archive_of_arrays_is_no_index_even_with_its_hash(copy: Path) -> None:
    path = copy / "train.index.npy"
    rows = np.load(path)
    with path.open("wb") as file:
        np.savez(file, rows)
    vouch(copy)
    assert "train.index.npy" in refused(copy)


@pytest.mark.parametrize(
    "change",
    [
        {"shard": 1},
        {"shard": 2**32 - 1},
        {"depth_offset": 0},
        {"depth_offset": 511},
        {"image_offset": 10**6},
        {"image_offset": 2**63},
        {"image_offset": 2**64 - 1},
        {"image_bytes": 0},
        {"depth_bytes": 2**32 - 1},
        {"meta_offset": 2**40},
    ],
    ids=str,
)
def test_an_index_that_leads_out_of_its_shard_is_refused_even_with_its_hash(copy: Path, change: dict[str, int]) -> None:
    path = copy / "train.index.npy"
    rows = np.load(path)
    for name, value in change.items():
        rows[name][0] = value
    np.save(path, rows)
    vouch(copy)
    assert "places samples where the shards have none" in refused(copy)


def test_an_index_that_pairs_two_samples_is_found_by_their_keys(copy: Path) -> None:
    """With checksums and hash to match: the image of sample 1 with the depth of sample 0."""
    path = copy / "train.index.npy"
    rows = np.load(path)
    for what in ("offset", "bytes", "crc"):
        rows[f"image_{what}"][0] = rows[f"image_{what}"][1]
    np.save(path, rows)
    vouch(copy)
    with open_split(copy, "train") as shards:
        with pytest.raises(DamagedSample, match=r"the index pairs the depth of .* with the image of"):
            shards.read_into(0, *buffers())
        shards.read_into(1, *buffers())


def test_a_sample_without_a_record_has_an_empty_one(copy: Path) -> None:
    path = copy / "train.index.npy"
    rows = np.load(path)
    for what in ("offset", "bytes", "crc"):
        rows[f"meta_{what}"] = 0
    np.save(path, rows)
    vouch(copy)
    with open_split(copy, "train") as shards:
        assert [shards.meta(sample) for sample in range(7)] == [{}] * 7
        shards.read_into(3, *buffers())


def test_an_index_row_is_as_the_format_says() -> None:
    assert INDEX.itemsize == 4 + 3 * 16
    assert INDEX.names[0] == "shard"


def test_a_number_too_large_for_a_float_is_no_traceback(copy: Path) -> None:
    edit(copy, lambda manifest: manifest["splits"]["train"]["depth"].update(max=10**400))
    assert "manifest.json" in refused(copy)


def test_a_shard_that_is_no_regular_file_is_refused_without_opening_it(copy: Path) -> None:
    (copy / "train-000001.tar").unlink()
    os.mkfifo(copy / "train-000001.tar")
    assert "train-000001.tar is not a regular file" in refused(copy)


def test_a_mean_map_that_is_missing_or_damaged(copy: Path) -> None:
    path = copy / "train.mean.blosc"
    whole = path.read_bytes()
    for data in (None, b"", whole[:-3], b"\0" * 100):
        path.unlink(missing_ok=True)
        if data is not None:
            path.write_bytes(data)
        with open_split(copy, "train") as shards, pytest.raises(UserError, match=r"train\.mean\.blosc"):
            shards.mean_map()


def test_a_mean_map_that_is_not_the_one_of_the_manifest(copy: Path) -> None:
    """It decodes, but it is the baseline of other samples."""
    shutil.copy(copy / "test.mean.blosc", copy / "train.mean.blosc")
    with open_split(copy, "train") as shards, pytest.raises(UserError, match=r"train\.mean\.blosc"):
        shards.mean_map()


def test_the_manifest_hash_tells_any_change(copy: Path) -> None:
    before = manifest_of(copy).sha256
    edit(copy, lambda manifest: manifest["splits"]["test"]["shards"][0].update(sha256="0" * 64))
    assert manifest_of(copy).sha256 != before


def test_a_shard_set_of_a_manifest_that_was_read_before(whole: Path) -> None:
    manifest, store = open_store(whole, CacheOptions())
    with ShardDataset(manifest, store, "train") as train, ShardDataset(manifest, store, "test") as test:
        assert train.file_of(6) == str(whole / "train-000002.tar")
        assert test.file_of(0) == str(whole / "test-000000.tar")
