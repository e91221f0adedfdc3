"""What a run is told: dataclass defaults <- TOML file <- command line. Each wing owns the config of its part."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from mde_dist.data.config import PATIENCE, AugmentConfig, CacheOptions, view_size
from mde_dist.distributed.config import Gradients, Precision
from mde_dist.models.config import ModelConfig
from mde_dist.utils.cli import RUN_DIR, LatePath, Place, Size, check_ranges, flatten, parse
from mde_dist.utils.errors import UserError
from mde_dist.utils.paths import as_typed, whole_path
from mde_dist.utils.toml import dump_toml
from mde_dist.utils.urls import hide_key, is_remote

SAMPLE_SHARDS = "shards/rooms"
"""Where the embedded sample is packed when nothing else is named."""


Kind = Literal["mse", "l1", "log_l1", "berhu", "silog"]
Switch = Literal["auto", "on", "off"]
Tracker = Literal["tensorboard", "wandb", "trackio", "mlflow", "comet_ml", "aim", "clearml", "dvclive", "swanlab"]
"""Those that accelerate knows."""


@dataclass(frozen=True)
class DataConfig:
    """Which shards, and how they are streamed."""

    shards: Place = SAMPLE_SHARDS
    """Directory made by `python -m mde_dist.shard`, or where it lies on a server: http(s)://… or s3://… (with the extra
    `s3`). The query of a signed URL is noted down nowhere. The default directory is rendered and packed if need be."""
    train_split: str = "train"
    """Split to train on."""
    eval_split: str = "test"
    """Split to evaluate on."""
    eval_shards: Place | None = None
    """Directory or URL of that split, where it is another one; None = the same."""
    size: Size | None = (120, 160)
    """Training size, pixels; None = that of the shards. Images are resized on the device."""
    threads: int = 2
    """Decoding threads per rank; 0 = decode in the loop itself."""
    prefetch_batches: int = 3
    """Batches decoded ahead of the loop, at least 1."""
    shuffle_shards: int = 4
    """Shards whose samples are shuffled into one another: larger mixes better, smaller reads more in sequence."""
    max_bad_fraction: float = 0.01
    """Damaged samples are replaced and counted; past this share of the samples the run stops. 0..1."""
    read_timeout: float = 300
    """Seconds after which a read that does not come back ends the run."""
    cache: LatePath = CacheOptions.directory
    """Where shards of a server are kept, whole: one directory per node for all its processes; best on a local disk."""
    cache_gb: float = 100
    """Gigabytes (10^9 bytes) that it may take; the files used longest ago go first."""
    remote_timeout: float = PATIENCE
    """Seconds without a byte from the server, or with less than a kilobyte a second, after which the run ends; until
    then it is asked again and again."""

    def __post_init__(self) -> None:
        for name in ("shards", "eval_shards"):  # what is written and said of a config has no key in it
            if getattr(self, name) is not None:
                object.__setattr__(self, name, hide_key(getattr(self, name)))

    @property
    def cache_options(self) -> CacheOptions:
        return CacheOptions(self.cache, int(self.cache_gb * 1e9), self.remote_timeout)


@dataclass(frozen=True)
class LossConfig:
    """What is minimised. Pixels without a measurement have no part in it."""

    kind: Kind = "mse"
    """Over all valid pixels of the global batch: mse = squared error, l1 = absolute error, log_l1 = that of the
    logarithm, berhu = absolute error that is squared from a fifth of the image's largest one on (Laina et al., 2016).
    Per image, then over images: silog = root of the scale-invariant logarithmic error (Eigen et al., 2014; root and
    focus of BTS, Lee et al., 2019)."""
    silog_lambda: float = 0.85
    """Of silog: how much of an image's mean error is forgiven, 0 = none, 1 = all, and with it the scale. 0..1."""
    gradient_weight: float = 0.0
    """Weight of the differences between neighbours, in logarithms, at four scales (Li and Snavely, 2018): edges."""


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


