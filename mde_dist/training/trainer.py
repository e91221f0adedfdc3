"""What a training holds open, and what it does beside its steps: go on, evaluate, log, save, reject, finish."""

import contextlib
import hashlib
import json
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from mde_dist.data.crops import view_size
from mde_dist.data.shards import ShardDataset
from mde_dist.distributed.process_group import (
    assert_equal_across_ranks,
    broadcast_buffers_of,
    gather_rows,
    run_on_all_ranks,
)
from mde_dist.distributed.rank_log import redirect_to_rank_log
from mde_dist.distributed.signals import PreemptionHandler
from mde_dist.evaluation.breakdown import split_breakdown
from mde_dist.evaluation.evaluator import ImageMetric, breakdown_metric, evaluate_split, model_predict, score_baselines
from mde_dist.evaluation.metrics import PROTOCOLS, summarise
from mde_dist.evaluation.results import EVALUATIONS, N_HASH_COLUMNS, ground_truth_of, target_hashes, to_json, write_json
from mde_dist.models.flops import training_flops
from mde_dist.training.checkpoint import Checkpoint, newest_checkpoint, newest_record, versions
from mde_dist.training.checkpoint_writer import AsyncCheckpointWriter
from mde_dist.training.config import Config, as_json, resume_key, to_toml, with_whole_paths
from mde_dist.training.data_stream import GlobalBatchInfo, batch_keys
from mde_dist.training.monitor import ProgressMonitor
from mde_dist.training.optim import learning_rate
from mde_dist.training.run_dir import RunDirectory
from mde_dist.training.snapshots import PredictionRecorder, make_image_strips, write_snapshots
from mde_dist.training.state import State
from mde_dist.training.step import StepResult, TrainModule
from mde_dist.training.throughput import ThroughputMeter, peak_flops
from mde_dist.training.trackers import Trackers, open_trackers
from mde_dist.utils.console import say
from mde_dist.utils.errors import UserError
from mde_dist.utils.paths import command_line

DEBUG_STEPS = 4
_KEYS_SAID = 16


