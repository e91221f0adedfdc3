"""Processes and devices: the one file besides train.py and evaluate.py that knows accelerate and torch.distributed."""

import gc
import hashlib
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
from accelerate import Accelerator
from accelerate.utils import DDPCommunicationHookType, DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import distributed, nn

from mde_dist.distributed.config import Gradients, Precision
from mde_dist.distributed.environment import (
    check_ranks,
    count,
    flag,
    ignored_variables,
    missing_interface,
    ranks_here,
    without_leftovers,
)
from mde_dist.distributed.launcher import watched_launcher
from mde_dist.distributed.rendezvous import compare_ranks, raise_first
from mde_dist.utils.console import say, say_once
from mde_dist.utils.errors import OtherRankError, RankError, UserError

SEVERAL = "accelerate launch --multi_gpu --num_machines 1 --num_processes {n} -m mde_dist.train"
"""The way to start several processes that works with and without GPUs."""

T = TypeVar("T")

_hosts: distributed.ProcessGroup | None = None
"""Group of all ranks over gloo, where the default group is that of their GPUs."""

_PATIENCE = 60.0  # seconds that a rank which has failed waits for the others, to tell them

# how launchers other than torchrun and accelerate tell a process that it has siblings
_SIBLINGS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MPI_LOCALNRANKS")


