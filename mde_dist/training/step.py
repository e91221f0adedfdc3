"""Everything that training changes: the model, its moving average, the optimizer; and all of it as the files of a
checkpoint."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import save as safetensors
from torch import nn

from mde_dist.data.config import LEAST_CROP, view_size
from mde_dist.models.depth_model import build_started
from mde_dist.models.flops import has_spread
from mde_dist.models.weights import EMA, MODEL, OPTIMIZER, Tensors, serialize_model
from mde_dist.training.checkpoint import Checkpoint, to_cpu
from mde_dist.training.config import Config, as_json
from mde_dist.training.ema import Ema
from mde_dist.training.losses import depth_loss
from mde_dist.training.nonfinite_guard import NonFiniteGuard
from mde_dist.training.optim import learning_rate, load_optimizer_tensors, make_optimizer, optimizer_tensors
from mde_dist.utils.errors import UserError

TrainBatch = tuple[torch.Tensor, torch.Tensor]
"""image float32 (batch, 3, height, width), normalised; depth float32 (batch, height, width), metres, 0 = hole."""


class StepResult:
    """Result of a training step. `skipped` is computed on the device; reading it waits for the step."""

    def __init__(self, losses: torch.Tensor, norm: torch.Tensor, skipped: torch.Tensor):
        self.losses, self.norm = losses, norm
        """This rank's part of the loss, and the norm of the gradient of all; scalars on the device."""
        cuda = skipped.is_cuda
        self._skipped = torch.empty_like(skipped, device="cpu", pin_memory=cuda).copy_(skipped, non_blocking=True)
        self._copied = torch.cuda.Event() if cuda else None
        if self._copied is not None:
            self._copied.record()

    def skipped(self) -> bool:
        if self._copied is not None:
            self._copied.synchronize()
        return bool(self._skipped.numpy())


