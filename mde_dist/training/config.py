"""Config of a run: dataclass defaults <- TOML file <- command line. Imports no torch, so that `--help` is quick."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from mde_dist.data.config import PATIENCE, AugmentConfig, CacheOptions, view_size
from mde_dist.distributed.config import Gradients, Precision
from mde_dist.models.config import ModelConfig
from mde_dist.utils.cli import RUN_DIR, LatePath, Place, Size, check_bounds, flatten, option, options_of, parse
from mde_dist.utils.errors import UserError
from mde_dist.utils.paths import as_typed, whole_path
from mde_dist.utils.toml import dump_toml
from mde_dist.utils.urls import hide_key, is_remote

SAMPLE_SHARDS = "shards/rooms"
"""Directory of the embedded sample, which is packed when no other shards are named."""


Kind = Literal["mse", "l1", "log_l1", "berhu", "silog"]
Switch = Literal["auto", "on", "off"]
Tracker = Literal["tensorboard", "wandb", "trackio", "mlflow", "comet_ml", "aim", "clearml", "dvclive", "swanlab"]
"""Those that accelerate knows."""


@dataclass(frozen=True)
class DataConfig:
    """Shards, and the stream of samples from them."""

    shards: Place = option(SAMPLE_SHARDS, resumable=True, local=True)
    """Directory made by `python -m mde_dist.shard`, or where it lies on a server: http(s)://… or s3://… (with the extra
    `s3`). The query of a signed URL is noted down nowhere. The default directory is rendered and packed if need be."""
    train_split: str = "train"
    """Split to train on."""
    eval_split: str = "test"
    """Split to evaluate on."""
    eval_shards: Place | None = option(None, resumable=True, local=True)
    """Directory or URL of that split, where it is another one; None = the same."""
    size: Size | None = (120, 160)
    """Training size, pixels; None = that of the shards. Images are resized on the device."""
    threads: int = option(2, low=0, high=1024, resumable=True)
    """Decoding threads per rank; 0 = decode in the loop itself."""
    prefetch_batches: int = option(3, low=1, high=1024, resumable=True)
    """Batches decoded ahead of the loop, at least 1."""
    shuffle_shards: int = option(4, low=1)
    """Shards whose samples are shuffled into one another: larger mixes better, smaller reads more in sequence."""
    max_bad_fraction: float = option(0.01, low=0, high=1, resumable=True)
    """Damaged samples are replaced and counted; past this share of the samples the run stops. 0..1."""
    read_timeout: float = option(300, low=1, resumable=True)
    """Seconds after which a read that does not come back ends the run."""
    cache: LatePath = option(CacheOptions.directory, resumable=True, local=True)
    """Directory that keeps whole shards of a server: one per node for all its processes; best on a local disk."""
    cache_gb: float = option(100, low=0, high=1e9, resumable=True)
    """Gigabytes (10^9 bytes) that it may take; the files used longest ago go first."""
    remote_timeout: float = option(PATIENCE, low=0, resumable=True)
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
    """The loss. Pixels without a measurement have no part in it."""

    kind: Kind = "mse"
    """Over all valid pixels of the global batch: mse = squared error, l1 = absolute error, log_l1 = that of the
    logarithm, berhu = absolute error that is squared from a fifth of the image's largest one on (Laina et al., 2016).
    Per image, then over images: silog = root of the scale-invariant logarithmic error (Eigen et al., 2014; root and
    focus of BTS, Lee et al., 2019)."""
    silog_lambda: float = option(0.85, low=0, high=1)
    """Lambda of silog, 0..1: 0 = RMSE of the logarithm, 1 = fully scale-invariant."""
    gradient_weight: float = option(0.0, low=0)
    """Weight of the differences between neighbours, in logarithms, at four scales (Li and Snavely, 2018): edges."""


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and its schedule."""

    lr: float = option(6e-4, low=0)
    """Highest learning rate."""
    base_batch_size: int = option(0, low=0)
    """Global batch that lr is meant for: another one multiplies it by the root of their ratio (the rule for Adam:
    Malladi et al., 2022). 0 = lr as it is."""
    weight_decay: float = option(1e-2, low=0)
    """Decay of the matrices and kernels; norms and biases are not decayed."""
    schedule: Literal["constant", "cosine", "poly"] = "cosine"
    """After warm-up: constant; or down to `min_lr_ratio` at the end, by half a cosine or by (1 - done)^`poly_power`."""
    warmup_samples: int = option(240, low=0)
    """Samples over which the rate rises linearly: each step has the share of them that is seen with its own batch."""
    min_lr_ratio: float = option(0.01, low=0, high=1)
    """Rate at the end of the schedules that fall, as a share of lr, 0..1."""
    poly_power: float = option(0.9, low=0)
    """Power of the schedule poly; 1 = a straight line."""
    grad_clip_norm: float = option(10.0, low=0)
    """Largest norm of the whole gradient; 0 = no clipping."""
    ema_samples: int = option(0, low=0)
    """Evaluate and publish a moving average of the weights: after so many samples an old one counts 1/e. 0 = none."""


