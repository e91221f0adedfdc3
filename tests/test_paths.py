"""Paths as people write them: expanded wherever one enters, and pasted back into a shell as they were meant."""

import json
import os
import shlex
import shutil
import subprocess
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from commands import environment
from hypothesis import given, settings
from hypothesis import strategies as st

from mde_dist import config as show_config
from mde_dist import shard
from mde_dist.ablate import AblateCommand
from mde_dist.evaluate import EvaluateCommand
from mde_dist.export import ExportCommand
from mde_dist.models.depth_model import create_pretrained_model
from mde_dist.models.weights import serialize_model
from mde_dist.packing.inspect import given_lists
from mde_dist.predict import PredictCommand
from mde_dist.report import ReportCommand
from mde_dist.shard import ShardConfig
from mde_dist.tools.ablation.table import read_table
from mde_dist.tools.benchmarking import loader, step
from mde_dist.training.checkpoint import open_model
from mde_dist.training.config import Config, as_json, read_config, to_toml, with_whole_paths
from mde_dist.training.run_dir import differences
from mde_dist.utils.cli import LatePath, Place, flatten, parse
from mde_dist.utils.errors import UserError
from mde_dist.utils.paths import as_typed, command_line, expanded, local_path, with_home

ODD = "a  (b) [c] 'd' \"e\" $HOME ${x} $$ ~ *; & ü"
COMMANDS: tuple[Any, ...] = (
    *(Config, ShardConfig, EvaluateCommand, PredictCommand, ExportCommand, ReportCommand, AblateCommand),
    *(loader.Options, step.Options),
)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("SCRATCH", str(tmp_path / "scratch"))
    monkeypatch.delenv("NOWHERE", raising=False)
    monkeypatch.setenv("EMPTY", "")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


# --- where a path enters ---


def path_options(command: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """Name and type of every field that holds a path or the place of shards."""
    hints, found = get_type_hints(command, include_extras=True), []
    for item in fields(command):
        kind = hints[item.name]
        if hasattr(kind, "__dataclass_fields__"):
            found += path_options(kind, f"{prefix}{item.name}.")
        elif {Path, LatePath, Place} & {kind, *get_args(kind), *(k for part in get_args(kind) for k in get_args(part))}:
            found.append((f"{prefix}{item.name}", kind))
    return found


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.__module__)
def test_every_path_of_every_command_is_expanded(tmp_path: Path, home: Path, command: Any) -> None:
    options = path_options(command)
    assert len(options) >= 2
    arguments = []
    for name, _ in options:
        typed = f"~/$SCRATCH/{name} b"
        positional = (command, name) in ((PredictCommand, "images"), (AblateCommand, "table"))
        arguments += [*([] if positional else [f"--{name.replace('_', '-')}"]), *[typed] * (1 + (name == "compare"))]
    found = dict(flatten(parse(command, arguments, "prog")))
    for name, kind in options:
        for one in found[name] if isinstance(found[name], tuple) else [found[name]]:
            assert Path(with_home(one) if kind is LatePath else one) == Path(f"{home}/{tmp_path}/scratch/{name} b")


def test_a_file_of_toml_and_what_stands_behind_a_sign_are_expanded(tmp_path: Path, home: Path) -> None:
    folder = tmp_path / "scratch"
    folder.mkdir()
    text = 'run = "~/run"\n[data]\nshards = "$SCRATCH/shards"\neval_shards = "~"\n[model]\nweights = "${SCRATCH}/w"\n'
    (folder / "mine.toml").write_text(text)
    for argument in (["--config=$SCRATCH/mine.toml"], ["--config", "$SCRATCH/mine.toml"]):
        config = read_config(argument)
        assert config.run == home / "run"
        assert (config.data.shards, config.data.eval_shards) == (f"{folder}/shards", str(home))
        assert config.model.weights == f"{folder}/w"
    assert given_lists(("train=~/list.txt",)) == {"train": home / "list.txt"}
    (folder / "table.toml").write_text('base = "$SCRATCH/mine.toml"\n[rows.one]\n[rows.two]\noptim.ema_samples = 9\n')
    table = read_table(folder / "table.toml", tmp_path / "out")
    assert table.trainings[0].config.data.shards == f"{folder}/shards"


@pytest.mark.parametrize(
    "text", ["s3://b/$NOWHERE/~", "https://h/a?b=$x", "pipe:cat $NOWHERE/x", "a{000..009}.tar", "b/~/*"]
)
def test_what_is_no_local_path_stays_as_it_is(text: str) -> None:
    assert expanded(text) == text
    assert read_config(["--data.shards", "a{0..9}*/[x]"]).data.shards == "a{0..9}*/[x]"


@pytest.mark.parametrize("text", ["$NOWHERE/x", "a/${NOWHERE}", "$EMPTY/x", "~nobody-of-this-name/x", "", "a\0b"])
def test_what_nobody_can_expand_is_one_line(tmp_path: Path, text: str) -> None:
    for arguments in (["--run", text], ["--data.shards", text], [f"--data.shards={text}"], ["--config", text]):
        with pytest.raises(UserError) as error:
            read_config(arguments)
        assert "\n" not in str(error.value)
        assert any(word in str(error.value) for word in ("NOWHERE", "EMPTY", "nobody-of-this-name", "no path"))
    file = tmp_path / "mine.toml"
    file.write_text(f"run = {json.dumps(text)}\n")
    with pytest.raises(UserError, match=r"mine\.toml"):
        read_config(["--config", str(file)])


