"""Keys of pairs: names of all scripts stay apart, in shards and in what others read of them, and old keys stay."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path, PurePosixPath
from unicodedata import is_normalized, normalize

import numpy as np
import pytest
import webdataset
from hypothesis import given
from hypothesis import strategies as st
from trees import (
    SIZE,
    jpeg_bytes,
    members,
    millimetres,
    packed,
    picture,
    sample_members,
    silent,
    vouch,
    write,
    write_tar,
    zipped,
)

from mde_dist.data.dataset import DamagedSample
from mde_dist.data.shards import open_split
from mde_dist.evaluation.predictions import open_predictions
from mde_dist.packing.pack import PackConfig, pack
from mde_dist.packing.raw_dataset import RawDataset
from mde_dist.packing.sources import open_source
from mde_dist.packing.sources.keys import unique_keys
from mde_dist.utils.console import printable
from mde_dist.utils.errors import UserError

CJK = ("卧室", "厨房", "客厅")
SCENES = [f"{scene}/{number}" for scene in ("кухня", "ванная") for number in range(3)]
CAFE = "caf\u00e9"  # the accent is part of the letter: NFC
LATIN = os.fsdecode(b"caf\xe9")  # as a name of Latin-1 on the disk


def keys_of(*names: str) -> list[str]:
    return unique_keys([PurePosixPath(f"{name}.png") for name in names], [f"row {name}" for name in names])


def pairs(root: Path, *names: str, depth: str = "NFC") -> Path:
    """A plain folder of pairs, whose depth maps have their names in another Unicode form."""
    for number, name in enumerate(names):
        write(root / f"images/{name}.jpg", jpeg_bytes(picture(number)))
        write(root / f"depth/{normalize(depth, name)}.png", millimetres(number))
    return root


def densedepth_of(root: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        write(root / f"data/nyu2_test/{name}.jpg", jpeg_bytes(picture(number)))
        write(root / f"data/nyu2_test/{name}_depth.png", millimetres(number))
    rows = [f"data/nyu2_test/{name}.jpg,data/nyu2_test/{name}_depth.png" for name in names]
    (root / "data/nyu2_test.csv").write_text("\n".join(rows), encoding="utf-8")
    return root


def one_line(error: pytest.ExceptionInfo[BaseException]) -> str:
    said = printable(str(error.value))
    assert said.isprintable()
    return said


def test_names_that_were_told_apart_keep_their_keys() -> None:
    """Golden values of 0.1: the keys of existing shards."""
    deep = f"{'x' * 90}1/{'x' * 90}/0"
    kept = {
        "bathroom/rgb_00045": "bathroom-rgb_00045",
        "a.b c": "a-b-c",
        "K\u00fcche": "K-che",
        "Ku\u0308che 2": "Ku-che-2",
        "кухня/7": "-7",
        "a_b": "a_b",
        deep: "x" * 63 + "-272a40e4019a780e",
    }
    assert keys_of(*kept) == list(kept.values())


@pytest.mark.parametrize(
    ("names", "keys"),
    [
        (CJK, CJK),
        (SCENES, [name.replace("/", "-") for name in SCENES]),
        (["客厅"], ["客厅"]),
        (["客厅.左", "客厅 右", "卧室/．"], ["客厅-左", "客厅-右", "卧室-．"]),
        (["cafe\u0301 1", "кухня", "ванна"], ["caf\u00e9-1", "кухня", "ванна"]),
    ],
    ids=["cjk", "scenes", "one", "signs", "decomposed"],
)
def test_where_ascii_is_not_enough_letters_of_all_scripts_are_kept(names: list[str], keys: list[str]) -> None:
    assert keys_of(*names) == list(keys)


def test_what_still_is_the_same_ends_in_a_hash_of_the_name() -> None:
    names = ["a b", "a.b", "a-b", "c"]
    keys = keys_of(*names)
    assert len(set(keys)) == 4 and keys[3] == "c" and all(key.startswith("a-b-") for key in keys[:3])
    assert keys_of("a-b", "d", "a b") == [keys[2], "d", keys[0]]  # whatever is beside it


@given(st.lists(st.text(st.characters(exclude_characters="/\0"), min_size=1, max_size=60), min_size=1, max_size=8))
def test_keys_are_what_a_tar_holds_and_all_differ(names: list[str]) -> None:
    stems = {normalize("NFC", str(PurePosixPath(f"d/{name}.png").with_suffix(""))): name for name in names}
    names = [f"d/{name}" for name in stems.values()]
    keys = keys_of(*names)
    assert len(set(keys)) == len(names)
    for key in keys:
        assert 0 < len(key.encode()) <= 80
        assert key.isprintable() and is_normalized("NFC", key)
        assert not any(letter in "./\\" or letter.isspace() for letter in key)
        assert webdataset.tariterators.base_plus_ext(f"{key}.depth.blosc") == (key, "depth.blosc")
    assert keys_of(*reversed(names)) == keys[::-1]


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["images/a.jpg", "images/a.png"], ["twice", "a.jpg", "a.png"]),
        ([f"images/{CAFE}.jpg", f"images/{normalize('NFD', CAFE)}.jpg"], ["two Unicode forms", r"\xe9", r"\u0301"]),
    ],
)
def test_files_that_are_one_name_are_refused(tmp_path: Path, names: list[str], words: list[str]) -> None:
    for number, name in enumerate(names):
        write(tmp_path / name, jpeg_bytes(picture(number)))
        write(tmp_path / f"depth/{Path(name).stem}.png", millimetres(number))
    with pytest.raises(UserError) as error:
        open_source(tmp_path)
    assert all(word in one_line(error) for word in words)


def test_names_of_all_scripts_are_packed_and_read_by_others(tmp_path: Path) -> None:
    pairs(tmp_path / "source", *CJK)
    packed(tmp_path / "source", tmp_path / "shards")
    (tar,) = (tmp_path / "shards").glob("*.tar")
    assert {name.split(".")[0] for name, _ in members(tar)} == set(CJK)
    by_webdataset = [sample["__key__"] for sample in webdataset.WebDataset(str(tar), shardshuffle=False)]
    with open_split(tmp_path / "shards", "train") as shards:
        keys = [shards.key(sample) for sample in range(len(shards))]
        assert by_webdataset == keys and sorted(keys) == sorted(CJK)
        for number, key in enumerate(keys):
            write(tmp_path / f"predictions/{key}_depth.png", millimetres(number))
        predictions, _ = open_predictions(tmp_path / "predictions", shards)
        assert [Path(predictions.name(sample)).name for sample in range(3)] == [f"{key}_depth.png" for key in keys]


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT], ids=["pax", "gnu"])
def test_keys_of_tars_of_other_tools_are_read_whole(tmp_path: Path, form: int) -> None:
    keys = ["кухня-0", "ванная-0", "x" * 140, "x" * 139 + "y", "а" * 700, "plain"]
    write_tar(tmp_path / "train-0.tar", [m for i, key in enumerate(keys) for m in sample_members(key, i)], form)
    vouch(tmp_path)
    with open_split(tmp_path, "train") as shards:
        assert [shards.key(sample) for sample in range(len(shards))] == keys


@pytest.mark.parametrize("make", [pairs, densedepth_of])
@pytest.mark.parametrize("kept", ["folder", "zip"])
def test_a_name_is_found_in_either_unicode_form(tmp_path: Path, make, kept: str) -> None:
    root = make(tmp_path / "tree", CAFE, "Tu\u0308r/b")
    for path in sorted(
        root.rglob("*"), reverse=True
    ):  # as macOS has stored them, beside lists that people have written
        if path.suffix in (".png", "") and path.name != "images":
            path.rename(path.with_name(normalize("NFD", path.name)))
    source = open_source(zipped(root, tmp_path / "tree.zip") if kept == "zip" else root)
    (split,) = source.splits.values()
    for pair in split.pairs:
        assert not source.missing(pair) and source.stamp(pair)
        assert source.read(pair, split.scale).depth.any()


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_predictions_match_in_either_unicode_form(tmp_path: Path, form: str) -> None:
    names = [CAFE, "cafu\u0308", "Ku\u0308che/1", "K\u00f6che/1"]
    for number, name in enumerate(names):
        write(tmp_path / f"source/images/{normalize('NFC', name).replace('/', '_')}.jpg", jpeg_bytes(picture(number)))
        write(tmp_path / f"source/depth/{normalize('NFC', name).replace('/', '_')}.png", millimetres(number))
        write(tmp_path / f"predictions/{normalize(form, name)}_深度.png", millimetres(number))
    samples = RawDataset(open_source(tmp_path / "source"), "train", SIZE)
    predictions, _ = open_predictions(tmp_path / "predictions", samples)
    for sample in range(4):
        image = Path(samples.meta(sample)["source"]).stem
        file = Path(predictions.name(sample)).relative_to(tmp_path / "predictions")
        assert normalize("NFC", str(file)).replace("/", "_").startswith(image)


def test_a_name_that_is_no_utf8_is_named(tmp_path: Path) -> None:
    source = open_source(pairs(tmp_path / "source", LATIN, "b"))
    with pytest.raises(UserError) as error:
        pack(source, tmp_path / "shards", PackConfig(), 1, silent)
    assert r"images/caf\xe9.jpg" in one_line(error) and "UTF-8" in one_line(error)
    manifest = pack(source, tmp_path / "shards", PackConfig(skip_bad=True), 1, silent)
    assert manifest.splits["train"].samples == 1
    (line,) = manifest.raw["splits"]["train"]["skipped"]
    assert r"images/caf\xe9.jpg" in printable(line)
    samples = RawDataset(source, "train", SIZE)
    place = next(number for number in range(2) if LATIN in samples.file_of(number))
    with pytest.raises(DamagedSample) as damage:
        samples.read_into(place, np.empty((*SIZE, 3), np.uint8), np.empty(SIZE, np.uint16))
    assert r"images/caf\xe9.jpg" in one_line(damage)
