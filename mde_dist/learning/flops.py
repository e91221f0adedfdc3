"""How much arithmetic a model needs: counted on shapes alone, nothing is computed."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from .model import ModelConfig, skeleton


def training_flops(config: ModelConfig, size: tuple[int, int]) -> int:
    """Floating-point operations (2 per multiply-add) of one forward and backward pass over one image."""
    with torch.device("meta"):
        model = skeleton(config)
        image = torch.empty(2, 3, *size)
    # shapes have no values for --debug to look at
    with FlopCounterMode(display=False) as counter, torch.autograd.set_detect_anomaly(False):
        model(image).sum().backward()
    return counter.get_total_flops() // 2
