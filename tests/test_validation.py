"""Whole rooms held out of the training split: which, how many pairs, and that nothing but the options decides it."""

from __future__ import annotations

import json
import shlex
import sys
import tarfile
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from commands import small
from hypothesis import given
from hypothesis import strategies as st
from numcodecs import blosc
from trees import (
    bts,
    contents,
    densedepth,
    folder,
    h5,
    h5_tars,
    jpeg_bytes,
    labeled_mat,
    marigold,
    millimetres,
    newcrfs,
    packed,
    packed_yet,
    picture,
    silent,
    write,
    zipped,
)
from warm import warm_run

from mde_dist.data.depth import DepthScale
from mde_dist.packing.holdout import choose, count_rooms, make_val_split, room_of
from mde_dist.packing.pack import PackConfig, pack, pack_part
from mde_dist.packing.sources import Pair, Source, Split, open_source
from mde_dist.shard import main
from mde_dist.utils.cli import run_command
from mde_dist.utils.errors import UserError

SCENES = {"living_room_0001a": 3, "living_room_0001b": 3, "kitchen_0002": 2, "office_0003": 4, "study_0004": 2}


def tree(root: Path) -> Path:
    """A bts data set with the scenes above, their frames in turn, and three test pairs."""
    bts(root, train=0)
    rows = []
    for number in range(max(SCENES.values())):
        for seed, (scene, count) in enumerate(SCENES.items()):
            if number < count:
                names = f"{scene}/rgb_{number:05d}.jpg", f"{scene}/sync_depth_{number:05d}.png"
                write(root / "sync" / names[0], jpeg_bytes(picture(10 * seed + number)))
                write(root / "sync" / names[1], millimetres(10 * seed + number, holes=0.3))
                rows.append(" ".join(names))
    (root / "nyudepthv2_train_files_with_gt.txt").write_text("\n".join(rows) + "\n")
    return root


def manifest_of(directory: Path) -> dict:
    return json.loads((directory / "manifest.json").read_text())


def samples(directory: Path, split: str) -> list[tuple[dict, np.ndarray]]:
    """Records and millimetres as the tars of a split have them, read without the package."""
    found = []
    for shard in manifest_of(directory)["splits"][split]["shards"]:
        with tarfile.open(directory / shard["name"]) as archive:
            files = {member.name: archive.extractfile(member).read() for member in archive}
        for name in files:
            if name.endswith(".json"):
                plain = blosc.decompress(files[name.replace(".json", ".depth.blosc")])
                found.append((json.loads(files[name]), np.frombuffer(plain, "<u2")))
    return found


def scenes_of(directory: Path, split: str) -> Counter[str]:
    return Counter(record["scene"] for record, _ in samples(directory, split))


