"""Training in real processes, killed and resumed, and every mistake in one line.

What comes out of forked processes has to equal what the session's `undisturbed` run left, which is started cold.
"""

import json
import re
import shutil
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
from commands import files_below, learned, records, run, small, wait_for
from safetensors.torch import load_file
from warm import warm_run, warm_start, without_pictures

from mde_dist import train
from mde_dist.data.sampler import GlobalSampler, hash64
from mde_dist.utils.errors import UserError
from mde_dist.utils.io import sha256_of

pytestmark = pytest.mark.slow


def checkpoints(directory: Path) -> list[str]:
    found = directory / "checkpoints"
    return sorted(path.name for path in found.glob("step-*")) if found.is_dir() else []


def same_weights(one: Path, other: Path) -> bool:
    a, b = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    return a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)


def test_a_run_makes_what_the_readme_says(undisturbed):
    files = files_below(undisturbed)
    assert {"config.toml", "metrics.jsonl", "model.safetensors", "curves.png", "panels.png"} <= files
    assert checkpoints(undisturbed) == ["step-00000004", "step-00000005"]  # the newest two; the best is one of them
    assert not any(".tmp" in name for name in files)
    assert not (undisturbed / "PREEMPTED").exists()


def test_metrics_have_every_interval_once(undisturbed):
    lines = records(undisturbed)
    assert [r["samples"] for r in lines if "loss" in r] == [12, 24, 36, 48, 60]
    assert [r["samples"] for r in lines if "evaluation" in r and "baseline" not in r] == [24, 48, 60]
    assert {r["baseline"] for r in lines if "baseline" in r} == {"training mean everywhere", "mean map of training"}
    assert all(r["images"] == 8 for r in lines if "evaluation" in r)


def test_the_same_command_gives_the_same_bits(undisturbed, room_shards, tmp_path):
    options = small(data_shards=room_shards, data_threads=0)
    done = warm_run("train", run=tmp_path / "again", before=without_pictures, **options)
    assert done.returncode == 0, done.stderr
    assert learned(tmp_path / "again") == learned(undisturbed)
    assert same_weights(tmp_path / "again", undisturbed)


@pytest.mark.parametrize("after", ["step-00000001", "step-00000003"])
def test_sigkill_and_the_same_command_end_bit_for_bit_as_undisturbed(undisturbed, room_shards, tmp_path, after):
    directory = tmp_path / "run"
    options = small(data_shards=room_shards)
    process = warm_start("train", run=directory, **options)
    wait_for(lambda: (directory / "checkpoints" / after).is_dir(), process)
    process.kill()
    assert not (directory / "model.safetensors").exists()
    done = warm_run("train", run=directory, **options)
    assert done.returncode == 0, done.stderr
    assert "resumed at sample" in done.stdout
    assert learned(directory) == learned(undisturbed)
    assert same_weights(directory, undisturbed)
    assert files_below(directory) == files_below(undisturbed)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP, signal.SIGQUIT])
def test_a_signal_leaves_a_checkpoint_and_the_run_goes_on_from_it(undisturbed, room_shards, tmp_path, number):
    directory = tmp_path / "run"
    options = small(data_shards=room_shards)
    process = warm_start("train", run=directory, **options)
    wait_for(lambda: checkpoints(directory), process)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number, output
    assert "Traceback" not in output
    assert (directory / "PREEMPTED").is_file()
    done = warm_run("train", run=directory, before=without_pictures, **options)
    assert done.returncode == 0, done.stderr
    assert not (directory / "PREEMPTED").exists()
    assert learned(directory) == learned(undisturbed)
    assert same_weights(directory, undisturbed)


def test_a_broken_newest_checkpoint_is_named_and_the_one_before_is_taken(undisturbed, room_shards, tmp_path):
    directory = tmp_path / "run"
    options = small(data_shards=room_shards)
    subprocess.run(["cp", "-r", undisturbed, directory], check=True)
    (directory / "model.safetensors").unlink()
    newest = directory / "checkpoints/step-00000005/model.safetensors"
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes(data)
    done = warm_run("train", run=directory, before=without_pictures, **options)
    assert done.returncode == 0, done.stderr
    assert "step-00000005 is not whole" in done.stdout
    assert "resumed at sample 48" in done.stdout
    assert learned(directory) == learned(undisturbed)
    assert same_weights(directory, undisturbed)


