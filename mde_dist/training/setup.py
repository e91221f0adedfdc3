"""Between config and first step: the batch checked, the sample made, the splits opened, all of it described."""

import contextlib
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from mde_dist.data.config import view_size
from mde_dist.data.shards import ShardDataset, open_split
from mde_dist.distributed.process_group import assert_equal_across_ranks, gather_rows, run_on_all_ranks
from mde_dist.distributed.signals import PreemptionHandler, unless_stopped
from mde_dist.training.config import SAMPLE_SHARDS, Config, to_toml
from mde_dist.training.monitor import ProgressMonitor
from mde_dist.training.step import TrainModule
from mde_dist.utils.console import say
from mde_dist.utils.errors import UserError
from mde_dist.utils.io import writing
from mde_dist.utils.locks import locked


def check_batch(config: Config, world: int) -> None:
    """The global batch has to divide by ranks and accumulation steps. Raises UserError."""
    batch, accumulate = config.train.batch_size, config.train.grad_accum_steps
    parts = world * accumulate
    if batch % parts:
        near = max(parts, round(batch / parts) * parts)
        raise UserError(
            f"train.batch_size = {batch} (global) does not divide by {world} ranks x {accumulate} accumulated; "
            f"try --train.batch-size {near}, or another number of processes"
        )


def make_sample(config: Config, accelerator: Accelerator) -> None:
    """Render and pack the embedded sample if it is what to train on and is not there: one process, the others wait."""
    if config.data.shards != SAMPLE_SHARDS:
        return
    # once more per node for nodes that share no disk; the bytes are the same
    for turn in (accelerator.is_main_process, accelerator.is_local_main_process):
        run_on_all_ranks(accelerator, pack_sample if turn else lambda: None)


def pack_sample() -> None:
    """Render and pack it, unless another training has done so or is about to. Raises UserError."""
    path = Path(SAMPLE_SHARDS)
    if (path / "manifest.json").is_file():
        return
    taken = "another training renders the sample"
    with writing(path), locked(path / ".rendering.lock", taken, wait=True):
        if not (path / "manifest.json").is_file():
            render_sample()


def render_sample() -> None:
    """Render and pack it with the command that does so for a user. Raises UserError."""
    # small shards, so that all cores have some to render
    options = f"--layout rooms --samples-per-shard 32 --output {SAMPLE_SHARDS}"
    command = ["-m", "mde_dist.shard", *options.split()]
    say(f"no shards at {SAMPLE_SHARDS} yet; rendering the sample: python {' '.join(command)}")
    alone = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    if subprocess.run([sys.executable, *command], env=alone, check=False).returncode:
        raise UserError(f"the sample could not be packed into {SAMPLE_SHARDS}; the line above says why")


def open_shards(
    config: Config, accelerator: Accelerator, opened: contextlib.ExitStack, stop: PreemptionHandler
) -> tuple[ShardDataset, ShardDataset] | None:
    """The splits to train on and to evaluate on, the same on all ranks; None where a signal came first.

    Called by every rank. Raises UserError.
    """
    splits = run_on_all_ranks(accelerator, lambda: unless_stopped(stop, lambda: open_splits(config, opened)))
    if gather_rows(accelerator, [float(splits is None)]).any() or splits is None:
        if accelerator.is_main_process:
            say("stopped by a signal while the shards were opened; the same command begins again")
        return None
    assert_equal_across_ranks(accelerator, "the shards", "".join(split.manifest.sha256 for split in splits))
    return splits


def open_splits(config: Config, opened: contextlib.ExitStack) -> tuple[ShardDataset, ShardDataset]:
    """Open both splits and read all that is read of a server before the first step. Raises UserError."""
    data = config.data
    shards = opened.enter_context(open_split(data.shards, data.train_split, data.cache_options))
    if shards.remote:
        shards.local(shards.info.mean_map)  # of which the baselines are made
    held_out = open_split(data.eval_shards or data.shards, data.eval_split, data.cache_options)
    return shards, opened.enter_context(held_out)


def describe(
    monitor: ProgressMonitor, config: Config, accelerator: Accelerator, shards: ShardDataset, samples_seen: int
) -> None:
    """Print the plan of the run, with every derived number."""
    manifest = shards.manifest
    world, accumulate, device = accelerator.num_processes, config.train.grad_accum_steps, accelerator.device
    height, width = view_size(config.data.size or manifest.size, config.augment)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    precision = accelerator.mixed_precision.replace("no", "fp32")
    part, epochs = config.train.batch_size // (world * accumulate), config.train.total_samples / len(shards)
    monitor.print(f"run {config.run}, {'resumed at' if samples_seen else 'from'} sample {samples_seen}")
    monitor.print(f"  {world} x {device.type} ({name}), precision {precision}")
    monitor.print(f"  {part} per rank x {world} ranks x {accumulate} accumulated = batch of {config.train.batch_size}")
    monitor.print(
        f"  {config.train.total_samples:,} samples = {epochs:.2f} epochs of {len(shards):,}, at {height}x{width}"
    )
    monitor.print(f"  {manifest.location}: {manifest.layout}, manifest {manifest.sha256[:12]}")
    for line in filter(None, to_toml(config).split("\n")):
        monitor.print(f"  | {line}")


def describe_batch(monitor: ProgressMonitor, samples: np.ndarray, image: torch.Tensor, depth: torch.Tensor) -> None:
    """The first batch by shape, range and device."""
    for name, tensor in {"image": image, "depth": depth}.items():
        monitor.print(
            f"  {name}: {tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')} on {tensor.device}, "
            f"{tensor.min():.3f} to {tensor.max():.3f}, mean {tensor.mean():.3f}"
        )
    holes = (depth == 0).float().mean()
    monitor.print(f"  (epoch, sample): {samples.tolist()}; holes {holes:.1%}")


def describe_start(config: Config, accelerator: Accelerator, train_module: TrainModule) -> dict[str, Any]:
    """On what the run goes on from here, for metrics.jsonl."""
    device = accelerator.device
    return {
        "time": now(),
        "ranks": accelerator.num_processes,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "precision": accelerator.mixed_precision.replace("no", "fp32"),
        "batch_size": config.train.batch_size,
        "host": socket.gethostname(),
        **({"weights": train_module.start.record()} if train_module.start else {}),
    }


def now() -> float:
    """Seconds since 1970, to the millisecond."""
    return round(time.time(), 3)
