"""Variables of the environment do not change the weights that a training ends with."""

import os
import socket
from functools import partial

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from commands import environment, learned, small
from faults import forbid_compiling
from safetensors.torch import load_file
from torch import nn
from warm import warm_run

from mde_dist.distributed.environment import ignored_variables, missing_interface, ranks_here
from mde_dist.distributed.process_group import init_distributed, promised_processes
from mde_dist.training.config import read_config
from mde_dist.utils.cli import read_alone, run_command
from mde_dist.utils.console import own_rank
from mde_dist.utils.errors import UserError

LEFTOVERS = {
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",
    "ACCELERATE_DYNAMO_BACKEND": "EAGER",
    "ACCELERATE_MIXED_PRECISION": "fp16",
    "ACCELERATE_TORCH_DEVICE": "meta",
    "ACCELERATE_USE_FSDP": "true",
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_USE_MEGATRON_LM": "true",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
    "ACCELERATE_USE_SAGEMAKER": "true",
}
"""Each of them asks for another training, or ends in a traceback."""
SILENT = {
    "ACCELERATE_DYNAMO_USE_FULLGRAPH": "None",
    "ACCELERATE_DEBUG_MODE": "perhaps",
    "ACCELERATE_FP8_BACKEND": "TE",
    "ACCELERATE_BYPASS_DEVICE_MAP": "true",
    "PARALLELISM_CONFIG_TP_SIZE": "2",
    "FORK_LAUNCHED": "perhaps",
    **{"RANK": "3", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "8"},
}
"""These say how to do what nobody asks for, or belong to another job."""


def test_leftovers_change_no_digit_of_a_training_and_are_told_in_one_line(undisturbed, room_shards, tmp_path):
    env = environment(**LEFTOVERS, **SILENT)
    done = warm_run("train", env=env, before=forbid_compiling, run=tmp_path / "run", **small(data_shards=room_shards))
    assert done.returncode == 0, done.stderr
    theirs, ours = (load_file(run / "model.safetensors") for run in (undisturbed, tmp_path / "run"))
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)
    assert learned(undisturbed) == learned(tmp_path / "run")
    (line,) = done.stderr.splitlines()
    assert all(f"{name}={value}" in line for name, value in LEFTOVERS.items())
    assert not any(name in line for name in SILENT)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR"),
        ("ACCELERATE_TORCH_DEVICE", "meta"),
        ("ACCELERATE_DEBUG_MODE", "perhaps"),
    ],
)
def test_none_of_them_reaches_accelerate(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        with init_distributed(cpu_threads=torch.get_num_threads()) as accelerator:
            assert name not in os.environ
            assert accelerator.gradient_accumulation_steps == 1
            assert accelerator.mixed_precision == "no"
            assert accelerator.distributed_type == DistributedType.NO
            assert accelerator.device == PartialState().default_device
            model = accelerator.prepare_model(nn.Linear(2, 1))
            assert type(model) is nn.Linear and model._compiled_call_impl is None
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert os.environ[name] == value  # for what comes after the training


@pytest.mark.parametrize("value", ["", "no", "NO", "False", "1", "0"])
@pytest.mark.parametrize("name", LEFTOVERS)
def test_what_a_launcher_sets_by_default_is_no_word_worth(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    assert name not in [variable.name for variable in ignored_variables()]


@pytest.mark.parametrize(
    ("name", "value"),
    [("ACCELERATE_USE_CPU", "perhaps"), ("WORLD_SIZE", "two"), ("WORLD_SIZE", "0"), ("PMI_SIZE", "x")],
)
def test_what_says_nothing_that_can_be_understood_is_one_line(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"^{name}={value}: .*unset it"), init_distributed():
        raise AssertionError("it began")


LAUNCHED = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
LAUNCHED |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
"""Variables that torchrun gives to one of two ranks."""


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("WORLD_SIZE", ["", "abc", "-1", "0", "1.5"]),
        ("RANK", ["", "abc", "-1", "2", None]),
        ("LOCAL_RANK", ["", "abc", "-1", "2", None]),
        ("LOCAL_WORLD_SIZE", ["", "abc", "0"]),
        ("MASTER_PORT", ["", "abc", "0", "65536", None]),
        ("MASTER_ADDR", ["", " ", None]),
    ],
)
def test_what_a_launcher_cannot_have_said_is_one_line_that_names_it(monkeypatch, capsys, name, values):
    """Also where the command has failed before; nobody is waited for, and no traceback shown."""
    for value in values:
        for key, given in (LAUNCHED | {name: value}).items():
            monkeypatch.delenv(key, raising=False) if given is None else monkeypatch.setenv(key, given)
        for config in ("no-such.toml", None):
            with pytest.raises(SystemExit) as stop:
                run_command(partial(begin, config))
            said = capsys.readouterr().err
            assert stop.value.code == 2
            assert said.startswith("error") and said.count("\n") == 1
            assert (f"{name} is not set" if value is None else f"{name}={value.strip()}") in said


def begin(config: str | None, argv: list[str]) -> None:
    given = ["--config", config] if config else []
    _, error = read_alone(lambda: read_config(given), None)
    with init_distributed(error=error):
        raise AssertionError("it began")


@pytest.mark.parametrize("name", ["no-such-0", "lo,no-such-0"])
def test_a_network_interface_that_is_not_here_is_named_with_those_that_are(monkeypatch, name):
    for key, value in LAUNCHED.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", name)
    assert f"GLOO_SOCKET_IFNAME={name}: this machine has no address on no-such-0" in missing_interface(cuda=False)
    assert "lo" in missing_interface(cuda=False).split("(there are")[1]
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    assert missing_interface(cuda=True) is None
    for told, cuda, found in (
        *(("lo", True, True), ("=lo", True, True), ("no-such", False, True), ("no-such", True, False)),
        *(("=l", True, False), ("l", True, True), ("no-such,lo", True, True), ("^no-such", True, True)),
        ("^" + ",".join(name for _, name in socket.if_nameindex()), True, False),
    ):
        monkeypatch.setenv("NCCL_SOCKET_IFNAME", told)
        assert (missing_interface(cuda) is None) == found, told


def test_launchers_of_which_each_task_started_one_are_told(monkeypatch, capsys):
    for key, value in (LAUNCHED | {"GROUP_WORLD_SIZE": "1", "SLURM_STEP_NUM_TASKS": "4"}).items():
        monkeypatch.setenv(key, value)
    assert promised_processes() == 2
    assert "SLURM_STEP_NUM_TASKS=4" in capsys.readouterr().err
    monkeypatch.setenv("GROUP_WORLD_SIZE", "4")
    assert promised_processes() == 2
    assert capsys.readouterr().err == ""


def test_the_place_that_another_job_had_among_its_ranks_is_not_this_process_s(monkeypatch):
    for name, value in {"LOCAL_WORLD_SIZE": "8", "RANK": "3", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert (ranks_here(), own_rank("RANK")) == (1, 0)
    monkeypatch.setenv("WORLD_SIZE", "16")
    assert (ranks_here(), own_rank("RANK")) == (8, 3)
