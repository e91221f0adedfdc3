"""`bench train`: the real stream feeding real steps for some seconds, and each of the two alone."""

import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import Any, cast

import torch
from accelerate import Accelerator

from mde_dist.data.config import view_size
from mde_dist.data.loader import Batch, DataLoader
from mde_dist.data.shards import open_split
from mde_dist.distributed.environment import ranks_here
from mde_dist.distributed.heartbeat import monitor_ranks
from mde_dist.distributed.process_group import (
    all_reduce_sum,
    assert_equal_across_ranks,
    gather_rows,
    init_distributed,
    raise_on_all_ranks,
    run_on_all_ranks,
    time_all_reduce,
)
from mde_dist.distributed.signals import PreemptionHandler
from mde_dist.models.flops import training_flops
from mde_dist.tools.benchmarking.harness import (
    Column,
    Result,
    Table,
    Timing,
    available_cores,
    device_name,
    interleave,
    over_rounds,
    ratio,
    train_config,
    wait_for,
)
from mde_dist.training.config import Config, for_all_ranks
from mde_dist.training.data_stream import next_local_batch, reduce_batch_info, training_stream
from mde_dist.training.setup import check_batch, make_sample
from mde_dist.training.step import TrainModule
from mde_dist.training.throughput import ThroughputMeter, peak_flops

_WAITS = 0.02  # share of the time without data that is worth a word
_BUSY = 0.85  # share of a thread's or core's time from which on it has nothing to spare
_IDLE = 0.05  # of a GPU's peak: below, it waits for its host to start the next kernel (so it looked at 1 to 3 %)
_REDUCES = 0.2  # share of a step that the sum over the ranks may take


@dataclass(frozen=True)
class Options(Config, Timing):
    """The training itself for some seconds, and in turn its steps alone and its loader alone: does the device wait for
    data, and why? Takes every option of mde_dist.train; leaves no run directory. On several ranks start it as training
    is: accelerate launch … -m mde_dist.bench train."""


COLUMNS = (
    Column("what", "what runs"),
    Column("rate", "images/s", ",.1f"),
    Column("spread", "rounds"),
    Column("ms", "ms/step", ",.1f"),
    Column("data_wait", "waits for data", ".1%"),
    Column("decoders", "decoders busy", ".0%"),
    Column("cpu", "cores busy", ".0%"),
    Column("utilisation", "of peak", ".1%"),
    Column("memory_gb", "GB", ".2f"),
)


def measure(options: Options) -> Result | None:
    """None on ranks other than 0. Raises UserError."""
    config, stop = train_config(options), PreemptionHandler()
    train, data = config.train, config.data
    with (
        init_distributed(**train.process_group_args, settings=for_all_ranks(config)) as accelerator,
        monitor_ranks(accelerator, stop, train.heartbeat_timeout) as explain_lost_ranks,
        contextlib.ExitStack() as opened,
    ):
        check_batch(config, accelerator.num_processes)
        make_sample(config, accelerator)
        shards = run_on_all_ranks(
            accelerator,
            lambda: opened.enter_context(open_split(data.shards, data.train_split, data.cache_options)),
        )
        assert_equal_across_ranks(accelerator, "the shards", shards.manifest.sha256)
        size = data.size or shards.size
        train_module = run_on_all_ranks(accelerator, lambda: TrainModule(config, accelerator, size))
        train_module.wrap()
        with explain_lost_ranks(), training_stream(config, shards, 0, accelerator, stop) as loader:
            bench = TrainingBench(config, accelerator, size, train_module, loader, Deadline(stop))
            rows = bench.rows(options.rounds, options.seconds)
            all_reduce_ms = bench.all_reduce_ms(options.seconds / options.rounds)
        if not accelerator.is_main_process:
            return None
        world, name = accelerator.num_processes, device_name(accelerator.device)
        share = ratio(all_reduce_ms, rows[1]["ms"])
        rows[0] |= {"ranks": world, "batch": train.batch_size}
        rows[0] |= {"all_reduce_ms": all_reduce_ms, "all_reduce_share": share}
        notes = []
        if share is not None:
            words = f"{all_reduce_ms:,.1f} ms with nothing beside: {share:.0%} of a step"
            notes.append(
                f"gradients are summed over {world} ranks in {words}; most of it runs beside the backward pass"
            )
        limit, advice = diagnose(config, rows, accelerator.device.type)
        height, width = view_size(size, config.augment)
        images = f"{world} x {train.batch_size // world} images of {height}x{width}"
        table = Table(f"train: {images}, {config.model.encoder}, {name}", COLUMNS, rows)
        return Result("train", {"train": table}, limit, advice, name, config, notes)


