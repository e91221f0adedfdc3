"""Killed at any point, a run goes on with the same command and ends bit for bit where the undisturbed one ends."""

import errno
import json
from functools import partial
from pathlib import Path

import pytest
from commands import files_below, learned, small
from faults import die, refused, together
from warm import warm_run, without_pictures

from mde_dist.utils.io import sha256_of

pytestmark = pytest.mark.slow

POINTS = [
    # point, which call of it, when
    ("file of the run", 1, "in"),
    ("evaluation", 2, "before"),  # the first, which scores the baselines as well
    ("line of metrics", 1, "in"),
    ("backward", 2, "after"),
    ("optimizer", 2, "after"),
    ("line of metrics", 5, "in"),
    ("file of an evaluation", 3, "in"),
    ("picture of an evaluation", 1, "after"),
    ("evaluation", 8, "after"),
    ("file of a checkpoint", 1, "in"),
    ("file of a checkpoint", 7, "after"),
    ("file of a checkpoint", 8, "in"),
    ("rename of a checkpoint", 2, "before"),
    ("rename of a checkpoint", 2, "after"),
    ("removal of a checkpoint", 3, "in"),
    ("removal of a checkpoint", 3, "after"),
    ("file of the run", 2, "in"),  # the published model
    ("pictures", 1, "before"),
]


def options(shards: Path, **changes):
    """Five steps, an evaluation after the second, the fourth and the last; one checkpoint is kept."""
    given = {
        "train_keep_checkpoints": 1,
        "optim_ema_samples": 24,
        "optim_schedule": "constant",
        "evaluate_batch_size": 3,
    }
    return small(data_shards=shards, **given | changes)


def end(directory: Path) -> tuple:
    """All that a run leaves, but for its logs and its speed."""
    weights = {path.name: sha256_of(path) for path in directory.glob("checkpoints/*/*.safetensors")}
    files = {name for name in files_below(directory) if not name.startswith("logs/")}
    weights |= {path.name: sha256_of(path) for path in directory.glob("panels/*")}
    weights |= {path.name: sha256_of(path) for path in directory.glob("evaluations/*")}
    return files, learned(directory), weights, sha256_of(directory / "model.safetensors")


@pytest.fixture(scope="module")
def undisturbed(room_shards, scratch) -> Path:
    # in a directory of the same name, since that stands in the config that the weights carry along
    directory = scratch("undisturbed") / "run"
    done = warm_run("train", cwd=directory.parent, before=without_pictures, run="run", **options(room_shards))
    assert done.returncode == 0, done.stderr
    return directory


@pytest.mark.parametrize(("point", "call", "when"), POINTS, ids=lambda value: str(value).replace(" ", "-"))
def test_killed_at_any_point_it_ends_bit_for_bit_as_undisturbed(undisturbed, room_shards, tmp_path, point, call, when):
    given = {"cwd": tmp_path, "run": "run", **options(room_shards)}
    fault = partial(together, without_pictures, partial(die, point, call, when))
    if point == "pictures":
        fault = partial(die, point, call, when)
    done = warm_run("train", before=fault, **given)
    assert done.returncode == -9, f"it was not struck: {done.stdout}{done.stderr}"
    done = warm_run("train", before=without_pictures, **given)
    assert done.returncode == 0, done.stderr
    assert end(tmp_path / "run") == end(undisturbed)


def test_a_finished_run_goes_on_with_more_samples_as_if_it_had_had_them_from_the_start(
    undisturbed, room_shards, tmp_path
):
    """While nothing can be removed, as on NFS where somebody has a file open: that ends no run either."""
    given = {"cwd": tmp_path, "run": "run"}
    before = partial(together, without_pictures, partial(refused, "removal of a checkpoint", errno.ENOTEMPTY))
    done = warm_run("train", before=before, **given, **options(room_shards, train_total_samples=24))
    assert done.returncode == 0, done.stderr
    assert "step-00000001-1.tmp cannot be removed (Directory not empty)" in done.stdout
    assert (tmp_path / "run/model.safetensors").is_file()
    done = warm_run("train", before=without_pictures, **given, **options(room_shards))
    assert done.returncode == 0, done.stderr
    assert "note: train.total_samples was 24, is 60 from sample 24 on; the learning rate is constant" in done.stdout
    assert end(tmp_path / "run") == end(undisturbed)
    done = warm_run("train", **given, **options(room_shards, train_total_samples=36))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: train.total_samples = 36: the run in run has seen 60 already")


def test_the_average_is_what_is_evaluated_and_published(undisturbed, tmp_path):
    _, lines, weights, published = end(undisturbed)
    assert published == weights["ema.safetensors"] != weights["model.safetensors"]
    target = tmp_path / "scores.json"
    done = warm_run("evaluate", checkpoint=undisturbed / "model.safetensors", json=target, **{"batch-size": 3})
    assert done.returncode == 0, done.stderr
    scored = json.loads(target.read_text())["results"]["model"]["eigen"]
    last = [line for line in lines if "evaluation" in line][-1]
    assert {name: last[name] for name in scored} == scored
