"""The real NYU Depth v2 pairs that MDE_DIST_NYUV2 points to: their units, holes and bytes survive the packing."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from trees import contents, packed

from mde_dist.data.shards import open_split
from mde_dist.packing.pack import PackConfig
from mde_dist.packing.sources import open_source
from mde_dist.shard import main

NYUV2 = Path(os.environ.get("MDE_DIST_NYUV2", "/nonexistent"))
pytestmark = pytest.mark.skipif(not NYUV2.is_dir(), reason="MDE_DIST_NYUV2 names no folder")


def stored(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture).astype(np.int64)


def millimetres(directory: Path, split: str) -> dict[str, np.ndarray]:
    """Source path of the image -> depth as the shards give it back."""
    maps = {}
    with open_split(directory, split) as shards:
        image, depth = np.empty((*shards.size, 3), np.uint8), np.empty(shards.size, np.uint16)
        for sample in range(len(shards)):
            shards.read_into(sample, image, depth)
            maps[shards.meta(sample)["source"]] = depth.copy()
    return maps


def splits_of(directory: Path) -> dict:
    return json.loads((directory / "manifest.json").read_text())["splits"]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("dense") / "shards"
    main(["--source", str(NYUV2 / "densedepth"), "--output", str(output), "--workers", "2"])
    return output


@pytest.fixture(scope="module")
def sync(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("sync") / "shards"
    main(["--source", str(NYUV2 / "bts"), "--output", str(output), "--workers", "2"])
    return output


def test_densedepth_packs_all_pairs_with_indoor_medians_and_the_bytes_of_its_jpegs(dense: Path) -> None:
    splits = splits_of(dense)
    assert (splits["train"]["samples"], splits["test"]["samples"]) == (795, 40)
    for split in splits.values():
        assert 1 < split["depth"]["median"] < 5
        assert split["depth"]["max"] <= 10
        assert split["skipped"] == []
    assert splits["train"]["depth"]["holes"] == 0
    assert (splits["train"]["reencoded_images"], splits["test"]["reencoded_images"]) == (0, 40)
    kept = 0
    for shard in splits["train"]["shards"]:
        with tarfile.open(dense / shard["name"]) as archive:
            files = {member.name: archive.extractfile(member).read() for member in archive}
        for name in files:
            if name.endswith(".json"):
                source = NYUV2 / "densedepth" / json.loads(files[name])["source"]
                assert files[name.removesuffix("json") + "jpg"] == source.read_bytes()
                kept += 1
    assert kept == 795


def test_densedepth_values_are_those_of_the_files_under_the_declared_scales(dense: Path) -> None:
    train, test = millimetres(dense, "train"), millimetres(dense, "test")
    for source in sorted(train)[::40]:
        value = stored(NYUV2 / "densedepth" / source.replace(".jpg", ".png"))
        centre = np.minimum((2 * value + 1) / 2 * 10_000 / 255, 10_000)
        assert np.abs(train[source] - centre)[value > 0].max() <= 0.5
        assert not train[source][value == 0].any()
    for source in test:
        assert np.array_equal(test[source], stored(NYUV2 / "densedepth" / source.replace("_colors", "_depth")))
    assert len(test) == 40


def test_bts_packs_all_pairs_and_every_value_and_hole_is_the_files_own(sync: Path) -> None:
    splits = splits_of(sync)
    assert (splits["train"]["samples"], splits["test"]["samples"]) == (3, 202)
    for name, count in (("train", 3), ("test", 202)):
        maps = millimetres(sync, name)
        assert len(maps) == count
        for source, depth in maps.items():
            path = NYUV2 / "bts" / source
            assert np.array_equal(
                depth, stored(path.with_name(path.name.replace("rgb", "sync_depth")).with_suffix(".png"))
            )
            if name == "train":
                assert 0.245 < (depth == 0).mean() < 0.335
        assert 1 < splits[name]["depth"]["median"] < 5
    assert 0.25 < splits["train"]["depth"]["holes"] < 0.33
    assert splits["test"]["depth"]["holes"] < 0.01


def test_pairs_that_are_in_both_layouts_agree_to_a_quantisation_step(dense: Path, sync: Path) -> None:
    """The 40 test pairs of densedepth are among the 202 of bts, whose depth comes in 4 cm steps."""
    ours = {Path(source).name.split("_")[0]: depth for source, depth in millimetres(dense, "test").items()}
    theirs = {Path(source).stem.split("_")[1]: depth for source, depth in millimetres(sync, "test").items()}
    both = sorted(set(ours) & set(theirs))
    assert len(both) == 40
    for number in both:
        assert np.abs(ours[number].astype(int) - theirs[number]).max() <= 40


def test_identical_bytes_for_two_numbers_of_workers(tmp_path: Path) -> None:
    for workers in (1, 2):
        options = PackConfig(limit=24, samples_per_shard=10, size=(240, 320))
        packed(NYUV2 / "densedepth", tmp_path / f"{workers}", options, workers)
    assert contents(tmp_path / "1") == contents(tmp_path / "2")
    assert splits_of(tmp_path / "1")["train"]["reencoded_images"] == 24


@pytest.mark.parametrize(
    ("name", "pairs"), [("bts_train_24231.txt.gz", 24_231), ("newcrfs_train_36253.txt.gz", 36_253)]
)
def test_the_published_lists_are_read_whole(tmp_path: Path, name: str, pairs: int) -> None:
    text = gzip.decompress((NYUV2 / "lists" / name).read_bytes())
    (tmp_path / "nyudepthv2_train_files_with_gt.txt").write_bytes(text)
    found = open_source(tmp_path).splits["train"].pairs
    assert len({pair.key for pair in found}) == len(found) == pairs
    assert all(pair.image.startswith(f"sync/{pair.scene}/rgb_") for pair in found)
    assert max(len(pair.key) for pair in found) <= 80
    first = text.decode().split()[0].lstrip("/")
    assert found[0].image == f"sync/{first}"


def test_the_lists_of_densedepth_name_scenes(dense: Path) -> None:
    rows = list(csv.reader(io.StringIO((NYUV2 / "densedepth/data/nyu2_train.csv").read_text())))
    scenes = {row[0].split("/")[2].removesuffix("_out") for row in rows}
    with open_split(dense, "train") as shards:
        assert {shards.meta(sample)["scene"] for sample in range(len(shards))} == scenes
        assert len(scenes) == 249
