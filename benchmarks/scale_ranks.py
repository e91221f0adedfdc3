"""What scale.py models of ranks and checkpoints, measured on this machine; see there for the commands."""

import argparse
import os
import socket
import time
from pathlib import Path
from typing import Any

import numpy as np
from scale_data import ROUNDS, said
from turns import in_ranks

# --- sums over ranks ---


def reduce(folder: str, size: int) -> dict[str, Any]:
    """Sums over ranks of gloo: seconds of a gradient, of `reduce_batch_info`, and of batch statistics gathered."""
    import torch
    from torch import distributed

    from mde_dist.distributed.process_group import init_distributed, time_all_reduce

    found: dict[str, Any] = {"gradient": [], "half": [], "news": [], "gather": []}
    with init_distributed(cpu_threads=1) as accelerator:
        news, part = torch.zeros(5, dtype=torch.float64), torch.zeros(1025)
        parts = torch.zeros(accelerator.num_processes * 1025)
        tensors = {"gradient": torch.zeros(size // 4), "half": torch.zeros(size // 8), "news": news}
        for _ in range(ROUNDS):
            for name, tensor in tensors.items():
                found[name].append(time_all_reduce(accelerator, tensor, 1.5 if tensor is not news else 0.3))
            distributed.barrier()
            start = time.perf_counter()
            for _ in range(100):
                distributed.all_gather_into_tensor(parts, part)
            found["gather"].append((time.perf_counter() - start) / 100)
    return found


def show_reduce(_: argparse.Namespace) -> None:
    from scale_formulas import PARAMETERS

    size = 4 * PARAMETERS
    found = {world: in_ranks(world, reduce, size=size) for world in (2, 3, 4)}
    print(f"gloo on {os.cpu_count()} cores, {ROUNDS} rounds, median (least to most)")
    once = float(np.median(found[2]["gradient"]))
    for world, its in found.items():
        # a ring moves 2 (n-1) times the bytes in all, and two cores move them whatever the number of ranks
        shared, own = once * (world - 1), once * 2 * (world - 1) / world
        print(f"  {world} ranks: {size / 1e6:.1f} MB {said(its['gradient'], 1e-3, 'ms')}", end="")
        print(f", half of it {said(its['half'], 1e-3, 'ms')}")
        print(f"    from 2 ranks: {1e3 * own:.0f} ms were each to have a core, {1e3 * shared:.0f} ms on two cores")
        print(
            f"    reduce_batch_info {said(its['news'], 1e-6, 'µs')}; "
            f"all-gather of 4 KB {said(its['gather'], 1e-6, 'µs')}",
            flush=True,
        )


# --- checkpoints ---


def checkpoint(folder: str, encoder: str, ema: bool) -> dict[str, Any]:
    """Copy, serialise and write checkpoints: seconds of each, and bytes."""
    import torch

    from mde_dist.models.config import ModelConfig
    from mde_dist.models.depth_model import create_pretrained_model
    from mde_dist.training.checkpoint import (
        EMA,
        MODEL,
        OPTIMIZER,
        load_checkpoint,
        save_checkpoint,
        serialize_model,
        to_cpu,
    )
    from mde_dist.training.config import OptimConfig
    from mde_dist.training.optim import make_optimizer, optimizer_tensors
    from mde_dist.training.state import State

    model = create_pretrained_model(ModelConfig(encoder=encoder), 0)
    optimizer = make_optimizer(model, OptimConfig())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    found: dict[str, Any] = {"copy": [], "bytes": 0, "serialise": [], "write": [], "load": []}

    def copy() -> dict[str, Any]:
        tensors = {MODEL: to_cpu(model.state_dict()), OPTIMIZER: to_cpu(optimizer_tensors(model, optimizer))}
        return tensors | ({EMA: to_cpu(model.state_dict())} if ema else {})

    for step in range(ROUNDS):
        start = time.perf_counter()
        copied = copy()
        found["copy"].append(time.perf_counter() - start)
        start = time.perf_counter()
        files = {name: serialize_model(tensors, {"config": {}, "size": [1, 1]}) for name, tensors in copied.items()}
        found["serialise"].append(time.perf_counter() - start)
        found["bytes"] = sum(map(len, files.values()))
        record = {**vars(State(step=step + 1)), "config": {}, "identity": {}}
        start = time.perf_counter()
        path = save_checkpoint(Path(folder, "checkpoints"), files, record, 1, None)
        found["write"].append(time.perf_counter() - start)
        start = time.perf_counter()
        load_checkpoint(path)
        found["load"].append(time.perf_counter() - start)
    return found


def show_checkpoint(_: argparse.Namespace) -> None:
    print(f"checkpoints, {ROUNDS} each, seconds: copy (the loop waits), serialise, hash and write (beside it), load")
    for encoder, ema in (("resnet18", False), ("resnet18", True), ("resnet50", True)):
        found = in_ranks(1, checkpoint, encoder=encoder, ema=ema)
        parts = (f"{what} {said(found[what], 1, 's')}" for what in ("copy", "serialise", "write", "load"))
        print(f"  {encoder}{', EMA' if ema else ''}: {found['bytes'] / 1e6:.0f} MB; {', '.join(parts)}", flush=True)


# --- who is still there ---


def peers(folder: str, ranks: int, beats: int = 8) -> dict[str, float]:
    """Share of a core that rank 0 takes to hear of all ranks: sockets of one process, signs of life spread out."""
    from mde_dist.distributed.heartbeat import _BEAT, _MESSAGE, _TICK, _Heartbeat
    from mde_dist.distributed.signals import PreemptionHandler

    pairs = {rank: socket.socketpair() for rank in range(1, ranks)}
    own = _Heartbeat(0, {rank: pair[0] for rank, pair in pairs.items()}, PreemptionHandler(), 60.0, None)
    clock, draw = time.pthread_getcpuclockid(own._thread.ident or 0), np.random.default_rng(0)
    begun, start = time.clock_gettime(clock), time.perf_counter()
    for beat in range(beats):
        for at, rank in sorted(zip(draw.random(ranks - 1) * _TICK, range(1, ranks), strict=True)):
            time.sleep(max(0.0, start + beat * _TICK + at - time.perf_counter()))
            pairs[rank][1].send(_MESSAGE.pack(_BEAT, rank))
    found = (time.clock_gettime(clock) - begun) / (time.perf_counter() - start)
    own.goodbye = True
    own.close()
    return {"share": found}


def show_peers(_: argparse.Namespace) -> None:
    for ranks in (8, 64, 512):
        found = [in_ranks(1, peers, ranks=ranks)["share"] for _ in range(3)]
        print(f"  {ranks} ranks: {np.median(found):.2%} of a core ({min(found):.2%} to {max(found):.2%})", flush=True)


RANKS = {
    "reduce": (reduce, show_reduce),
    "checkpoint": (checkpoint, show_checkpoint),
    "peers": (peers, show_peers),
}
