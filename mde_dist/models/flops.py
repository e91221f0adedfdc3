"""Shapes of a model, without anything computed: how much arithmetic it needs, and whether it can normalise."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from mde_dist.models.config import ModelConfig
from mde_dist.models.depth_model import create_model


def training_flops(config: ModelConfig, size: tuple[int, int]) -> int:
    """Floating-point operations (2 per multiply-add) of one forward and backward pass over one image."""
    with torch.device("meta"):
        model = create_model(config)
        image = torch.empty(2, 3, *size)
    # shapes have no values for --debug to look at
    with FlopCounterMode(display=False) as counter, torch.autograd.set_detect_anomaly(False):
        model(image).sum().backward()
    return counter.get_total_flops() // 2


def has_spread(config: ModelConfig, size: tuple[int, int]) -> bool:
    """False where one image of `size` leaves some normalisation a single value of a channel, which torch refuses."""
    with torch.device("meta"):
        model, image = create_model(config), torch.empty(1, 3, *size)
    try:
        model(image)
    except ValueError:
        return False
    return True
