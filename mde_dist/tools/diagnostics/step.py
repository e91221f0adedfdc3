"""One training step as it will be: does it fit, how long does it take, what do its gradients cost on the network?"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from accelerate import Accelerator

from mde_dist.data.augmentation import prepare
from mde_dist.data.config import view_size
from mde_dist.data.loader import Batch
from mde_dist.distributed.process_group import time_all_reduce
from mde_dist.models.flops import has_spread
from mde_dist.tools.diagnostics.machine import host_memory
from mde_dist.tools.diagnostics.panel import RankSurvey, Row, format_bytes
from mde_dist.training.checkpoint import newest_record
from mde_dist.training.config import Config
from mde_dist.training.losses import valid_counts
from mde_dist.training.setup import check_batch
from mde_dist.training.step import TrainModule, shares_statistics
from mde_dist.training.throughput import peak_memory
from mde_dist.utils.errors import UserError

SECONDS = 3.0
"""Seconds for which steps are measured; at least one is."""
_LONG = 10.0  # seconds of a first step after which no second one is waited for
_FULL = 0.92  # share of a memory above which little is left for what comes later
_REDUCE_SHARE = 0.3  # of the time of a step


def check_divides(panel: RankSurvey, config: Config) -> Config:
    """-> the config itself, or where its batch does not divide one whose batch does: for the checks to come."""
    panel.begin("batch")
    accumulate, batch = config.train.grad_accum_steps, config.train.batch_size
    answers = panel.query_ranks(lambda: check_batch(config, panel.world), "another --train.batch-size")
    if panel.failed("batch", answers):
        parts = panel.world * accumulate
        return replace(config, train=replace(config.train, batch_size=max(1, batch // parts) * parts))
    part = batch // (panel.world * accumulate)
    found = f"{part} per rank x {panel.world} ranks x {accumulate} accumulated = {batch}"
    panel.add(Row("batch", "ok", found))
    return config


@dataclass
class Measured:
    """Measurements of a step of this config."""

    parameters: int = 0
    """Parameters of the model; 0 where it could not be built."""
    checkpoint: int = 0
    """Bytes of a checkpoint; 0 where the model could not be built."""
    seconds: float | None = None
    """Seconds of a step of the global batch, on the slowest rank, without the reduction; None where that is not
    known."""
    reduce: float = 0.0
    """Seconds that the sum of the gradients over the ranks takes."""

    @property
    def whole(self) -> float | None:
        """Seconds of a step with its reduction, were that not to overlap with the backward pass."""
        return None if self.seconds is None else self.seconds + self.reduce


def measure_step(panel: RankSurvey, config: Config, size: tuple[int, int], batch: Batch | None) -> Measured:
    """Steps of a new model on a real batch (or on noise of its shape), on all ranks at once.

    Each rank on its own, without DDP and batch statistics over the ranks: one that runs out of memory would leave the
    others waiting in a collective.
    """
    panel.begin("memory and step")
    accelerator, measured = panel.accelerator, Measured()
    if panel.failed("views", panel.query_ranks(lambda: [*view_size(size, config.augment)], "a smaller --augment.crop")):
        return measured
    parts = panel.world * config.train.grad_accum_steps
    part = config.train.batch_size // parts
    if (
        part == 1
        and shares_statistics(config, accelerator)
        and not has_spread(config.model, view_size(size, config.augment))
    ):
        part, batch = 2, None  # without the other ranks' images, one is too few
    alone = replace(config, train=replace(config.train, batch_size=part * parts, sync_bn=False, compile="off"))
    learners: list[TrainModule] = []

    def build() -> list[int]:
        learners.append(TrainModule(alone, accelerator, size, resumes=bool(newest_record(config.run))))
        return [sum(p.numel() for p in learners[0].bare.parameters()), checkpoint_bytes(learners[0])]

    def step() -> list[float]:
        try:
            some = batch or noise(part, size, accelerator.device)
            return _timed_steps(learners[0], alone, accelerator, some, size)
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
        if accelerator.device.type == "cuda":
            torch.cuda.empty_cache()
        raise UserError(_too_large(config, panel.world, part, view_size(size, config.augment)))

    advice = "train with --debug, which shows where it comes from"
    answers = panel.query_ranks(build, advice)
    if not panel.failed("memory", answers):
        measured.parameters, measured.checkpoint = answers[0].value
        answers = panel.query_ranks(step, advice)
        if not panel.failed("memory", answers):
            measured.seconds = max(answer.value[0] for answer in answers)
            _judge_memory(panel, config, [answer.value for answer in answers])
    learners.clear()
    return measured


def noise(part: int, size: tuple[int, int], device: torch.device) -> Batch:
    """A batch of the shape and range of real ones."""
    image = torch.randint(256, (part, *size, 3)).to(torch.uint8)
    depth = torch.randint(500, 9500, (part, *size)).to(torch.uint16)
    return Batch(image.to(device), depth.to(device), np.zeros(part, np.int64), np.arange(part))


def checkpoint_bytes(train_module: TrainModule) -> int:
    """Bytes of a checkpoint: weights and buffers, AdamW's two moments and its step, and the average."""
    parameters = [tensor.nbytes for tensor in train_module.bare.parameters()]
    model = sum(tensor.nbytes for tensor in train_module.bare.state_dict().values())
    return model + 2 * sum(parameters) + 4 * len(parameters) + (0 if train_module.ema is None else model)


