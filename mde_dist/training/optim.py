"""Optimizer, and the learning rate as a pure function of samples seen."""

import math
from collections.abc import Mapping

import torch
from torch import nn

from mde_dist.training.config import OptimConfig

ADAMW = ("step", "exp_avg", "exp_avg_sq")
"""State that AdamW keeps of each parameter."""


def make_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW, fused: faster on every device, and it can leave a step out without asking the host."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, fused=True)


def learning_rate(config: OptimConfig, samples_seen: int, total: int, batch_size: int) -> float:
    """Rate for the step that starts after `samples_seen` of `total` samples, over a global batch."""
    highest = config.lr * (math.sqrt(batch_size / config.base_batch_size) if config.base_batch_size else 1)
    if samples_seen < config.warmup_samples:
        return highest * min(1.0, (samples_seen + batch_size) / config.warmup_samples)
    if config.schedule == "constant":
        return highest
    done = min(1.0, (samples_seen - config.warmup_samples) / max(1, total - config.warmup_samples))
    fallen = (1 - done) ** config.poly_power if config.schedule == "poly" else 0.5 * (1 + math.cos(math.pi * done))
    return highest * (config.min_lr_ratio + (1 - config.min_lr_ratio) * fallen)


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
    """Put back what `optimizer_tensors` gave. Raises ValueError where the tensors are not of this model and AdamW."""
    parameters = dict(model.named_parameters())
    if tensors and tensors.keys() != {f"{name}|{key}" for name in parameters for key in ADAMW}:
        raise ValueError("the optimizer's state is not of these parameters")
    for name, value in tensors.items():
        owner, key = name.split("|")
        parameter = parameters[owner]
        if value.ndim and value.shape != parameter.shape:
            raise ValueError(f"{name} has shape {tuple(value.shape)}, the parameter {tuple(parameter.shape)}")
        # laid out in memory as the parameter is: the fused kernel pairs numbers by their position there
        like = parameter if value.ndim else value.to(parameter.device)
        optimizer.state[parameter][key] = torch.empty_like(like, dtype=value.dtype, requires_grad=False).copy_(value)