@dataclass(frozen=True)
class TrainConfig:
    """The loop. All intervals count samples, so that they mean the same for every batch size and number of ranks."""

    total_samples: int = option(2400, low=1, resumable=True)
    """Samples to train on, over all ranks; training ends with the batch that reaches it. A run may go on with more."""
    batch_size: int = option(24, low=1, high=1e6, resumable=True)
    """GLOBAL batch: samples per optimizer step over all ranks and accumulation steps."""
    grad_accum_steps: int = option(1, low=1, resumable=True)
    """Parts of a rank's share of the batch that go through the model one after another, to save memory."""
    precision: Precision = "auto"
    """auto = bf16 on GPUs that have it, else fp32. A CPU with bf16 instructions, too, is faster with bf16."""
    channels_last: Switch = option("auto", resumable=True)
    """Memory layout of images and features with the channels innermost; auto = what is faster on the device: on."""
    compile: Switch = option("auto", resumable=True)
    """torch.compile of the model, which takes a minute at the start; auto = off."""
    grad_comm_dtype: Gradients = option("fp32", resumable=True)
    """In which precision gradients travel between the ranks: bf16 halves the bytes, and rounds what each rank adds to 8
    bits; for networks that cannot keep up with the step (see `python -m mde_dist.doctor`)."""
    ddp_bucket_mb: float = option(25, low=1, high=1e6, resumable=True)
    """Megabytes (2^20 bytes) of gradients that travel together, while the backward pass goes on."""
    sync_bn: bool = True
    """On several GPUs: batch statistics over the whole global batch instead of each rank's share."""
    seed: int = option(0, low=-(2**63), high=2**64 - 1)
    """Seed of weights, order and augmentation."""
    evaluate_every: int = option(800, low=1)
    """Samples between evaluations; there is one at the end in any case, and a checkpoint after each."""
    checkpoint_every: int = option(800, low=1, resumable=True)
    """Samples between checkpoints."""
    keep_checkpoints: int = option(2, low=1, resumable=True)
    """Newest checkpoints that stay; the best one stays as well."""
    log_every: int = option(240, low=1, resumable=True)
    """Samples between lines of metrics.jsonl."""
    cpu_threads: int = option(0, low=0, high=1024, resumable=True)
    """Threads of a rank on a CPU; 0 = cores of the machine / ranks on it."""
    nonfinite: Literal["stop", "skip"] = option("stop", resumable=True)
    """When the loss or the gradient of a batch is not finite on any rank: stop, naming the batch, or leave it out."""
    max_skipped: int = option(10, low=0, resumable=True)
    """Batches that may be left out so in all; one more ends the run."""
    save_errors: Literal["stop", "continue"] = option("stop", resumable=True)
    """When a checkpoint or metrics.jsonl cannot be written (disk full, read-only): stop, or say so, train on, and try
    again at the next one. What was written before stays whole."""
    heartbeat_timeout: float = option(30, low=3, high=1e6, resumable=True)
    """Seconds without a sign of life after which a rank counts as lost, which ends the others. A rank whose process
    ends is noticed at once."""
    timeout: float = option(600, low=1, high=1e6, resumable=True)
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
    """Definition of abs_rel and delta1: eigen = the field's crop, full = no crop, blog = predictions as they are,
    densedepth = its own crop, all pixels pooled."""
    batch_size: int = option(8, low=1, high=1e6)
    """Images per forward pass."""
    flip: bool = False
    """Average each prediction with that of the mirrored image, as AdaBins, NeWCRFs and ZoeDepth report."""
    limit: int | None = option(None, low=1)
    """Score the first N images of the split only."""


@dataclass(frozen=True)
class Config:
    """Train a depth model on shards. Without arguments: on rendered rooms, in a few minutes on a CPU."""

    run: Annotated[Path, RUN_DIR] = option(Path("runs/rooms"), resumable=True, local=True)
    """Run directory. One with checkpoints of the same config is resumed; of another config it is refused. Under
    torchrun, whose own parser refuses --run, it is --run-dir."""
    debug_from: Path | None = option(None, resumable=True, local=True)
    """With --debug: begin where the newest checkpoint in this directory is (RUN/checkpoints, or RUN/failed after a loss
    that was not finite)."""
    log_with: tuple[Tracker, ...] = option((), resumable=True)
    """Also log to these, pictures included: tensorboard (in RUN/trackers), wandb, …; each has to be installed, for
    example as the extra of its name."""
    debug: bool = option(False, resumable=True)
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

RESUMABLE_FIELDS = {name for name, _, about in options_of(Config()) if about.get("resumable")}
"""Fields that may change on resume: they do not change which samples come in which order (instead of the path of the
shards, their manifest is compared). A new batch size, or a new end, does change what is learned; the run says so."""

ORDER = "order of samples"
ORDER_VERSION = 2
"""Version of the order of `GlobalSampler`; mde_dist 0.1 had another one, which it did not number: 1."""

LOCAL_FIELDS = {name for name, _, about in options_of(Config()) if about.get("local")}
"""Fields that may differ over the ranks: a node may have its own paths."""


def read_config(argv: Sequence[str]) -> Config:
    """Defaults <- `--config FILE.toml` <- flags, checked. Raises UserError."""
    return validate(parse(Config, argv, "python -m mde_dist.train"))


def validate(config: C) -> C:
    """The config, all values of which are possible ones. Raises UserError."""
    check_bounds(config)
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
    """Everything that a run is a function of, hashes of its manifests included: no other run's checkpoint is
    resumed."""
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