class Deadline(PreemptionHandler):
    """Flag that is raised when the time is over, or the training has to stop.

    The ranks agree on it as they do on signals, and so all measure the same number of steps.
    """

    def __init__(self, stop: PreemptionHandler):
        super().__init__()
        self.end = float("inf")
        self._stop = stop

    def __bool__(self) -> bool:
        return time.perf_counter() > self.end or bool(self._stop)


class TrainingBench:
    """Training without its evaluations, checkpoints and logs, on every rank."""

    def __init__(
        self,
        config: Config,
        accelerator: Accelerator,
        size: tuple[int, int],
        train_module: TrainModule,
        loader: DataLoader,
        deadline: Deadline,
    ):
        self._config, self._accelerator, self._size, self._train_module = config, accelerator, size, train_module
        self._loader, self._deadline = loader, deadline
        self._local_batch_size = config.train.batch_size // accelerator.num_processes
        self._flops = training_flops(config.model, view_size(size, config.augment))
        self._peak = peak_flops(accelerator.device, accelerator.mixed_precision)
        self._meter = ThroughputMeter(accelerator.device)
        batch = next(loader)  # whose memory is filled again
        self._resident = itertools.repeat(replace(batch, image=batch.image.clone(), depth=batch.depth.clone()))

    def rows(self, rounds: int, seconds: float) -> list[dict[str, Any]]:
        """Training, its steps alone and its loader alone, in turn; the same on all ranks."""
        calls: dict[str, Callable[[], int]] = {
            "training": partial(self._train_step, self._loader),
            "its steps alone": partial(self._train_step, self._resident),
        }
        if self._accelerator.num_processes > 1:
            calls["steps of each rank for itself"] = partial(self._train_step, self._resident, reduce=False)
        calls["its loader alone"] = self._load
        for call in (calls["training"], *calls.values()):  # allocate, and choose kernels
            call()
        cases = {name: partial(self._measure, call) for name, call in calls.items()}
        return [median_row(name, found) for name, found in interleave(cases, rounds, seconds).items()]

    def all_reduce_ms(self, seconds: float) -> float | None:
        """Milliseconds in which the gradients are summed over the ranks with nothing beside it; None on one."""
        if self._accelerator.num_processes == 1:
            return None
        parameters = sum(parameter.numel() for parameter in self._train_module.bare.parameters())
        gradient = torch.zeros(parameters, device=self._accelerator.device)
        return 1e3 * time_all_reduce(self._accelerator, gradient, seconds)

    def _train_step(self, batches: Iterator[Batch], reduce: bool = True) -> int:
        """One optimizer step -> images of this rank; 0 once the time is over. `reduce`: sum over the ranks."""
        local = next_local_batch(cast(DataLoader, batches), self._config, self._size, self._meter)
        info = reduce_batch_info(self._accelerator, local, self._deadline)
        if info.failed:
            raise_on_all_ranks(self._accelerator, local.error)
        if info.stopped:
            return 0
        self._train_module.set_lr(0)
        losses = self._train_module.backward(local.views, info.global_counts, self._meter.working, reduce=reduce)
        self._train_module.step(losses, self._config.train.batch_size, 1)
        return self._local_batch_size

    def _load(self) -> int:
        """The batches of a step -> images of this rank; 0 once the time is over."""
        if self._deadline:
            return 0
        for _ in range(self._config.train.grad_accum_steps):
            next(self._loader)
        return self._local_batch_size

    def _measure(self, call: Callable[[], int], seconds: float) -> dict[str, Any]:
        """Call it for some seconds, at least once -> figures over all ranks."""
        load = call == self._load
        if load:
            for _ in range(1 + self._config.data.prefetch_batches):  # decoded beforehand
                call()
        self._wait_for_all()
        self._meter.restart()
        start, cpu, decoders = time.perf_counter(), time.process_time(), decoding_seconds()
        images, calls = call(), 1
        self._deadline.end = start + seconds
        while more := call():
            images, calls = images + more, calls + 1
        wait_for(self._accelerator.device)
        spent = time.perf_counter() - start
        self._deadline.end = float("inf")
        cpu, decoders = time.process_time() - cpu, decoding_seconds() - decoders
        _, waited, _, memory = self._meter.row()
        mine = [images / spent, spent / calls, waited / spent, cpu / spent, decoders / spent, memory]
        rates, steps, waits, cores, busy, most = gather_rows(self._accelerator, mine).unbind(1)
        rate = rates.sum().item()
        return {
            "rate": rate,
            "ms": None if load else 1e3 * steps.max().item(),
            "data_wait": None if load else waits.max().item(),
            "decoders": ratio(busy.mean().item(), self._config.data.threads),
            "cpu": cores.mean().item() * ranks_here() / len(available_cores()),
            "utilisation": None if load or self._peak is None else rate * self._flops / (self._peak * len(rates)),
            "memory_gb": most.max().item() / 1e9,
            "ranks_rate": rates.tolist(),
        }

    def _wait_for_all(self) -> None:
        """Wait until no rank has anything left to do on its device."""
        wait_for(self._accelerator.device)
        all_reduce_sum(self._accelerator, torch.zeros(1, device=self._accelerator.device)).item()