@contextmanager
def init_distributed(
    precision: Precision = "fp32",
    cpu_threads: int = 0,
    timeout: float = 600.0,
    grad_comm_dtype: Gradients = "fp32",
    ddp_bucket_mb: float = 25.0,
    error: Exception | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Iterator[Accelerator]:
    """Join the process group that the launcher promised, on whatever devices there are; leave it in good order.

    `grad_comm_dtype`: in which gradients are summed over the ranks, in buckets of `ddp_bucket_mb` MB. `timeout`:
    seconds after which a collective that waits for a lost rank ends the run. `error`: what this rank alone may have
    met before, see `read_alone`; it ends all ranks. `settings`: values that have to be the same on all. Raises
    UserError where they are not, where the ranks do not compute on devices of one kind, or where they would train
    independently of one another. What accelerate would take from the environment, it does not find there.
    """
    global _hosts
    promised = promised_processes()
    cpu = flag("ACCELERATE_USE_CPU") or not (torch.cuda.is_available() or _other_accelerator())
    numbers = mixed_precision(precision, torch.cuda.is_available() and not cpu)
    ignored = [str(variable) for variable in ignored_variables() if variable.value != numbers]
    if ignored:
        say_once(f"note: in the environment and not obeyed: {', '.join(ignored)}", file=sys.stderr)
    # the CPU's 1x1 convolutions give channels-last gradients, which DDP copies: right, and too small to matter
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    # the name that all versions of DDP since 2.5 know, which is what accelerate passes on
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
    missing = _missing_interface(promised, cuda=not cpu)
    error = error or missing
    patience = timeout if error is None else min(timeout, _PATIENCE)
    options = [
        InitProcessGroupKwargs(timeout=timedelta(seconds=patience)),
        # buffers are needed alike for evaluating and saving only: see `broadcast_buffers_of`
        DistributedDataParallelKwargs(
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
            bucket_cap_mb=ddp_bucket_mb,
            comm_hook=DDPCommunicationHookType.BF16 if grad_comm_dtype == "bf16" else DDPCommunicationHookType.NO,
        ),
    ]
    with without_leftovers(), watched_launcher() as joined, _leaving_in_order() as leaving:
        try:
            # gloo without a GPU, whichever way the processes were started: by itself accelerate would start alone
            accelerator = Accelerator(cpu=cpu, mixed_precision=numbers, kwargs_handlers=options)
            leaving.append(accelerator)
            torch.zeros((), device=accelerator.device)  # a GPU that does not answer says so now
        except Exception as failure:
            if not distributed.is_initialized():
                not_met = isinstance(failure, distributed.DistError)
                raise error or (UserError(_not_met(failure)) if not_met else failure) from None
            error = error or failure
        joined.set()
        if distributed.is_initialized():
            compare_ranks(error, "cpu" if cpu else "cuda" if torch.cuda.is_available() else "xpu", settings or {})
        check_world(accelerator.num_processes, promised)
        if cpu:
            # launchers set OMP_NUM_THREADS=1 unless told otherwise: share the cores among the ranks of this machine
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            torch.set_num_threads(cpu_threads or max(1, cores // ranks_here()))
        if accelerator.num_processes > 1 and accelerator.device.type != "cpu":
            _hosts = hosts_group(timeout)
        yield accelerator


@contextmanager
def _leaving_in_order() -> Iterator[list[Accelerator]]:
    """Leave the process group, and what has been appended to the list, in good order."""
    global _hosts
    joined: list[Accelerator] = []
    try:
        yield joined
    except UserError as error:
        if type(error) is UserError and distributed.is_initialized() and distributed.get_rank():
            raise OtherRankError(str(error)) from error  # every rank meets it, and rank 0 says so
        raise
    finally:
        _hosts = None
        # in this order: a gloo rank that frees its last tensor while Python is already going down aborts
        for accelerator in joined:
            accelerator.free_memory()
        gc.collect()
        if distributed.is_initialized():
            distributed.destroy_process_group()


def _missing_interface(promised: int, cuda: bool) -> RankError | None:
    """Find an interface that the ranks are told to use, but is not here; then they meet without, for it to be told."""
    missing = missing_interface(cuda) if promised > 1 or "LOCAL_RANK" in os.environ else None
    if missing is None:
        return None
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        os.environ.pop(name, None)
    return RankError(missing)


def _not_met(failure: Exception) -> str:
    host, port = (os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    why = " ".join(str(failure).split())[:200]
    return f"the processes did not meet at {address} ({why}); see whether all nodes were started and can reach it"


def promised_processes() -> int:
    """Number of processes that the launcher announces. Raises UserError where it announces several to a lone
    process."""
    promised = check_ranks()
    if "WORLD_SIZE" not in os.environ and "MASTER_ADDR" in os.environ and "ACCELERATE_MIXED_PRECISION" in os.environ:
        # what `accelerate launch --cpu --num_processes N` leaves behind: it starts one process whatever N is
        say(f"note: accelerate started one process; for several: {SEVERAL.format(n='N')}", file=sys.stderr)
    for name in _SIBLINGS:
        siblings = 1 if "WORLD_SIZE" in os.environ else count(name)
        if siblings > 1:
            raise UserError(
                f"{name}={siblings}, but no launcher gave these processes a rank: they would be {siblings} independent "
                "trainings; start one `accelerate launch` per node instead of one process per task"
            )
        tasks = os.environ.get(name, "")
        if "GROUP_WORLD_SIZE" in os.environ and tasks.isdecimal() and int(tasks) > count("GROUP_WORLD_SIZE"):
            launchers = count("GROUP_WORLD_SIZE")
            say_once(
                f"note: {name}={tasks}, but {launchers} launcher{'s' * (launchers > 1)} of ranks met: if every task "
                "started one, they are independent trainings; start one per node, told of the others",
                file=sys.stderr,
            )
    return promised


def check_world(joined: int, promised: int) -> None:
    """Refuse to go on alone where siblings were promised. Raises UserError."""
    if joined != promised:
        raise UserError(
            f"the launcher promised {promised} processes, but this one joined a group of {joined}: they would be "
            f"{promised} independent trainings; on a CPU: {SEVERAL.format(n=promised)}"
        )


def all_reduce_sum(accelerator: Accelerator, tensor: torch.Tensor) -> torch.Tensor:
    """Sum over the ranks, in place; exact where all but one rank hold zeros."""
    if accelerator.num_processes > 1:
        distributed.all_reduce(tensor)
    return tensor


def hosts_group(timeout: float) -> distributed.ProcessGroup:
    """Group of all ranks over gloo. Called by every rank."""
    return cast(distributed.ProcessGroup, distributed.new_group(backend="gloo", timeout=timedelta(seconds=timeout)))


def all_reduce_device_and_host(
    accelerator: Accelerator, on_device: torch.Tensor, on_host: Sequence[float]
) -> tuple[torch.Tensor, list[float]]:
    """Sum over the ranks of float64 (n,) on the device, and of numbers that the host must know now.

    On a GPU these go over a group of their own, from host to host: read off the device, they would have to wait for all
    that it still has to do.
    """
    numbers = torch.tensor(on_host, dtype=torch.float64)
    if accelerator.num_processes == 1:
        return on_device, list(on_host)
    if _hosts is None:  # one sum for both: the device is the host
        both = all_reduce_sum(accelerator, torch.cat([on_device, numbers]))
        return both[: len(on_device)], both[len(on_device) :].tolist()
    distributed.all_reduce(on_device)
    distributed.all_reduce(numbers, group=_hosts)
    return on_device, numbers.tolist()


def gather_rows(accelerator: Accelerator, row: Sequence[float]) -> torch.Tensor:
    """The rows of all ranks -> float64 (world, len(row)), on the CPU."""
    table = torch.zeros((accelerator.num_processes, len(row)), dtype=torch.float64, device=accelerator.device)
    table[accelerator.process_index] = torch.tensor(row, dtype=torch.float64)
    return all_reduce_sum(accelerator, table).cpu()


def gather_json(accelerator: Accelerator, value: Any) -> list[Any]:
    """The values of all ranks, by rank, each as JSON gives it back: `all_gather_object` would read pickles."""
    data = json.dumps(value).encode()
    sizes = [int(size) for (size,) in gather_rows(accelerator, [len(data)]).tolist()]
    table = torch.zeros((len(sizes), max(sizes)), dtype=torch.uint8)
    table[accelerator.process_index, : len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    table = all_reduce_sum(accelerator, table.to(accelerator.device)).cpu()
    return [json.loads(row[:size].numpy().tobytes()) for row, size in zip(table, sizes, strict=True)]


def time_all_reduce(accelerator: Accelerator, tensor: torch.Tensor, budget: float) -> float:
    """Seconds that one sum of `tensor` over the ranks takes, the mean of as many as fit into about `budget` seconds.

    Called by every rank; the answer is that of the slowest one.
    """

    def measure(times: int) -> float:
        all_reduce_sum(accelerator, torch.zeros(1, device=accelerator.device)).item()  # all begin together
        start = time.perf_counter()
        for _ in range(times):
            all_reduce_sum(accelerator, tensor)
        tensor.view(-1)[0].item()  # which waits for the device
        return gather_rows(accelerator, [time.perf_counter() - start]).max().item() / times

    measure(1)  # the first one sets up connections
    once = measure(1)
    return measure(max(1, min(100, int(budget / max(once, 1e-9)))))


def clock_offsets(accelerator: Accelerator) -> list[float]:
    """Seconds by which the clock of each rank is ahead of that of rank 0, as far as the network can tell."""
    tables = []
    for _ in range(5):
        all_reduce_sum(
            accelerator, torch.zeros(1, device=accelerator.device)
        ).item()  # all leave it at about the same time
        table = gather_rows(accelerator, [time.time()])[:, 0]
        tables.append(table - table[0])
    # a rank that the scheduler let wait looks late: the median of a few does not
    return torch.stack(tables).median(dim=0).values.tolist()


def raise_on_all_ranks(accelerator: Accelerator, error: Exception | None) -> None:
    """End all ranks where one has an error: the first such rank raises its own, the others OtherRankError.

    To be called by every rank. Without it the others would wait in their next collective for one that is gone.
    """
    world, rank = accelerator.num_processes, accelerator.process_index
    if world == 1:
        if error is not None:
            raise error
        return
    first = torch.tensor(world if error is None else rank)
    # from host to host: the error may be one of the device
    distributed.all_reduce(first, distributed.ReduceOp.MIN, group=_hosts)
    if first.item() < world:
        raise_first(error, rank, int(first))


def run_on_all_ranks(accelerator: Accelerator, action: Callable[[], T]) -> T:
    """Run the action on every rank -> its result; an error on one rank ends all, see `raise_on_all_ranks`.

    No collective may be in it.
    """
    error, result = None, None
    try:
        result = action()
    except Exception as failure:
        error = failure
    raise_on_all_ranks(accelerator, error)
    return cast(T, result)


def assert_equal_across_ranks(accelerator: Accelerator, what: str, value: str) -> None:
    """Refuse to go on where the ranks do not all have this text. Raises UserError."""
    found = hashlib.sha256(value.encode(errors="surrogateescape")).hexdigest()  # it may hold a path that is no text
    mine = torch.tensor(int(found[:15], 16))
    first = mine.clone()
    if accelerator.num_processes > 1:
        distributed.broadcast(first, src=0, group=_hosts)
    error = None if first.equal(mine) else UserError(f"{what} differ from those of rank 0 ({value} here)")
    raise_on_all_ranks(accelerator, error)


def broadcast_buffers_of(accelerator: Accelerator, model: nn.Module) -> None:
    """Give every rank the buffers of rank 0: the running statistics of batch norm differ over the ranks, and with them
    what each rank would score."""
    if accelerator.num_processes > 1:
        for buffer in model.buffers():
            distributed.broadcast(buffer, src=0)


def mixed_precision(precision: Precision, on_cuda: bool) -> str:
    """Accelerate's name of a precision: bf16, or no for float32 throughout."""
    if precision == "auto":
        return "bf16" if on_cuda and torch.cuda.is_bf16_supported() else "no"
    return "bf16" if precision == "bf16" else "no"


def _other_accelerator() -> bool:
    return torch.backends.mps.is_available() or (hasattr(torch, "xpu") and torch.xpu.is_available())