@dataclass
class Trainer:
    """One training, from `open_trainer`."""

    config: Config
    accelerator: Accelerator
    shards: ShardDataset
    eval_set: ShardDataset
    size: tuple[int, int]
    """Of the whole training images, pixels."""
    end_sample: int
    """samples_seen at which training ends."""
    directory: RunDirectory
    train_module: TrainModule
    state: State
    monitor: ProgressMonitor
    saver: AsyncCheckpointWriter
    meter: ThroughputMeter
    trackers: Trackers
    on_io_error: Callable[[UserError], None]
    """What becomes of a file that the disk did not take."""
    io_errors: list[UserError]
    """Of these, what is to end the run."""
    pending_steps: deque[tuple[StepResult, State]] = field(default_factory=deque)
    """Steps of which the loop does not know yet whether they were learned from, and the state before each."""

    @property
    def is_main_process(self) -> bool:
        """Whether this is the rank that writes."""
        return self.accelerator.is_main_process

    def on_step(self, result: StepResult, before: State) -> None:
        """Note a step, and hear how the one before it went: then the device has this one to do meanwhile."""
        self.pending_steps.append((result, before))
        self.resolve_pending(1)

    def resolve_pending(self, leave: int = 0) -> None:
        """Hear how all steps but the last `leave` went. Called by every rank; raises UserError as `reject` does."""
        while len(self.pending_steps) > leave:
            result, before = self.pending_steps.popleft()
            if result.skipped():
                self.handle_nonfinite_step(result, before)

    def save(self) -> None:
        """Write a checkpoint of this very state, beside the loop, unless that has been done."""
        self.resolve_pending()
        if self.is_main_process:
            record, best = self._record(), self.state.best.get("step")

            def write(tensors: dict) -> None:
                self.directory.save(
                    self.train_module.as_files(tensors), record, self.config.train.keep_checkpoints, best
                )

            self.saver.submit((self.state.samples_seen, self.state.evaluated), self.train_module.snapshot, write)

    def evaluation_due(self) -> bool:
        """Whether the model of this very sample has to be evaluated and was not yet."""
        state = self.state
        wanted = state.samples_seen >= self.end_sample or state.due(self.config.train.evaluate_every, state.evaluated)
        return wanted and state.evaluated < state.samples_seen

    def evaluate(self, stop: PreemptionHandler) -> None:
        """Score the held-out split, note it, remember it if it is the best so far, and save. Raises Interrupted."""
        self.resolve_pending()
        config, state, model = self.config, self.state, self.train_module.scored
        protocol = PROTOCOLS[config.evaluate.protocol]
        options = (config.evaluate.batch_size, config.data.threads, config.evaluate.limit)
        measures = [breakdown_metric(protocol), ImageMetric(N_HASH_COLUMNS, target_hashes)]
        recorder = PredictionRecorder(
            min(len(self.eval_set), config.evaluate.limit or len(self.eval_set)), self.eval_set.size
        )
        broadcast_buffers_of(self.accelerator, model)
        model.eval()
        try:
            # forward, not the call: a compiled model would be compiled again for these batches
            predict = recorder.wrap(model_predict(model.forward, self.size, self.accelerator, config.evaluate.flip))
            scored, hashes = evaluate_split(
                *(self.accelerator, predict, self.eval_set, measures, *options),
                stop=lambda: bool(stop),
                progress=self.monitor.phase("evaluating"),
            )
        except UserError:
            self.save()  # what was learned is whole, what it was to be scored on is not
            raise
        model.train()
        rows, where = split_breakdown(scored)
        summary = summarise(rows, protocol)
        score = summary.metrics["abs_rel"]
        best = score < state.best.get("abs_rel", float("inf"))
        if best:
            state.best = {"abs_rel": score, "samples": state.samples_seen, "step": state.step}
        state.evaluated = state.samples_seen
        self.monitor.record(
            samples=state.samples_seen,
            evaluation=protocol.name,
            images=summary.images,
            **summary.metrics,
            time=_now(),
        )
        self.monitor.say(
            f"evaluated at sample {state.samples_seen}: {protocol.name} abs_rel {score:.4f}, "
            f"delta1 {summary.metrics['delta1']:.4f}{' (best so far)' if best else ''}"
        )
        self.trackers.log(state.samples_seen, protocol.name, summary.metrics)
        maps = recorder.all_gather(self.accelerator)
        if self.is_main_process:
            self._keep_evaluation(rows, where, hashes, best)
            self._keep_panels(recorder.chosen, *maps)
        self.save()
        self.meter.restart()

    def _keep_evaluation(self, rows: torch.Tensor, where: torch.Tensor, hashes: torch.Tensor, best: bool) -> None:
        """Every image's numbers, as `evaluate --json` has them: for the report, and to compare runs by."""
        protocol = PROTOCOLS[self.config.evaluate.protocol]
        truth = ground_truth_of(self.eval_set, self.config.data.eval_split, hashes)
        about = {"path": str(self.config.run), "samples": self.state.samples_seen, "size": list(self.size)}
        about |= {"flip": self.config.evaluate.flip, "precision": self.accelerator.mixed_precision}
        try:
            record = to_json({"model": [rows]}, [protocol], truth, about, [], where)
            for name in ("last", "best") if best else ("last",):
                write_json(self.config.run / EVALUATIONS / f"{name}.json", record)
        except UserError as error:
            self.on_io_error(error)

    def _keep_panels(self, chosen: list[int], *maps: np.ndarray) -> None:
        """How a few images are predicted now, for the report and for trackers."""
        keys = [self.eval_set.key(sample) for sample in chosen]
        try:
            write_snapshots(self.config.run, self.state.samples_seen, keys, *maps)
            if self.trackers:
                pictures = {f"held-out/{key}": strip for key, strip in zip(keys, make_image_strips(*maps), strict=True)}
                self.trackers.show(self.state.samples_seen, pictures)
        except UserError as error:
            self.on_io_error(error)

    def record_baselines(self, stop: PreemptionHandler) -> None:
        """What predicting without looking scores: the line that the model has to beat. Raises Interrupted."""
        protocol, limit = PROTOCOLS[self.config.evaluate.protocol], self.config.evaluate.limit
        tables = score_baselines(
            *(self.accelerator, self.eval_set, self.shards, [protocol], limit),
            stop=lambda: bool(stop),
            progress=self.monitor.phase("baselines"),
        )
        for name, (rows,) in tables.items():
            summary = summarise(rows, protocol)
            self.monitor.record(
                samples=0, baseline=name, evaluation=protocol.name, images=summary.images, **summary.metrics
            )

    def log(self, result: StepResult, rate: float, info: GlobalBatchInfo) -> None:
        """A line about the step that was just done and about the speed since the last one. Called by every rank."""
        self.resolve_pending()
        state = self.state
        rows = gather_rows(self.accelerator, [result.losses.item(), *self.meter.row()])
        values = {"loss": _number(rows[:, 0].sum()), "lr": rate, "grad_norm": _number(result.norm)}
        values |= {name: count for name in ("replaced", "skipped") if (count := getattr(state, name))}
        rates = self.meter.rates(rows[:, 1:], self.end_sample - state.samples_seen)
        self.monitor.step(state.samples_seen, **values, batch=f"{info.batch_hash:x}", **rates, time=_now())
        self.trackers.log(state.samples_seen, "train", values | rates)
        self.meter.restart()

    def handle_nonfinite_step(self, result: StepResult, before: State) -> None:
        """Say that a batch was left out, whose loss or gradient is not finite on some rank. Called by every rank.

        Raises UserError, which names the batch, where that is not wanted or was done too often; then the state is that
        before the batch, as model and optimizer are.
        """
        config, state, world = self.config, self.state, self.accelerator.num_processes
        losses, norm, where_from = result.losses, result.norm, before.samples_seen
        bad = gather_rows(self.accelerator, [float(not losses.isfinite())])[:, 0].nonzero()[:, 0].tolist()
        keys = batch_keys(config, self.shards, where_from, world, bad or range(world))
        which = ", ".join(keys[:_KEYS_SAID]) + (f" and {len(keys) - _KEYS_SAID} more" if keys[_KEYS_SAID:] else "")
        where = f"of rank {', '.join(map(str, bad))} is" if world > 1 else "is"
        what = f"the loss {where} not finite" if bad else f"the gradient is not finite ({norm.item()})"
        what = f"{what} at sample {where_from} (keys: {which})"
        state.skipped += 1
        if config.train.nonfinite == "skip" and state.skipped <= config.train.max_skipped:
            self.monitor.say(f"batch {state.skipped} left out of at most {config.train.max_skipped}: {what}")
            return
        state.samples_seen, state.replaced, state.step = where_from, before.replaced, before.step
        self.pending_steps.clear()  # what came after it was left out as well
        skipped = f"; {config.train.max_skipped} batches were left out before" if state.skipped > 1 else ""
        places = ("--debug-from", config.run / "failed", "--config", config.run / "config.toml")
        look = command_line("train", "--debug", *places)
        run_on_all_ranks(self.accelerator, lambda: self._save_failed(keys))
        raise UserError(
            f"{what}{skipped}; it was not learned from, and the checkpoints before it are whole; "
            f"--train.nonfinite skip leaves such batches out; look inside: {look}"
        )

    def _save_failed(self, keys: list[str]) -> None:
        """Keep the state before the step, for a look inside; it is none to go on from."""
        if self.is_main_process:
            files = self.train_module.as_files(self.train_module.snapshot())
            self.directory.save_failed(files, {**self._record(), "batch": keys})

    def finish(self) -> None:
        """Wait until everything is written. Raises UserError on every rank where it is not."""

        def written() -> None:
            self.saver.finish()
            self.monitor.finish()

        run_on_all_ranks(self.accelerator, written)

    def _record(self) -> dict:
        return {**vars(self.state), "config": as_json(self.config), **versions()}


