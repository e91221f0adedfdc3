"""A table of trainings as a user runs it: stopped and gone on with, failing, refused, and what is said of the rows."""

import json
import signal

import numpy as np
import pytest
import torch
from commands import records, run, start, wait_for

from mde_dist.evaluation.bootstrap import RESAMPLES
from mde_dist.evaluation.metrics import PROTOCOLS, SUFFICIENT_STATISTICS
from mde_dist.tools.ablation.numbers import figures_of
from mde_dist.tools.ablation.runs import check_devices, gpus_of
from mde_dist.tools.ablation.table import check_begun, read_table
from mde_dist.utils.errors import UserError

TABLE = """
seeds = [0]
[common]
data.shards = "{shards}"
data.size = "32x32"
train.total_samples = {samples}
train.batch_size = 12
train.log_every = 12
train.checkpoint_every = 12
evaluate.batch_size = 8
[rows.plain]
[rows."no shards"]
data.shards = "nowhere"
"""


def written(tmp_path, text):
    path = tmp_path / "table.toml"
    path.write_text(text)
    return path


@pytest.fixture(scope="module")
def ablation(room_shards, tmp_path_factory):
    """Its terminal is closed in its first training, on two ranks; then run to its end. The second row cannot train."""
    folder = tmp_path_factory.mktemp("ablation")
    table = written(folder, TABLE.format(shards=room_shards, samples=48))
    first = start("ablate", table, "--processes", 2, output=folder / "out")
    wait_for(lambda: (folder / "out/plain/seed-0/checkpoints").is_dir(), first)
    first.send_signal(signal.SIGHUP)
    said, _ = first.communicate(timeout=120)
    return (
        folder,
        table,
        (first.returncode, said),
        run("ablate", table, output=folder / "out", jobs=2),
    )


def test_it_is_stopped_and_goes_on(ablation):
    folder, _, (code, words), _ = ablation
    assert code == 128 + signal.SIGHUP and "stopped by a signal" in words
    said = records(folder / "out/plain/seed-0")
    starts = [record for record in said if "start" in record]
    assert [record["start"]["ranks"] for record in starts] == [2, 1]
    assert starts[1]["samples"] > 0  # taken up where it was, not begun anew
    assert sum("evaluation" in record and "baseline" not in record for record in said) == 1


def test_a_training_that_fails_leaves_the_others_be(ablation):
    folder, _, _, done = ablation
    assert done.returncode == 1 and "failed: no shards, seed 0: error: nowhere" in done.stderr
    record = json.loads((folder / "out/table.json").read_text())
    assert record["rows"]["plain"]["seeds"] == [0] and "no shards" not in record["rows"]
    assert set(record["failed"]) == {"no shards, seed 0"}
    assert "not in it: no shards, seed 0" in (folder / "out/table.md").read_text()
    assert (folder / "out/table.png").read_bytes().startswith(b"\x89PNG")


def test_another_config_is_refused(ablation, room_shards, tmp_path):
    folder, *_ = ablation
    table = written(tmp_path, TABLE.format(shards=room_shards, samples=60))
    with pytest.raises(UserError, match=r"row 'plain', seed 0.*train.total_samples = 48, the table says 60"):
        for training in read_table(table, folder / "out").trainings:
            check_begun(training)


