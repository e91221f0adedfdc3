"""What can befall a training, brought about in its own processes: for `before` of warm.py.

Each function patches something in the process that is about to train. `rank=None` is every rank.
"""

import fcntl
import os
import pickle
import resource
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from mde_dist.data.shards import ShardDataset
from mde_dist.distributed import process_group as run_distributed
from mde_dist.evaluation import evaluator as scoring
from mde_dist.evaluation import results
from mde_dist.models.depth_model import DepthModel
from mde_dist.reporting import report
from mde_dist.tools.diagnostics import data as checkup_data
from mde_dist.tools.diagnostics import machine
from mde_dist.tools.diagnostics import step as checkup_step
from mde_dist.training import checkpoint, snapshots
from mde_dist.training import data_stream as stream
from mde_dist.training import run_dir as directory
from mde_dist.training import step as train_module
from mde_dist.utils import jsonl as run_records

POINTS: dict[str, tuple[Any, str]] = {
    "forward": (DepthModel, "forward"),
    "backward": (Accelerator, "backward"),
    "optimizer": (torch.optim.AdamW, "step"),
    "evaluation": (scoring, "depth_counts"),  # once a batch
    "file of a checkpoint": (checkpoint, "write_atomic"),
    "rename of a checkpoint": (Path, "rename"),
    "flush of a directory": (checkpoint, "sync_directory"),
    "removal of a checkpoint": (shutil, "rmtree"),
    "line of metrics": (run_records.JsonlLogger, "write"),
    "file of the run": (directory, "write_atomic"),
    "file of an evaluation": (results, "write_atomic"),
    "picture of an evaluation": (snapshots, "write_atomic"),
    "pictures": (report, "draw_report"),
}
"""What can be struck: by the place where it is looked up."""


def mine(rank: int | None) -> bool:
    return rank is None or int(os.environ.get("RANK", "0")) == rank


def together(*faults: Callable[[], object]) -> None:
    """Several of them."""
    for fault in faults:
        fault()


Action = Callable[[Callable[[], Any], tuple[Any, ...]], Any]
"""What happens instead of a call: given the call itself, and its arguments."""