@contextmanager
def open_trainer(
    config: Config, accelerator: Accelerator, shards: ShardDataset, eval_set: ShardDataset
) -> Iterator[Trainer]:
    """Build what is trained, take the run directory, and go on where it is. Raises UserError on every rank."""
    size = config.data.size or shards.size
    flops = run_on_all_ranks(accelerator, lambda: training_flops(config.model, view_size(size, config.augment)))
    rank, world, writes = accelerator.process_index, accelerator.num_processes, accelerator.is_main_process
    begun = bool(config.debug_from or newest_record(config.run))
    train_module = run_on_all_ranks(accelerator, lambda: TrainModule(config, accelerator, size, resumes=begun))
    if train_module.start and writes:
        say(train_module.start.in_words())
    this_run = resume_key(config, shards.manifest.sha256, eval_set.manifest.sha256)
    toml = to_toml(with_whole_paths(config))
    directory = RunDirectory(config.run, this_run, toml, writes, defaults=as_json(Config()))
    io_errors: list[UserError] = []

    def on_io_error(error: UserError) -> None:
        if config.train.save_errors == "stop":
            io_errors.append(error)
        else:
            say(f"warning: {error}; training goes on")

    with contextlib.ExitStack() as opened:
        run_on_all_ranks(accelerator, lambda: opened.enter_context(directory))
        state = run_on_all_ranks(accelerator, lambda: resume(directory, config, train_module))
        assert_equal_across_ranks(accelerator, "the checkpoints to go on from", f"sample {state.samples_seen}")
        total = (
            state.samples_seen + DEBUG_STEPS * config.train.batch_size if config.debug else config.train.total_samples
        )
        metrics = config.run / "metrics.jsonl" if writes else None
        places = (state.samples_seen, state.evaluated, total)
        monitor = run_on_all_ranks(
            accelerator, lambda: ProgressMonitor(metrics, *places, on_io_error, live=not config.debug)
        )
        opened.enter_context(monitor)
        if not config.debug:  # a debugger wants the terminal itself
            run_on_all_ranks(accelerator, lambda: opened.enter_context(redirect_to_rank_log(config.run, rank, world)))
        skip = config.train.nonfinite == "skip"
        train_module.wrap(max(0, config.train.max_skipped - state.skipped) if skip else 0)
        meter = ThroughputMeter(accelerator.device, flops, peak_flops(accelerator.device, accelerator.mixed_precision))
        saver = opened.enter_context(AsyncCheckpointWriter(on_io_error))
        about = as_json(config)
        run_id = run_id_of(config, this_run)
        trackers = run_on_all_ranks(
            accelerator,
            lambda: opened.enter_context(
                open_trackers(accelerator, config.log_with, config.run, run_id, about, state.samples_seen)
            ),
        )
        if state.samples_seen < total:
            monitor.record(samples=state.samples_seen, start=describe_start(config, accelerator, train_module))
        yield Trainer(
            *(
                config,
                accelerator,
                shards,
                eval_set,
                size,
                total,
                directory,
                train_module,
                state,
                monitor,
                saver,
                meter,
            ),
            *(trackers, on_io_error, io_errors),
        )