@dataclass(frozen=True)
class TrainConfig:
    """The loop. All intervals count samples, so that they mean the same for every batch size and number of ranks."""

    total_samples: int = 2400
    """Samples to train on, over all ranks; training ends with the batch that reaches it. A run may go on with more."""
    batch_size: int = 24
    """GLOBAL batch: samples per optimizer step over all ranks and accumulation steps."""
    grad_accum_steps: int = 1
    """Parts of a rank's share of the batch that go through the model one after another, to save memory."""
    precision: Precision = "auto"
    """auto = bf16 on GPUs that have it, else fp32. A CPU with bf16 instructions, too, is faster with bf16."""
    channels_last: Switch = "auto"
    """Memory layout of images and features with the channels innermost; auto = what is faster on the device: on."""
    compile: Switch = "auto"
    """torch.compile of the model, which takes a minute at the start; auto = off."""
    grad_comm_dtype: Gradients = "fp32"
    """In which precision gradients travel between the ranks: bf16 halves the bytes, and rounds what each rank adds to 8
    bits; for networks that cannot keep up with the step (see `python -m mde_dist.doctor`)."""
    ddp_bucket_mb: float = 25
    """Megabytes (2^20 bytes) of gradients that travel together, while the backward pass goes on."""
    sync_bn: bool = True
    """On several GPUs: batch statistics over the whole global batch instead of each rank's share."""
    seed: int = 0
    """Of weights, order and augmentation."""
    evaluate_every: int = 800
    """Samples between evaluations; there is one at the end in any case, and a checkpoint after each."""
    checkpoint_every: int = 800
    """Samples between checkpoints."""
    keep_checkpoints: int = 2
    """Newest checkpoints that stay; the best one stays as well."""
    log_every: int = 240
    """Samples between lines of metrics.jsonl."""
    cpu_threads: int = 0
    """Threads of a rank on a CPU; 0 = cores of the machine / ranks on it."""
    nonfinite: Literal["stop", "skip"] = "stop"
    """When the loss or the gradient of a batch is not finite on any rank: stop, naming the batch, or leave it out."""
    max_skipped: int = 10
    """Batches that may be left out so in all; one more ends the run."""
    save_errors: Literal["stop", "continue"] = "stop"
    """When a checkpoint or metrics.jsonl cannot be written (disk full, read-only): stop, or say so, train on, and try
    again at the next one. What was written before stays whole."""
    heartbeat_timeout: float = 30
    """Seconds without a sign of life after which a rank counts as lost, which ends the others. A rank whose process
    ends is noticed at once."""
    timeout: float = 600
    """Seconds after which a collective that waits in vain for another rank gives up."""

    @property
    def process_group_args(self) -> dict[str, Any]:
        """Arguments of `init_distributed`."""
        names = ("precision", "cpu_threads", "timeout", "grad_comm_dtype", "ddp_bucket_mb")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class EvaluateConfig:
    """Evaluation while training."""

    protocol: Literal["eigen", "full", "blog", "densedepth"] = "eigen"
    """What abs_rel and delta1 mean: eigen = the field's crop, full = no crop, blog = predictions as they are,
    densedepth = its own crop, all pixels pooled."""
    batch_size: int = 8
    """Images per forward pass."""
    flip: bool = False
    """Average each prediction with that of the mirrored image, as AdaBins, NeWCRFs and ZoeDepth report."""
    limit: int | None = None
    """Score the first N images of the split only."""


@dataclass(frozen=True)
class Config:
    """Train a depth model on shards. Without arguments: on rendered rooms, in a few minutes on a CPU."""

    run: Annotated[Path, RUN_DIR] = Path("runs/rooms")
    """Run directory. One with checkpoints of the same config is resumed; of another config it is refused. Under
    torchrun, whose own parser refuses --run, it is --run-dir."""
    debug_from: Path | None = None
    """With --debug: begin where the newest checkpoint in this directory is (RUN/checkpoints, or RUN/failed after a loss
    that was not finite)."""
    log_with: tuple[Tracker, ...] = ()
    """Also log to these, pictures included: tensorboard (in RUN/trackers), wandb, …; each has to be installed, for
    example as the extra of its name."""
    debug: bool = False
    """Single process, no threads, deterministic, anomaly detection, a handful of steps, first batch described, full
    tracebacks; works under a debugger. Writes to a temporary directory."""
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)


