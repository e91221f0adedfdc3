"""`bench step`: images/s of the training step on batches that are on the device already, and what each choice gains."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from mde_dist.data.augmentation import prepare
from mde_dist.data.config import view_size
from mde_dist.data.shards import open_split
from mde_dist.distributed.process_group import init_distributed
from mde_dist.models.flops import training_flops
from mde_dist.tools.benchmarking.profile import write_profile
from mde_dist.tools.benchmarking.result import (
    Column,
    Result,
    Table,
    Timing,
    device_name,
    over_rounds,
    plain_config,
    ratio,
)
from mde_dist.tools.diagnostics.step import noise, out_of_memory
from mde_dist.training.config import Config
from mde_dist.training.losses import valid_counts
from mde_dist.training.setup import check_batch, make_sample
from mde_dist.training.step import TrainBatch, TrainModule
from mde_dist.training.throughput import peak_flops
from mde_dist.utils.cli import option
from mde_dist.utils.errors import UserError

_GAIN = 1.03  # from which on a choice is worth naming
_WARM_UP = 2  # steps that allocate and choose kernels
_BATCHES = (8, 64, 256)  # on a GPU, where none are given


@dataclass(frozen=True)
class Own(Timing):
    batches: tuple[int, ...] = option((), low=1, high=1e6)
    """Other batch sizes, images on the device at a time; none given = 8, 64 and 256 on a GPU, on a CPU none."""
    all: bool = False
    """On a CPU: also bf16, which few CPUs are fast at, and compile, which takes a minute."""
    profile: Path | None = None
    """Write what the device did in a few steps into this directory, as a trace for chrome://tracing or ui.perfetto.dev,
    and say which kinds of kernels took the time."""


@dataclass(frozen=True)
class Options(Config, Own):
    """Images a second of the training step as the config has it, on a batch that is on the device already, and with
    each of its choices the other way, one at a time. Takes every option of mde_dist.train; one process, one device."""


COLUMNS = (
    Column("what", "step"),
    Column("batch", "images"),
    Column("ms", "ms/step", ",.1f"),
    Column("spread", "rounds"),
    Column("rate", "images/s", ",.1f"),
    Column("tflops", "TFLOP/s", ",.2f"),
    Column("utilisation", "of peak", ".1%"),
    Column("gain", "gain", ".2f"),
    Column("memory_gb", "GB", ".2f"),
    Column("first_seconds", "first step s", ".1f"),
)


@dataclass
class Variant:
    """The step with one thing changed, and what it came to."""

    what: str
    config: Config
    flip: str = ""
    """The choice that it is the other side of, as options of mde_dist.train; empty where it is none of them."""
    foreach: bool = False
    """AdamW in the kernels of several tensors each, in place of the fused one."""
    prepare_only: bool = False
    """The views of a batch alone, no step."""
    step: Callable[[], object] | None = None
    """One step, not waited for; None where it does not fit."""
    first: float | None = None
    """Seconds of the first step."""
    memory: int | None = None
    """Bytes of a GPU that its steps need at most."""
    times: list[float] = field(default_factory=list)
    """Seconds of a step, by round."""
    trouble: str = ""

    @property
    def precision(self) -> str:
        return self.config.train.precision


def bench(options: Options) -> Result:
    """Raises UserError."""
    config = plain_config(options)
    with init_distributed("fp32", config.train.cpu_threads, config.train.timeout) as accelerator:
        if accelerator.num_processes > 1:
            raise UserError(
                "bench step is for one process on one device; for several: python -m mde_dist.bench scaling"
            )
        check_batch(config, 1)
        make_sample(config, accelerator)
        with open_split(config.data.shards, config.data.train_split, config.data.cache_options) as shards:
            stored = shards.size
        size = config.data.size or stored
        variants = chosen(options, accelerator.device)
        for variant in variants:
            set_up(variant, accelerator, size, stored)
        turns(variants, options.rounds, options.seconds, accelerator.device)
        seen = view_size(size, config.augment)
        flops = training_flops(config.model, seen)
        rows = [row(variant, variants[0], flops, accelerator.device) for variant in variants]
        notes = list(described(variants))
        if options.profile is not None and variants[0].step is not None:
            notes += write_profile(variants[0].step, options.profile, accelerator.device)
        limit, advice = judge(variants, rows, seen)
        title = f"step: {config.model.encoder} at {seen[0]}x{seen[1]}, {device_name(accelerator.device)}"
        table = Table(title, COLUMNS, rows)
        return Result("step", {"step": table}, limit, advice, device_name(accelerator.device), config, notes)


def chosen(options: Options, device: torch.device) -> list[Variant]:
    """The config as it is, its views alone, each choice the other way, other batches."""
    cuda, plain = device.type == "cuda", plain_config(options)
    train = plain.train
    bf16 = train.precision == "bf16" or (train.precision == "auto" and cuda and torch.cuda.is_bf16_supported())
    train = replace(train, precision="bf16" if bf16 else "fp32")
    base = replace(plain, train=train)

    def other(flip: str, **changes: Any) -> Variant:
        return Variant(flip.replace("--train.", ""), replace(base, train=replace(train, **changes)), flip)

    found = [Variant("as it is", base), Variant("prepare and augment alone", base, prepare_only=True)]
    layout = "on" if train.channels_last == "off" else "off"
    found.append(other(f"--train.channels-last {layout}", channels_last=layout))
    if cuda or options.all:
        precision = "fp32" if bf16 else "bf16"
        found.append(other(f"--train.precision {precision}", precision=precision))
        compiled = "off" if train.compile == "on" else "on"
        found.append(other(f"--train.compile {compiled}", compile=compiled))
    found.append(Variant("AdamW foreach, not fused", base, foreach=True))
    for batch in options.batches or (_BATCHES if cuda else ()):
        found.append(
            Variant(f"batch {batch}", replace(base, train=replace(train, batch_size=batch, grad_accum_steps=1)))
        )
    return found


def set_up(variant: Variant, accelerator: Accelerator, size: tuple[int, int], stored: tuple[int, int]) -> None:
    """Build what it steps, and make the first steps. `stored`: size of the images in the shards."""
    config, device = variant.config, accelerator.device
    part = config.train.batch_size // config.train.grad_accum_steps
    before = _allocated(device)
    try:
        batch = noise(part, stored, device)
        if variant.prepare_only:
            step: Callable[[], object] = lambda: prepare(batch, size, config.augment, config.train.seed)  # noqa: E731
        else:
            train_module = TrainModule(config, accelerator, size)
            train_module.wrap()
            if variant.foreach:
                train_module.optimizer = Foreach(_groups(train_module.optimizer), foreach=True)
            view = prepare(batch, size, config.augment, config.train.seed)
            step = training_step(train_module, device, config, view)
        start = time.perf_counter()
        step()
        wait(device)
        variant.first = time.perf_counter() - start
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        for _ in range(_WARM_UP - 1):
            step()
        wait(device)
        if device.type == "cuda":
            variant.memory = torch.cuda.max_memory_allocated(device) - before
        variant.step = step
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        _give_up(variant, error, device)


def _give_up(variant: Variant, error: Exception, device: torch.device) -> None:
    """Note that it does not fit, and free what it took. Raises what is another error."""
    if not out_of_memory(error):
        raise error
    variant.trouble, variant.step = "out of memory", None
    variant.times.clear()
    error.__traceback__ = None  # whose frames hold tensors
    if device.type == "cuda":
        torch.cuda.empty_cache()


class Foreach(torch.optim.AdamW):
    """Cannot leave out a step that is not finite, as the fused one can; here there is none."""

    def step(self, closure: Any = None) -> Any:
        self.found_inf = None
        return super().step(closure)


def _groups(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    return [{name: group[name] for name in ("params", "lr", "weight_decay")} for group in optimizer.param_groups]


def turns(variants: Sequence[Variant], rounds: int, seconds: float, device: torch.device) -> None:
    """Measure all in turn, every second round backwards; at least one step each."""
    for number in range(rounds):
        for variant in list(variants)[:: 1 if number % 2 == 0 else -1]:
            if variant.step is not None:
                try:
                    variant.times.append(seconds_of(variant.step, seconds / rounds, variant.first or 0.0, device))
                except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                    _give_up(variant, error, device)


def seconds_of(step: Callable[[], object], budget: float, guess: float, device: torch.device) -> float:
    """Seconds that a step takes, the mean of as many as fit into the budget; the device is waited for at both ends."""

    def block(steps: int) -> float:
        wait(device)
        start = time.perf_counter()
        for _ in range(steps):
            step()
        wait(device)
        return (time.perf_counter() - start) / steps

    once = block(1)
    steps = int((budget - once) / once)
    return block(steps) if steps >= 1 else once


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type in ("cuda", "mps", "xpu"):
        getattr(torch, device.type).synchronize()


def row(variant: Variant, base: Variant, flops: int, device: torch.device) -> dict[str, Any]:
    """What is shown of a variant. `flops`: of an image."""
    config = variant.config
    batch = config.train.batch_size
    found: dict[str, Any] = {"what": variant.what, "batch": batch, "precision": variant.precision}
    found |= {"options": variant.flip, "first_seconds": variant.first}
    found["memory_gb"] = None if variant.memory is None else variant.memory / 1e9
    if not variant.times:
        return found | {"ms": None, "rate": None, "spread": variant.trouble, "error": variant.trouble}
    parts = config.train.grad_accum_steps
    found |= over_rounds("ms", [1e3 * seconds * (parts if variant.prepare_only else 1) for seconds in variant.times])
    found["rate"] = 1e3 * batch / found["ms"]
    if variant.prepare_only:
        return found
    speed = flops * found["rate"]
    found |= {"tflops": speed / 1e12, "utilisation": ratio(speed, peak_flops(device, variant.precision))}
    # round by round: what disturbs one disturbs its neighbour as well
    gains = [
        before / base.config.train.batch_size * batch / seconds
        for before, seconds in zip(base.times, variant.times, strict=False)
    ]
    return found | (over_rounds("gain", gains) | {"spread": found["spread"]} if gains else {})


def row_ms(variant: Variant) -> float:
    return over_rounds("ms", [1e3 * seconds for seconds in variant.times])["ms"]


def training_step(
    train_module: TrainModule, device: torch.device, config: Config, view: TrainBatch
) -> Callable[[], None]:
    """The trainer's optimizer step on one view, which stands for all parts of the batch; one process."""
    views = [view] * config.train.grad_accum_steps
    counted = len(views) * valid_counts(view[1])

    def precision() -> torch.autocast:
        return torch.autocast(device.type, torch.bfloat16, enabled=config.train.precision == "bf16")

    def step() -> None:
        train_module.set_lr(0)
        train_module.step(train_module.backward(views, counted, precision), config.train.batch_size, 1)

    return step