class TrainModule:
    """Built the same on every rank; `wrap` it once its weights are what the run goes on from."""

    def __init__(self, config: Config, accelerator: Accelerator, size: tuple[int, int], resumes: bool = False):
        """`size`: of the whole training images, pixels; `resumes`: a checkpoint will be loaded, and the file of
        `model.weights` is not needed any more. Raises UserError where the model cannot be built, or trained."""
        self._config, self._accelerator, self._size = config, accelerator, size
        check_statistics(config, accelerator, size)
        device = accelerator.device
        model = replace(config.model, weights="none") if resumes else config.model
        built, self.start = build_started(model, config.train.seed)
        """The part of `model.weights` that was taken; None for none."""
        self.bare: nn.Module = built.to(device)
        """The model as it is saved."""
        if shares_statistics(config, accelerator):
            self.bare = nn.SyncBatchNorm.convert_sync_batchnorm(self.bare)
        self.layout = torch.contiguous_format if config.train.channels_last == "off" else torch.channels_last
        """Memory format of the images."""
        self.bare.to(memory_format=self.layout)
        self.optimizer = make_optimizer(self.bare, config.optim)
        self.ema = Ema(self.bare, config.optim.ema_samples) if config.optim.ema_samples else None
        self.model = self.bare
        """Model that a training step calls: compiled, and wrapped for its ranks."""
        self._guard = NonFiniteGuard(self.bare, device)

    @property
    def eval_model(self) -> nn.Module:
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

    def wrap(self, max_skipped: int = 0) -> None:
        """Compile it where that is wanted, and let its gradients be reduced over the ranks.

        `max_skipped`: non-finite steps after which every later one is skipped too, see `NonFiniteGuard`.
        """
        if self._config.debug:
            for name, module in self.bare.named_modules():
                module.register_forward_hook(partial(_name_the_first_bad, name or "the model"))
        if self._config.train.compile == "on":
            self.bare.compile()
        self.model = self._accelerator.prepare_model(self.bare)
        # not before: the buffers may be others now
        self._guard = NonFiniteGuard(self.bare, self._accelerator.device, max_skipped)
        if self._accelerator.num_processes > 1:
            self._warm_up_buckets()

    def set_lr(self, samples_seen: int) -> float:
        """The learning rate of the step that begins at sample `samples_seen`."""
        train = self._config.train
        lr = learning_rate(self._config.optim, samples_seen, train.total_samples, train.batch_size)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        return lr

    def backward(
        self,
        views: Sequence[TrainBatch],
        global_counts: torch.Tensor,
        working: Callable[[], AbstractContextManager] = contextlib.nullcontext,
        reduce: bool = True,
    ) -> torch.Tensor:
        """The gradient of this rank's part of a global batch, one view per accumulation step, summed over the ranks.

        `global_counts`: `valid_counts` of the whole global batch; `working`: entered around the work that depends on
        this rank alone; `reduce`: False leaves the gradient as this rank has it. -> this rank's part of the loss,
        float64 scalar on the device. Nothing in here waits for the device.
        """
        accelerator, world = self._accelerator, self._accelerator.num_processes
        losses = torch.zeros((), dtype=torch.float64, device=accelerator.device)
        self._guard.snapshot_buffers()
        for number, (image, depth) in enumerate(views, 1):
            last = number == len(views) and reduce
            with contextlib.nullcontext() if last else accelerator.no_sync(self.model):
                with working(), accelerator.autocast():
                    prediction = self.model(image.contiguous(memory_format=self.layout))
                # this part's share of the mean over the GLOBAL batch; DDP averages over ranks, hence `world`
                loss = depth_loss(prediction, depth, self._config.loss, global_counts)
                # a loss that is not finite makes the gradient so, and with it that of all ranks
                accelerator.backward(loss * torch.where(loss.isfinite(), world, torch.nan))
                losses += loss.detach().double()
        return losses

    def step(self, losses: torch.Tensor, batch: int, step: int) -> StepResult:
        """Learn from the gradient of `backward`: the `step`-th step, over a `batch` of samples.

        Where it is not finite, weights, statistics, average and optimizer stay as they were before `backward`.
        """
        norm = nn.utils.clip_grad_norm_(self.bare.parameters(), self._config.optim.grad_clip_norm or float("inf"))
        skipped = self._guard.should_skip(norm)
        self._guard.restore(skipped)
        self.optimizer.found_inf = skipped  # type: ignore[attr-defined]  # as torch.amp.GradScaler tells it
        self.optimizer.step()
        if self.ema is not None:
            self.ema.update(self.bare, batch, step, skipped)
        self.optimizer.zero_grad(set_to_none=True)
        return StepResult(losses, norm, skipped)

    def snapshot(self) -> dict[str, Tensors]:
        """File of a checkpoint -> tensors in host memory, which training does not change any more."""
        tensors: dict[str, Tensors] = {
            MODEL: to_cpu(self.bare.state_dict()),
            OPTIMIZER: to_cpu(optimizer_tensors(self.bare, self.optimizer)),
        }
        return tensors | ({} if self.ema is None else {EMA: to_cpu(self.ema.model.state_dict())})

    def as_files(self, snapshot: Mapping[str, Tensors]) -> dict[str, bytes]:
        """A snapshot as the files of a checkpoint."""
        return {
            name: safetensors(dict(tensors)) if name == OPTIMIZER else serialize_model(tensors, self._metadata())
            for name, tensors in snapshot.items()
        }

    def final_model(self) -> bytes:
        """The model to use, with what rebuilds it, as safetensors."""
        return serialize_model(to_cpu(self.eval_model.state_dict()), self._metadata())

    def _metadata(self) -> dict[str, Any]:
        return {"config": as_json(self._config), "size": self._size}

    def _warm_up_buckets(self) -> None:
        """A pass over nothing, after which the model is as before.

        DDP lays out its buckets anew after the first backward pass, and a sum over three ranks and more is rounded by
        the position in a bucket: without this, the first step of a run that goes on would differ in the last digits.
        """
        self._guard.snapshot_buffers()
        parts = self._accelerator.num_processes * self._config.train.grad_accum_steps
        device = self._accelerator.device
        size = view_size(self._size, self._config.augment)
        image = torch.zeros(self._config.train.batch_size // parts, 3, *size, device=device)
        with self._accelerator.autocast():
            prediction = self.model(image.contiguous(memory_format=self.layout))
        self._accelerator.backward(prediction.sum())
        self.optimizer.zero_grad(set_to_none=True)
        self._guard.restore(torch.ones((), device=device))


def shares_statistics(config: Config, accelerator: Accelerator) -> bool:
    """True where batch norm sees the images of all ranks."""
    return accelerator.device.type == "cuda" and accelerator.num_processes > 1 and config.train.sync_bn


def check_statistics(config: Config, accelerator: Accelerator, size: tuple[int, int]) -> None:
    """Refuse steps in which a channel has one value to normalise, which has no spread. Raises UserError.

    The last features of an image of up to 32x32 are one value each, and batch norm needs a second image.
    """
    view, train = view_size(size, config.augment), config.train
    parts = accelerator.num_processes * train.grad_accum_steps
    beside = config.model.norm == "batch" and (train.batch_size > parts or shares_statistics(config, accelerator))
    if max(view) > LEAST_CROP or beside or has_spread(config.model, view):
        return
    ways = [f"--train.batch-size {2 * parts} (2 at a time)"] if config.model.norm == "batch" else []
    ways += ["--train.grad-accum-steps 1"] if train.grad_accum_steps > 1 and ways else []
    side = 2 * LEAST_CROP if config.augment.border == 0 else 4 * LEAST_CROP  # a border leaves half of it at least
    crop = f"--augment.crop {2 * LEAST_CROP}x{2 * LEAST_CROP}" if config.augment.crop is not None else ""
    ways.append(crop if crop and min(size) >= side else f"--data.size {side}x{side} {crop}".strip())
    ways += ["--model.norm group"] if config.model.norm == "batch" else []
    raise UserError(
        f"1 image of {view[0]}x{view[1]} at a time leaves model.norm {config.model.norm} one value per channel, which "
        f"has no spread; try {', or '.join(ways)}"
    )


def _name_the_first_bad(name: str, module: nn.Module, _: Any, output: torch.Tensor) -> None:
    if not output.isfinite().all():
        raise UserError(f"{name} ({type(module).__name__}) gives values that are not finite, from inputs that are")
