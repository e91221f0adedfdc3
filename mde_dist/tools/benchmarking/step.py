"""`bench step`: images/s of the training step on a batch that is on the device, and the gain of each choice."""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from torch.profiler import ProfilerActivity, profile

from mde_dist.data.augmentation import prepare
from mde_dist.data.config import view_size
from mde_dist.data.shards import open_split
from mde_dist.distributed.process_group import init_distributed
from mde_dist.models.flops import training_flops
from mde_dist.tools.benchmarking.harness import (
    Column,
    Result,
    Table,
    Timing,
    device_name,
    interleave,
    over_rounds,
    ratio,
    train_config,
    wait_for,
)
from mde_dist.tools.diagnostics.step import noise, out_of_memory
from mde_dist.training.config import Config
from mde_dist.training.losses import valid_counts
from mde_dist.training.setup import check_batch, make_sample
from mde_dist.training.step import TrainModule
from mde_dist.training.throughput import peak_flops
from mde_dist.utils.cli import option
from mde_dist.utils.errors import UserError
from mde_dist.utils.io import writing

T = TypeVar("T")

_GAIN = 1.03  # from which on a choice is worth naming
_BATCHES = (8, 64, 256)  # on a GPU, where none are given
_PROFILED = 3  # steps
_NAMED = 8  # kernels or operators that a profile names


@dataclass(frozen=True)
class _Own(Timing):
    batches: tuple[int, ...] = option((), low=1, high=1e6)
    """Other batch sizes, images on the device at a time; none given = 8, 64 and 256 on a GPU, on a CPU none."""
    all: bool = False
    """On a CPU: also bf16, which few CPUs are fast at, and compile, which takes a minute."""
    profile: Path | None = None
    """Write a trace of a few steps into this directory, for chrome://tracing or ui.perfetto.dev, and name the kernels
    that take the most time."""


@dataclass(frozen=True)
class Options(Config, _Own):
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
    """The step with one thing changed."""

    what: str
    config: Config
    options: str = ""
    """Options of mde_dist.train that make the change; empty where there are none."""
    views_only: bool = False
    """Make the views of a batch, without a step."""
    step: Callable[[], object] | None = None
    """One step, not waited for; of `set_up`."""
    first: float | None = None
    """Seconds of the first step."""
    memory: int | None = None
    """Bytes of a GPU that its steps need at most."""
    fits: bool = True
    """False once the device had too little memory for it."""


def measure(options: Options) -> Result:
    """Raises UserError."""
    config = train_config(options)
    with init_distributed("fp32", config.train.cpu_threads, config.train.timeout) as accelerator:
        if accelerator.num_processes > 1:
            raise UserError("bench step is for one process on one device; for several: mde_dist.bench scaling")
        check_batch(config, 1)
        make_sample(config, accelerator)
        with open_split(config.data.shards, config.data.train_split, config.data.cache_options) as shards:
            stored = shards.size
        device, size = accelerator.device, config.data.size or stored
        seen, name = view_size(size, config.augment), device_name(device)
        variants = {variant.what: variant for variant in choose_variants(options, config, device)}
        for variant in variants.values():
            within_memory(variant, device, partial(set_up, variant, accelerator, size, stored))
        cases = {what: partial(step_seconds, variant, device) for what, variant in variants.items()}
        times = interleave(cases, options.rounds, options.seconds)
        base, flops = next(iter(variants.values())), training_flops(config.model, seen)
        rows = [
            variant_row(variant, times[what], flops, peak_flops(device, variant.config.train.precision))
            for what, variant in variants.items()
        ]
        compare(rows)
        train = base.config.train
        notes = [f"as it is: {train.precision}, compile {train.compile}, {train.grad_accum_steps} accumulated"]
        if options.profile is not None and base.step is not None:
            notes.append(write_profile(base.step, options.profile, device))
        limit, advice = diagnose(rows, seen)
        title = f"step: {config.model.encoder} at {seen[0]}x{seen[1]}, {name}"
        return Result("step", {"step": Table(title, COLUMNS, rows)}, limit, advice, name, config, notes)


