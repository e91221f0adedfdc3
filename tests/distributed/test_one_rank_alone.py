"""A fault of one rank before the first step: that rank says it, and all end soon."""

import os
import socket
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from commands import small
from faults import elsewhere, left_behind, mine, together
from warm import warm_run

from mde_dist.distributed.rendezvous import _compare
from mde_dist.models.config import ModelConfig
from mde_dist.models.depth_model import create_pretrained_model
from mde_dist.models.weights import serialize_model
from mde_dist.training import build
from mde_dist.training.config import Config, as_json
from mde_dist.utils.errors import UserError

pytestmark = pytest.mark.distributed


def errors(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith("error")]


@pytest.fixture
def places(tmp_path) -> tuple[Path, Path]:
    """Working directories of rank 0 and of another rank: two nodes' disks."""
    places = tmp_path / "here", tmp_path / "there"
    for place in places:
        place.mkdir()
    return places


def write_model(path: Path) -> None:
    config = Config(model=ModelConfig(encoder="tiny"))
    tensors = create_pretrained_model(config.model, seed=0).state_dict()
    path.write_bytes(serialize_model(tensors, {"config": as_json(config), "size": [32, 32]}))


def start(command: str, places: tuple[Path, Path], *faults, processes: int = 2, **options):
    """The last rank works elsewhere -> what was said, and the exit codes of all, which end by themselves."""
    here, there = places
    before = partial(together, *faults, partial(elsewhere, processes - 1, there))
    return warm_run(command, processes=processes, cwd=here, before=before, timeout=60, **options)


def test_a_file_of_options_that_is_on_one_node_only(places):
    (places[0] / "options.toml").write_text("[train]\nkeep_checkpoints = 3\n")
    done = start("train", places, processes=3, config="options.toml")
    assert done.returncode == 2
    (said,) = errors(done.stderr)
    assert said.startswith("error (rank 2): --config options.toml: No such file")


def test_a_network_interface_that_one_node_lacks(places):
    done = start("train", places, partial(left_behind_on, 1, "GLOO_SOCKET_IFNAME", "no-such-0"))
    assert done.returncode == 2
    (said,) = errors(done.stderr)
    assert said.startswith("error (rank 1): GLOO_SOCKET_IFNAME=no-such-0")


def left_behind_on(rank: int, name: str, value: str) -> None:
    if mine(rank):
        left_behind(name, value)


def test_options_that_are_others_on_one_node(places, room_shards):
    for place, seed in zip(places, (3, 4), strict=True):
        (place / "options.toml").write_text(f"[train]\nseed = {seed}\n[data]\ncache = '{place}'\n")
    done = start("train", places, config="options.toml", **small(data_shards=room_shards))
    assert done.returncode == 2
    (said,) = errors(done.stderr)
    assert "rank 1" in said and "train.seed is 4, not 3" in said and "cache" not in said


ADDS_UP = """
import torch
from mde_dist.utils.cli import run_command
from mde_dist.distributed.process_group import all_reduce_sum, init_distributed
from mde_dist.distributed.heartbeat import monitor_ranks
from mde_dist.distributed.signals import PreemptionHandler

def main(argv):
    with init_distributed() as accelerator, monitor_ranks(accelerator, PreemptionHandler()):
        print(all_reduce_sum(accelerator, torch.ones(1)).item())

run_command(main)
"""


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="needs IPv6")
@pytest.mark.parametrize("host", ["::1", "[::1]"])
def test_ranks_meet_and_watch_one_another_at_an_ipv6_address(tmp_path, host):
    with socket.socket(socket.AF_INET6) as probe:
        try:
            probe.bind(("::1", 0))
        except OSError:
            pytest.skip("there is no ::1")
    (tmp_path / "adds_up.py").write_text(ADDS_UP)
    before = partial(left_behind, "MASTER_ADDR", host)
    done = warm_run(tmp_path / "adds_up.py", processes=2, before=before, timeout=60)
    assert (done.returncode, done.stdout) == (0, "2.0\n2.0\n"), done.stderr