def described(variants: Sequence[Variant]) -> Iterator[str]:
    """What the table leaves open."""
    base, views = variants[0], variants[1]
    layout = "contiguous" if base.config.train.channels_last == "off" else "channels last"
    compiled = "compiled" if base.config.train.compile == "on" else "eager"
    yield f"as it is: {base.precision}, {layout}, {compiled}, {base.config.train.grad_accum_steps} accumulated"
    if base.times and views.times:
        share = base.config.train.grad_accum_steps * row_ms(views) / row_ms(base)
        yield f"views (resize, flip, …, normalise) are not in the steps; they take {share:.0%} of one on top"


def judge(variants: Sequence[Variant], rows: Sequence[dict[str, Any]], size: tuple[int, int]) -> tuple[str, str]:
    """-> how fast the step is, and which choices are better."""
    base = rows[0]
    if base["rate"] is None:
        what = f"memory, a step of {base['batch']} images of {size[0]}x{size[1]} does not fit the device"
        return what, "a higher --train.grad-accum-steps, which does the same batch in smaller parts"
    used = "" if base["utilisation"] is None else f", {base['utilisation']:.0%} of the device's peak"
    limit = f"the step, {base['rate']:,.1f} images/s, {base['tflops']:.2f} TFLOP/s{used}"
    better = [row for row in rows[1:] if row.get("gain", 0) >= _GAIN and min(row["gain_rounds"]) > 1]
    better.sort(key=lambda row: -row["gain"])
    tips = [f"{row['options']} ({row['gain']:.2f} times)" for row in better if row["options"]]
    larger = [row for row in better if not row["options"] and row["batch"] > base["batch"]]
    if larger:
        tips.append(
            f"a larger --train.batch-size ({larger[0]['batch']}: {larger[0]['gain']:.2f} times; it learns other)"
        )
    return limit, ", ".join(tips)


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