def patch(point: str, action: Action, call: int | None = None, rank: int | None = None) -> None:
    """Put an action in the place of call number `call` (from 1; None = all) of a point."""
    if not mine(rank):
        return
    owner, name = POINTS[point]
    real, calls = getattr(owner, name), 0

    def patched(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if call in (None, calls):
            return action(lambda: real(*arguments, **options), arguments)
        return real(*arguments, **options)

    setattr(owner, name, patched)


def die(point: str, call: int, when: str, rank: int | None = None) -> None:
    """The process is killed before, in or after a call. "in" leaves half of what the call writes or removes."""

    def action(do_it: Callable[[], Any], arguments: tuple[Any, ...]) -> Any:
        if when == "in" and point == "removal of a checkpoint":
            next(iter(Path(arguments[0]).iterdir())).unlink()
        elif when == "in" and point == "line of metrics":
            arguments[0]._file = _Half(arguments[0]._file)
            do_it()
        elif when == "in":
            real_open = Path.open
            Path.open = lambda *a, **o: _Half(real_open(*a, **o))  # type: ignore[method-assign, assignment]
            do_it()
        elif when == "after":
            do_it()
        os.kill(os.getpid(), signal.SIGKILL)

    patch(point, action, call, rank)


class _Half:
    """A file whose first write is its last."""

    def __init__(self, file: Any):
        self._file = file

    def __enter__(self) -> "_Half":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, data: bytes) -> None:
        self._file.write(data[: len(data) // 2])
        self._file.flush()
        os.kill(os.getpid(), signal.SIGKILL)


def signalled(point: str, call: int, number: int, rank: int | None = None, again: int | None = None) -> None:
    """The process gets a signal just before a call, and right after it another one, where `again` says so."""

    def action(do_it: Callable[[], Any], _: tuple[Any, ...]) -> Any:
        os.kill(os.getpid(), number)
        if again is not None:
            os.kill(os.getpid(), again)
        return do_it()

    patch(point, action, call, rank)


def refused(point: str, number: int) -> None:
    """The system refuses every call, with this error."""

    def action(do_it: Callable[[], Any], _: tuple[Any, ...]) -> Any:
        raise OSError(number, os.strerror(number))

    patch(point, action)


def slow(point: str, seconds: float, rank: int | None = None) -> None:
    """Every call takes so much longer."""

    def action(do_it: Callable[[], Any], _: tuple[Any, ...]) -> Any:
        time.sleep(seconds)
        return do_it()

    patch(point, action, rank=rank)


def no_data(after: int, rank: int, mark: Path) -> None:
    """After so many samples the shards do not answer this rank any more; then `mark` is there."""
    if not mine(rank):
        return
    real, reads, lock = ShardDataset.read_into, 0, threading.Lock()

    def stuck(self: ShardDataset, *arguments: Any) -> None:
        nonlocal reads
        with lock:
            reads += 1
            late = reads > after
        if late:
            mark.touch()
            time.sleep(600)
        real(self, *arguments)

    ShardDataset.read_into = stuck  # type: ignore[method-assign]


def not_finite(step: int, what: str, rank: int | None = None) -> None:
    """The loss of this rank in a step (from 1), or the gradient of a loss that is finite, is not."""
    if not mine(rank):
        return
    real, seen = train_module.depth_loss, 0

    def depth_loss(*arguments: Any) -> torch.Tensor:
        nonlocal seen
        seen += 1
        loss = real(*arguments)
        if seen == step:
            loss = loss * torch.nan if what == "loss" else _Poison.apply(loss)
        return loss

    train_module.depth_loss = depth_loss


class _Poison(torch.autograd.Function):
    """A finite number whose gradient is not."""

    @staticmethod
    def forward(context: Any, value: torch.Tensor) -> torch.Tensor:
        return value.clone()

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * torch.inf


def holes() -> None:
    """Every third sample has a measurement in a strip only, so that ranks differ in the number of valid pixels."""
    real = stream.prepare

    def prepare(batch: Any, *arguments: Any) -> Any:
        image, depth = real(batch, *arguments)
        few = torch.from_numpy(batch.sample % 3 == 0)[:, None, None]
        strip = torch.arange(depth.shape[2]) < depth.shape[2] // 8
        return image, torch.where(few & ~strip, 0.0, depth)

    stream.prepare = prepare


def forbid_pickle() -> None:
    """Reading or writing one raises, and so do torch's functions that would."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a pickle")

    for name in ("dump", "dumps", "load", "loads", "Pickler", "Unpickler"):
        setattr(pickle, name, refuse)
    torch.save = torch.load = refuse


def forbid_compiling() -> None:
    """Asking torch to compile anything raises."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("it is compiled")

    torch.compile = torch.nn.Module.compile = refuse


# --- for the doctor ---


def quick_checkup() -> None:
    """Measure for a moment only."""
    checkup_data.SECONDS = checkup_step.SECONDS = 0.1


def other_version(rank: int) -> None:
    if mine(rank):
        machine.__version__ = "0.0.9"


def broken_check(rank: int) -> None:
    """One of the checks raises what nobody expects."""
    if mine(rank):
        machine.host_memory = lambda: 1 // 0


def out_of_memory(rank: int | None = None) -> None:
    def action(do_it: Callable[[], Any], _: tuple[Any, ...]) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    patch("forward", action, rank=rank)


def left_behind(name: str, value: str) -> None:
    """A variable of the environment that another job has set."""
    os.environ[name] = value


def few_files(limit: int) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))


def elsewhere(rank: int, folder: Path, node: bool = False) -> None:
    """The rank works in another folder; with `node` it is the first one of a node of its own."""
    if mine(rank):
        os.chdir(folder)
        if node:
            os.environ["LOCAL_RANK"] = "0"


def no_locks() -> None:
    """Of a run directory; the doctor may lock a file of its own."""
    real = fcntl.flock

    def refuse(file: Any, kind: int) -> None:
        assert Path(file.name).suffix == ".tmp", "a lock"
        real(file, kind)

    fcntl.flock = refuse


def hosts_apart() -> None:
    """What ranks on GPUs do: the numbers that the host waits for go over a group of their own."""
    real = stream.all_reduce_device_and_host

    def all_reduce_device_and_host(*arguments: Any) -> Any:
        if run_distributed._hosts is None:
            run_distributed._hosts = run_distributed.hosts_group(60)
        return real(*arguments)

    stream.all_reduce_device_and_host = all_reduce_device_and_host