def median_row(name: str, figures: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Row of medians over the rounds, with the rounds."""
    row = {"what": name, **over_rounds("rate", [one["rate"] for one in figures])}
    for key in ("ms", "data_wait", "decoders", "cpu", "utilisation", "memory_gb"):
        known = [one[key] for one in figures if one[key] is not None]
        row[key] = median(known) if known else None
    return row | {"rounds": list(figures)}


def decoding_seconds() -> float:
    """CPU time that the decoding threads of this process have had so far; 0 where the system does not say."""
    if not hasattr(time, "pthread_getcpuclockid"):
        return 0.0
    threads = [thread for thread in threading.enumerate() if thread.name.startswith("decode-") and thread.ident]
    return sum(time.clock_gettime(time.pthread_getcpuclockid(thread.ident or 0)) for thread in threads)


def diagnose(config: Config, rows: Sequence[dict[str, Any]], device: str) -> tuple[str, str]:
    """-> the bottleneck of training, advice."""
    both, steps, *_, load = rows
    rates = f"{both['rate']:,.1f} images/s; steps alone {steps['rate']:,.1f}, loader alone {load['rate']:,.1f}"
    more = "(python -m mde_dist.bench loader shows which cores, disk and shards it takes)"
    choices = "python -m mde_dist.bench step shows what other choices gain"
    waits = both["data_wait"] > _WAITS
    if waits and load["rate"] < 1.5 * steps["rate"]:
        limit = f"the loader, {both['data_wait']:.0%} of the time the device waits for data: {rates}"
        if load["decoders"] is not None and load["decoders"] < _BUSY and load["cpu"] < _BUSY:
            return limit, f"a faster or local disk: the decoding threads are busy {load['decoders']:.0%} only {more}"
        if load["cpu"] < _BUSY:
            return limit, f"more --data.threads than {config.data.threads}: cores have time to spare {more}"
        return limit, f"more cores per device, or shards packed at training size {more}"
    exposed = 1 - rows[2]["ms"] / steps["ms"] if len(rows) > 3 else 0.0
    used = steps.get("utilisation")
    if used is not None and used < _IDLE and exposed <= _REDUCES:
        limit = f"the host, which starts kernels one by one: steps use {used:.1%} of the device's peak; {rates}"
        return limit, f"a larger --train.batch-size, which takes hardly longer (and learns other); {choices}"
    if waits:
        limit = f"the loader's unevenness, {both['data_wait']:.0%} of the time the device waits for data: {rates}"
        deeper = f"--data.prefetch-batches {2 * config.data.prefetch_batches}"
        return limit, f"{deeper}, which evens out slow reads; or other jobs off these cores"
    if device == "cpu":
        share = both["rate"] / load["rate"]
        return f"the cores, which take {share:.0%} of their time to decode, else compute: {rates}", f"a GPU; {choices}"
    if exposed > _REDUCES:
        fewer = "a larger --train.batch-size or --train.grad-accum-steps"
        limit = f"the network, {exposed:.0%} of a step goes to summing gradients: {rates}"
        return limit, f"{fewer}, a faster network (NCCL_DEBUG=INFO says which)"
    return f"the step, for data it waits {both['data_wait']:.1%} of the time: {rates}", choices