C = TypeVar("C", bound=Config)

RESUMABLE_FIELDS = {
    *(
        "run",
        "log_with",
        "debug",
        "debug_from",
        "data.shards",
        "data.eval_shards",
        "data.threads",
        "data.prefetch_batches",
        "data.read_timeout",
    ),
    *("data.cache", "data.cache_gb", "data.remote_timeout", "data.max_bad_fraction"),
    *("train.total_samples", "train.batch_size", "train.grad_accum_steps"),
    *("train.keep_checkpoints", "train.checkpoint_every", "train.log_every", "train.cpu_threads", "train.timeout"),
    *("train.nonfinite", "train.max_skipped", "train.save_errors", "train.heartbeat_timeout"),
    *("train.channels_last", "train.compile", "train.grad_comm_dtype", "train.ddp_bucket_mb"),
}
"""Fields that may change on resume: they do not change which samples come in which order (instead of the path of the
shards, their manifest is compared). A new batch size, or a new end, does change what is learned; the run says so."""

ORDER = "order of samples"
ORDER_VERSION = 2
"""Of `GlobalSampler`; mde_dist 0.1 had an order of its own, which it did not number: 1."""

LOCAL_FIELDS = {"run", "debug_from", "data.shards", "data.eval_shards", "data.cache"}
"""Fields that may differ over the ranks: a node may have its own paths."""

_AT_LEAST: dict[str, float] = {
    **{
        "data.threads": 0,
        "data.prefetch_batches": 1,
        "data.shuffle_shards": 1,
        "train.total_samples": 1,
        "train.batch_size": 1,
    },
    **{
        "train.grad_accum_steps": 1,
        "train.evaluate_every": 1,
        "train.checkpoint_every": 1,
        "train.keep_checkpoints": 1,
    },
    **{"train.log_every": 1, "train.cpu_threads": 0, "train.timeout": 1, "evaluate.batch_size": 1, "evaluate.limit": 1},
    **{
        "optim.lr": 0,
        "optim.weight_decay": 0,
        "optim.warmup_samples": 0,
        "optim.grad_clip_norm": 0,
        "data.max_bad_fraction": 0,
    },
    **{
        "optim.min_lr_ratio": 0,
        "optim.poly_power": 0,
        "optim.ema_samples": 0,
        "optim.base_batch_size": 0,
        "train.max_skipped": 0,
    },
    **{
        "train.heartbeat_timeout": 3,
        "train.ddp_bucket_mb": 1,
        "loss.silog_lambda": 0,
        "loss.gradient_weight": 0,
        "model.min_depth": 1e-3,
    },
    **{"augment.border": 0, "augment.zoom": 1, "augment.cut_depth": 0},
    **{"augment.flip": 0, "augment.color": 0, "data.read_timeout": 1, "data.cache_gb": 0, "data.remote_timeout": 0},
}
_AT_MOST: dict[str, float] = {
    **{"data.max_bad_fraction": 1, "augment.flip": 1, "augment.color": 1, "optim.min_lr_ratio": 1},
    **{"loss.silog_lambda": 1, "augment.border": 0.25, "augment.zoom": 4, "augment.cut_depth": 1},
    # threads that a system can have, seconds that its clocks take, images and bytes that memories can hold
    **{"data.threads": 1024, "train.cpu_threads": 1024, "train.timeout": 1e6, "train.heartbeat_timeout": 1e6},
    **{"data.prefetch_batches": 1024, "train.batch_size": 1e6, "evaluate.batch_size": 1e6, "train.ddp_bucket_mb": 1e6},
    **{"data.cache_gb": 1e9, "train.seed": 2**64 - 1},
}


