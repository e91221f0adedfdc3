"""Environment of a process: what a launcher says of its ranks, and what accelerate would take for a run's config."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from ..errors import UserError

_PREFIX = "ACCELERATE_"
_KEPT = ("ACCELERATE_USE_CPU", "ACCELERATE_CPU_AFFINITY", "ACCELERATE_LOG_LEVEL", "ACCELERATE_MIXED_PRECISION")
"""They change nothing of what is learned: where a run computes, what is shown; precision is passed to accelerate, and
that it stands there tells of a launcher."""
_TRUE, _FALSE = ("1", "true", "yes", "on", "y", "t"), ("0", "false", "no", "off", "n", "f", "")
"""As accelerate reads them, in any case."""
_DECIDED_BY = {
    "ACCELERATE_MIXED_PRECISION": "--train.precision decides",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "--train.accumulate decides",
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
