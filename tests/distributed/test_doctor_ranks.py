"""The doctor on two ranks: who differs is named, and a rank that fails makes no other one wait."""

import shutil
from functools import partial
from pathlib import Path

import pytest
from commands import small
from faults import (
    broken_check,
    die,
    elsewhere,
    forbid_pickle,
    other_version,
    out_of_memory,
    quick_checkup,
    together,
)
from test_doctor import CHECKS, examine
from warm import warm_run

pytestmark = pytest.mark.distributed


def test_two_ranks_that_are_well(room_shards, tmp_path):
    done, rows = examine(forbid_pickle, processes=2, run=tmp_path / "run", **small(data_shards=room_shards))
    assert done.returncode == 0, done.stdout
    assert set(rows) == {*CHECKS, "clocks"}
    assert done.stdout.count("ready") == 1, "only one rank speaks"
    assert "6 per rank x 2 ranks" in rows["batch"][1]
    assert "2 x cpu" in rows["devices"][1]
    assert "gradient of 975 KB in" in rows["network"][1]
    assert "% of forward and backward" in rows["network"][1]
    assert "on all ranks" in rows["shards"][1]
    assert "38 read" in rows["samples"][1], "the ranks of a node share them"
    assert not [name for name, (result, *_) in rows.items() if result == "fail"]
    assert not list(tmp_path.iterdir())


def test_what_befalls_one_rank_is_told_of_it_and_the_others_go_on(room_shards, tmp_path):
    faults = (partial(fault, 1) for fault in (other_version, broken_check, out_of_memory))
    done, rows = examine(*faults, processes=2, run=tmp_path / "run", **small(data_shards=room_shards))
    assert done.returncode == 1
    assert set(rows) == {*CHECKS, "clocks"} - {"loader"}  # for which nobody can tell how much is needed
    assert {name for name, (result, *_) in rows.items() if result == "fail"} == {"versions", "devices", "memory"}
    found, advice = rows["versions"][1:]
    assert "mde_dist 0.0.9" in found[found.index("rank 1 (") :]
    assert "mde_dist 0.1.0" in found[found.index("rank 0 (") : found.index("rank 1 (")]
    assert "same environment on every node" in advice
    assert rows["devices"][1].startswith("rank 1 (")
    assert "ZeroDivisionError" in rows["devices"][1]
    assert rows["memory"][1].startswith("rank 1 (")
    assert "out of memory with 6 images" in rows["memory"][1]
    assert "try --train.grad-accum-steps 2 (3 at a time" in rows["memory"][2]
    assert rows["disk"][0] == "ok"


def test_other_shards_on_another_node_and_a_batch_that_does_not_divide(room_shards, tmp_path):
    places = [tmp_path / "one", tmp_path / "two"]
    for place in places:
        shutil.copytree(room_shards, place / "rooms")
    manifest = places[1] / "rooms/manifest.json"
    manifest.write_text(manifest.read_text() + " ")
    options = small(data_shards="rooms", train_batch_size=9)
    fault = partial(elsewhere, 1, places[1], node=True)
    done, rows = examine(fault, processes=2, cwd=places[0], run=tmp_path / "run", **options)
    assert done.returncode == 1
    result, found, advice = rows["shards"]
    assert result == "fail"
    assert "rank 0 (" in found
    assert "rank 1 (" in found
    assert "copy one directory to all" in advice
    result, found, advice = rows["batch"]
    assert (result, found) == ("fail", "train.batch_size = 9 (global) does not divide by 2 ranks x 1 accumulated")
    assert "try --train.batch-size 8" in advice
    assert "for 8 images" in rows["memory"][1]
    assert "not ready: 2 problems (batch, shards)" in done.stdout


def test_a_run_directory_that_is_not_the_same_on_all_nodes(undisturbed, room_shards, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    fault, options = partial(elsewhere, 1, other, node=True), small(data_shards=room_shards)
    done, rows = examine(fault, processes=2, cwd=undisturbed.parent, run=undisturbed.name, **options)
    assert done.returncode == 1
    result, found, advice = rows["run directory"]
    assert result == "fail"
    assert "begins at sample 60" in found[found.index("rank 0 (") : found.index("rank 1 (")]
    assert "begins at sample 0" in found[found.index("rank 1 (") :]
    assert "shared file system" in advice
    here = tmp_path / "here"
    here.mkdir()
    done, rows = examine(fault, processes=2, cwd=here, run="run", **options)
    assert done.returncode == 0, done.stdout
    assert rows["disk"][0] == "warn"
    assert "rank 1 (" in rows["disk"][1]
    assert "does not see what rank 0 writes there" in rows["disk"][1]
    assert files(here) == files(other) == []


def test_a_rank_that_dies_ends_the_other_with_its_name(room_shards, tmp_path):
    faults = partial(together, quick_checkup, partial(die, "forward", 1, "before", rank=1))
    done = warm_run("doctor", processes=2, before=faults, run=tmp_path / "run", **small(data_shards=room_shards))
    (said,) = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert "rank 1 is gone" in said
    assert "ready" not in done.stdout


def files(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*")]