def test_a_name_with_a_sign_that_stands_there_is_meant(tmp_path: Path) -> None:
    """As a shell gives it for photos/*."""
    (tmp_path / "cost $NOWHERE").touch()
    assert local_path("cost $NOWHERE") == Path("cost $NOWHERE")
    assert local_path("cost $5 $") == Path("cost $5 $")
    assert local_path("./~/x") == tmp_path / "~/x"
    assert local_path("a$$b$$$$") == Path("a$b$$")


# --- what is noted down ---


@given(st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0\r"), min_size=1))
@settings(deadline=None, max_examples=60)
def test_a_path_reads_back_from_a_command_and_from_a_config(text: str) -> None:
    path = Path("/x", text)
    assert local_path(as_typed(path)) == path
    words = shlex.split(command_line("train", "--run", path)) if text.isprintable() else []
    assert not words or local_path(words[-1]) == path


def test_a_resolved_config_holds_in_other_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = ["--run", as_typed(ODD), "--data.shards", as_typed(f"s/{ODD}"), "--model.weights", as_typed(f"../{ODD}")]
    config = read_config(given)
    (tmp_path / "config.toml").write_text(to_toml(with_whole_paths(config)), "utf-8")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    again = read_config(["--config", str(tmp_path / "config.toml")])
    assert again.run == tmp_path / ODD
    assert again.data.shards == f"{tmp_path}/s/{ODD}"
    assert again.data.cache == config.data.cache
    assert read_config(["--config", str(tmp_path / "config.toml")]) == again
    # the weights are those of before, whoever names them
    before, now = ({"model.weights": one.model.weights} for one in (config, again))
    assert differences(before, now) == []
    assert differences({"model.weights": "imagenet"}, now) and differences({"model.weights": "other.safetensors"}, now)
    assert differences({"model.weights": "imagenet"}, {"model.weights": "none"})


def test_a_job_script_is_told_the_run_directory_as_it_is(capsys: pytest.CaptureFixture[str], home: Path) -> None:
    show_config.main(["run", f"--run=~/{as_typed(ODD)}", "--train.total-samples", "48"])
    assert capsys.readouterr().out == f"{home}/{ODD}\n"


# --- what is printed to be pasted ---


def pasted(line: str, folder: Path, before: str = "") -> subprocess.CompletedProcess[str]:
    """Run a line as if it was pasted into a shell, in another folder."""
    script = f"{before}\n{line}"
    return subprocess.run(
        ["bash", "-c", script], cwd=folder, env=environment(), capture_output=True, text=True, check=False
    )


SHOW = "python() { printf '%s\\0' \"$@\"; }"


def test_every_word_comes_through_a_shell(tmp_path: Path) -> None:
    names = [ODD, "-x", "new\nline", "\x1b[31m", os.fsdecode(b"no utf-8 \xff"), "#", "!x", "a=b", "\\", "None"]
    line = command_line("report", "--run", *map(Path, names), then="")
    env = environment()
    done = subprocess.run(["bash", "-c", f"{SHOW}\n{line}"], cwd="/", env=env, capture_output=True, check=True)
    words = os.fsdecode(done.stdout).split("\0")[:-1]
    assert words[:3] == ["-m", "mde_dist.report", "--run"]
    assert [local_path(word) for word in words[3:]] == [tmp_path / name for name in names]
    assert line.isprintable()


def test_the_lines_that_shard_prints_can_be_pasted_elsewhere(
    room_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Shards in a folder of an odd name, named from beside it: the lines are run from another folder."""
    shutil.copytree(room_shards, tmp_path / ODD)
    tar = tmp_path / ODD / "test-000000.tar"
    tar.write_bytes(tar.read_bytes()[:20_000])
    with pytest.raises(SystemExit):
        shard.main(["--verify", as_typed(ODD), "--workers", "1"])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("repair: ")]
    done = pasted(line.removeprefix("repair: ").split("  (sets")[0], Path("/"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / ODD / "quarantine").is_dir()
    line = done.stdout.splitlines()[-1].removeprefix("next: ")
    done = pasted(line, Path("/"), SHOW.replace("python", "accelerate"))
    words = done.stdout.split("\0")[:-1]
    assert words[:3] == ["launch", "-m", "mde_dist.train"]
    assert Path(read_config(words[3:]).data.shards) == tmp_path / ODD


def test_a_run_finds_its_shards_from_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights have places as they were typed; config.toml says from where. A place that has gone stays as typed."""
    config = read_config(["--data.shards", as_typed(ODD), "--data.eval-shards", "gone", "--model.encoder", "tiny"])
    weights = tmp_path / "run/checkpoints/step-00000001/model.safetensors"
    weights.parent.mkdir(parents=True)
    (tmp_path / ODD).mkdir()
    about = {"config": as_json(config), "size": [32, 32]}
    weights.write_bytes(serialize_model(create_pretrained_model(config.model, 0).state_dict(), about))
    (tmp_path / "run/config.toml").write_text(to_toml(with_whole_paths(config)), "utf-8")
    monkeypatch.chdir("/")
    for toml, shards in ((True, f"{tmp_path}/{ODD}"), (False, ODD)):
        if not toml:
            (tmp_path / "run/config.toml").unlink()
        _, metadata, _ = open_model(None, weights)
        assert (metadata["config"]["data.shards"], metadata["config"]["data.eval_shards"]) == (shards, "gone")