def read_config(argv: Sequence[str]) -> Config:
    """Defaults <- `--config FILE.toml` <- flags, checked. Raises UserError."""
    return validate(parse(Config, argv, "python -m mde_dist.train"))


def validate(config: C) -> C:
    """The config, all values of which are possible ones. Raises UserError."""
    check_ranges(
        config, {n: (_AT_LEAST.get(n, float("-inf")), _AT_MOST.get(n, float("inf"))) for n, _ in flatten(config)}
    )
    for name in ("read_timeout", "remote_timeout"):
        if getattr(config.data, name) >= config.train.timeout:
            raise UserError(
                f"data.{name} = {getattr(config.data, name):g}: must be less than train.timeout = "
                f"{config.train.timeout:g}, or the other ranks give up before the one that waits can say why"
            )
    if config.model.max_depth <= config.model.min_depth:
        raise UserError(f"model.max_depth = {config.model.max_depth:g}: must be more than model.min_depth")
    if config.data.size is not None:  # or that of the shards, once they are open
        view_size(config.data.size, config.augment)
    if config.debug_from is not None and not config.debug:
        raise UserError("debug_from is for --debug only")
    if config.debug:
        config = _debug(config)
    return config


def _debug(config: C) -> C:
    """Everything comes soon: log, evaluate, checkpoint."""
    batch = config.train.batch_size
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, threads=0),
        train=dataclasses.replace(config.train, evaluate_every=2 * batch, checkpoint_every=2 * batch, log_every=batch),
        evaluate=dataclasses.replace(config.evaluate, limit=8),
    )


def as_json(config: Config) -> dict[str, Any]:
    """`section.field` -> plain value, as stored in checkpoints."""
    return json.loads(json.dumps(dict(flatten(config)), default=str))


def resume_key(config: Config, manifest: str, eval_manifest: str) -> dict[str, Any]:
    """What a run is a function of (with the hashes of its manifests): a checkpoint of anything else is not resumed."""
    values = {name: value for name, value in as_json(config).items() if name not in RESUMABLE_FIELDS}
    return values | {ORDER: ORDER_VERSION, "manifest": manifest, "eval_manifest": eval_manifest}


def for_all_ranks(config: Config) -> dict[str, Any]:
    """Values that have to be the same on all ranks, by name."""
    return {name: value for name, value in as_json(config).items() if name not in LOCAL_FIELDS}


def with_whole_paths(config: C) -> C:
    """The same config with paths from the root on, which hold in every folder: what RUN/config.toml has.

    Weights and records have paths as they were typed: the same training gives the same files wherever it runs.
    """

    def whole(part: Any, prefix: str = "") -> Any:
        changes = {}
        for item in dataclasses.fields(part):
            name, value = f"{prefix}{item.name}", getattr(part, item.name)
            if dataclasses.is_dataclass(value):
                changes[item.name] = whole(value, f"{name}.")
            elif _is_path(name, value):
                changes[item.name] = str(whole_path(value)) if isinstance(value, str) else whole_path(value)
        return dataclasses.replace(part, **changes)

    return whole(config)


def _is_path(name: str, value: Any) -> bool:
    if name == "model.weights":
        return value not in ("none", "imagenet")
    return name in LOCAL_FIELDS and value is not None and not is_remote(str(value))


def to_toml(config: Config) -> str:
    """The resolved config as a file that `--config` reads back."""
    defaults = dict(flatten(type(config)()))
    values = ((name, as_typed(value) if _is_path(name, value) else value) for name, value in flatten(config))
    return dump_toml((name, value) for name, value in values if value is not None or defaults[name] is not None)


def eval_shards_of(config: dict[str, Any]) -> str:
    """Where the evaluation split of a trained model's config lies. Raises UserError."""
    place = config.get("data.eval_shards") or config.get("data.shards")
    if not place:
        raise UserError("the checkpoint does not say what it was trained on; name it: --shards DIR or --source DIR")
    return place
