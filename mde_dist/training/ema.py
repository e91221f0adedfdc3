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
        self._mine = _numbers(self.model)

    @torch.no_grad()
    def update(self, model: nn.Module, batch: int, step: int, skipped: torch.Tensor) -> None:
        """Take in the weights after `step` steps, the last of them over a `batch` of samples.

        Early on the average is over few steps, so that the random start does not weigh on it. `skipped`: scalar on the
        device; where it is 1 the average stays as it is.
        """
        decay = min(math.exp(-batch / self._samples), step / (step + 9))
        weight = (1 - decay) * (1 - skipped)
        (floats, counts), (new_floats, new_counts) = self._mine, _numbers(model)
        # lerp takes weights on the device as a list only, and on CUDA then starts a kernel for each tensor
        moved = torch._foreach_sub(new_floats, floats)
        torch._foreach_mul_(moved, weight)
        torch._foreach_add_(floats, moved)
        if counts:
            torch._foreach_copy_(counts, new_counts)


def _numbers(model: nn.Module) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Weights and statistics of a model, and its counters: the tensors themselves, for state_dict makes a new one of
    each, which takes a GPU's host as long as many a kernel."""
    tensors = [*model.parameters(), *model.buffers()]
    return [t for t in tensors if t.is_floating_point()], [t for t in tensors if not t.is_floating_point()]
