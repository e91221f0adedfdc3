"""Units that cannot be wrong: what is refused in one line, what overrules it and says so, what else is pointed out."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from trees import SIZE, bts, densedepth, eight_bit, folder, h5, h5_bytes, jpeg_bytes, millimetres, picture, write

from mde_dist.packing.inspect import given_lists, given_scales, open_checked
from mde_dist.packing.sources import Pair
from mde_dist.packing.sources.official import count_in_words, scene_leakage, test_scenes
from mde_dist.utils.errors import UserError

NYUV2 = Path(os.environ.get("MDE_DIST_NYUV2", "/nonexistent"))
real = pytest.mark.skipif(not NYUV2.is_dir(), reason="MDE_DIST_NYUV2 names no folder")


def refused(root: Path, *scales: str) -> str:
    with pytest.raises(UserError) as error:
        open_checked(root, None, scales)
    assert "\n" not in str(error.value)
    return str(error.value)


def warnings(capfd: pytest.CaptureFixture[str]) -> list[str]:
    lines = capfd.readouterr().out.splitlines()
    return [line.removeprefix("  warning: ") for line in lines if line.startswith("  warning: ")]


def scaled(root: Path, **factors: float) -> Path:
    """A plain folder whose maps hold `factor` times the millimetres, per split."""
    for split, factor in factors.items():
        for i in range(2):
            write(root / split / f"images/{i}.jpg", jpeg_bytes(picture(i)))
            write(root / split / f"depth/{i}.png", (millimetres(i) * factor).astype(np.uint16))
    return root


def test_splits_in_different_units_are_refused_with_both_medians(tmp_path: Path) -> None:
    said = refused(scaled(tmp_path, train=1, test=3.5))
    for word in ("more than 3x", "train 2.", "test 8.", "--depth-scale SPLIT=VALUE"):
        assert word in said


def test_a_median_that_is_not_indoor_is_refused(tmp_path: Path) -> None:
    assert "split train: the median depth is 25." in refused(scaled(tmp_path / "a", train=10))
    assert "split train: the median depth is 0.1" in refused(scaled(tmp_path / "b", train=0.05))


def test_float_metres_in_another_unit_are_refused(tmp_path: Path) -> None:
    for number in range(2):
        depth = millimetres(number).astype(np.float32) / 100  # decimetres
        write(tmp_path / f"train/a/{number:05d}.h5", h5_bytes(number, depth=depth))
    assert "the median depth is 25." in refused(tmp_path)
    source, probes = open_checked(tmp_path, None, ("train=0.1",))
    assert 2 < probes["train"].median < 3
    assert source.splits["train"].scale.metres_per_unit == 0.1


@pytest.mark.parametrize("make", [bts, h5])
def test_8_bit_maps_are_refused_in_every_layout_and_named_with_the_option(tmp_path: Path, make) -> None:
    root = make(tmp_path)
    for path in root.glob("sync/*/*.png"):
        write(path, eight_bit(1))
    for path in root.glob("train/*/*.h5"):
        path.write_bytes(h5_bytes(1, depth=eight_bit(1)))
    said = refused(root)
    assert "split train: none of the pairs" in said
    assert "is 8-bit, but the layout declares" in said
    assert "--depth-scale" in said


def test_an_8_bit_map_among_16_bit_maps_of_a_plain_folder_is_refused(tmp_path: Path) -> None:
    root = folder(tmp_path)
    write(root / "depth/0002.png", eight_bit(2))
    _, probes = open_checked(root, None, ())
    assert len(probes["train"].bad) == 1
    assert f"{root / 'depth/0002.png'} is 8-bit, but" in probes["train"].bad[0]


def test_image_and_depth_of_different_size_are_refused(tmp_path: Path) -> None:
    root = folder(tmp_path, count=1)
    write(root / "depth/0000.png", millimetres(0, (SIZE[1], SIZE[0])))
    assert "is 32x24, but its image" in refused(root)


def test_what_a_given_scale_overrules_is_a_warning(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    root = scaled(tmp_path, train=1, test=1)
    open_checked(root, None, ("train=0.01",))
    said = warnings(capfd)
    assert len(said) == 2
    assert "split train: the median depth is 25." in said[0]
    assert "differ by more than 3x" in said[1]
    assert all("without --depth-scale this would be refused" in line for line in said)
    open_checked(root, None, ("0.001",))
    assert warnings(capfd) == []  # a scale that is right needs no comment


def test_a_given_scale_for_one_split_does_not_excuse_the_other(tmp_path: Path) -> None:
    root = scaled(tmp_path, train=10, test=10)
    assert refused(root, "train=0.0001").startswith("split test: the median depth is 25.")


def test_arguments_that_mean_nothing() -> None:
    for argument in ("train=much", "0", "nan", "train=-1", "train="):
        with pytest.raises(UserError, match="SPLIT=METRES"):
            given_scales((argument,))
    for arguments in (("list.txt",), ("train=",), ("val=list.txt",), ("train=a.txt", "train=b.txt")):
        with pytest.raises(UserError, match="--list"):
            given_lists(arguments)
    assert given_lists(("train=a=b.txt", "test=c")) == {"train": Path("a=b.txt"), "test": Path("c")}


def test_rooms_take_no_scale_list_or_map() -> None:
    for given in ({"depth_scale": ("0.001",)}, {"lists": ("train=x",)}, {"depth_map": "raw"}):
        with pytest.raises(UserError, match="--layout rooms is rendered"):
            open_checked(None, "rooms", **{"depth_scale": (), **given})


# --- official test scenes in training ---


def test_official_test_scenes_in_training_are_counted_and_named(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path
    scenes = ["kitchen_0004", "bathroom_0003", "office_0005", "dining_room_0036", "office_0003"]
    rows = []
    for i, scene in enumerate([*scenes, "kitchen_0004"]):
        name = f"data/nyu2_train/{scene}_out/{i + 1}"
        write(root / f"{name}.jpg", jpeg_bytes(picture(i)))
        write(root / f"{name}.png", eight_bit(i))
        rows.append(f"{name}.jpg,{name}.png\n")
    (root / "data/nyu2_train.csv").write_text("".join(rows))
    open_checked(root, None, ())
    (said,) = warnings(capfd)
    assert said.startswith("train: 5 of its pairs show 4 of the 215 official test scenes")
    assert "(bathroom_0003, dining_room_0036, kitchen_0004 …)" in said
    open_checked(densedepth(tmp_path / "clean"), None, ())
    assert warnings(capfd) == []


def test_leaks_are_those_of_the_table() -> None:
    pairs = [Pair(f"{i}", scene, "", "") for i, scene in enumerate(sorted(test_scenes()))]
    assert scene_leakage(pairs) == (215, sorted(test_scenes()))
    assert scene_leakage([Pair("a", "kitchen_0028b", "", ""), Pair("b", "official", "", "")]) == (0, [])


# --- counts in words ---


@pytest.mark.parametrize(
    ("layout", "split", "count", "said"),
    [
        ("bts", "train", 24_231, "24,231 pairs: the whole bts training list"),
        ("bts", "train", 36_253, "36,253 pairs: the whole NeWCRFs training list"),
        ("h5", "train", 47_584, "47,584 pairs: the whole h5 training set"),
        ("densedepth", "train", 50_688, "50,688 pairs: the whole densedepth training set"),
        ("labeled", "train", 795, "795 pairs: the whole official labelled training set"),
        ("densedepth", "train", 795, "795 of the 50,688 that densedepth has; it is the size of the official labelled"),
        ("folder", "train", 24_231, "24,231 pairs: the size of the bts training list"),
        ("bts", "test", 654, "654 pairs: the whole official test set"),
        ("bts", "test", 202, "202 pairs (the official test set has 654)"),
        ("bts", "train", 1, "1 pair: not a size that is known (bts has 24,231 or 36,253)"),
        ("rooms", "train", 320, "320 pairs of the embedded sample"),
        ("folder", "train", 12, "12 pairs: not a size that is known"),
    ],
)
def test_counts_in_words(layout: str, split: str, count: int, said: str) -> None:
    assert count_in_words(layout, split, count).startswith(said)


# --- real pairs ---


def real_folder(root: Path, count: int, factor: float) -> Path:
    """Real training pairs as a plain folder, their depth as 16-bit PNG of metres * `factor`."""
    (root / "images").mkdir(parents=True)
    (root / "depth").mkdir()
    for i, image in enumerate(sorted((NYUV2 / "densedepth/data/nyu2_train").glob("*/*.jpg"))[:: 795 // count]):
        (root / f"images/{i}.jpg").symlink_to(image)
        with Image.open(image.with_suffix(".png")) as stored:
            metres = (np.asarray(stored) + 0.5) / 255 * 10
        Image.fromarray((metres * factor).astype(np.uint16)).save(root / f"depth/{i}.png")
    return root


@real
def test_real_pairs_in_wrong_units_are_refused_and_in_right_ones_pass(tmp_path: Path) -> None:
    said = refused(real_folder(tmp_path / "5000", 16, 5000))
    assert "split train: the median depth is 1" in said
    assert "0.8..10 m" in said
    assert "the median depth is" in refused(real_folder(tmp_path / "10000", 4, 10_000))
    assert "the median depth is 0." in refused(real_folder(tmp_path / "256", 16, 256))  # a quarter of the truth
    _, probes = open_checked(tmp_path / "5000", None, ("0.0002",))
    assert 1 < probes["train"].median < 5
    open_checked(real_folder(tmp_path / "mm", 16, 1000), None, ())


@real
def test_real_pairs_in_a_unit_that_could_be_indoor_are_pointed_out(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A third of the truth: small, but not impossible."""
    open_checked(real_folder(tmp_path, 16, 340), None, ())
    (said,) = warnings(capfd)
    assert re.search(r"a median depth of 0\.[89]\d m is possible, but unusual", said)
    assert "--depth-scale train=VALUE" in said


@real
def test_real_8_bit_maps_read_as_millimetres_are_refused(tmp_path: Path) -> None:
    """The mistake that gives abs_rel 0.9745 whatever the model."""
    (tmp_path / "sync").mkdir()
    rows = []
    for image in sorted((NYUV2 / "densedepth/data/nyu2_train").glob("*/*.jpg"))[:8]:
        name = f"{image.parent.name}_{image.stem}"
        (tmp_path / f"sync/{name}.jpg").symlink_to(image)
        (tmp_path / f"sync/{name}.png").symlink_to(image.with_suffix(".png"))
        rows.append(f"/{name}.jpg /{name}.png 518.8579\n")
    (tmp_path / "nyudepthv2_train_files_with_gt.txt").write_text("".join(rows))
    assert "is 8-bit, but the layout declares 16-bit" in refused(tmp_path)
    _, probes = open_checked(tmp_path, None, ("train=0.0392157",))
    assert 1 < probes["train"].median < 5


@real
def test_the_real_pairs_pass_without_a_warning(capfd: pytest.CaptureFixture[str]) -> None:
    for name in ("densedepth", "bts"):
        open_checked(NYUV2 / name, None, ())
        assert warnings(capfd) == []
