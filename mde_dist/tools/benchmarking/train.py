"""`bench train`: the real stream feeding real steps for some seconds, and each of the two alone."""

import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
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
from mde_dist.tools.benchmarking.result import (
    Column,
    Result,
    Table,
    Timing,
    cores_at_hand,
    device_name,
    middle,
    over_rounds,
    plain_config,
    ratio,
)
from mde_dist.tools.benchmarking.step import wait
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


def bench(options: Options) -> Result | None:
    """None on ranks other than 0. Raises UserError."""
    config = plain_config(options)
    train, data = config.train, config.data
    stop = PreemptionHandler()
    with (
        init_distributed(**train.process_group_args, settings=for_all_ranks(config)) as accelerator,
        monitor_ranks(accelerator, stop, train.heartbeat_timeout) as explain_lost_ranks,
    ):
        check_batch(config, accelerator.num_processes)
        make_sample(config, accelerator)
        with contextlib.ExitStack() as opened:
            shards = run_on_all_ranks(
                accelerator,
                lambda: opened.enter_context(open_split(data.shards, data.train_split, data.cache_options)),
            )
            assert_equal_across_ranks(accelerator, "the shards", shards.manifest.sha256)
            size = data.size or shards.size
            train_module = run_on_all_ranks(accelerator, lambda: TrainModule(config, accelerator, size))
            train_module.wrap()
            with explain_lost_ranks(), training_stream(config, shards, 0, accelerator, stop) as loader:
                fed = Fed(config, accelerator, size, train_module, loader, Clock(stop))
                rows = fed.rows(options.rounds, options.seconds)
                reduce = fed.all_reduce(options.seconds / options.rounds)
        if not accelerator.is_main_process:
            return None
        world, name = accelerator.num_processes, device_name(accelerator.device)
        rows[0] |= {"ranks": world, "batch": train.batch_size, "all_reduce_ms": reduce}
        rows[0]["all_reduce_share"] = ratio(reduce, rows[1]["ms"])
        limit, advice = judge(config, rows, accelerator.device.type)
        height, width = view_size(size, config.augment)
        title = f"train: {world} x {train.batch_size // world} images of {height}x{width}, {config.model.encoder}"
        tables = {"train": Table(f"{title}, {name}", COLUMNS, rows)}
        return Result("train", tables, limit, advice, name, config, notes(rows[0]))


class Clock(PreemptionHandler):
    """A flag that is raised when the time is over, or the training has to stop: the ranks agree on it as they do on
    signals, and so all measure the same number of steps."""

    def __init__(self, stop: PreemptionHandler):
        super().__init__()
        self.end = float("inf")
        self._stop = stop

    def __bool__(self) -> bool:
        return time.perf_counter() > self.end or bool(self._stop)


class Fed:
    """A training without its evaluations, checkpoints and logs, on every rank."""

    def __init__(
        self,
        config: Config,
        accelerator: Accelerator,
        size: tuple[int, int],
        train_module: TrainModule,
        loader: DataLoader,
        clock: Clock,
    ):
        self._config, self._accelerator, self._size, self._learner = config, accelerator, size, train_module
        self._loader, self._clock = loader, clock
        self._part = config.train.batch_size // accelerator.num_processes
        self._flops = training_flops(config.model, view_size(size, config.augment))
        self._peak = peak_flops(accelerator.device, accelerator.mixed_precision)
        self._account = ThroughputMeter(accelerator.device)
        self._resident = itertools.repeat(copied(next(loader)))

    def rows(self, rounds: int, seconds: float) -> list[dict[str, Any]]:
        """Training, its steps alone and its loader alone, in turn; the same on all ranks."""
        kinds: dict[str, Callable[[], int]] = {"training": self._train, "its steps alone": self._step_again}
        if self._accelerator.num_processes > 1:
            kinds["steps of each rank for itself"] = partial(self._step_again, alone=True)
        kinds["its loader alone"] = self._load
        for call in (self._train, *kinds.values()):  # allocate, and choose kernels
            call()
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in kinds}
        for _ in range(rounds):
            for name, call in kinds.items():
                found[name].append(self._measure(call, seconds / rounds))
        return [over_all_rounds(name, answers) for name, answers in found.items()]

    def all_reduce(self, seconds: float) -> float | None:
        """Milliseconds that the sum of the gradients over the ranks takes with nothing beside it; None on one."""
        if self._accelerator.num_processes == 1:
            return None
        parameters = sum(parameter.numel() for parameter in self._learner.bare.parameters())
        return 1e3 * time_all_reduce(
            self._accelerator, torch.zeros(parameters, device=self._accelerator.device), seconds
        )

    def _train(self) -> int:
        """One optimizer step on the next batch -> images of this rank; 0 once the time is over."""
        return self._learn(self._loader)

    def _step_again(self, alone: bool = False) -> int:
        """The same on a batch that is on the device; `alone`: gradients are not summed over the ranks."""
        return self._learn(self._resident, alone)

    def _load(self) -> int:
        """The next batches alone."""
        if self._clock:
            return 0
        for _ in range(self._config.train.grad_accum_steps):
            next(self._loader)
        return self._part

    def _learn(self, batches: Iterator[Batch], alone: bool = False) -> int:
        share = next_local_batch(cast(DataLoader, batches), self._config, self._size, self._account)
        news = reduce_batch_info(self._accelerator, share, self._clock)
        if news.failed:
            raise_on_all_ranks(self._accelerator, share.error)
        if news.stopped:
            return 0
        self._learner.set_lr(0)
        losses = self._learner.backward(share.views, news.global_counts, self._account.working, reduce=not alone)
        self._learner.step(losses, self._config.train.batch_size, 1)
        return self._part

    def _measure(self, call: Callable[[], int], seconds: float) -> dict[str, Any]:
        """Call it for some seconds, at least once -> what came of it, over all ranks."""
        if call == self._load:
            for _ in range(1 + self._config.data.prefetch_batches):  # which were decoded beforehand
                call()
        self._wait_for_all()
        self._account.restart()
        start, cpu, decoders = time.perf_counter(), time.process_time(), decoding_seconds()
        images, calls = call(), 1
        self._clock.end = start + seconds
        while more := call():
            images, calls = images + more, calls + 1
        wait(self._accelerator.device)
        spent = time.perf_counter() - start
        self._clock.end = float("inf")
        cpu, decoders = time.process_time() - cpu, decoding_seconds() - decoders
        waited, memory = self._account.row()[1], self._account.row()[3]
        mine = [images / spent, spent / calls, waited / spent, cpu / spent, decoders / spent, memory]
        rates, steps, waits, cores, busy, most = gather_rows(self._accelerator, mine).unbind(1)
        world, rate, load = len(rates), rates.sum().item(), call == self._load
        return {
            "rate": rate,
            "ms": None if load else 1e3 * steps.max().item(),
            "data_wait": None if load else waits.max().item(),
            "decoders": ratio(busy.mean().item(), self._config.data.threads),
            "cpu": cores.mean().item() * ranks_here() / len(cores_at_hand()),
            "utilisation": None if load or self._peak is None else rate * self._flops / (self._peak * world),
            "memory_gb": most.max().item() / 1e9,
            "ranks_rate": rates.tolist(),
            "ranks_wait": waits.tolist(),
        }

    def _wait_for_all(self) -> None:
        """All ranks, with nothing left to do on their devices."""
        wait(self._accelerator.device)
        all_reduce_sum(self._accelerator, torch.zeros(1, device=self._accelerator.device)).item()


