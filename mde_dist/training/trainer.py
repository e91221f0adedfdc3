"""The trainer: the loop, and its parts train_step, evaluate, log, save. The step on the device is step.py."""

import contextlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from accelerate import Accelerator

from mde_dist.data.shards import ShardDataset
from mde_dist.distributed.process_group import (
    gather_rows,
    raise_on_all_ranks,
    run_on_all_ranks,
)
from mde_dist.distributed.signals import PreemptionHandler
from mde_dist.evaluation.evaluator import Interrupted
from mde_dist.training.checkpoint import versions
from mde_dist.training.checkpoint_writer import AsyncCheckpointWriter
from mde_dist.training.config import Config, as_json
from mde_dist.training.data_stream import (
    GlobalBatchInfo,
    LocalBatch,
    batch_keys,
    check_bad_sample_quota,
    next_local_batch,
    reduce_batch_info,
    training_stream,
)
from mde_dist.training.monitor import ProgressMonitor
from mde_dist.training.run_dir import RunDirectory
from mde_dist.training.setup import describe, describe_batch, now
from mde_dist.training.state import State
from mde_dist.training.step import StepResult, TrainModule
from mde_dist.training.throughput import ThroughputMeter
from mde_dist.training.trackers import Trackers
from mde_dist.training.validation import Validator
from mde_dist.utils.errors import UserError
from mde_dist.utils.paths import command_line

_KEYS_SHOWN = 16