def test_a_finished_run_is_shown_again_and_not_changed(undisturbed, room_shards):
    before = (undisturbed / "metrics.jsonl").read_bytes(), checkpoints(undisturbed)
    done = warm_run("train", run=undisturbed, **small(data_shards=room_shards))
    assert done.returncode == 0, done.stderr
    assert "abs_rel" in done.stdout
    assert ((undisturbed / "metrics.jsonl").read_bytes(), checkpoints(undisturbed)) == before


def test_the_resolved_config_is_saved_and_starts_the_same_run(undisturbed, tmp_path):
    given = {"config": undisturbed / "config.toml", "run": tmp_path / "run"}
    done = warm_run("train", before=without_pictures, **given)
    assert done.returncode == 0, done.stderr
    assert learned(tmp_path / "run") == learned(undisturbed)


def test_a_run_starts_from_the_whole_model_of_another_and_goes_on_without_its_file(room_shards, tmp_path):
    """Without a step that changes anything it scores to the digit what that one scored."""
    options = small(data_shards=room_shards, train_total_samples=12, model_norm="group")
    trained, started = tmp_path / "trained", tmp_path / "started"
    done = warm_run("train", run=trained, before=without_pictures, **options, **{"train.seed": 1})
    assert done.returncode == 0, done.stderr
    options |= {"model.weights": trained / "model.safetensors", "optim.lr": 0}
    done = warm_run("train", run=started, before=without_pictures, **options)
    assert done.returncode == 0, done.stderr
    (line,) = (line for line in done.stdout.splitlines() if "model.weights" in line)
    assert "random" not in line
    assert same_weights(started, trained)
    results = [json.loads((run / "evaluations/last.json").read_text())["results"] for run in (trained, started)]
    assert results[0] == results[1]
    (first,) = (r["start"] for r in records(started) if "start" in r)
    assert first["weights"]["sha256"] == sha256_of(trained / "model.safetensors")
    shutil.rmtree(trained)
    done = warm_run("train", run=started, before=without_pictures, **options | {"train.total-samples": 24})
    assert done.returncode == 0, done.stderr
    assert "resumed at sample 12" in done.stdout


def one_line(done: subprocess.CompletedProcess, *words: str) -> None:
    """The contract of a mistake that a user can mend."""
    lines = [line for line in done.stderr.splitlines() if line]
    assert done.returncode == 2, (done.stdout, done.stderr)
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    for word in words:
        assert word in lines[0]


def test_a_run_of_another_config_is_refused_and_named(undisturbed, room_shards):
    before = files_below(undisturbed)
    done = warm_run("train", run=undisturbed, **small(data_shards=room_shards, optim_lr=0.5))
    one_line(done, "optim.lr was 0.0006, is 0.5", str(undisturbed))
    assert files_below(undisturbed) == before


def test_two_trainings_in_one_directory_are_refused(room_shards, tmp_path):
    directory = tmp_path / "run"
    options = small(data_shards=room_shards, train_total_samples=100_000)
    with warm_start("train", run=directory, **options) as process:
        wait_for(lambda: checkpoints(directory), process)
        done = warm_run("train", run=directory, **options)
        one_line(done, "another training is at work", str(process.ranks[0].pid))


def test_the_batch_size_may_change_in_mid_run(room_shards, tmp_path):
    """The stream goes on at the very next sample, in batches of the new size."""
    directory = tmp_path / "run"
    process = warm_start("train", run=directory, **small(data_shards=room_shards))
    wait_for(lambda: "step-00000001" in checkpoints(directory), process)
    process.terminate()
    process.communicate(timeout=60)
    changed = small(data_shards=room_shards, train_batch_size=8, train_grad_accum_steps=2, train_log_every=8)
    done = warm_run("train", run=directory, before=without_pictures, **changed)
    assert done.returncode == 0, done.stderr
    stopped = int(re.search(r"resumed at sample (\d+)", done.stdout)[1])
    assert f"note: train.batch_size was 12, is 8 from sample {stopped} on" in done.stdout
    order = GlobalSampler(samples=30, block=8, window=4, seed=0)
    logged = [(r["samples"], r["batch"]) for r in records(directory) if "batch" in r]
    expected = []
    for end, size in [(end, 12) for end in range(12, stopped + 1, 12)] + [
        (end, 8) for end in range(stopped + 8, 68, 8)
    ]:
        total = int((hash64(*order.at(np.arange(end - size, end))) >> np.uint64(32)).sum())
        expected.append((end, f"{total:x}"))
    assert logged == expected
    assert expected[-1][0] >= 60