def choose_variants(options: Options, config: Config, device: torch.device) -> list[Variant]:
    """The config as it is, its views alone, each choice the other way, other batches."""
    cuda, train = device.type == "cuda", config.train
    bf16 = train.precision == "bf16" or (train.precision == "auto" and cuda and torch.cuda.is_bf16_supported())
    train = replace(train, precision="bf16" if bf16 else "fp32")
    base = replace(config, train=train)
    changes = {"channels_last": "on" if train.channels_last == "off" else "off"}
    if cuda or options.all:
        changes |= {"precision": "fp32" if bf16 else "bf16", "compile": "off" if train.compile == "on" else "on"}
    variants = [Variant("as it is", base), Variant("prepare and augment alone", base, views_only=True)]
    for name, value in changes.items():
        words, changed = f"{name.replace('_', '-')} {value}", replace(train, **{name: value})  # type: ignore[arg-type]
        variants.append(Variant(words, replace(base, train=changed), f"--train.{words}"))
    for batch in options.batches or (_BATCHES if cuda else ()):
        changed = replace(train, batch_size=batch, grad_accum_steps=1)
        variants.append(Variant(f"batch {batch}", replace(base, train=changed)))
    return variants


def within_memory(variant: Variant, device: torch.device, action: Callable[[], T]) -> T | None:
    """Result of the action; None where the device has, or had before, too little memory for it."""
    try:
        return action() if variant.fits else None
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        error.__traceback__ = None  # whose frames hold tensors
    variant.step, variant.fits = None, False
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return None


def set_up(variant: Variant, accelerator: Accelerator, size: tuple[int, int], stored: tuple[int, int]) -> None:
    """Build the step of a variant, and run it twice. `stored`: size of the images in the shards."""
    device, cuda = accelerator.device, accelerator.device.type == "cuda"
    before = torch.cuda.memory_allocated(device) if cuda else 0
    step = build_step(variant, accelerator, size, stored)
    start = time.perf_counter()
    step()
    wait_for(device)
    first = time.perf_counter() - start
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    step()
    wait_for(device)
    if cuda:
        variant.memory = torch.cuda.max_memory_allocated(device) - before
    variant.step, variant.first = step, first