def _timed_steps(
    train_module: TrainModule, config: Config, accelerator: Accelerator, batch: Batch, size: tuple[int, int]
) -> list[float]:
    """[seconds of a step of all parts, bytes at its peak, whether the first loss was finite] of this rank."""
    if accelerator.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(accelerator.device)
    parts = config.train.grad_accum_steps

    def one_part() -> torch.Tensor:
        view = prepare(batch, size, config.augment, config.train.seed)
        return train_module.backward([view], valid_counts(view[1]))

    def finish() -> None:
        train_module.step(torch.zeros((), device=accelerator.device), config.train.batch_size, 1)

    def clocked(action: Callable[[], object]) -> float:
        start = time.perf_counter()
        action()
        next(train_module.bare.parameters()).sum().item()  # which waits for the device
        return time.perf_counter() - start

    began = time.perf_counter()
    finite = one_part().isfinite().item()
    if parts > 1:
        one_part()  # beside the gradient of the first
    finish()
    passes, ends = list[float](), list[float]()
    end = time.perf_counter() + SECONDS
    # the first step allocates and chooses kernels: it counts only where there is no time for another
    while not passes or (time.perf_counter() < end and time.perf_counter() - began < _LONG):
        passes.append(clocked(one_part))
        ends.append(clocked(finish))
    return [
        parts * sum(passes) / len(passes) + sum(ends) / len(ends),
        float(peak_memory(accelerator.device)),
        float(finite),
    ]


def out_of_memory(error: BaseException) -> bool:
    """Say whether an error is about memory: on a CPU torch has no type of its own for it."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def _too_large(config: Config, world: int, part: int, size: tuple[int, int]) -> str:
    accumulate, batch = config.train.grad_accum_steps, config.train.batch_size
    what = f"out of memory with {part} images of {size[0]}x{size[1]} at a time"
    finer = next((n for n in range(accumulate + 1, batch // world + 1) if batch % (world * n) == 0), None)
    if finer is None:
        return f"{what}; try a smaller --data.size, or one rank per device"
    return f"{what}; try --train.grad-accum-steps {finer} ({batch // (world * finer)} at a time, the same batch)"


def _judge_memory(panel: RankSurvey, config: Config, values: list[list[float]]) -> None:
    """`values`: [seconds, bytes, finite] by rank."""
    cuda = panel.accelerator.device.type == "cuda"
    # a GPU has its own memory, the ranks of a node share the host's
    total = torch.cuda.get_device_properties(panel.accelerator.device).total_memory if cuda else host_memory()
    taken = [
        values[rank][1] if cuda else sum(values[other][1] for other in panel.of_node(panel.nodes[rank]))
        for rank in range(panel.world)
    ]
    totals = [answer.value for answer in panel.query_ranks(lambda: total, "")]
    seconds, peak = max(value[0] for value in values), max(value[1] for value in values)
    found = f"a step fits: {seconds:.3g} s for {config.train.batch_size} images, {format_bytes(peak)} " + (
        "of the device" if cuda else "resident"
    )
    slowest = max(range(panel.world), key=lambda rank: values[rank][0])
    mean = sum(value[0] for value in values) / panel.world
    advice = []
    bad = [rank for rank in range(panel.world) if not values[rank][2]]
    full = [rank for rank in range(panel.world) if taken[rank] > _FULL * totals[rank]]
    if seconds > 1.2 * mean:
        found += f"; {panel.named([slowest])} takes {seconds / mean - 1:.0%} longer than the mean"
        advice.append("see what else runs on that device; the slowest one sets the pace")
    if full:
        found += f"; {panel.named(full)}: {taken[full[0]] / totals[full[0]]:.0%} of the memory is taken"
        advice.append("a higher --train.grad-accum-steps leaves more room")
    if bad:
        found = f"{panel.named(bad)}: the loss of the first batch is not finite"
        advice = ["look inside with: python -m mde_dist.train --debug and the same options"]
    panel.add(Row("memory", "fail" if bad else "warn" if advice else "ok", found, "\n".join(advice)))


def check_network(panel: RankSurvey, measured: Measured) -> None:
    """Sum a tensor of the size of the gradient over the ranks, and a small one; notes the time in `measured`."""
    if panel.world == 1:
        panel.add(Row("network", "ok", "one process: nothing to reduce"))
        return
    if not measured.parameters:
        return
    panel.begin("network")
    device = panel.accelerator.device
    tensors: list[torch.Tensor] = []
    answers = panel.query_ranks(
        lambda: tensors.append(torch.zeros(measured.parameters, device=device)), "free some memory of the device"
    )
    if panel.failed("network", answers):
        return
    latency = time_all_reduce(panel.accelerator, torch.zeros(1, device=device), 0.2)
    measured.reduce = time_all_reduce(panel.accelerator, tensors[0], 1.0)
    size = tensors[0].nbytes
    # what each rank sends and receives in a ring, which is what links are compared by
    rate = 2 * (panel.world - 1) / panel.world * size / measured.reduce / 1e9
    found = f"gradient of {format_bytes(size)} in {measured.reduce * 1e3:.0f} ms ({rate:.2g} GB/s on the bus)"
    found += f", latency {latency * 1e6:.0f} µs"
    if measured.seconds is None:
        panel.add(Row("network", "ok", found))
        return
    share = measured.reduce / measured.seconds
    found += f"; {share:.0%} of forward and backward"
    slow = share > _REDUCE_SHARE
    advice = "it may overlap with the backward pass, but slows it down: a larger batch or --train.grad-accum-steps, "
    advice += "a faster network (NCCL_DEBUG=INFO says which one is used)"
    panel.add(Row("network", "warn" if slow else "ok", found, advice if slow else ""))
