"""Environment of a process: what a launcher says of its ranks, and what accelerate would take for a run's config."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from torch import distributed

from mde_dist.utils.errors import RankError, UserError

_PREFIX = "ACCELERATE_"
_KEPT = ("ACCELERATE_USE_CPU", "ACCELERATE_CPU_AFFINITY", "ACCELERATE_LOG_LEVEL", "ACCELERATE_MIXED_PRECISION")
"""They change nothing of what is learned: where a run computes, what is shown; precision is passed to accelerate, and
that it stands there tells of a launcher."""
_TRUE, _FALSE = ("1", "true", "yes", "on", "y", "t"), ("0", "false", "no", "off", "n", "f", "")
"""Words that accelerate reads as true and as false, in upper or lower case."""
_DECIDED_BY = {
    "ACCELERATE_MIXED_PRECISION": "--train.precision decides",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "--train.grad-accum-steps decides",
    "ACCELERATE_DYNAMO_BACKEND": "--train.compile decides",
    "ACCELERATE_TORCH_DEVICE": "CUDA_VISIBLE_DEVICES decides, or ACCELERATE_USE_CPU",
    "ACCELERATE_USE_FSDP": "ranks are trained by DDP",
    "ACCELERATE_USE_DEEPSPEED": "ranks are trained by DDP",
    "ACCELERATE_USE_MEGATRON_LM": "ranks are trained by DDP",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "ranks are trained by DDP",
    "ACCELERATE_USE_SAGEMAKER": "ranks are trained by DDP",
}
"""Variables that ask for another training, and the option or rule that decides instead. Other variables only detail
these."""
_START = "start with `accelerate launch` or torchrun, which set it"
_ASKS_NOTHING = ("", "no", "none", "false", "0", "1")


class Ignored(NamedTuple):
    """A variable that asks for something which a run's config decides."""

    name: str
    value: str
    instead: str

    def __str__(self) -> str:
        return f"{self.name}={self.value} ({self.instead})"


def ignored_variables() -> list[Ignored]:
    """Variables that a launcher's yaml, another job or a notebook left behind; `without_leftovers` takes them out."""
    return [
        Ignored(name, value, instead)
        for name, instead in _DECIDED_BY.items()
        if (value := os.environ.get(name, "")).lower() not in _ASKS_NOTHING
    ]


@contextmanager
def without_leftovers() -> Iterator[None]:
    """Within the block accelerate, and what is started, find nothing in the environment that would change a run.

    Accelerate reads it at many places, when it is built and later, and prefers some of it to what it is given.
    """
    left = {name for name in os.environ if name.startswith(_PREFIX) and name not in _KEPT} | {"FORK_LAUNCHED"}
    if "WORLD_SIZE" not in os.environ:  # or accelerate would look for the others
        left |= {"LOCAL_RANK"}
    taken = {name: os.environ[name] for name in left if name in os.environ}
    for name in taken:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(taken)


def flag(name: str) -> bool:
    """A variable that is true or false; false where it is not there. Raises UserError."""
    value = os.environ.get(name, "")
    if value.lower() not in _TRUE + _FALSE:
        raise UserError(f"{name}={value}: is neither true nor false; unset it")
    return value.lower() in _TRUE


def count(name: str) -> int:
    """A variable that says how many processes there are; 1 where it is not there. Raises UserError."""
    value = os.environ.get(name, "1")
    if not value.isdecimal() or int(value) < 1:
        raise UserError(f"{name}={value}: is no number of processes; unset it, or start with `accelerate launch`")
    return int(value)


def ranks_here() -> int:
    """Ranks on this machine, as the launcher says; 1 where there was none. Raises UserError."""
    return count("LOCAL_WORLD_SIZE") if "WORLD_SIZE" in os.environ else 1


def check_ranks() -> int:
    """Check what the launcher says -> number of processes, 1 without a launcher. Takes brackets off MASTER_ADDR.

    Raises UserError where that cannot be, which may be so for this process alone.
    """
    if "WORLD_SIZE" not in os.environ:
        return 1
    world, all_here = count("WORLD_SIZE"), "LOCAL_WORLD_SIZE" if "LOCAL_WORLD_SIZE" in os.environ else "WORLD_SIZE"
    if world > 1:
        for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            if name not in os.environ:
                raise RankError(f"WORLD_SIZE={world}, but {name} is not set; {_START}, or unset WORLD_SIZE")
    for name, of in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", all_here)):
        value = os.environ.get(name, "0")
        if not value.isdecimal() or int(value) >= count(of):
            raise RankError(f"{name}={value}: is no number from 0 to {count(of) - 1} ({of}={count(of)}); {_START}")
    port = os.environ.get("MASTER_PORT", "1")
    if not port.isdecimal() or not 0 < int(port) < 2**16:
        raise RankError(f"MASTER_PORT={port}: is no port, a number from 1 to {2**16 - 1}; {_START}")
    if "MASTER_ADDR" in os.environ:
        host = os.environ["MASTER_ADDR"].strip()
        if not host:
            raise RankError(f"MASTER_ADDR=: is no address of the machine of rank 0; {_START}")
        if host.startswith("[") and host.endswith("]"):  # an IPv6 address as it stands before a port
            os.environ["MASTER_ADDR"] = host[1:-1]
    return world


def missing_interface(cuda: bool) -> str | None:
    """Say which interface that gloo, or on GPUs NCCL, is told to use is not on this machine; None where all are."""
    names = [name for _, name in socket.if_nameindex()]
    there = f"(there are {', '.join(names)}); name one that has an address, or unset it"
    told = os.environ.get("GLOO_SOCKET_IFNAME", "")
    for name in filter(None, told.split(",")):
        try:
            distributed.ProcessGroupGloo.create_device(interface=name)
        except RuntimeError:
            return f"GLOO_SOCKET_IFNAME={told}: this machine has no address on {name} {there}"
    told = os.environ.get("NCCL_SOCKET_IFNAME", "")
    if cuda and told and not any(_nccl_takes(name, told) for name in names):
        return f"NCCL_SOCKET_IFNAME={told}: names no interface of this machine {there}"
    return None


def _nccl_takes(name: str, told: str) -> bool:
    """NCCL's rules: prefixes in a list; a leading ^ excludes them, a leading = wants whole names."""
    prefixes = told.removeprefix("^").removeprefix("=").split(",")
    whole = told.removeprefix("^").startswith("=")
    found = any(name == prefix if whole else name.startswith(prefix) for prefix in prefixes)
    return found != told.startswith("^")
