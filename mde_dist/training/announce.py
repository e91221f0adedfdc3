"""What a run says before it trains: everything that was given, and everything that was derived from it."""

import numpy as np
import torch
from accelerate import Accelerator

from mde_dist.data.crops import view_size
from mde_dist.data.shards import ShardSet
from mde_dist.training.config import Config, as_toml
from mde_dist.training.monitor import Monitor


def describe(monitor: Monitor, config: Config, accelerator: Accelerator, shards: ShardSet, samples_seen: int) -> None:
    """What is about to happen, with everything that was derived."""
    manifest = shards.manifest
    world, accumulate, device = accelerator.num_processes, config.train.accumulate, accelerator.device
    height, width = view_size(config.data.size or manifest.size, config.augment)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    precision = accelerator.mixed_precision.replace("no", "fp32")
    part, epochs = config.train.batch_size // (world * accumulate), config.train.samples / len(shards)
    monitor.say(f"run {config.run}, {'resumed at' if samples_seen else 'from'} sample {samples_seen}")
    monitor.say(f"  {world} x {device.type} ({name}), precision {precision}")
    monitor.say(f"  {part} per rank x {world} ranks x {accumulate} accumulated = batch of {config.train.batch_size}")
    monitor.say(f"  {config.train.samples:,} samples = {epochs:.2f} epochs of {len(shards):,}, at {height}x{width}")
    monitor.say(f"  {manifest.place}: {manifest.layout}, manifest {manifest.sha256[:12]}")
    for line in filter(None, as_toml(config).split("\n")):
        monitor.say(f"  | {line}")


def describe_batch(monitor: Monitor, samples: np.ndarray, image: torch.Tensor, depth: torch.Tensor) -> None:
    """The first batch by shape, range and device."""
    for name, tensor in {"image": image, "depth": depth}.items():
        monitor.say(
            f"  {name}: {tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')} on {tensor.device}, "
            f"{tensor.min():.3f} to {tensor.max():.3f}, mean {tensor.mean():.3f}"
        )
    holes = (depth == 0).float().mean()
    monitor.say(f"  (epoch, sample): {samples.tolist()}; holes {holes:.1%}")