@dataclass
class Trainer:
    """One training, from `open_trainer`."""

    config: Config
    accelerator: Accelerator
    stop: PreemptionHandler
    shards: ShardDataset
    size: tuple[int, int]
    """Height and width of the whole training images, pixels."""
    end_sample: int
    """samples_seen at which training ends."""
    directory: RunDirectory
    train_module: TrainModule
    validator: Validator
    state: State
    monitor: ProgressMonitor
    saver: AsyncCheckpointWriter
    meter: ThroughputMeter
    trackers: Trackers
    on_io_error: Callable[[UserError], None]
    """Called with the error when the disk does not take a file."""
    io_errors: list[UserError]
    """I/O errors that must end the run."""
    pending_steps: deque[tuple[StepResult, State]] = field(default_factory=deque)
    """Steps whose skip flag has not been read back yet, with the state before each."""

    def train(self) -> bool:
        """Train to the end, or until a signal; returns whether it was the end. Raises UserError on every rank."""
        config, state = self.config, self.state
        with (
            contextlib.suppress(Interrupted),
            training_stream(config, self.shards, state.samples_seen, self.accelerator, self.stop) as loader,
        ):
            describe(self.monitor, config, self.accelerator, self.shards, state.samples_seen)
            self.meter.restart()
            while True:
                if self.evaluation_due():
                    self.evaluate()
                if state.samples_seen >= self.end_sample:
                    break
                # this rank's part of the global batch at samples_seen
                batch = next_local_batch(loader, config, self.size, self.meter)
                if config.debug and batch.views:
                    describe_batch(self.monitor, batch.samples, *batch.views[0])
                info = self.agree_on(batch)
                if info.stopped:
                    break
                self.train_step(batch, info)
        finished = state.samples_seen >= self.end_sample and not self.evaluation_due()
        if not finished:
            self.save()
        self.finish()
        if not finished:
            self.directory.mark_preempted(f"stopped at sample {state.samples_seen}")
            self.monitor.print(
                f"stopped at sample {state.samples_seen} by a signal; the same command continues from there"
            )
        return finished

    def agree_on(self, batch: LocalBatch) -> GlobalBatchInfo:
        """Tell all ranks of this rank's part of a global batch -> what all know of the whole. Called by every rank.

        Raises UserError on every rank where the stream of one has failed, or too much of it is damaged.
        """
        batch.error = batch.error or next(iter(self.io_errors), None)
        info = reduce_batch_info(self.accelerator, batch, self.stop)
        if not info.stopped:
            replaced, seen = self.state.replaced + info.replaced, self.state.samples_seen + self.batch_size
            error = batch.error or check_bad_sample_quota(self.config, replaced, seen, self.shards)
            if info.failed or error is not None:
                self.save()  # what was learned so far is whole
                raise_on_all_ranks(self.accelerator, error)
        return info

    def train_step(self, batch: LocalBatch, info: GlobalBatchInfo) -> None:
        """One optimizer step over a global batch; logs and saves where that is due. Called by every rank."""
        config, state, before = self.config, self.state, replace(self.state)
        lr = self.train_module.set_lr(state.samples_seen)
        losses = self.train_module.backward(batch.views, info.global_counts, self.meter.working)
        result = self.train_module.step(losses, self.batch_size, state.step + 1)
        state.samples_seen += self.batch_size
        state.replaced += info.replaced
        state.step += 1
        # the step before this one is done by now: its flag is read while the device has this one to do
        self.pending_steps.append((result, before))
        self.resolve_pending(leave=1)
        self.meter.step(self.batch_size)
        self.monitor.update(state.samples_seen)
        if state.samples_seen >= self.end_sample or state.crossed(config.train.log_every, before.samples_seen):
            self.log(result, lr, info)
        if state.crossed(config.train.checkpoint_every, before.samples_seen) and not self.evaluation_due():
            self.save()

    @property
    def is_main_process(self) -> bool:
        """True for the rank that writes."""
        return self.accelerator.is_main_process

    @property
    def batch_size(self) -> int:
        """Samples of a global batch."""
        return self.config.train.batch_size

    def resolve_pending(self, leave: int = 0) -> None:
        """Read the skip flags of all steps but the last `leave`. Called by every rank.

        Raises UserError as `handle_nonfinite_step` does.
        """
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
        """Say whether the model of this very sample has yet to be evaluated."""
        state = self.state
        wanted = state.samples_seen >= self.end_sample or state.crossed(
            self.config.train.evaluate_every, state.evaluated
        )
        return wanted and state.evaluated < state.samples_seen

    def evaluate(self) -> None:
        """Score the evaluation split, log it, remember it if it is the best so far, and save. Raises Interrupted."""
        self.resolve_pending()
        state = self.state
        first = state.evaluated == 0
        try:
            found = self.validator.run(
                self.train_module.eval_model, first, lambda: bool(self.stop), self.monitor.task("evaluating")
            )
        except UserError:
            self.save()  # what was learned is whole, what it was to be scored on is not
            raise
        for name, baseline in found.baselines.items():
            self.monitor.log(
                samples=state.samples_seen,
                baseline=name,
                evaluation=baseline.protocol,
                images=baseline.images,
                **baseline.metrics,
            )
        protocol, metrics = found.summary.protocol, found.summary.metrics
        best = metrics["abs_rel"] < state.best.get("abs_rel", float("inf"))
        if best:
            state.best = {"abs_rel": metrics["abs_rel"], "samples": state.samples_seen, "step": state.step}
        state.evaluated = state.samples_seen
        images = found.summary.images
        self.monitor.log(samples=state.samples_seen, evaluation=protocol, images=images, **metrics, time=now())
        self.monitor.print(
            f"evaluated at sample {state.samples_seen}: {protocol} abs_rel {metrics['abs_rel']:.4f}, "
            f"delta1 {metrics['delta1']:.4f}{' (best so far)' if best else ''}"
        )
        self.trackers.log(state.samples_seen, protocol, metrics)
        if self.is_main_process:
            try:
                self.validator.write(found, state.samples_seen, best, self.trackers)
            except UserError as error:
                self.on_io_error(error)
        self.save()
        self.meter.restart()

    def log(self, result: StepResult, lr: float, info: GlobalBatchInfo) -> None:
        """A line about the step that was just done and about the speed since the last one. Called by every rank."""
        self.resolve_pending()
        state = self.state
        rows = gather_rows(self.accelerator, [result.losses.item(), *self.meter.row()])
        values = {"loss": _number(rows[:, 0].sum()), "lr": lr, "grad_norm": _number(result.norm)}
        values |= {name: count for name in ("replaced", "skipped") if (count := getattr(state, name))}
        rates = self.meter.rates(rows[:, 1:], self.end_sample - state.samples_seen)
        self.monitor.step(state.samples_seen, **values, batch=f"{info.batch_hash:x}", **rates, time=now())
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
        which = ", ".join(keys[:_KEYS_SHOWN]) + (f" and {len(keys) - _KEYS_SHOWN} more" if keys[_KEYS_SHOWN:] else "")
        where = f"of rank {', '.join(map(str, bad))} is" if world > 1 else "is"
        what = f"the loss {where} not finite" if bad else f"the gradient is not finite ({norm.item()})"
        what = f"{what} at sample {where_from} (keys: {which})"
        state.skipped += 1
        if config.train.nonfinite == "skip" and state.skipped <= config.train.max_skipped:
            self.monitor.print(f"batch {state.skipped} left out of at most {config.train.max_skipped}: {what}")
            return
        state.samples_seen, state.replaced, state.step = where_from, before.replaced, before.step
        self.pending_steps.clear()  # the steps after it were skipped as well
        skipped = f"; {config.train.max_skipped} batches were left out before" if state.skipped > 1 else ""
        arguments = ("--debug-from", config.run / "failed", "--config", config.run / "config.toml")
        look = command_line("train", "--debug", *arguments)
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


def _number(value: torch.Tensor) -> float | None:
    """JSON knows no nan."""
    return value.item() if value.isfinite() else None