def copied(batch: Batch) -> Batch:
    """In memory of its own, which the loader does not fill again."""
    return replace(batch, image=batch.image.clone(), depth=batch.depth.clone())


def over_all_rounds(name: str, answers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A row: medians over the rounds, and the rounds."""
    row = {"what": name, **over_rounds("rate", [answer["rate"] for answer in answers])}
    for key in ("ms", "data_wait", "decoders", "cpu", "utilisation", "memory_gb"):
        row[key] = middle([answer[key] for answer in answers if answer[key] is not None])
    return row | {"rounds": list(answers)}


def decoding_seconds() -> float:
    """CPU time that the decoding threads of this process have had so far; 0 where the system does not say."""
    if not hasattr(time, "pthread_getcpuclockid"):
        return 0.0
    threads = [thread for thread in threading.enumerate() if thread.name.startswith("decode-") and thread.ident]
    return sum(time.clock_gettime(time.pthread_getcpuclockid(thread.ident or 0)) for thread in threads)


def notes(row: dict[str, Any]) -> list[str]:
    """What the table leaves open."""
    if row["all_reduce_ms"] is None:
        return []
    share = f"{row['all_reduce_share']:.0%} of a step, beside whose backward pass most of it runs"
    return [
        f"gradients are summed over {row['ranks']} ranks in {row['all_reduce_ms']:,.1f} ms with nothing beside: {share}"
    ]


def judge(config: Config, rows: Sequence[dict[str, Any]], device: str) -> tuple[str, str]:
    """-> what limits training, and what to change."""
    both, steps, *_, load = rows
    rates = f"{both['rate']:,.1f} images/s; steps alone {steps['rate']:,.1f}, loader alone {load['rate']:,.1f}"
    deeper = "(python -m mde_dist.bench loader shows which cores, disk and shards it takes)"
    if both["data_wait"] > _WAITS and load["rate"] < 1.5 * steps["rate"]:
        limit = f"the loader, {both['data_wait']:.0%} of the time the device waits for data: {rates}"
        if load["decoders"] is not None and load["decoders"] < _BUSY and load["cpu"] < _BUSY:
            return limit, f"a faster or local disk: the decoding threads are busy {load['decoders']:.0%} only {deeper}"
        if load["cpu"] < _BUSY:
            return limit, f"more --data.threads than {config.data.threads}: cores have time to spare {deeper}"
        return limit, f"more cores per device, or shards packed at training size {deeper}"
    exposed = 1 - rows[2]["ms"] / steps["ms"] if len(rows) > 3 else 0.0
    used = steps.get("utilisation")
    if used is not None and used < _IDLE and exposed <= _REDUCES:
        limit = f"the host, which starts kernels one by one: steps use {used:.1%} of the device's peak; {rates}"
        return limit, (
            "a larger --train.batch-size, which takes hardly longer (and learns other); python -m mde_dist.bench step "
            "shows what other choices gain"
        )
    if both["data_wait"] > _WAITS:
        limit = f"the loader's unevenness, {both['data_wait']:.0%} of the time the device waits for data: {rates}"
        more = f"--data.prefetch-batches {2 * config.data.prefetch_batches}"
        return limit, f"{more}, which evens out slow reads; or other jobs off these cores"
    if device == "cpu":
        limit = (
            f"the cores, which take {both['rate'] / load['rate']:.0%} of their time to decode, else compute: {rates}"
        )
        return limit, "a GPU; python -m mde_dist.bench step shows what other choices gain here"
    if exposed > _REDUCES:
        limit = f"the network, {exposed:.0%} of a step goes to summing gradients: {rates}"
        return (
            limit,
            "a larger --train.batch-size or --train.grad-accum-steps, a faster network (NCCL_DEBUG=INFO says which)",
        )
    limit = f"the step, for data it waits {both['data_wait']:.1%} of the time: {rates}"
    return limit, "python -m mde_dist.bench step, which shows what other choices gain"