def build_step(
    variant: Variant, accelerator: Accelerator, size: tuple[int, int], stored: tuple[int, int]
) -> Callable[[], object]:
    """The trainer's optimizer step on one view, which stands for all parts of the batch; or the views of all parts."""
    config, device, parts = variant.config, accelerator.device, variant.config.train.grad_accum_steps
    batch = noise(config.train.batch_size // parts, stored, device)

    def make_views(count: int = parts) -> Any:
        for _ in range(count):
            view = prepare(batch, size, config.augment, config.train.seed)
        return view

    if variant.views_only:
        return make_views
    train_module = TrainModule(config, accelerator, size)
    train_module.wrap()
    views = [make_views(1)] * parts
    global_counts = parts * valid_counts(views[0][1])

    def precision() -> torch.autocast:
        return torch.autocast(device.type, torch.bfloat16, enabled=config.train.precision == "bf16")

    def step() -> None:
        train_module.set_lr(0)
        train_module.step(train_module.backward(views, global_counts, precision), config.train.batch_size, 1)

    return step


def step_seconds(variant: Variant, device: torch.device, budget: float) -> float | None:
    """Seconds of a step, the mean of as many as fit into the budget, at least one; None where memory is too small."""
    step = variant.step

    def block(steps: int) -> float:
        wait_for(device)
        start = time.perf_counter()
        for _ in range(steps):
            step()  # type: ignore[misc]  # it fits
        wait_for(device)
        return (time.perf_counter() - start) / steps

    def mean_of_many() -> float:
        once = block(1)
        steps = int((budget - once) / once)
        return block(steps) if steps >= 1 else once

    return within_memory(variant, device, mean_of_many)


def variant_row(variant: Variant, times: Sequence[float | None], flops: int, peak: float | None) -> dict[str, Any]:
    """Row of a variant. `times`: seconds of a step, by round; `flops`: of an image."""
    batch, known = variant.config.train.batch_size, [1e3 * seconds for seconds in times if seconds is not None]
    row: dict[str, Any] = {"what": variant.what, "batch": batch, "precision": variant.config.train.precision}
    row |= {"options": variant.options, "first_seconds": variant.first, "memory_gb": ratio(variant.memory, 1e9)}
    if len(known) < len(times):
        return row | {"ms": None, "rate": None, "spread": "out of memory", "error": "out of memory"}
    row |= over_rounds("ms", known)
    row["rate"] = 1e3 * batch / row["ms"]
    if not variant.views_only:
        speed = flops * row["rate"]
        row |= {"tflops": speed / 1e12, "utilisation": ratio(speed, peak)}
    return row


def compare(rows: Sequence[dict[str, Any]]) -> None:
    """Add to each step its gain over the first row, round by round: both are disturbed alike."""
    base = rows[0]
    for row in rows:
        if row.get("tflops") and base["rate"]:
            pairs = zip(base["ms_rounds"], row["ms_rounds"], strict=True)
            gains = over_rounds("gain", [before / base["batch"] * row["batch"] / ms for before, ms in pairs])
            row |= gains | {"spread": row["spread"]}


def write_profile(step: Callable[[], object], folder: Path, device: torch.device) -> str:
    """Trace a few steps into `folder`/step.json -> a line that names where the time goes. Raises UserError."""
    cuda = device.type == "cuda"
    os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # or it complains of GPUs that are not there
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as trace:
        for _ in range(_PROFILED):
            step()
        wait_for(device)
    path = folder / "step.json"
    with writing(path):
        folder.mkdir(parents=True, exist_ok=True)
        trace.export_chrome_trace(str(path))
    kind = torch.autograd.DeviceType.CUDA if cuda else torch.autograd.DeviceType.CPU
    times = {
        event.key: event.self_device_time_total if cuda else event.self_cpu_time_total
        for event in trace.key_averages()
        if event.device_type == kind
    }
    longest, whole = sorted(times, key=lambda key: -times[key])[:_NAMED], sum(times.values()) or 1
    shares = ", ".join(f"{key[:40]} {times[key] / whole:.0%}" for key in longest)
    return f"profile of {_PROFILED} steps: {path} (ui.perfetto.dev); most time: {shares}"


def diagnose(rows: Sequence[dict[str, Any]], size: tuple[int, int]) -> tuple[str, str]:
    """-> the speed of the step, the choices that are better."""
    base = rows[0]
    if base["rate"] is None:
        limit = f"memory, a step of {base['batch']} images of {size[0]}x{size[1]} does not fit the device"
        return limit, "a higher --train.grad-accum-steps, which does the same batch in smaller parts"
    used = "" if base["utilisation"] is None else f", {base['utilisation']:.0%} of the device's peak"
    limit = f"the step, {base['rate']:,.1f} images/s, {base['tflops']:.2f} TFLOP/s{used}"
    better = [row for row in rows[1:] if row.get("gain", 0) >= _GAIN and min(row["gain_rounds"]) > 1]
    better.sort(key=lambda row: -row["gain"])
    tips = [f"{row['options']} ({row['gain']:.2f} times)" for row in better if row["options"]]
    for row in better:
        if not row["options"] and row["batch"] > base["batch"]:
            tips.append(f"a larger --train.batch-size ({row['batch']}: {row['gain']:.2f} times; it learns other)")
            break
    return limit, ", ".join(tips)
