"""Optimizer, and the learning rate as a pure function of samples seen."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and its schedule."""

    lr: float = 6e-4
    """Highest learning rate."""
    weight_decay: float = 1e-2
    """Of the matrices and kernels; norms and biases are not decayed."""
    schedule: Literal["constant", "cosine"] = "cosine"
    """After warm-up: constant, or half a cosine down to 1 % of lr at the end of training."""
    warmup: int = 240
    """Samples over which the rate rises linearly from 0."""
    clip: float = 10.0
    """Largest norm of the whole gradient; 0 = no clipping."""


def make_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW, fused on a GPU."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, fused=decayed[0].is_cuda)


def learning_rate(config: OptimConfig, samples_seen: int, total: int) -> float:
    """Rate for the step that starts after `samples_seen` of `total` samples."""
    if samples_seen < config.warmup:
        return config.lr * (samples_seen + 1) / config.warmup
    if config.schedule == "constant":
        return config.lr
    done = (samples_seen - config.warmup) / max(1, total - config.warmup)
    return config.lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(done, 1.0))))


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The optimizer's state as `PARAMETER|KEY` -> tensor; its hyperparameters come from the config instead."""
    return {
        f"{name}|{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state[parameter].items()
    }


def load_optimizer_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor]
) -> None:
    """Put back what `optimizer_tensors` gave. Raises KeyError or ValueError where the tensors are of another model."""
    parameters = dict(model.named_parameters())
    if tensors and {name.split("|")[0] for name in tensors} != parameters.keys():
        raise ValueError("the optimizer's state is not of these parameters")
    for name, value in tensors.items():
        owner, key = name.split("|")
        parameter = parameters[owner]
        if value.ndim and value.shape != parameter.shape:
            raise ValueError(f"{name} has shape {tuple(value.shape)}, the parameter {tuple(parameter.shape)}")
        device = parameter.device if value.ndim or optimizer.param_groups[0].get("fused") else "cpu"
        optimizer.state[parameter][key] = value.to(device)
