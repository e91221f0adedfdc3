"""Packing: the same bytes whatever the workers and interruptions, readable by plain WebDataset, in the right units."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import tarfile
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import webdataset
from numcodecs import blosc
from PIL import Image, JpegImagePlugin
from trees import (
    SIZE,
    bts,
    contents,
    densedepth,
    folder,
    jpeg_bytes,
    millimetres,
    packed,
    packed_yet,
    picture,
    silent,
    write,
)
from warm import warm_run, warm_start

from mde_dist.data.config import CacheOptions
from mde_dist.data.depth import DepthScale
from mde_dist.data.manifest import INDEX
from mde_dist.data.shards import open_split
from mde_dist.data.store import open_store
from mde_dist.packing.pack import PackConfig, pack
from mde_dist.packing.probe import check_units, probe
from mde_dist.packing.sources import open_source
from mde_dist.packing.writer import ShardWriter
from mde_dist.shard import main
from mde_dist.utils.errors import UserError


def manifest_of(directory: Path) -> dict:
    return json.loads((directory / "manifest.json").read_text())


def tars(directory: Path, split: str) -> list[Path]:
    return [directory / shard["name"] for shard in manifest_of(directory)["splits"][split]["shards"]]


def members(tar: Path) -> list[tuple[str, bytes]]:
    with tarfile.open(tar) as archive:
        return [(member.name, archive.extractfile(member).read()) for member in archive]


def samples(directory: Path, split: str) -> Iterator[tuple[str, bytes, np.ndarray, dict]]:
    """Key, JPEG bytes, millimetres and record of every sample: by tarfile, numcodecs and NumPy, not by the package."""
    for tar in tars(directory, split):
        files = dict(members(tar))
        for name in files:
            if not name.endswith(".json"):
                continue
            key = name.removesuffix(".json")
            with Image.open(io.BytesIO(files[f"{key}.jpg"])) as image:
                shape = image.size[::-1]
            plain = blosc.decompress(files[f"{key}.depth.blosc"])
            depth = np.frombuffer(plain, "<u2").reshape(shape)
            yield key, files[f"{key}.jpg"], depth, json.loads(files[name])


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shards of a densedepth tree of 8 training and 5 test pairs, 3 in a shard."""
    base = tmp_path_factory.mktemp("dense")
    packed(densedepth(base / "tree", 8, 5), base / "shards")
    return base / "shards"


