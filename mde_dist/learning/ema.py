"""The exponential moving average of a model, over samples: the same for every number of ranks."""

import copy
import math

import torch
from torch import nn


class Ema:
    """A second model whose weights and statistics follow those of the first (Polyak and Juditsky, 1992)."""

    def __init__(self, model: nn.Module, samples: float):
        """`samples`: after so many, what a weight was before counts 1/e."""
        self.model, self._samples = copy.deepcopy(model).requires_grad_(False), samples

    @torch.no_grad()
    def update(self, model: nn.Module, batch: int, step: int, left_out: torch.Tensor) -> None:
        """Take in the weights after `step` steps, the last of them over a `batch` of samples.

        Early on the average is over few steps, so that the random start does not weigh on it. `left_out`: scalar on the
        device; where it is 1 the average stays as it is.
        """
        decay = min(math.exp(-batch / self._samples), step / (step + 9))
        mine, theirs = self.model.state_dict(), model.state_dict()
        floats = [name for name, tensor in theirs.items() if tensor.is_floating_point()]
        weight = (1 - decay) * (1 - left_out)
        torch._foreach_lerp_([mine[n] for n in floats], [theirs[n] for n in floats], [weight] * len(floats))
        for name in theirs.keys() - floats:
            mine[name].copy_(theirs[name])