@pytest.mark.long
def test_two_parts_share_out_two_seeds(room_shards, tmp_path):
    text = TABLE.format(shards=room_shards, samples=24).replace("seeds = [0]", "seeds = [0, 5]")
    table = written(tmp_path, text.split('[rows."no shards"]')[0])
    output = tmp_path / "out"
    parts = [start("ablate", table, output=output, part=f"{part}/2") for part in (0, 1)]
    for part, process in enumerate(parts):
        said, _ = process.communicate(timeout=300)
        assert process.returncode == 0 and f"part {part}/2 is done" in said, said
    assert not (output / "table.json").exists()
    done = run("ablate", table, output=output)
    assert done.returncode == 0 and "2 trainings, 2 of them finished" in done.stdout
    rows = json.loads((output / "table.json").read_text())["rows"]
    assert {name: row["seeds"] for name, row in rows.items()} == {"plain": [0, 5]}
    for seed in (0, 5):  # each was trained once
        assert sum("start" in record for record in records(output / f"plain/seed-{seed}")) == 1


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[rows.a]\noptim.rate = 1", "row 'a'.*optim.rate"),
        ("[rows.a]\noptim.lr = -1", "row 'a': optim.lr = -1"),
        ("[rows.a]\ntrain.seed = 1", "train.seed cannot be set in a table"),
        ("[rows.a]\n[rows.b]\nevaluate.protocol = 'full'", "row 'b': evaluate.protocol = full"),
        ("[rows.'a b']\n[rows.a-b]", "its directory would be 'a-b'"),
        ("seeds = [1, 1]\n[rows.a]", "stands there twice"),
        ("seed = 1\n[rows.a]", "seed: a table has"),
    ],
)
def test_a_table_is_refused_before_anything_is_trained(tmp_path, text, complaint):
    with pytest.raises(UserError, match=complaint):
        read_table(written(tmp_path, text), tmp_path / "out")


def test_rows_begin_at_their_base_under_what_is_common(tmp_path):
    (tmp_path / "other.toml").write_text("[optim]\nlr = 0.5\nema_samples = 500\n[train]\nevaluate_every = 7\n")
    text = "seeds = [3, 4]\n[common]\noptim.lr = 0.1\n[rows.a]\n[rows.b]\nbase = 'other.toml'\noptim.grad_clip_norm = 2"
    table = read_table(written(tmp_path, text), tmp_path / "out")
    config = table.rows["b"][4].config
    assert (config.optim.lr, config.optim.ema_samples, config.optim.grad_clip_norm) == (0.1, 500, 2)
    assert config.train.seed == 4 and config.train.evaluate_every == config.train.total_samples
    assert [training.name for training in table.trainings] == ["a, seed 3", "b, seed 3", "a, seed 4", "b, seed 4"]
    assert set(table.changes("b")) == {"optim.ema_samples", "optim.grad_clip_norm"}


def test_intervals_are_those_of_numpy_over_the_seeds_that_both_rows_have():
    random, images, protocol = np.random.default_rng(3), 12, PROTOCOLS["eigen"]
    scored = [
        np.column_stack([np.full(images, 9.0), random.random((images, len(SUFFICIENT_STATISTICS)))]) for _ in range(3)
    ]
    a = figures_of("a", {0: scored[0], 1: scored[1]}, protocol, {})
    b = figures_of("b", {1: scored[2]}, protocol, {})
    k, column = protocol.metrics.index("abs_rel"), 1 + SUFFICIENT_STATISTICS.index("abs_rel")
    draws = np.random.default_rng(0).multinomial(images, np.full(images, 1 / images), size=RESAMPLES) / images
    of = [draws @ rows[:, column] for rows in scored]
    ends = [0.025, 0.975]
    np.testing.assert_allclose(a.ends[:, k], np.quantile((of[0] + of[1]) / 2, ends), rtol=1e-12)
    np.testing.assert_allclose(b.difference(a)[1:, k], np.quantile(of[2] - of[1], ends), rtol=1e-12)
    np.testing.assert_allclose(b.relative(a, k)[1:], np.quantile(of[2] / of[1] - 1, ends), rtol=1e-12)
    assert b.relative(a, k)[0] == pytest.approx(scored[2][:, column].mean() / scored[1][:, column].mean() - 1)


def test_trainings_have_gpus_of_their_own_and_share_them_where_there_are_too_few(monkeypatch):
    """Counted only: this suite runs without GPUs."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3,5,7")
    assert [gpus_of(slot, processes=1) for slot in range(5)] == [["2"], ["3"], ["5"], ["7"], ["2"]]
    assert [gpus_of(slot, processes=3) for slot in range(2)] == [["2", "3", "5"], ["7", "2", "3"]]
    check_devices(processes=4)
    with pytest.raises(UserError, match=r"--processes 5: a rank has a GPU of its own; there are 4"):
        check_devices(processes=5)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert gpus_of(3, processes=2) == ["2", "3"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert gpus_of(0, processes=2) == []
    check_devices(processes=5)