def test_one_small_image_per_rank_is_refused_in_one_line(places, room_shards):
    given = small(data_shards=room_shards, train_batch_size=2)
    done = warm_run("train", processes=2, cwd=places[0], run="run", **given)
    assert done.returncode == 2
    (said,) = errors(done.stderr)
    assert "1 image of 32x32" in said and "--train.batch-size 4 " in said
    assert not list(places[0].iterdir())


def test_weights_that_are_on_one_node_only(places, room_shards):
    write_model(places[0] / "start.safetensors")
    given = small(data_shards=room_shards, model_weights="start.safetensors")
    done = start("train", places, processes=3, run=places[0] / "run", **given)
    assert done.returncode == 2
    (said,) = errors(done.stderr)
    assert said.startswith("error (rank 2): ") and "start.safetensors" in said
    assert not (places[0] / "run").exists()


def test_a_checkpoint_that_is_on_one_node_only(places, room_shards):
    write_model(places[0] / "model.safetensors")
    done = start("evaluate", places, checkpoint="model.safetensors", shards=room_shards)
    assert done.returncode == 2
    (said,) = errors(done.stderr)
    assert said.startswith("error (rank 1): model.safetensors")


def test_a_sample_that_cannot_be_packed_on_one_node(places):
    (places[0] / "shards/rooms").mkdir(parents=True)
    (places[0] / "shards/rooms/manifest.json").touch()
    (places[1] / "shards").touch()
    done = start("train", places, partial(elsewhere, 1, places[1], node=True), run="run")
    assert done.returncode == 2
    (said,) = errors(done.stderr)
    assert said.startswith("error (rank 1): shards/rooms: cannot be written")


def broken(place: str, name: str, rank: int, owner: str = "") -> None:
    """A function of a module, or a method, raises on this rank what nobody expects."""

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("the library is another one here")

    if mine(rank):
        module = import_module(place)
        setattr(getattr(module, owner) if owner else module, name, fail)


def test_what_nobody_expects_while_the_model_is_built(places, room_shards):
    fault = partial(broken, "mde_dist.training.build", "TrainModule", 1)
    done = start("train", places, fault, processes=3, run=places[0] / "run", **small(data_shards=room_shards))
    assert done.returncode == 2
    assert errors(done.stderr) == ["error (rank 1): OSError: the library is another one here"]
    assert done.stderr.count("Traceback") == 1


def test_what_nobody_expects_in_the_middle_of_a_collective(places, room_shards):
    """Nobody can be told in time; but each finds out, and names a log that is there."""
    run = places[0] / "run"
    fault = partial(broken, "accelerate", "prepare_model", 1, "Accelerator")
    done = start("train", places, fault, run=run, **small(data_shards=room_shards))
    (said,) = errors(done.stderr)
    assert said.startswith(f"error (rank 0): rank 1 is gone; log: {run}/logs/rank-1.log;")
    log = (run / "logs/rank-1.log").read_text()
    assert "error (rank 1): OSError: the library" in log and "Traceback" in log


def test_a_rank_that_dies_before_it_has_a_log(places, room_shards):
    fault = partial(dying, 1)
    done = start("train", places, fault, run=places[0] / "run", **small(data_shards=room_shards))
    (said,) = errors(done.stderr)
    assert said.startswith("error (rank 0): rank 1 is gone; ") and "log" not in said


def dying(rank: int) -> None:
    if mine(rank):
        build.training_flops = lambda *_: os._exit(3)


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_on_devices_of_two_kinds_are_refused_by_name(rank):
    ranks = [
        {"failed": False, "device": device, "host": host, "settings": {}}
        for device, host in (("cuda", "one"), ("cpu", "two"))
    ]
    with pytest.raises(UserError, match=r"rank 1 \(two\) has cpu"):
        _compare(ranks, None, rank)


def test_a_device_that_does_not_answer_is_told_before_the_first_collective(places, room_shards):
    done = start("train", places, partial(broken, "torch", "zeros", 1), run="run", **small(data_shards=room_shards))
    assert done.returncode == 2
    assert errors(done.stderr) == ["error (rank 1): OSError: the library is another one here"]