@pytest.fixture(scope="module")
def sync(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shards of a bts tree of 7 training pairs with holes and 4 test pairs, 3 in a shard."""
    base = tmp_path_factory.mktemp("sync")
    root = bts(base / "tree", 7, 4)
    for path in sorted(root.glob("sync/*/*.png")):  # one pixel that no training map measures
        with Image.open(path) as picture:
            stored = np.array(picture)
        stored[5, 7] = 0
        write(path, stored)
    packed(root, base / "shards")
    return base / "shards"


# --- the same bytes ---


def test_bytes_do_not_depend_on_workers_or_on_the_run(tmp_path: Path) -> None:
    root = densedepth(tmp_path / "tree", 11, 5)
    for name, workers in (("one", 1), ("two", 2), ("three", 3), ("again", 2)):
        packed(root, tmp_path / name, PackConfig(samples_per_shard=2), workers)
    expected = contents(tmp_path / "one")
    assert len(expected) == 6 + 3 + 5  # shards; and index and mean map of two splits, and the manifest
    for name in ("two", "three", "again"):
        assert contents(tmp_path / name) == expected


def test_bytes_do_not_depend_on_workers_where_pairs_are_left_out(tmp_path: Path) -> None:
    root = densedepth(tmp_path / "tree", 24, 3)
    for path in sorted(root.glob("data/nyu2_train/*/*.png"))[::2]:
        write(path, np.zeros(SIZE, np.uint8))
    for workers in (1, 2, 3):
        packed(root, tmp_path / f"{workers}", PackConfig(samples_per_shard=2, skip_bad=True), workers)
    expected = manifest_of(tmp_path / "1")["splits"]["train"]
    assert expected["samples"] == len(expected["skipped"]) == 12
    for workers in (2, 3):
        assert manifest_of(tmp_path / f"{workers}")["splits"]["train"]["skipped"] == expected["skipped"]
        assert contents(tmp_path / f"{workers}") == contents(tmp_path / "1")


def test_bytes_do_not_depend_on_where_the_source_lies(tmp_path: Path) -> None:
    for name in ("here", "there/and/back"):
        packed(bts(tmp_path / name), tmp_path / f"{name}-shards")
    assert contents(tmp_path / "here-shards") == contents(tmp_path / "there/and/back-shards")


# --- the format ---


def test_tar_members_have_fixed_order_time_owner_and_names(dense: Path) -> None:
    for split in ("train", "test"):
        for tar in tars(dense, split):
            with tarfile.open(tar) as archive:
                found = archive.getmembers()
            keys = [member.name.split(".")[0] for member in found[::3]]
            assert [member.name for member in found] == [
                f"{key}.{extension}" for key in keys for extension in ("depth.blosc", "jpg", "json")
            ]
            assert len(set(keys)) == len(keys)
            assert {member.mtime for member in found} == {0}
            assert {(member.uname, member.gname, member.uid, member.gid) for member in found} == {
                ("mde_dist", "mde_dist", 0, 0)
            }
            assert len({member.mode for member in found}) == 1
            assert all(member.isfile() for member in found)


def test_record_of_a_sample_names_scene_source_and_split(sync: Path) -> None:
    records = [record for _, _, _, record in samples(sync, "test")]
    assert records[1] == {
        "scene": "home_office",
        "source": "official_splits/test/home_office/rgb_00001.jpg",
        "split": "test",
    }
    assert {record["split"] for _, _, _, record in samples(sync, "train")} == {"train"}


def check_index(directory: Path, split: str) -> None:
    """Number, place, size and checksum (header and payload) of every member are those that tarfile finds."""
    index = np.load(directory / f"{split}.index.npy", allow_pickle=False)
    assert index.dtype == INDEX
    found = []
    for number, tar in enumerate(tars(directory, split)):
        raw = tar.read_bytes()
        with tarfile.open(tar) as archive:
            for member in archive:
                assert member.offset_data == member.offset + 512
                data = raw[member.offset : member.offset_data] + archive.extractfile(member).read()
                found.append((number, member.offset_data, member.size, zlib.crc32(data)))
    assert len(found) == 3 * len(index)
    for place, row in enumerate(index):
        for column, member in enumerate(("depth", "image", "meta")):
            says = (row["shard"], row[f"{member}_offset"], row[f"{member}_bytes"], row[f"{member}_crc"])
            assert tuple(map(int, says)) == found[3 * place + column]


def test_index_says_where_tarfile_finds_the_members(sync: Path) -> None:
    for split in ("train", "test"):
        check_index(sync, split)


def test_index_is_right_where_a_member_fills_its_last_tar_block(tmp_path: Path) -> None:
    root = folder(tmp_path / "tree", count=4)
    for i, rest in enumerate((0, 1, 511)):
        path = root / f"images/{i:04d}.jpg"
        short = len(jpeg_bytes(picture(i), comment=b"x"))
        path.write_bytes(jpeg_bytes(picture(i), comment=b"x" * (1 + (rest - short) % 512)))
        assert path.stat().st_size % 512 == rest
    packed(root, tmp_path / "shards")
    assert manifest_of(tmp_path / "shards")["splits"]["train"]["reencoded_images"] == 0
    check_index(tmp_path / "shards", "train")


def test_a_tar_is_byte_for_byte_the_one_of_webdatasets_own_writer() -> None:
    ours, theirs = io.BytesIO(), io.BytesIO()
    theirs_too = webdataset.TarWriter(theirs, encoder=False, compress=False, mtime=0, user="mde_dist", group="mde_dist")
    with ShardWriter(ours, "blosc") as writer:
        for number, key in enumerate(["a", "kitchen/0001", "küche", "k" * 99, "long" * 70]):
            members = {"image": bytes(1500 * number), "depth": b"depth" * number, "meta": b"{}"}
            if number == 1:
                del members["meta"]
            writer.write_members(key, members)
            names = {"image": "jpg", "depth": "depth.blosc", "meta": "json"}
            theirs_too.write({"__key__": key} | {names[member]: data for member, data in members.items()})
    theirs_too.close()
    assert ours.getvalue() == theirs.getvalue()


def test_packing_imports_nothing_that_its_workers_do_not_need() -> None:
    code = "import sys, mde_dist.shard; print(sorted({'torch', 'matplotlib', 'webdataset'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def test_plain_webdataset_reads_the_same_pixels_and_millimetres(sync: Path) -> None:
    urls = [str(tar) for tar in tars(sync, "train")]
    seen = set()
    for sample in webdataset.WebDataset(urls, shardshuffle=False):
        number = int(json.loads(sample["json"])["source"].removesuffix(".jpg")[-5:])
        assert sample["jpg"] == jpeg_bytes(picture(number))  # the source's own bytes
        expected = millimetres(number, holes=0.3)
        expected[5, 7] = 0
        plain = blosc.decompress(sample["depth.blosc"])
        assert plain == expected.astype("<u2").tobytes()  # little-endian, row by row, of the image's shape
        seen.add(number)
    assert seen == set(range(7))


def test_png_codec_stores_the_same_millimetres_as_16_bit_png(tmp_path: Path) -> None:
    packed(bts(tmp_path / "tree"), tmp_path / "shards", PackConfig(codec="png"))
    depths = [data for tar in tars(tmp_path / "shards", "test") for name, data in members(tar) if "depth.png" in name]
    for i, data in enumerate(depths):
        with Image.open(io.BytesIO(data)) as stored:
            assert stored.mode in ("I;16", "I")
            assert np.array_equal(np.asarray(stored), millimetres(100 + i))
    assert len(depths) == 3
    assert (tmp_path / "shards/train.mean.png").is_file()


def test_images_that_are_no_baseline_jpeg_are_encoded_without_subsampling(dense: Path) -> None:
    split = manifest_of(dense)["splits"]
    assert split["train"]["reencoded_images"] == 0
    assert split["test"]["reencoded_images"] == 5
    for i, (_, jpeg, _, _) in enumerate(samples(dense, "test")):
        with Image.open(io.BytesIO(jpeg)) as image:
            assert JpegImagePlugin.get_sampling(image) == 0
            assert np.abs(np.asarray(image).astype(int) - picture(100 + i)).mean() < 2


def test_jpeg_quality_is_used_for_what_is_encoded_anew_only(tmp_path: Path) -> None:
    root = densedepth(tmp_path / "tree")
    for quality in (20, 95):
        packed(root, tmp_path / f"q{quality}", PackConfig(jpeg_quality=quality))
    sizes = {
        (quality, split): sum(len(jpeg) for _, jpeg, _, _ in samples(tmp_path / f"q{quality}", split))
        for quality in (20, 95)
        for split in ("train", "test")
    }
    assert sizes[20, "train"] == sizes[95, "train"]
    assert sizes[20, "test"] < 0.7 * sizes[95, "test"]


# --- order ---


def test_test_split_keeps_the_order_of_its_list_and_training_is_spread(tmp_path: Path) -> None:
    packed(bts(tmp_path / "tree", 30, 8), tmp_path / "shards", PackConfig(samples_per_shard=5))
    order = {}
    for split in ("train", "test"):
        records = [record["source"] for _, _, _, record in samples(tmp_path / "shards", split)]
        order[split] = [int(source.removesuffix(".jpg")[-5:]) for source in records]
    assert order["test"] == list(range(8))
    assert sorted(order["train"]) == list(range(30))
    neighbours = sum(abs(a - b) == 1 for a, b in zip(order["train"], order["train"][1:], strict=False))
    assert neighbours < 10
    assert [shard["samples"] for shard in manifest_of(tmp_path / "shards")["splits"]["test"]["shards"]] == [5, 3]


# --- options ---


def test_size_resizes_image_and_depth_alike(tmp_path: Path) -> None:
    """Blocks of 2x2 equal pixels, halved: every target pixel is its block, in image and depth."""
    image, depth = picture(1), millimetres(1)
    depth[3, 4] = 0
    big_depth = depth.repeat(2, 0).repeat(2, 1)
    big_depth[0, 0] = big_depth[11, 12] = big_depth[15, 17] = 0  # a hole in a block that holds a measurement
    write(tmp_path / "tree/images/a.png", image.repeat(2, 0).repeat(2, 1))
    write(tmp_path / "tree/depth/a.png", big_depth)
    packed(tmp_path / "tree", tmp_path / "shards", PackConfig(size=SIZE))
    assert manifest_of(tmp_path / "shards")["image_size"] == list(SIZE)
    _, jpeg, stored, _ = next(samples(tmp_path / "shards", "train"))
    assert np.array_equal(stored, depth)
    with Image.open(io.BytesIO(jpeg)) as judge:
        assert judge.size == SIZE[::-1]
        assert np.abs(np.asarray(judge).astype(int) - image).max() < 25
        assert np.abs(np.asarray(judge).astype(int) - image).mean() < 2
    assert manifest_of(tmp_path / "shards")["splits"]["train"]["reencoded_images"] == 1


def test_size_makes_pairs_of_several_sizes_one_size(tmp_path: Path) -> None:
    folder(tmp_path / "tree", count=4)
    folder(tmp_path / "tree", count=1, first=4, size=(48, 32))
    with pytest.raises(UserError) as error:
        packed(tmp_path / "tree", tmp_path / "shards")
    said = str(error.value)
    assert "0004.jpg is 48x32, but the others are 24x32" in said
    assert "--size" in said
    assert not packed_yet(tmp_path / "shards")
    packed(tmp_path / "tree", tmp_path / "shards", PackConfig(size=(12, 48), samples_per_shard=3))
    assert {depth.shape for _, _, depth, _ in samples(tmp_path / "shards", "train")} == {(12, 48)}
    with open_split(tmp_path / "shards", "train") as shards:
        image, depth = np.empty((12, 48, 3), np.uint8), np.empty((12, 48), np.uint16)
        for sample in range(5):
            shards.read_into(sample, image, depth)
            assert depth.any()


def test_same_size_given_keeps_the_bytes_of_the_images(tmp_path: Path) -> None:
    root = bts(tmp_path / "tree")
    packed(root, tmp_path / "plain")
    packed(root, tmp_path / "sized", PackConfig(size=SIZE, samples_per_shard=3))
    assert contents(tmp_path / "sized") == contents(tmp_path / "plain")


def test_limit_packs_the_first_pairs_of_each_split(tmp_path: Path) -> None:
    packed(bts(tmp_path / "tree", 6, 5), tmp_path / "shards", PackConfig(limit=2))
    for split, first in (("train", 0), ("test", 0)):
        found = {record["source"][-9:-4] for _, _, _, record in samples(tmp_path / "shards", split)}
        assert found == {f"{first:05d}", f"{first + 1:05d}"}


# --- pairs that cannot be used ---


def damaged_tree(root: Path) -> tuple[Path, list[Path]]:
    """A bts tree with 9 training pairs of which 3 cannot be used: cut off, missing, without measurement."""
    bts(root, 9, 3)
    pairs = open_source(root, "bts").splits["train"].pairs
    cut, gone, empty = (root / pair.depth for pair in (pairs[1], pairs[4], pairs[7]))
    cut.write_bytes(cut.read_bytes()[:100])
    gone.unlink()
    write(empty, np.zeros(SIZE, np.uint16))
    return root, [cut, gone, empty]


def test_a_bad_pair_stops_the_run_is_named_and_nothing_is_published(tmp_path: Path) -> None:
    root, (cut, gone, empty) = damaged_tree(tmp_path / "tree")
    with pytest.raises(UserError) as error:  # missing files are known before any work
        packed(root, tmp_path / "shards")
    said = str(error.value)
    assert f"{gone} is missing" in said
    assert "1 of 9" in said
    assert "--skip-bad" in said
    write(gone, millimetres(4))
    with pytest.raises(UserError) as error:
        packed(root, tmp_path / "shards")
    said = str(error.value)
    assert str(cut) in said or str(empty) in said
    assert "--skip-bad" in said
    assert not packed_yet(tmp_path / "shards")
    assert {path.name for path in tmp_path.iterdir()} == {root.name, "shards"}


def test_a_pair_without_a_valid_pixel_is_a_bad_pair(tmp_path: Path) -> None:
    root = bts(tmp_path / "tree", 4, 3)
    empty = root / open_source(root).splits["train"].pairs[2].depth
    write(empty, np.zeros(SIZE, np.uint16))
    with pytest.raises(UserError) as error:
        packed(root, tmp_path / "shards")
    assert f"{empty} has no valid pixel" in str(error.value)
    assert "--skip-bad" in str(error.value)
    packed(root, tmp_path / "shards", PackConfig(samples_per_shard=3, skip_bad=True))
    assert manifest_of(tmp_path / "shards")["splits"]["train"]["samples"] == 3


def test_reasons_for_leaving_out_are_the_same_words_in_every_run(tmp_path: Path) -> None:
    root = bts(tmp_path / "tree", 6, 3)
    pairs = open_source(root).splits["train"].pairs
    (root / pairs[0].depth).write_bytes(b"not a picture")
    (root / pairs[1].image).write_bytes(b"not a picture")
    (root / pairs[2].depth).write_bytes((root / pairs[2].depth).read_bytes()[:200])
    for name in ("first", "second"):
        packed(root, tmp_path / name, PackConfig(skip_bad=True))
    said = [manifest_of(tmp_path / name)["splits"]["train"]["skipped"] for name in ("first", "second")]
    assert len(said[0]) == 3
    assert said[0] == said[1]
    assert not any(" object at 0x" in reason for reason in said[0])  # an address in memory helps nobody


def test_skip_bad_leaves_out_counts_and_names(tmp_path: Path) -> None:
    root, bad = damaged_tree(tmp_path / "tree")
    packed(root, tmp_path / "shards", PackConfig(samples_per_shard=3, skip_bad=True), workers=2)
    split = manifest_of(tmp_path / "shards")["splits"]["train"]
    assert split["samples"] == sum(shard["samples"] for shard in split["shards"]) == 6
    assert len(split["skipped"]) == 3
    for path in bad:
        assert sum(str(path) in reason for reason in split["skipped"]) == 1
    assert manifest_of(tmp_path / "shards")["splits"]["test"]["skipped"] == []
    packed_numbers = {int(record["source"][-9:-4]) for _, _, _, record in samples(tmp_path / "shards", "train")}
    assert packed_numbers == {0, 2, 3, 5, 6, 8}
    with open_split(tmp_path / "shards", "train") as shards:
        assert len(shards) == 6


def test_a_shard_of_bad_pairs_only_is_not_published(tmp_path: Path) -> None:
    root = bts(tmp_path / "tree", 2, 6)
    for pair in open_source(root).splits["test"].pairs[2:4]:  # the second of three shards
        (root / pair.image).write_bytes(b"\xff\xd8\xff")
    packed(root, tmp_path / "shards", PackConfig(samples_per_shard=2, skip_bad=True))
    split = manifest_of(tmp_path / "shards")["splits"]["test"]
    assert split["samples"] == 4
    assert {path.name for path in (tmp_path / "shards").glob("test*.tar")} == {s["name"] for s in split["shards"]}
    with open_split(tmp_path / "shards", "test") as shards:
        image, depth = np.empty((*SIZE, 3), np.uint8), np.empty(SIZE, np.uint16)
        for sample, number in enumerate((0, 1, 4, 5)):
            shards.read_into(sample, image, depth)
            assert np.array_equal(depth, millimetres(100 + number))


def test_a_split_of_bad_pairs_only_is_refused(tmp_path: Path) -> None:
    root = bts(tmp_path / "tree")
    for path in root.glob("sync/*/*.png"):
        path.write_bytes(b"")
    with pytest.raises(UserError, match="split train: none of the pairs") as error:
        packed(root, tmp_path / "shards", PackConfig(skip_bad=True))
    assert "sync_depth_0000" in str(error.value)
    assert not packed_yet(tmp_path / "shards")
    for path in root.glob("sync/*/*.png"):
        path.unlink()
    with pytest.raises(UserError, match="split train"):
        packed(root, tmp_path / "shards", PackConfig(skip_bad=True))
    assert not packed_yet(tmp_path / "shards")


# --- runs that are cut off ---


def identity(directory: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of the tars: another file or another write changes them."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in directory.glob("*.tar")}


def slow_tree(root: Path) -> Path:
    """64 pairs of 480x640 (links to two files): each takes a few milliseconds, so a kill meets a shard half written."""
    files = folder(root.parent / "files", count=2, size=(480, 640))
    for i in range(64):
        for kind, suffix in (("images", "jpg"), ("depth", "png")):
            link = root / f"train/{kind}/{i:04d}.{suffix}"
            link.parent.mkdir(parents=True, exist_ok=True)
            link.hardlink_to(files / f"{kind}/{i % 2:04d}.{suffix}")
    return root


def test_a_killed_run_goes_on_and_ends_with_the_bytes_of_an_undisturbed_one(tmp_path: Path) -> None:
    root, partial = slow_tree(tmp_path / "tree"), tmp_path / "shards/.packing"
    options = {"source": root, "output": tmp_path / "shards", "workers": 2}
    options |= {"samples-per-shard": 16, "size": "240x320"}
    with warm_start("shard", **options) as run:  # which kills it, and its workers
        deadline = time.monotonic() + 60
        while not (any(partial.glob("*.part")) and any(partial.glob(".*tar*.tmp"))):  # one done, one in the middle
            assert run.poll() is None, "the run ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.002)
    assert not packed_yet(tmp_path / "shards")
    before = finished(partial)
    assert 0 < len(before) < 4

    again = warm_run("shard", **options)
    assert again.returncode == 0, again.stderr
    assert before.items() <= identity(tmp_path / "shards").items()  # not done anew
    assert not partial.exists()

    packed(root, tmp_path / "undisturbed", PackConfig(samples_per_shard=16, size=(240, 320)), workers=2)
    assert contents(tmp_path / "shards") == contents(tmp_path / "undisturbed")


def finished(partial: Path) -> dict[str, tuple[int, int]]:
    """The shards of a run that did not end which are whole: those with a part file."""
    return {name: it for name, it in identity(partial).items() if (partial / name).with_suffix(".part").is_file()}


def interrupted(tmp_path: Path) -> tuple[Path, Path, dict[str, tuple[int, int]]]:
    """A run that a bad pair in the last shard ended: the tree, the bad file, and what the shards before it are."""
    root = bts(tmp_path / "tree", 4, 9)
    bad = root / open_source(root).splits["test"].pairs[8].depth
    whole = bad.read_bytes()
    bad.write_bytes(whole[:50])
    with pytest.raises(UserError, match="finished shards are kept"):
        packed(root, tmp_path / "shards")
    bad.with_suffix(".whole").write_bytes(whole)
    kept = finished(tmp_path / "shards/.packing")
    assert set(kept) == {"train-000000.tar", "train-000001.tar", "test-000000.tar", "test-000001.tar"}
    return root, bad, kept


def test_a_shard_that_a_bad_pair_ended_does_not_stand_under_its_name(tmp_path: Path) -> None:
    _, _, kept = interrupted(tmp_path)
    assert identity(tmp_path / "shards/.packing") == kept


def test_finished_shards_are_kept_when_the_bad_pair_is_left_out(tmp_path: Path) -> None:
    root, bad, kept = interrupted(tmp_path)
    packed(root, tmp_path / "shards", PackConfig(samples_per_shard=3, skip_bad=True))
    assert kept.items() <= identity(tmp_path / "shards").items()
    packed(root, tmp_path / "fresh", PackConfig(samples_per_shard=3, skip_bad=True))
    assert contents(tmp_path / "shards") == contents(tmp_path / "fresh")
    assert str(bad) in manifest_of(tmp_path / "shards")["splits"]["test"]["skipped"][0]


def test_finished_shards_are_kept_when_the_bad_pair_is_mended(tmp_path: Path) -> None:
    root, bad, kept = interrupted(tmp_path)
    bad.write_bytes(bad.with_suffix(".whole").read_bytes())
    packed(root, tmp_path / "shards")
    packed(root, tmp_path / "fresh")
    assert contents(tmp_path / "shards") == contents(tmp_path / "fresh")
    assert kept.items() <= identity(tmp_path / "shards").items()  # as the message promised


def test_a_source_file_that_changed_between_two_runs_is_packed_anew(tmp_path: Path) -> None:
    root, bad, _ = interrupted(tmp_path)
    bad.write_bytes(bad.with_suffix(".whole").read_bytes())
    changed = root / open_source(root).splits["test"].pairs[0].depth  # in a finished shard
    write(changed, millimetres(55))
    packed(root, tmp_path / "shards")
    depths = [depth for _, _, depth, _ in samples(tmp_path / "shards", "test")]
    assert np.array_equal(depths[0], millimetres(55))
    packed(root, tmp_path / "fresh")
    assert contents(tmp_path / "shards") == contents(tmp_path / "fresh")


@pytest.mark.parametrize(
    "other",
    [PackConfig(samples_per_shard=3, codec="png"), PackConfig(samples_per_shard=2), PackConfig(size=(12, 16))],
)
def test_other_options_do_not_go_on_with_shards_of_the_first(tmp_path: Path, other: PackConfig) -> None:
    root, bad, _ = interrupted(tmp_path)
    bad.write_bytes(bad.with_suffix(".whole").read_bytes())
    packed(root, tmp_path / "shards", other)
    packed(root, tmp_path / "fresh", other)
    assert contents(tmp_path / "shards") == contents(tmp_path / "fresh")


def test_another_scale_does_not_go_on_with_shards_of_the_first(tmp_path: Path) -> None:
    root, bad, _ = interrupted(tmp_path)
    bad.write_bytes(bad.with_suffix(".whole").read_bytes())
    for name in ("shards", "fresh"):
        source = open_source(root, scales={"": DepthScale(0.0005)})
        pack(source, tmp_path / name, PackConfig(samples_per_shard=3), 1, silent)
    assert contents(tmp_path / "shards") == contents(tmp_path / "fresh")
    depths = [depth for _, _, depth, _ in samples(tmp_path / "shards", "test")]
    assert np.abs(depths[0] - millimetres(100) / 2).max() <= 0.5


# --- units ---


def scaled_folder(root: Path, factors: dict[str, float]) -> Path:
    """Splits whose 16-bit files hold the millimetres times a factor."""
    for split, factor in factors.items():
        for i in range(2):
            write(root / f"{split}/images/{i}.jpg", jpeg_bytes(picture(i)))
            write(root / f"{split}/depth/{i}.png", (millimetres(i) * factor).astype(np.uint16))
    return root


@pytest.mark.parametrize(
    ("factors", "words"),
    [
        ({"train": 10}, ("split train", r"median depth is 2[45]\.", r"0\.8\.\.10 m")),  # a tenth of a millimetre
        ({"train": 0.1}, ("split train", r"median depth is 0\.2[45]", r"0\.8\.\.10 m")),  # centimetres
        ({"train": 1, "test": 0.1}, ("split test", r"median depth is 0\.2[45]")),
        (
            {"train": 1, "test": 3.5},
            ("more than 3x", r"train 2\.\d+ m", r"test 8\.\d+ m"),
        ),  # both possible, not together
        ({"train": 0.4, "test": 1.3}, ("more than 3x", r"train 1\.\d+ m", r"test 3\.\d+ m")),
    ],
)
def test_wrong_units_are_refused_and_overruled_by_a_given_scale(
    tmp_path: Path, factors: dict[str, float], words: tuple[str, ...]
) -> None:
    root = scaled_folder(tmp_path / "tree", factors)
    base = ["--source", str(root), "--output", str(tmp_path / "shards"), "--workers", "1"]
    with pytest.raises(UserError) as error:
        main(base)
    for word in (*words, "--depth-scale"):
        assert re.search(word, str(error.value))
    assert "\n" not in str(error.value)
    assert not list(tmp_path.glob("*shards*"))  # nothing was begun
    scales = [f"{split}={0.001 / factor}" for split, factor in factors.items()]
    main([*base, "--depth-scale", *scales])
    for split in factors:
        depth = next(samples(tmp_path / "shards", split))[2]
        truth = min(np.abs(depth.astype(int) - millimetres(i)).max() for i in range(2))
        assert truth <= 10
        assert "given by --depth-scale" in manifest_of(tmp_path / "shards")["splits"][split]["depth_scale"]


def test_units_that_can_be_right_are_accepted(tmp_path: Path) -> None:
    for factors in ({"train": 1, "test": 2.5}, {"train": 0.4, "test": 1.1}, {"train": 3.5, "test": 1.5}):
        source = open_source(scaled_folder(tmp_path / str(factors["train"]), factors))
        check_units(source, probe(source), [])


def test_a_scale_given_for_one_split_leaves_the_other_checked(tmp_path: Path) -> None:
    root = scaled_folder(tmp_path / "tree", {"train": 10, "test": 10})
    with pytest.raises(UserError, match=r"split test: the median depth is 2[45]\."):
        main(["--source", str(root), "--output", str(tmp_path / "shards"), "--depth-scale", "train=0.0001"])


def test_a_given_scale_overrules_the_check_itself(tmp_path: Path) -> None:
    """A car park, say: ten times the depth of a room."""
    root = scaled_folder(tmp_path / "tree", {"train": 1})
    for name, scale in (("split", "train=0.01"), ("all", "0.01")):
        main(["--source", str(root), "--output", str(tmp_path / name), "--workers", "1", "--depth-scale", scale])
        assert 20 < manifest_of(tmp_path / name)["splits"]["train"]["depth"]["median"] < 30


def test_8_bit_depth_read_as_millimetres_is_refused(tmp_path: Path) -> None:
    """The mistake that has cost published projects their numbers."""
    root = densedepth(tmp_path / "tree")
    source = open_source(root, scales={"train": DepthScale(0.001)})
    with pytest.raises(UserError, match=r"split train: the median depth is 0\.06"):
        check_units(source, probe(source), [])


def test_holes_do_not_count_in_the_median_of_the_probe(tmp_path: Path) -> None:
    root = bts(tmp_path / "tree")
    for path in root.glob("sync/*/*.png"):
        depth = millimetres(0)
        depth[:, :25] = 0  # more than half of the pixels
        write(path, depth)
    found = probe(open_source(root))
    assert found["train"].holes > 0.7
    assert found["train"].median == pytest.approx(np.median(millimetres(0)[::4, 25:][:, 3::4]) / 1000, abs=0.05)
    assert found["train"].size == SIZE


def test_maps_with_very_few_measurements_are_not_called_wrong_units(tmp_path: Path) -> None:
    root = bts(tmp_path / "tree")
    for path in root.glob("sync/*/*.png"):
        depth = np.zeros(SIZE, np.uint16)
        depth[1::2, 1::2] = 2500
        write(path, depth)
    source = open_source(root)
    found = probe(source)
    assert found["train"].median == 2.5
    check_units(source, found, [])


# --- manifest ---


@pytest.mark.parametrize("layout", ["dense", "sync"])
def test_statistics_are_those_of_numpy_over_the_decoded_maps(layout: str, request: pytest.FixtureRequest) -> None:
    directory = request.getfixturevalue(layout)
    for split, said in manifest_of(directory)["splits"].items():
        maps = np.stack([depth for _, _, depth, _ in samples(directory, split)])
        valid = maps[maps > 0].astype(np.float64) / 1000
        assert said["samples"] == len(maps)
        assert said["depth"]["min"] == valid.min()
        assert said["depth"]["max"] == valid.max()
        assert said["depth"]["median"] == np.quantile(valid, 0.5, method="inverted_cdf")
        assert said["depth"]["mean"] == pytest.approx(valid.mean(), rel=1e-12)
        assert said["depth"]["holes"] == pytest.approx((maps == 0).mean(), rel=1e-12)


@pytest.mark.parametrize("layout", ["dense", "sync"])
def test_mean_map_is_the_mean_over_measurements(layout: str, request: pytest.FixtureRequest) -> None:
    directory = request.getfixturevalue(layout)
    for split in ("train", "test"):
        maps = np.stack([depth for _, _, depth, _ in samples(directory, split)]).astype(np.float64)
        plain = blosc.decompress((directory / f"{split}.mean.blosc").read_bytes())
        stored = np.frombuffer(plain, "<u2").reshape(SIZE)
        counts = (maps > 0).sum(0)
        measured = counts > 0
        mean = maps.sum(0) / np.maximum(counts, 1)
        assert np.abs(stored - mean)[measured].max() <= 0.5
        never = np.flatnonzero(~measured)
        if layout == "sync" and split == "train":
            assert 5 * SIZE[1] + 7 in never
            overall = maps[maps > 0].mean()  # where none was measured
            assert np.abs(stored[~measured] - overall).max() <= 0.5
        with open_split(directory, split) as shards:
            assert np.array_equal(shards.mean_map(), stored)


def test_manifest_counts_bytes_and_hashes_what_lies_there(sync: Path) -> None:
    manifest, lying = manifest_of(sync), contents(sync)
    named = {"manifest.json"}
    for name, split in manifest["splits"].items():
        assert split["samples"] == {"train": 7, "test": 4}[name] == sum(shard["samples"] for shard in split["shards"])
        for shard in split["shards"]:
            assert lying[shard["name"]] == shard["sha256"]
            assert (sync / shard["name"]).stat().st_size == shard["bytes"]
            assert len(members(sync / shard["name"])) == 3 * shard["samples"]
        for file in (split["index"], split["mean_map"]):
            assert set(file) == {"name", "bytes", "sha256"}
            assert lying[file["name"]] == file["sha256"]
            assert (sync / file["name"]).stat().st_size == file["bytes"]
        named |= {split["index"]["name"], split["mean_map"]["name"], *(shard["name"] for shard in split["shards"])}
    assert set(lying) == named  # and nothing else
    assert (manifest["format"], manifest["version"]) == ("mde_dist.shards", 2)
    assert manifest["image_size"] == list(SIZE)
    assert manifest["source"]["layout"] == "bts"


def test_packing_returns_the_manifest_that_opening_reads(tmp_path: Path) -> None:
    made = pack(open_source(bts(tmp_path / "tree")), tmp_path / "shards", PackConfig(samples_per_shard=3), 1, silent)
    read = open_store(tmp_path / "shards", CacheOptions())[0]
    assert (made.sha256, made.raw, made.splits) == (read.sha256, read.raw, read.splits)
    assert (made.codec, made.size, made.layout) == (read.codec, read.size, read.layout)


def test_progress_counts_pairs_up_to_the_total(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    source = open_source(bts(tmp_path / "tree", 5, 4))
    pack(source, tmp_path / "shards", PackConfig(samples_per_shard=2), 1, lambda *counts: told.append(counts))
    assert {total for _, total in told} == {9}
    done = [count for count, _ in told]
    assert done == sorted(done)
    assert done[-1] == 9