def resume(directory: RunDirectory, config: Config, train_module: TrainModule) -> State:
    """Put back the newest whole checkpoint, if there is one. Raises UserError."""
    checkpoint = newest_checkpoint(config.debug_from) if config.debug_from else directory.resume()
    if checkpoint is not None:
        directory.note_change(checkpoint, {"train.batch_size": config.train.batch_size})
        if not config.debug:
            directory.refuse_less(checkpoint, config.train.total_samples)
            directory.note_change(
                checkpoint, {"train.total_samples": config.train.total_samples}, new_rate(checkpoint, config)
            )
        train_module.load(checkpoint)
    directory.start()
    return State() if checkpoint is None else checkpoint.state


def run_id_of(config: Config, this_run: Mapping[str, Any]) -> str:
    """A name for trackers that stays as long as the run: a field that a later version adds does not change it."""
    defaults = as_json(Config())
    told = {name: value for name, value in this_run.items() if name not in defaults or value != defaults[name]}
    return hashlib.sha256(json.dumps([str(config.run.resolve()), told]).encode()).hexdigest()[:16]


def new_rate(checkpoint: Checkpoint, config: Config) -> str:
    """Describe the effect of another `train.total_samples` than the checkpoint's on the learning rate, in words."""
    if config.optim.schedule == "constant":
        return "; the learning rate is constant: it learns what it would have learned with them from the start"
    seen, batch_size = checkpoint.state.samples_seen, config.train.batch_size
    totals = (int(checkpoint.config.get("train.total_samples", config.train.total_samples)), config.train.total_samples)
    before, now = (learning_rate(config.optim, seen, total, batch_size) for total in totals)
    return (
        f"; optim.schedule {config.optim.schedule} ends there: the learning rate goes from {before:.3g} to {now:.3g}, "
        "and what is learned is not what it would have been with them from the start"
    )


def describe_start(config: Config, accelerator: Accelerator, train_module: TrainModule) -> dict[str, Any]:
    """On what the run goes on from here, for metrics.jsonl."""
    device = accelerator.device
    return {
        "time": _now(),
        "ranks": accelerator.num_processes,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "precision": accelerator.mixed_precision.replace("no", "fp32"),
        "batch_size": config.train.batch_size,
        "host": socket.gethostname(),
        **versions(),
        **({"weights": train_module.start.record()} if train_module.start else {}),
    }


def _now() -> float:
    """Seconds since 1970, to the millisecond."""
    return round(time.time(), 3)


def _number(value: torch.Tensor) -> float | None:
    """JSON knows no nan."""
    return value.item() if value.isfinite() else None
