"""Steps whose gradient is not finite leave no trace: decided on the device, so that nothing waits for the answer."""

from collections.abc import Iterable

import torch
from torch import nn


class NonFiniteGuard:
    """Skips non-finite steps on the device: counts them, and undoes what the forward pass of one changed.

    After `allowed` such steps every later one is skipped too: when the loop hears of the last one, the device has done
    more steps, which must not have learned anything.
    """

    def __init__(self, model: nn.Module, device: torch.device, allowed: int = 0):
        self._found, self._allowed = torch.zeros((), device=device), allowed
        self._groups = [_Group(buffers) for buffers in _by_type(model.buffers())]

    def snapshot_buffers(self) -> None:
        """Remember the statistics that a forward pass changes."""
        for group in self._groups:
            group.snapshot_buffers()

    def should_skip(self, norm: torch.Tensor) -> torch.Tensor:
        """The norm of a gradient -> 1.0 where its step has to be skipped, else 0.0; a scalar on the device."""
        not_finite = ~norm.isfinite()
        self._found += not_finite
        return (not_finite | (self._found > self._allowed)).float()

    def restore(self, skipped: torch.Tensor) -> None:
        """Put the statistics back as `snapshot_buffers` found them, where `skipped` is 1."""
        for group in self._groups:
            group.restore(skipped > 0)


class _Group:
    """Buffers of one type, copied as one tensor: a model has a hundred of them, of a few numbers each."""

    def __init__(self, buffers: list[torch.Tensor]):
        self._buffers = [buffer.view(-1) for buffer in buffers]
        self._kept, self._now = torch.cat(self._buffers), torch.cat(self._buffers)
        self._parts = list(self._now.split([len(buffer) for buffer in self._buffers]))

    def snapshot_buffers(self) -> None:
        torch.cat(self._buffers, out=self._kept)

    def restore(self, wanted: torch.Tensor) -> None:
        torch.cat(self._buffers, out=self._now)
        torch.where(wanted, self._kept, self._now, out=self._now)
        torch._foreach_copy_(self._buffers, self._parts)


def _by_type(buffers: Iterable[torch.Tensor]) -> list[list[torch.Tensor]]:
    groups: dict[torch.dtype, list[torch.Tensor]] = {}
    for buffer in buffers:
        groups.setdefault(buffer.dtype, []).append(buffer)
    return list(groups.values())
