"""Fields of the config that version 0.1 called by other names."""

from collections.abc import Iterable
from typing import Any

from mde_dist.utils.errors import UserError

RENAMED = {
    "data.ahead": "data.prefetch_batches",
    "data.patience": "data.remote_timeout",
    "data.window": "data.shuffle_shards",
    "loss.focus": "loss.silog_lambda",
    "loss.gradient": "loss.gradient_weight",
    "model.backbone": "model.encoder",
    "model.refine": "model.skip_conv",
    "optim.clip": "optim.grad_clip_norm",
    "optim.ema": "optim.ema_samples",
    "optim.final": "optim.min_lr_ratio",
    "optim.lr_batch": "optim.base_batch_size",
    "optim.power": "optim.poly_power",
    "optim.warmup": "optim.warmup_samples",
    "train.accumulate": "train.grad_accum_steps",
    "train.bucket_mb": "train.ddp_bucket_mb",
    "train.gradients": "train.grad_comm_dtype",
    "train.keep": "train.keep_checkpoints",
    "train.lost_after": "train.heartbeat_timeout",
    "train.samples": "train.total_samples",
}
"""Old name -> new name."""


def with_new_names(values: dict[str, Any]) -> dict[str, Any]:
    """The values of a config that was stored, by the names of today."""
    return {RENAMED.get(name, name): value for name, value in values.items()}


def check_names(arguments: Iterable[str]) -> None:
    """Raises UserError for an option that has another name now."""
    for argument in arguments:
        name = argument.partition("=")[0].removeprefix("--").replace("-", "_")
        if argument.startswith("--") and name in RENAMED:
            raise UserError(f"{name} is called {RENAMED[name]} now")
