"""Every layout that people have: recognised, packed, and the same metres in the shards as in its files."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from trees import (
    MAT_SIZE,
    bts,
    densedepth,
    folder,
    h5,
    h5_bytes,
    h5_tars,
    labeled_mat,
    marigold,
    millimetres,
    newcrfs,
    picture,
    silent,
    write,
    zipped,
)

from mde_dist.data.depth import DepthScale
from mde_dist.data.shards import open_split
from mde_dist.packing.inspect import Layout
from mde_dist.packing.pack import PackConfig, pack
from mde_dist.packing.sources import EXPECTED, LAYOUTS, BadPair, Source, open_source
from mde_dist.packing.sources.official import OFFICIAL_TEST, official_split, test_scenes
from mde_dist.shard import main
from mde_dist.utils.errors import UserError

NYUV2 = Path(os.environ.get("MDE_DIST_NYUV2", "/nonexistent"))
real = pytest.mark.skipif(not NYUV2.is_dir(), reason="MDE_DIST_NYUV2 names no folder")

DENSE_STEP = 1000 * 10 / 255 / 2
"""Half a step of the 8-bit quantiser, millimetres."""
Make = Callable[[Path], Path]


@pytest.fixture(scope="module")
def mat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return labeled_mat(tmp_path_factory.mktemp("mat") / "nyu_depth_v2_labeled.mat")


def zip_of(make: Make, prefix: str = "") -> Make:
    return lambda root: zipped(make(root / "tree"), root / "source.zip", prefix)


def h5_below(place: str, lists: bool) -> Make:
    def make(root: Path) -> Path:
        h5(root / place, lists=lists)
        return root

    return make


FILES = {  # layout, tree, holes of training and test, millimetres by which depth may differ
    "densedepth": ("densedepth", densedepth, 0.0, 0.0, DENSE_STEP + 0.5),
    "densedepth zip": ("densedepth", zip_of(densedepth), 0.0, 0.0, DENSE_STEP + 0.5),
    "densedepth zip nyu_data/": ("densedepth", zip_of(densedepth, "nyu_data/"), 0.0, 0.0, DENSE_STEP + 0.5),
    "densedepth zip any/": ("densedepth", zip_of(densedepth, "kaggle/"), 0.0, 0.0, DENSE_STEP + 0.5),
    "bts": ("bts", bts, 0.3, 0.0, 0),
    "bts zip": ("bts", zip_of(bts), 0.3, 0.0, 0),
    "marigold": ("marigold", marigold, 0.3, 0.3, 0),
    "marigold zip": ("marigold", zip_of(marigold), 0.3, 0.3, 0),
    "marigold without lists": ("marigold", lambda root: marigold(root, lists=False), 0.3, 0.3, 0),
    "h5": ("h5", h5, 0.1, 0.1, 0),
    "h5 listed": ("h5", lambda root: h5(root, lists=True), 0.1, 0.1, 0),
    "h5 below nyudepth_hdf5": ("h5", h5_below("nyudepth_hdf5", False), 0.1, 0.1, 0),
    "h5 below data, listed": ("h5", h5_below("data/nyudepth_hdf5", True), 0.1, 0.1, 0),
    "h5 zip": ("h5", zip_of(h5), 0.1, 0.1, 0),
    "h5 tars": ("h5", h5_tars, 0.1, 0.1, 0),
}


@pytest.mark.parametrize("name", FILES)
def test_the_shards_of_a_layout_hold_the_metres_of_its_files(tmp_path: Path, name: str) -> None:
    layout, make, train_holes, test_holes, step = FILES[name]
    source = open_source(make(tmp_path))
    assert source.layout == layout
    pack(source, tmp_path / "shards", PackConfig(samples_per_shard=3), 1, silent)
    for split, count, first, holes in (("train", 4, 0, train_holes), ("test", 3, 100, test_holes)):
        expected = [(picture(first + i), millimetres(first + i, holes=holes)) for i in range(count)]
        found = shards_of(tmp_path / "shards", split)
        assert len(found) == count
        assert [source.missing(pair) for pair in source.splits[split].pairs] == [[]] * count
        for image, depth in found:
            near = min(expected, key=lambda pair: np.abs(pair[0].astype(int) - image).sum())
            assert np.array_equal(depth == 0, near[1] == 0)
            assert np.abs(depth.astype(int) - near[1]).max() <= step
    manifest = json.loads((tmp_path / "shards/manifest.json").read_text())
    kind = {"densedepth": "filled", "marigold": "raw"}.get(layout, "as given")
    assert [split["depth_map"] for split in manifest["splits"].values()] == [kind, kind]


def shards_of(directory: Path, split: str) -> list[tuple[np.ndarray, np.ndarray]]:
    found = []
    with open_split(directory, split) as shards:
        for sample in range(len(shards)):
            image, depth = np.empty((*shards.size, 3), np.uint8), np.empty(shards.size, np.uint16)
            shards.read_into(sample, image, depth)
            found.append((image, depth))
    return found


@pytest.mark.parametrize("name", ["densedepth", "bts", "h5"])
def test_keys_and_scenes_are_the_same_however_the_files_are_kept(tmp_path: Path, name: str) -> None:
    kept = [kept for kept, (layout, *_) in FILES.items() if layout == name]
    sources = [open_source(FILES[how][1](tmp_path / how.replace("/", "-"))) for how in kept]
    for split in ("train", "test"):
        found = [sorted((pair.key, pair.scene) for pair in source.splits[split].pairs) for source in sources]
        assert all(other == found[0] for other in found)
        if name == "h5" and split == "train":
            assert found[0][0] == ("basement_0001a-00001", "basement_0001a")


@pytest.mark.parametrize("name", ["densedepth zip", "h5 tars", "h5 zip", "bts"])
def test_a_source_that_travelled_reads_in_many_threads_what_it_reads_alone(tmp_path: Path, name: str) -> None:
    source = open_source(FILES[name][1](tmp_path))
    split = source.splits["train"]
    alone = [source.read(pair, split.scale).depth for pair in split.pairs]
    travelled: Source = pickle.loads(pickle.dumps(source))
    with ThreadPoolExecutor(8) as threads:
        together = list(threads.map(lambda pair: travelled.read(pair, split.scale).depth, split.pairs * 25))
    assert all(np.array_equal(depth, alone[i % 4]) for i, depth in enumerate(together))
    assert [travelled.stamp(pair) for pair in split.pairs] == [source.stamp(pair) for pair in split.pairs]


def test_a_zip_is_packed_by_worker_processes_into_the_bytes_of_its_folder(tmp_path: Path) -> None:
    tree = densedepth(tmp_path / "tree")
    for name, root in (("folder", tree), ("zip", zipped(tree, tmp_path / "nyu_data.zip"))):
        pack(open_source(root), tmp_path / name, PackConfig(samples_per_shard=2), 2, silent)
    tars = sorted(path.name for path in (tmp_path / "folder").glob("*.tar"))
    assert len(tars) == 4
    for tar in tars:
        assert (tmp_path / "folder" / tar).read_bytes() == (tmp_path / "zip" / tar).read_bytes()


def test_a_zip_made_on_windows_or_on_a_mac_is_read(tmp_path: Path) -> None:
    tree = densedepth(tmp_path / "tree")
    plain = open_source(tree)
    windows, mac = tmp_path / "windows.zip", zipped(tree, tmp_path / "mac.zip", "nyu/")
    names = {path.relative_to(tree).as_posix(): path.read_bytes() for path in tree.rglob("*") if path.is_file()}
    with zipfile.ZipFile(windows, "w") as archive:
        for name, data in names.items():
            archive.writestr(name.replace("/", "|"), data)
    data = windows.read_bytes()
    for name in names:  # zipfile itself writes '/' only
        data = data.replace(name.replace("/", "|").encode(), name.replace("/", "\\").encode())
    windows.write_bytes(data)
    with zipfile.ZipFile(mac, "a") as archive:
        for name in names:
            archive.writestr(f"__MACOSX/nyu/{name}", b"its notes")
    for path in (windows, mac):
        source = open_source(path)
        assert source.splits == plain.splits
        for split in source.splits.values():
            assert all(not source.missing(pair) and source.read(pair, split.scale) for pair in split.pairs)


@pytest.mark.parametrize("kind", ["zip", "mat"])
def test_a_forked_process_opens_the_file_for_itself(tmp_path: Path, mat: Path, kind: str) -> None:
    """One that shared its parent's handle would move the parent's place in the file, and the parent its own."""
    root = mat if kind == "mat" else zipped(densedepth(tmp_path / "tree", 60), tmp_path / "nyu_data.zip")
    source = open_source(root)
    split = source.splits["train"]
    pairs = split.pairs[:60]
    expected = [source.read(pair, split.scale).depth for pair in pairs]
    child = os.fork()
    if not child:
        try:
            good = all(
                np.array_equal(source.read(pair, split.scale).depth, depth)
                for _ in range(20)
                for pair, depth in zip(pairs, expected, strict=True)
            )
            os._exit(0 if good else 1)
        except BaseException:
            os._exit(2)
    for _ in range(20):
        for pair, depth in zip(pairs, expected, strict=True):
            assert np.array_equal(source.read(pair, split.scale).depth, depth)
    assert os.waitpid(child, 0)[1] == 0


# --- labeled ---


def test_the_labelled_file_has_the_official_split_and_its_metres_turned_upright(mat: Path) -> None:
    for root in (mat, mat.parent):
        source = open_source(root)
        assert source.layout == "labeled"
        assert {name: len(split.pairs) for name, split in source.splits.items()} == {"train": 795, "test": 654}
        assert [pair.key for pair in source.splits["test"].pairs[:2]] == ["kitchen_0004-00000", "kitchen_0004-00001"]
        assert source.splits["train"].pairs[0].key == "office_0003-00002"
        assert {split.depth_map for split in source.splits.values()} == {"filled"}
    for split in source.splits.values():
        for pair in split.pairs[::60]:
            index = int(pair.key[-5:])
            raw = source.read(pair, split.scale)
            assert np.array_equal(raw.depth, millimetres(index % 97, MAT_SIZE))
            assert np.array_equal(raw.image, picture(index % 97, MAT_SIZE))
    assert not {p.scene for p in source.splits["train"].pairs} & {p.scene for p in source.splits["test"].pairs}


def test_the_labelled_file_packs_in_worker_processes_and_gives_its_raw_maps_when_asked(
    mat: Path, tmp_path: Path
) -> None:
    arguments = ["--source", str(mat), "--output", str(tmp_path / "shards"), "--limit", "20", "--workers", "2"]
    main([*arguments, "--depth-map", "raw"])
    manifest = json.loads((tmp_path / "shards/manifest.json").read_text())
    for split in manifest["splits"].values():
        assert split["depth_map"] == "raw"
        assert 0.2 < split["depth"]["holes"] < 0.4
    expected = {millimetres(i, MAT_SIZE, 0.3).tobytes() for i in range(97)}
    assert all(depth.tobytes() in expected for _, depth in shards_of(tmp_path / "shards", "train"))


def test_the_command_line_offers_every_layout() -> None:
    assert set(get_args(Layout)) == {*LAYOUTS, "rooms"}
    assert set(LAYOUTS) == set(EXPECTED)


def test_the_table_of_the_official_split() -> None:
    split = official_split()
    assert len(split) == 1449
    assert sum(name == "test" for name, _ in split) == OFFICIAL_TEST
    assert len(test_scenes()) == 215
    assert [split[index][0] for index in (0, 2, 45, 1448)] == ["test", "train", "test", "test"]


# --- which depth map ---


@pytest.mark.parametrize(("make", "layout"), [(newcrfs, "bts"), (marigold, "marigold")])
def test_of_two_depth_maps_the_one_asked_for_is_read(tmp_path: Path, make: Make, layout: str) -> None:
    root = make(tmp_path)
    for asked, holes in ((None, 0.3), ("raw", 0.3), ("filled", 0.0)):
        source = open_source(root, depth_map=asked)
        split = source.splits["train"]
        assert (source.layout, split.depth_map) == (layout, asked or "raw")
        for i, pair in enumerate(split.pairs):
            assert np.array_equal(source.read(pair, split.scale).depth, millimetres(i, holes=holes))


@pytest.mark.parametrize(
    ("make", "asked"), [(densedepth, "raw"), (bts, "filled"), (h5, "raw"), (h5_tars, "filled"), (folder, "filled")]
)
def test_a_depth_map_that_the_layout_lacks_is_refused(tmp_path: Path, make: Make, asked: str) -> None:
    with pytest.raises(UserError, match=f"--depth-map {asked}: ") as error:
        open_source(make(tmp_path), depth_map=asked)
    assert "\n" not in str(error.value)


def test_a_split_without_a_second_map_keeps_the_one_it_has(tmp_path: Path) -> None:
    source = open_source(newcrfs(bts(tmp_path, train=0)), depth_map="filled")
    assert {name: split.depth_map for name, split in source.splits.items()} == {"train": "filled", "test": "as given"}


# --- float metres ---


def test_float_metres_round_to_millimetres_and_take_a_given_unit(tmp_path: Path) -> None:
    source = open_source(h5(tmp_path), scales={"train": DepthScale(0.5)})
    assert source.splits["test"].scale.metres_per_unit == 1
    pair = source.splits["train"].pairs[0]
    depth = source.read(pair, source.splits["train"].scale).depth
    truth = np.float32(millimetres(0, holes=0.1) / 1000).astype(np.float64) * 500
    assert np.abs(depth - truth).max() <= 0.51


def test_holes_of_float_maps_are_nan_negative_and_zero(tmp_path: Path) -> None:
    depth = np.full((24, 32), 2.5, np.float32)
    depth[0, :5] = [np.nan, -1, 0, np.inf, 1e9]
    write(tmp_path / "train/a/00001.h5", h5_bytes(0, depth=depth))
    source = open_source(tmp_path)
    found = source.read(source.splits["train"].pairs[0], source.splits["train"].scale).depth
    assert not found[0, :5].any()
    assert (found[0, 5:] == 2500).all()
    write(tmp_path / "train/a/00001.h5", h5_bytes(0, depth=np.full((24, 32), 60, np.uint8)))
    with pytest.raises(BadPair, match="is 8-bit, but the layout declares 32-bit"):
        source.read(source.splits["train"].pairs[0], source.splits["train"].scale)