def test_a_run_that_failed_before_its_first_step_begins_anew_with_one_line_per_baseline(room_shards, tmp_path):
    shards, directory = shutil.copytree(room_shards, tmp_path / "rooms"), tmp_path / "run"
    for tar in shards.glob("train-*.tar"):
        data = bytearray(tar.read_bytes())
        data[700] ^= 1  # in the first depth map of each
        tar.write_bytes(data)
    given = small(data_shards=shards, train_total_samples=12, train_batch_size=60)
    done = warm_run("train", run=directory, **given, **{"data.max-bad-fraction": 0})
    assert done.returncode == 2
    assert "more than data.max_bad_fraction" in done.stderr
    done = warm_run("train", run=directory, before=without_pictures, **given, **{"data.max-bad-fraction": 1})
    assert done.returncode == 0, done.stderr
    assert [r["baseline"] for r in records(directory) if "baseline" in r] == [
        "training mean everywhere",
        "mean map of training",
    ]


def test_an_evaluation_that_fails_loses_nothing_that_was_learned(undisturbed, room_shards, tmp_path):
    shards, directory = shutil.copytree(room_shards, tmp_path / "rooms"), tmp_path / "run"
    given = small(data_shards=shards, train_checkpoint_every=1000)  # only evaluations save
    process = warm_start("train", run=directory, **given)
    wait_for(lambda: (directory / "metrics.jsonl").is_file() and records(directory)[2:], process)  # past the baselines
    tar = shards / "test-000000.tar"
    whole = tar.read_bytes()
    tar.write_bytes(whole[:2000] + bytes(3000) + whole[5000:])
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "error: damaged sample: " in output
    assert checkpoints(directory) != []
    tar.write_bytes(whole)
    done = warm_run("train", run=directory, before=without_pictures, **given)
    assert done.returncode == 0, done.stderr
    assert "resumed at sample" in done.stdout
    assert learned(directory) == learned(undisturbed)
    assert same_weights(directory, undisturbed)


def test_debug_describes_the_first_batch_and_leaves_no_run(room_shards, tmp_path):
    done = warm_run("train", "--debug", cwd=tmp_path, **small(data_shards=room_shards, train_batch_size=2))
    assert done.returncode == 0, done.stderr
    for words in ("image: (2, 3, 32, 32) float32 on cpu", "depth: (2, 32, 32) float32 on cpu", "abs_rel"):
        assert words in done.stdout
    assert not list(tmp_path.iterdir())


def test_debug_shows_the_traceback_of_a_mistake(tmp_path):
    done = warm_run("train", "--debug", **{"data.shards": tmp_path / "nowhere"})
    assert done.returncode != 0
    assert "Traceback" in done.stderr
    assert "nowhere holds no shards" in done.stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"data.shards": "/nowhere"}, ("/nowhere", "mde_dist.shard")),
        ({"train.batch_sizes": 8}, ("train.batch", "--help")),
        ({"train.grad_accum_steps": 5}, ("train.batch_size = 12", "does not divide", "--train.batch-size 10")),
        ({"train.batch-size": 0}, ("train.batch_size = 0", "at least 1")),
        ({"data.max-bad-fraction": 2}, ("data.max_bad_fraction", "0 to 1")),
        ({"optim.lr": "nan"}, ("optim.lr", "must be 0")),
        ({"optim.lr": "fast"}, ("optim.lr", "fast")),
        ({"data.size": "240"}, ("HEIGHTxWIDTH",)),
        ({"data.train-split": "trian"}, ("trian", "train, test")),
        ({"config": "/nowhere.toml"}, ("/nowhere.toml",)),
        ({"model.weights": "/nowhere.safetensors"}, ("/nowhere.safetensors",)),
    ],
)
def test_mistakes_are_one_line_and_nothing_is_written(room_shards, tmp_path, monkeypatch, options, words):
    monkeypatch.chdir(tmp_path)
    given = small(data_shards=room_shards) | {"run": tmp_path / "run"} | options
    with pytest.raises(UserError) as error:
        train.main([text for name, value in given.items() for text in (f"--{name}", str(value))])
    assert all(word in str(error.value) for word in words), error.value
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_mistake_ends_the_command_with_exit_code_2(room_shards, tmp_path):
    given = small(data_shards=room_shards) | {"run": tmp_path / "run", "train.batch_sizes": 8}
    one_line(run("train", cwd=tmp_path, **given), "train.batch_sizes")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_no_run_is_not_taken_for_one(room_shards, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    one_line(warm_run("train", run=tmp_path, **small(data_shards=room_shards)), "not a run directory")
    assert files_below(tmp_path) == {"thesis.tex"}
