"""Launchers read a command line before the commands do: what of it they pass on, and what they take for their own."""

import contextlib
import io
import re

import pytest
from accelerate.commands.launch import launch_command_parser
from torch.distributed.run import get_args_parser

from mde_dist import ablate, bench, evaluate, export, predict, report, shard, train
from mde_dist.training.config import read_config
from mde_dist.utils.cli import parse

REFUSED = {"--run"}
"""By torchrun on Python 3.11: several of its own options begin so. Each has a second name."""


@pytest.fixture(scope="module")
def options() -> set[str]:
    """All names of all options of all commands."""
    said = io.StringIO()
    for command in (ablate, evaluate, export, predict, report, shard, train):
        with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
            command.main(["--help"])
    for word in bench.WORDS:
        with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
            bench.main([word, "--help"])
    return set(re.findall(r"(?<![\w-])--[a-z][\w.-]*\w", said.getvalue())) | {"--config"}


def passed_on(parser, option: str) -> bool:
    try:
        given = parser.parse_args(["-m", "mde_dist.train", "--first", option, "value", f"{option}=value"])
    except SystemExit:
        return False
    return given.training_script_args == ["--first", option, "value", f"{option}=value"]


def test_torchrun_passes_on_every_option_under_one_name_at_least(options):
    assert {"--run", "--run-dir", "--train.batch-size", "--checkpoint", "--log-with", "--threads"} < options
    refused = {option for option in options if not passed_on(get_args_parser(), option)}
    assert refused <= REFUSED


def test_accelerate_passes_on_every_option(options):
    parser = launch_command_parser()
    assert {option for option in options if not passed_on(parser, option)} == set()


@pytest.mark.parametrize("name", ["--run-dir", "--run"])
def test_both_names_of_the_run_directory_mean_the_same(name):
    assert str(read_config([name, "a b"]).run) == "a b"
    assert str(read_config([f"{name}=a b"]).run) == "a b"
    for kind in (evaluate.EvaluateCommand, export.ExportCommand, predict.PredictCommand):
        rest = ["--output", "out"] if kind is not evaluate.EvaluateCommand else []
        rest += ["image.png"] if kind is predict.PredictCommand else []
        assert str(parse(kind, [name, "runs/a", *rest], "it").run) == "runs/a"
    assert len(parse(report.ReportCommand, [name, "a", "b"], "it").run) == 2
