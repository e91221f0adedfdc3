"""What training changes: the model, its moving average, the optimizer; and all of it as the files of a checkpoint."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import save as safetensors
from torch import nn

from .config import Config, as_json
from .errors import UserError
from .learning.ema import Ema
from .learning.model import build
from .learning.optim import learning_rate, load_optimizer_tensors, make_optimizer, optimizer_tensors
from .run.checkpoint import EMA, MODEL, OPTIMIZER, Checkpoint, Tensors, host_copy, model_bytes


class Learner:
    """Built the same on every rank; `wrap` it once its weights are what the run goes on from."""

    def __init__(self, config: Config, accelerator: Accelerator, size: tuple[int, int]):
        """`size`: of the training images, pixels. Raises UserError where the model cannot be built."""
        self._config, self._accelerator, self._size = config, accelerator, size
        device = accelerator.device
        self.bare: nn.Module = build(config.model, config.train.seed).to(device)
        """The model as it is saved."""
        if device.type == "cuda" and accelerator.num_processes > 1 and config.train.sync_bn:
            self.bare = nn.SyncBatchNorm.convert_sync_batchnorm(self.bare)
        self.layout = torch.contiguous_format if config.train.channels_last == "off" else torch.channels_last
        """Memory format of the images."""
        self.bare.to(memory_format=self.layout)
        self.optimizer = make_optimizer(self.bare, config.optim)
        self.ema = Ema(self.bare, config.optim.ema) if config.optim.ema else None
        self.model = self.bare
        """What a training step calls: the model compiled and wrapped for its ranks."""
        self._buffers: list[torch.Tensor] = []
        self._kept: list[torch.Tensor] = []

    @property
    def scored(self) -> nn.Module:
        """The model to evaluate and to publish: the average, where there is one."""
        return self.bare if self.ema is None else self.ema.model

    def load(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint. Raises UserError where it is not of this model."""
        try:
            self.bare.load_state_dict(checkpoint.tensors[MODEL])
            load_optimizer_tensors(self.bare, self.optimizer, checkpoint.tensors[OPTIMIZER])
            if self.ema is not None:
                self.ema.model.load_state_dict(checkpoint.tensors[EMA])
        except (RuntimeError, ValueError, KeyError) as error:
            why = " ".join(str(error).split())[:200]
            raise UserError(f"{checkpoint.path} does not fit the model of its config: {why}") from None

    def wrap(self) -> None:
        """Compile it where that is wanted, and let its gradients be reduced over the ranks."""
        if self._config.debug:
            for name, module in self.bare.named_modules():
                module.register_forward_hook(partial(_name_the_first_bad, name or "the model"))
        if self._config.train.compile == "on":
            self.bare.compile()
        self.model = self._accelerator.prepare_model(self.bare)
        self._buffers = list(self.bare.buffers())  # not before: they may be others now
        self._kept = [buffer.clone() for buffer in self._buffers]
        if self._accelerator.num_processes > 1:
            self._settle_buckets()

    def set_rate(self, samples_seen: int) -> float:
        """The learning rate of the step at this place of the stream."""
        rate = learning_rate(self._config.optim, samples_seen, self._config.train.samples)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        return rate

    def keep_buffers(self) -> None:
        """Remember the statistics that a forward pass changes; for a batch that turns out to be none to learn from."""
        if self._buffers:
            torch._foreach_copy_(self._kept, self._buffers)

    def restore_buffers(self) -> None:
        """Put back what `keep_buffers` remembered."""
        if self._buffers:
            torch._foreach_copy_(self._buffers, self._kept)

    def step(self, batch: int, step: int) -> None:
        """Learn from the gradients that are there: the `step`-th step, over a `batch` of samples."""
        self.optimizer.step()
        if self.ema is not None:
            self.ema.update(self.bare, batch, step)

    def snapshot(self) -> dict[str, Tensors]:
        """File of a checkpoint -> tensors in host memory, which training does not change any more."""
        tensors: dict[str, Tensors] = {
            MODEL: host_copy(self.bare.state_dict()),
            OPTIMIZER: host_copy(optimizer_tensors(self.bare, self.optimizer)),
        }
        return tensors | ({} if self.ema is None else {EMA: host_copy(self.ema.model.state_dict())})

    def as_files(self, snapshot: Mapping[str, Tensors]) -> dict[str, bytes]:
        """A snapshot as the files of a checkpoint."""
        return {
            name: safetensors(dict(tensors)) if name == OPTIMIZER else model_bytes(tensors, self._about())
            for name, tensors in snapshot.items()
        }

    def published(self) -> bytes:
        """The model to use, with what rebuilds it, as safetensors."""
        return model_bytes(host_copy(self.scored.state_dict()), self._about())

    def _about(self) -> dict[str, Any]:
        return {"config": as_json(self._config), "size": self._size}

    def _settle_buckets(self) -> None:
        """A pass over nothing, after which the model is as before.

        DDP lays out its buckets anew after the first backward pass, and a sum over three ranks and more is rounded by
        the place in a bucket: without this, the first step of a run that goes on would differ in the last digits.
        """
        self.keep_buffers()
        parts = self._accelerator.num_processes * self._config.train.accumulate
        image = torch.zeros(self._config.train.batch_size // parts, 3, *self._size, device=self._accelerator.device)
        with self._accelerator.autocast():
            prediction = self.model(image.contiguous(memory_format=self.layout))
        self._accelerator.backward(prediction.sum())
        self.optimizer.zero_grad(set_to_none=True)
        self.restore_buffers()


def _name_the_first_bad(name: str, module: nn.Module, _: Any, output: torch.Tensor) -> None:
    if not output.isfinite().all():
        raise UserError(f"{name} ({type(module).__name__}) gives values that are not finite, from inputs that are")