def refused(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line that a command ends with, exit code 2."""
    monkeypatch.setattr(sys, "argv", ["shard", *map(str, arguments)])
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        run_command(main)
    assert stop.value.code == 2
    error = capfd.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


# --- which places ---


@pytest.mark.parametrize(
    ("scene", "place"),
    [
        ("living_room_0001a", "living_room_0001"),
        ("living_room_0001b_out", "living_room_0001"),
        ("living_room_0001", "living_room_0001"),
        ("living_room_0011", "living_room_0011"),
        ("nyu_office_0", "nyu_office_0"),
        ("room_0000012", "room_0000012"),
        ("lobby", "lobby"),
        ("", ""),
    ],
)
def test_parts_of_one_place_have_its_name(scene: str, place: str) -> None:
    assert room_of(scene) == place


# the sha256 of these letters begin with 18 (d), 2e (c), 3e (b), 3f (e), ca (a): that is their order
LETTERS = {"a": 6, "b": 2, "c": 3, "d": 5, "e": 4}


@pytest.mark.parametrize(
    ("share", "places"),
    [
        (0.25, "d"),  # 5 of 20
        (0.2, "e"),  # 4: not to be had of d, c, b
        (0.4, "dc"),
        (0.5, "dcb"),
        (0.05, "b"),  # at least one place: 2 is nearest to 1
        (0.72, "dcbe"),  # 14.4 -> 14
        (0.999, "dcbea"),  # all, which hold_out refuses
    ],
)
def test_the_choice_by_hand(share: float, places: str) -> None:
    assert choose(LETTERS, share) == set(places)


def test_of_two_counts_equally_near_the_smaller_is_taken() -> None:
    assert choose({"a": 3, "b": 5}, 0.5) == {"a"}
    assert choose({"a": 5, "b": 3}, 0.5) == {"b"}


COUNTS = st.dictionaries(st.text(max_size=3), st.integers(1, 9), min_size=1, max_size=7)


@given(COUNTS, st.floats(0.001, 0.999), st.randoms())
def test_no_other_places_come_nearer_and_the_order_does_not_matter(counts: dict, share: float, draw) -> None:
    chosen = choose(counts, share)
    wanted = share * sum(counts.values())
    sizes = [
        sum(some) for many in range(1, len(counts) + 1) for some in combinations(counts.values(), many)
    ]  # of every subset but the empty one
    assert abs(sum(counts[place] for place in chosen) - wanted) == min(abs(size - wanted) for size in sizes)
    mixed = list(counts.items())
    draw.shuffle(mixed)
    assert choose(dict(mixed), share) == chosen


NAMES = st.builds(
    "{}_{:04d}{}".format, st.sampled_from(["kitchen", "office"]), st.integers(0, 6), st.sampled_from("ab ")
)


@given(st.lists(NAMES, min_size=2, max_size=40), st.floats(0.05, 0.6), st.randoms())
def test_places_stay_whole_and_pairs_keep_their_order(names: list[str], share: float, draw) -> None:
    pairs = tuple(Pair(f"{number}", name.strip(), "", "") for number, name in enumerate(names))
    source = Source(
        "bts", Path("here"), {"train": Split(pairs, DepthScale(1.0)), "test": Split((), DepthScale(1.0))}, None
    )
    try:
        held_out = make_val_split(source, share)
    except UserError:
        assert len(count_rooms(pairs)) == 1 or len(choose(count_rooms(pairs), share)) == len(count_rooms(pairs))
        return
    train, val = (held_out.source.splits[name].pairs for name in ("train", "val"))
    assert list(held_out.source.splits) == ["train", "val", "test"]
    assert train
    assert val
    assert not count_rooms(train).keys() & count_rooms(val).keys()
    assert sorted(train + val, key=lambda pair: int(pair.key)) == list(pairs)
    assert all([pair for pair in pairs if pair in part] == list(part) for part in (train, val))
    mixed = draw.sample(pairs, len(pairs))
    other = make_val_split(replace(source, splits={"train": Split(tuple(mixed), DepthScale(1.0))}), share)
    assert {pair.key for pair in other.source.splits["val"].pairs} == {pair.key for pair in val}


def test_thousands_of_places_are_no_matter() -> None:
    counts = {f"room_{number:05d}": 1 + number % 7 for number in range(5000)}
    chosen = choose(counts, 0.15)
    assert sum(counts[place] for place in chosen) == round(0.15 * sum(counts.values()))
    means = [np.mean([counts[place] for place in places]) for places in (chosen, counts)]
    assert abs(means[0] - means[1]) < 0.3  # neither the large nor the small ones are preferred


# --- every layout that knows scenes ---


@pytest.mark.parametrize("make", [densedepth, bts, newcrfs, h5, h5_tars, marigold])
def test_layouts(make: Callable[[Path], Path], tmp_path: Path) -> None:
    whole = open_source(make(tmp_path / "tree"))
    held_out = make_val_split(whole, 0.5).source
    assert {pair.scene for pair in held_out.splits["train"].pairs} == {"basement_0001a"}
    assert {pair.scene for pair in held_out.splits["val"].pairs} == {"kitchen_0028b"}
    assert held_out.splits.get("test") == whole.splits.get("test")


def test_the_labelled_file_and_the_rooms(tmp_path: Path) -> None:
    for source, pairs in (
        (open_source(labeled_mat(tmp_path / "nyu_depth_v2_labeled.mat")), 119),
        (open_source(tmp_path, "rooms"), 48),
    ):
        splits = make_val_split(source, 0.15).source.splits
        assert len(splits["val"].pairs) == pairs  # 0.15 of 795 and of 320
        assert len(splits["train"].pairs) == len(source.splits["train"].pairs) - pairs


def test_a_zip_is_split_as_its_folder(tmp_path: Path) -> None:
    root = tree(tmp_path / "tree")
    packed(root, tmp_path / "folder", PackConfig(validation=0.4))
    packed(zipped(root, tmp_path / "tree.zip"), tmp_path / "zip", PackConfig(validation=0.4))
    assert contents(tmp_path / "folder") == contents(tmp_path / "zip")


# --- packed ---


def test_train_val_and_test_are_packed_apart_with_statistics_of_their_own(tmp_path: Path) -> None:
    root = tree(tmp_path / "tree")
    packed(root, tmp_path / "shards", PackConfig(validation=0.4, samples_per_shard=4))
    train, val = (scenes_of(tmp_path / "shards", split) for split in ("train", "val"))
    assert train + val == Counter(SCENES)
    assert set(val) in (
        {"living_room_0001a", "living_room_0001b"},
        {"office_0003", "kitchen_0002"},
        {"office_0003", "study_0004"},
    )
    splits = manifest_of(tmp_path / "shards")["splits"]
    assert list(splits) == ["train", "val", "test"]
    assert splits["val"]["held_out"] == {
        "of": "train",
        "share": 0.4,
        "places": sorted(map(room_of, val - Counter(living_room_0001b=9))),
    }
    assert "held_out" not in splits["train"]
    for split in ("train", "val"):
        stored = samples(tmp_path / "shards", split)
        assert {record["split"] for record, _ in stored} == {split}
        depths = np.stack([depth for _, depth in stored]).astype(np.float64)
        assert splits[split]["depth"]["mean"] == pytest.approx(depths[depths > 0].mean() / 1000, abs=1e-6)
        plain = blosc.decompress((tmp_path / "shards" / splits[split]["mean_map"]["name"]).read_bytes())
        seen = (depths > 0).sum(0)
        mean = depths.sum(0)[seen > 0] / seen[seen > 0]
        assert np.abs(np.frombuffer(plain, "<u2")[seen > 0] - mean).max() <= 0.5 + 1e-6


def test_without_the_option_nothing_is_held_out(tmp_path: Path) -> None:
    root = tree(tmp_path / "tree")
    packed(root, tmp_path / "plain", PackConfig(samples_per_shard=4))
    packed(root, tmp_path / "held", PackConfig(samples_per_shard=4, validation=0.4))
    plain, held = contents(tmp_path / "plain"), contents(tmp_path / "held")
    assert list(manifest_of(tmp_path / "plain")["splits"]) == ["train", "test"]
    assert "held_out" not in (tmp_path / "plain/manifest.json").read_text()
    assert scenes_of(tmp_path / "plain", "train") == Counter(SCENES)
    tests = {name for name in plain if name.startswith("test")}
    assert len(tests) == 3
    assert {name: plain[name] for name in tests} == {name: held[name] for name in tests}


def test_the_limit_is_of_each_split(tmp_path: Path) -> None:
    packed(tree(tmp_path / "tree"), tmp_path / "shards", PackConfig(validation=0.4, limit=2))
    splits = manifest_of(tmp_path / "shards")["splits"]
    assert {name: split["samples"] for name, split in splits.items()} == {"train": 2, "val": 2, "test": 2}
    packed(tmp_path / "tree", tmp_path / "whole", PackConfig(validation=0.4))
    assert splits["val"]["held_out"] == manifest_of(tmp_path / "whole")["splits"]["val"]["held_out"]


def test_parts_and_workers_and_a_run_that_was_cut_off_end_in_the_same_bytes(tmp_path: Path) -> None:
    root, options = tree(tmp_path / "tree"), PackConfig(validation=0.4, samples_per_shard=2)
    packed(root, tmp_path / "alone", options)
    expected = contents(tmp_path / "alone")
    packed(root, tmp_path / "workers", options, workers=2)
    source = open_source(root)
    for part in range(2):
        pack_part(source, tmp_path / "parts", options, 1, silent, (part, 2))
    before = {path.name: path.stat().st_ino for path in (tmp_path / "parts/.packing").glob("*.tar")}
    pack(source, tmp_path / "parts", options, 1, silent)
    assert before == {
        path.name: path.stat().st_ino for path in (tmp_path / "parts").glob("*.tar")
    }  # published as it was
    assert contents(tmp_path / "workers") == contents(tmp_path / "parts") == expected
    for other in (None, 0.2):  # parts of another choice lie there, whole
        changed = replace(options, validation=other)
        for part in range(2):
            pack_part(source, tmp_path / f"mixed{other}", changed, 1, silent, (part, 2))
        with pytest.raises(UserError, match=f"validation = {other}, not 0.4"):
            pack(source, tmp_path / f"mixed{other}", options, 1, silent)
        assert not packed_yet(tmp_path / f"mixed{other}")


# --- the command ---


def test_a_dry_run_says_how_many_and_its_command_packs_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    root = tree(tmp_path / "tree")
    main(["--source", str(root), "--dry-run", "--validation", "0.15"])
    lines = capfd.readouterr().out.splitlines()
    start = lines.index("--validation 0.15: 1 of 4 rooms are held out of train as val, to choose on")
    assert lines[start + 1 : start + 4] == [
        "  train: 12 pairs of 4 scenes",
        "  val: 2 pairs of 1 scene",
        "  test: 3 pairs of 2 scenes",
    ]
    assert not (tmp_path / "shards").exists()
    main([*shlex.split(lines[-1].removeprefix("next: "))[3:], "--workers", "1"])
    said = capfd.readouterr().out.splitlines()
    assert lines[start] in said
    splits = manifest_of(tmp_path / "shards/tree")["splits"]
    assert {name: split["samples"] for name, split in splits.items()} == {"train": 12, "val": 2, "test": 3}


def test_what_cannot_be_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def attempt(root: Path, share: object, *arguments: object) -> str:
        return refused(
            monkeypatch, capfd, "--source", root, "--output", tmp_path / "out", "--validation", share, *arguments
        )

    root = tree(tmp_path / "tree")
    for share in ("0", "1", "-0.1", "15"):
        assert "must be a share between 0 and 1, such as 0.15" in attempt(root, share)
    assert "--validation nan" in attempt(root, "nan")
    assert "no room of the 4 would be left to train on" in attempt(root, 0.99)
    assert "the pairs of train are all of one room, basement_0001;" in attempt(bts(tmp_path / "one", train=1), 0.15)
    assert "the pairs of train name no scene" in attempt(folder(tmp_path / "plain"), 0.15)
    for split in ("train", "val"):
        folder(tmp_path / f"own/{split}")
    assert "has a split val already" in attempt(tmp_path / "own", 0.15)
    assert "has no split train" in attempt(bts(tmp_path / "test", train=0), 0.15)
    assert not (tmp_path / "out").exists()
    monkeypatch.chdir(tmp_path)
    assert "name no scene" in refused(
        monkeypatch, capfd, "--source", tmp_path / "plain", "--dry-run", "--validation", 0.2
    )


def test_a_training_is_evaluated_on_what_was_held_out(tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    pack(open_source(tmp_path, "rooms"), shards, PackConfig(size=(48, 64), limit=12, validation=0.15), 2, silent)
    done = warm_run(
        "train", run=tmp_path / "run", **small(data_shards=shards, data_eval_split="val", train_total_samples=8)
    )
    assert done.returncode == 0, done.stderr
    evaluated = json.loads((tmp_path / "run/evaluations/last.json").read_text())
    assert evaluated["ground_truth"]["split"] == "val"
    held_out = manifest_of(shards)["splits"]["val"]["held_out"]["places"]
    assert len(held_out) == 48
    assert len(evaluated["images"]["scenes"]) == 12
    assert set(evaluated["images"]["scenes"]) <= set(held_out)
