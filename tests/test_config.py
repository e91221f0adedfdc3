"""Defaults <- TOML <- flags; impossible values named; the resolved config reads back as itself."""

import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from commands import run

from mde_dist.models.weights import MODEL, read_model, read_tensors, serialize_model
from mde_dist.training.config import RESUMABLE_FIELDS, Config, TrainConfig, as_json, read_config, resume_key, to_toml
from mde_dist.utils.cli import flatten, toml_arguments
from mde_dist.utils.errors import UserError
from mde_dist.utils.renamed import RENAMED

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.toml"))


def test_flags_overrule_the_file_and_the_file_the_defaults(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text('[train]\nbatch_size = 16\nseed = 7\n[data]\nsize = "96x128"\n')
    config = read_config(["--config", str(file), "--train.batch-size", "32"])
    assert config.train == replace(TrainConfig(), batch_size=32, seed=7)
    assert config.data.size == (96, 128)
    assert config.model == Config().model


def test_underscores_and_hyphens_mean_the_same():
    assert read_config(["--train.batch_size", "6"]) == read_config(["--train.batch-size", "6"])


@pytest.mark.parametrize("argument", [["--config=FILE"], ["--config", "FILE"]])
def test_both_ways_to_name_the_file(tmp_path, argument):
    file = tmp_path / "mine.toml"
    file.write_text("[optim]\nlr = 0.5\n")
    assert read_config([text.replace("FILE", str(file)) for text in argument]).optim.lr == 0.5


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le"])
def test_a_file_as_editors_of_windows_save_it(tmp_path, encoding):
    file = tmp_path / "mine.toml"
    file.write_bytes("# größer\r\n[optim]\r\nlr = 0.5\r\n".encode(encoding))
    assert read_config(["--config", str(file)]).optim.lr == 0.5


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_configs_that_come_along_are_read(path):
    assert len(CONFIGS) >= 2
    config = read_config(["--config", str(path)])
    assert config != Config()
    assert toml_arguments(path)


def test_the_seed_config_is_the_recipe():
    config = read_config(["--config", str(next(path for path in CONFIGS if path.stem == "seed"))])
    assert (config.model.encoder, config.model.weights) == ("resnet18", "imagenet")
    assert (config.optim.lr, config.optim.schedule, config.train.batch_size) == (1e-4, "constant", 8)


def test_the_resolved_config_reads_back_as_itself(tmp_path):
    given = ["--data.size", "None", "--evaluate.limit", "3", "--run", 'runs/a "quoted" näme', "--train.no-sync-bn"]
    config = read_config(given)
    file = tmp_path / "config.toml"
    file.write_text(to_toml(config))
    assert read_config(["--config", str(file)]) == config


def test_every_field_has_a_docstring_and_stands_in_help(capsys):
    with pytest.raises(SystemExit) as stop:
        read_config(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for name, _ in flatten(Config()):
        assert f"--{name.replace('_', '-')}" in text, name


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--train.total-samples", "0"], ["train.total_samples = 0", "at least 1"]),
        (["--augment.flip", "1.5"], ["augment.flip = 1.5", "0 to 1"]),
        (["--model.min-depth", "0"], ["model.min_depth = 0", "at least 0.001"]),
        (["--loss.silog-lambda", "2"], ["loss.silog_lambda = 2", "0 to 1"]),
        (["--evaluate.limit", "0"], ["evaluate.limit = 0", "at least 1"]),
        (["--data.remote-timeout", "-1"], ["data.remote_timeout = -1", "at least 0"]),
        (["--optim.weight-decay", "-1"], ["optim.weight_decay = -1", "at least 0"]),
        (["--optim.schedule", "linear"], ["linear", "constant", "cosine"]),
        (["--model.encoder", "vgg"], ["vgg", "resnet18"]),
        (["--data.thread", "3"], ["data.thread", "data.threads"]),
        (["--data.threads", "many"], ["data.threads", "many"]),
        (["sometimes"], ["sometimes"]),
        (["--train.seed", str(2**70)], ["train.seed", "at most"]),
        (["--train.total-samples", str(2**62)], ["train.total_samples", "at most"]),
        (["--train.cpu-threads", str(2**31)], ["train.cpu_threads", "at most 1024"]),
        (["--train.timeout", "inf"], ["train.timeout", "inf"]),
        (["--train.heartbeat-timeout", "1e9"], ["train.heartbeat_timeout", "at most"]),
        (["--optim.lr", "nan"], ["optim.lr", "nan"]),
        (["--optim.grad-clip-norm", "inf"], ["optim.grad_clip_norm", "inf"]),
        (["--data.cache-gb", "1e300"], ["data.cache_gb", "at most"]),
    ],
)
def test_impossible_values_are_one_line_that_names_them(arguments, words):
    with pytest.raises(UserError) as error:
        read_config(arguments)
    assert "\n" not in str(error.value)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
    "text", ["[train\n", "train = \xff", "[train]\ntotal_samples = 'x'\n", "[trains]\nsamples = 3\n"]
)
def test_a_bad_file_is_named(tmp_path, text):
    file = tmp_path / "mine.toml"
    file.write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=r"mine\.toml"):
        read_config(["--config", str(file)])


def test_identity_ignores_what_does_not_change_the_run_and_nothing_else():
    config = read_config([])
    moved = read_config(
        ["--run", "elsewhere", "--data.threads", "9", "--data.shards", "there", "--train.keep-checkpoints", "5"]
    )
    longer = read_config(["--train.total-samples", "9000"])
    assert resume_key(config, "a", "b") == resume_key(moved, "a", "b") == resume_key(longer, "a", "b")
    assert resume_key(config, "a", "b") != resume_key(config, "other", "b")
    assert resume_key(config, "a", "b") != resume_key(read_config(["--train.seed", "1"]), "a", "b")
    learned = {"train.seed", "train.evaluate_every", "data.size", "data.shuffle_shards", "optim.lr", "loss.kind"}
    assert learned <= set(as_json(config)) - RESUMABLE_FIELDS


def test_the_module_prints_what_a_command_line_comes_to():
    """Job scripts read the run directory from it."""
    done = run("config", "--train.total-samples", "48", run="runs/x")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith('run = "runs/x"\n')
    assert tomllib.loads(done.stdout)["train"]["total_samples"] == 48
    wrong = run("config", "--train.total-samples", "0")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr == "error: train.total_samples = 0: must be at least 1\n"


def test_a_field_that_has_a_new_name_is_one_line_that_says_it(tmp_path):
    fields = set(as_json(Config()))
    assert set(RENAMED.values()) <= fields and not fields & set(RENAMED)
    file = tmp_path / "of_before.toml"
    file.write_text("[optim]\nlr = 1e-3\nlr_batch = 8\n")
    for arguments in (["--config", str(file)], ["--optim.lr-batch", "8"], ["--optim.lr_batch=8"]):
        with pytest.raises(UserError) as error:
            read_config(arguments)
        assert "optim.lr_batch" in str(error.value) and "optim.base_batch_size" in str(error.value)


def test_a_model_of_before_is_read_by_the_names_of_today(tmp_path):
    config = {"model.backbone": "tiny", "model.refine": True, "optim.lr": 1.0, "data.shards": "s"}
    path = tmp_path / MODEL
    path.write_bytes(serialize_model({"x": torch.zeros(2)}, {"config": config, "size": [64, 64]}))
    expected = {"model.encoder": "tiny", "model.skip_conv": True, "optim.lr": 1.0, "data.shards": "s"}
    assert read_model(path)[0]["config"] == read_tensors(path)[0] == expected
