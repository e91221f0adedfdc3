"""Trackers and curves of a run that is killed and goes on: real TensorBoard files, and what the report reads."""

from functools import partial

import pytest
from commands import small
from faults import die, together
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from warm import warm_run, without_pictures

from mde_dist.reporting.history import read_runs
from mde_dist.training.config import read_config, to_toml


def events(run) -> EventAccumulator:
    found = EventAccumulator(str(run / "trackers/mde_dist"), size_guidance={"scalars": 0, "images": 0})
    return found.Reload()


def test_a_run_killed_three_times_has_one_log_and_one_curve(room_shards, tmp_path):
    run = tmp_path / "run"
    given = {"run": run, "log-with": "tensorboard", **small(data_shards=room_shards, train_total_samples=96)}
    fault = partial(together, without_pictures, partial(die, "optimizer", 3, "before"))
    for _ in range(3):
        assert warm_run("train", before=fault, **given).returncode == -9
    done = warm_run("train", before=without_pictures, **given)
    assert done.returncode == 0, done.stderr

    steps, evaluations = [12, 24, 36, 48, 60, 72, 84, 96], [24, 48, 72, 96]
    found = events(run)
    assert [e.step for e in found.Scalars("train/loss")] == steps
    assert [e.step for e in found.Scalars("eigen/abs_rel")] == evaluations
    names = [name for name in found.Tags()["images"] if name.startswith("held-out/")]
    assert len(names) == 6
    for pictures in map(found.Images, names):
        assert [e.step for e in pictures] == evaluations
        assert (pictures[0].width, pictures[0].height) == (3 * 64, 48)

    (told,) = read_runs([run])
    assert [line.samples for line in told.steps] == steps
    assert [line.samples for line in told.evaluations] == evaluations
    assert len(told.starts) == 4
    assert [line.attempt for line in told.steps] == sorted(line.attempt for line in told.steps)
    assert told.steps[-1].attempt == 3
    assert sorted(told.snapshots.predictions) == evaluations


def test_a_tracker_that_is_not_there_is_one_line(room_shards, tmp_path):
    done = warm_run("train", run=tmp_path / "run", **{"log-with": "aim"}, **small(data_shards=room_shards))
    assert done.returncode == 2
    assert done.stderr.strip() == "error: --log-with aim: not installed; pip install aim, or leave it out"


def test_a_tracker_that_fails_does_not_end_the_run(room_shards, tmp_path):
    given = {"run": tmp_path / "run", "log-with": "tensorboard", **small(data_shards=room_shards)}
    done = warm_run("train", before=partial(together, without_pictures, broken_tensorboard), **given)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("warning: tensorboard: OSError: the server is gone; training goes on") == 1


def broken_tensorboard() -> None:
    from accelerate.tracking import TensorBoardTracker

    def fail(self, *values, **options):
        raise OSError("the server is gone")

    TensorBoardTracker.log = fail


def test_trackers_stand_in_the_config_that_is_read_back(tmp_path):
    config = read_config(["--log-with", "tensorboard", "wandb"])
    (tmp_path / "config.toml").write_text(to_toml(config))
    assert read_config(["--config", str(tmp_path / "config.toml")]) == config
    none = read_config([])
    (tmp_path / "config.toml").write_text(to_toml(none))
    assert read_config(["--config", str(tmp_path / "config.toml")]) == none
    with pytest.raises(Exception, match="log-with"):
        read_config(["--log-with", "paper"])
