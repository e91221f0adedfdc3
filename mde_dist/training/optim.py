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
    base_batch_size: int = 0
    """Global batch that lr is meant for: another one multiplies it by the root of their ratio (the rule for Adam:
    Malladi et al., 2022). 0 = lr as it is."""
    weight_decay: float = 1e-2
    """Of the matrices and kernels; norms and biases are not decayed."""
    schedule: Literal["constant", "cosine", "poly"] = "cosine"
    """After warm-up: constant; or down to `final` at the end of training, by half a cosine or by (1 - done)^`power`."""
    warmup_samples: int = 240
    """Samples over which the rate rises linearly: each step has the share of them that is seen with its own batch."""
    min_lr_ratio: float = 0.01
    """Rate at the end of the schedules that fall, as a share of lr, 0..1."""
    poly_power: float = 0.9
    """Of the schedule poly; 1 = a straight line."""
    grad_clip_norm: float = 10.0
    """Largest norm of the whole gradient; 0 = no clipping."""
    ema_samples: int = 0
    """Evaluate and publish a moving average of the weights: after so many samples an old one counts 1/e. 0 = none."""


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
        # laid out in memory as the parameter is: the fused kernel pairs numbers by their place there
        like = parameter if value.ndim else value.to(parameter.device)
        optimizer.state[parameter][key] = torch.empty_like(like, dtype=value.dtype, requires_grad=False).copy_(value)
