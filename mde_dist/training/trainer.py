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
from mde_dist.data.shards import ShardSet
from mde_dist.distributed.process_group import gather_rows, same_everywhere, share_buffers, together
from mde_dist.distributed.rank_log import rank_log
from mde_dist.distributed.signals import StopFlag
from mde_dist.evaluation.breakdown import split_breakdown
from mde_dist.evaluation.evaluator import Measure, breakdown_measure, model_predict, score_baselines, score_split
from mde_dist.evaluation.metrics import PROTOCOLS, summarise
from mde_dist.evaluation.results import DIGEST, EVALUATIONS, as_record, digests, truth_of, write_json
from mde_dist.models.flops import training_flops
from mde_dist.training.checkpoint import Checkpoint, newest_checkpoint, newest_record, versions
from mde_dist.training.checkpoint_writer import Saver
from mde_dist.training.config import Config, as_json, as_toml, identity, with_whole_paths
from mde_dist.training.data_stream import News, batch_keys
from mde_dist.training.monitor import Monitor
from mde_dist.training.optim import learning_rate
from mde_dist.training.run_dir import RunDirectory
from mde_dist.training.snapshots import Watch, strips, write_showcase
from mde_dist.training.state import State
from mde_dist.training.step import Learner, Verdict
from mde_dist.training.throughput import Account, peak_flops
from mde_dist.training.trackers import Trackers, opened_trackers
from mde_dist.utils.console import say
from mde_dist.utils.errors import UserError
from mde_dist.utils.paths import command_line

DEBUG_STEPS = 4
_KEYS_SAID = 16


@dataclass
class Trainer:
    """One training, from `opened_trainer`."""

    config: Config
    accelerator: Accelerator
    shards: ShardSet
    held_out: ShardSet
    size: tuple[int, int]
    """Of the whole training images, pixels."""
    total: int
    """samples_seen at which training ends."""
    directory: RunDirectory
    learner: Learner
    state: State
    monitor: Monitor
    saver: Saver
    account: Account
    trackers: Trackers
    complain: Callable[[UserError], None]
    """What becomes of a file that the disk did not take."""
    troubles: list[UserError]
    """Of these, what is to end the run."""
    unsettled: deque[tuple[Verdict, State]] = field(default_factory=deque)
    """Steps of which the loop does not know yet whether they were learned from, and the state before each."""

    @property
    def writes(self) -> bool:
        """Whether this is the rank that writes."""
        return self.accelerator.is_main_process

    def stepped(self, verdict: Verdict, before: State) -> None:
        """Note a step, and hear how the one before it went: then the device has this one to do meanwhile."""
        self.unsettled.append((verdict, before))
        self.settle(1)

    def settle(self, leave: int = 0) -> None:
        """Hear how all steps but the last `leave` went. Called by every rank; raises UserError as `reject` does."""
        while len(self.unsettled) > leave:
            verdict, before = self.unsettled.popleft()
            if verdict.left_out():
                self.reject(verdict, before)

    def save(self) -> None:
        """Write a checkpoint of this very state, beside the loop, unless that has been done."""
        self.settle()
        if self.writes:
            record, best = self._record(), self.state.best.get("step")

            def write(tensors: dict) -> None:
                self.directory.save(self.learner.as_files(tensors), record, self.config.train.keep, best)

            self.saver.start((self.state.samples_seen, self.state.evaluated), self.learner.snapshot, write)

    def evaluation_due(self) -> bool:
        """Whether the model of this very sample has to be evaluated and was not yet."""
        state = self.state
        wanted = state.samples_seen >= self.total or state.due(self.config.train.evaluate_every, state.evaluated)
        return wanted and state.evaluated < state.samples_seen

    def evaluate(self, stop: StopFlag) -> None:
        """Score the held-out split, note it, remember it if it is the best so far, and save. Raises Interrupted."""
        self.settle()
        config, state, model = self.config, self.state, self.learner.scored
        protocol = PROTOCOLS[config.evaluate.protocol]
        options = (config.evaluate.batch_size, config.data.threads, config.evaluate.limit)
        measures = [breakdown_measure(protocol), Measure(DIGEST, digests)]
        watch = Watch(min(len(self.held_out), config.evaluate.limit or len(self.held_out)), self.held_out.size)
        share_buffers(self.accelerator, model)
        model.eval()
        try:
            # forward, not the call: a compiled model would be compiled again for these batches
            predict = watch.watching(model_predict(model.forward, self.size, self.accelerator, config.evaluate.flip))
            scored, prints = score_split(
                *(self.accelerator, predict, self.held_out, measures, *options),
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
        maps = watch.gather(self.accelerator)
        if self.writes:
            self._keep_evaluation(rows, where, prints, best)
            self._keep_panels(watch.chosen, *maps)
        self.save()
        self.account.restart()

    def _keep_evaluation(self, rows: torch.Tensor, where: torch.Tensor, prints: torch.Tensor, best: bool) -> None:
        """Every image's numbers, as `evaluate --json` has them: for the report, and to compare runs by."""
        protocol = PROTOCOLS[self.config.evaluate.protocol]
        truth = truth_of(self.held_out, self.config.data.eval_split, prints)
        about = {"path": str(self.config.run), "samples": self.state.samples_seen, "size": list(self.size)}
        about |= {"flip": self.config.evaluate.flip, "precision": self.accelerator.mixed_precision}
        try:
            record = as_record({"model": [rows]}, [protocol], truth, about, [], where)
            for name in ("last", "best") if best else ("last",):
                write_json(self.config.run / EVALUATIONS / f"{name}.json", record)
        except UserError as error:
            self.complain(error)

    def _keep_panels(self, chosen: list[int], *maps: np.ndarray) -> None:
        """How a few images are predicted now, for the report and for trackers."""
        keys = [self.held_out.key(sample) for sample in chosen]
        try:
            write_showcase(self.config.run, self.state.samples_seen, keys, *maps)
            if self.trackers:
                pictures = {f"held-out/{key}": strip for key, strip in zip(keys, strips(*maps), strict=True)}
                self.trackers.show(self.state.samples_seen, pictures)
        except UserError as error:
            self.complain(error)

    def record_baselines(self, stop: StopFlag) -> None:
        """What predicting without looking scores: the line that the model has to beat. Raises Interrupted."""
        protocol, limit = PROTOCOLS[self.config.evaluate.protocol], self.config.evaluate.limit
        tables = score_baselines(
            *(self.accelerator, self.held_out, self.shards, [protocol], limit),
            stop=lambda: bool(stop),
            progress=self.monitor.phase("baselines"),
        )
        for name, (rows,) in tables.items():
            summary = summarise(rows, protocol)
            self.monitor.record(
                samples=0, baseline=name, evaluation=protocol.name, images=summary.images, **summary.metrics
            )

    def log(self, verdict: Verdict, rate: float, news: News) -> None:
        """A line about the step that was just done and about the speed since the last one. Called by every rank."""
        self.settle()
        state = self.state
        rows = gather_rows(self.accelerator, [verdict.losses.item(), *self.account.row()])
        values = {"loss": _number(rows[:, 0].sum()), "lr": rate, "grad_norm": _number(verdict.norm)}
        values |= {name: count for name in ("replaced", "skipped") if (count := getattr(state, name))}
        rates = self.account.rates(rows[:, 1:], self.total - state.samples_seen)
        self.monitor.step(state.samples_seen, **values, batch=f"{news.batch_hash:x}", **rates, time=_now())
        self.trackers.log(state.samples_seen, "train", values | rates)
        self.account.restart()

    def reject(self, verdict: Verdict, before: State) -> None:
        """Say that a batch was left out, whose loss or gradient is not finite on some rank. Called by every rank.

        Raises UserError, which names the batch, where that is not wanted or was done too often; then the state is that
        before the batch, as model and optimizer are.
        """
        config, state, world = self.config, self.state, self.accelerator.num_processes
        losses, norm, where_from = verdict.losses, verdict.norm, before.samples_seen
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
        self.unsettled.clear()  # what came after it was left out as well
        left_out = f"; {config.train.max_skipped} batches were left out before" if state.skipped > 1 else ""
        places = ("--debug-from", config.run / "failed", "--config", config.run / "config.toml")
        look = command_line("train", "--debug", *places)
        together(self.accelerator, lambda: self._save_failed(keys))
        raise UserError(
            f"{what}{left_out}; it was not learned from, and the checkpoints before it are whole; "
            f"--train.nonfinite skip leaves such batches out; look inside: {look}"
        )

    def _save_failed(self, keys: list[str]) -> None:
        """Keep the state before the step, for a look inside; it is none to go on from."""
        if self.writes:
            files = self.learner.as_files(self.learner.snapshot())
            self.directory.save_failed(files, {**self._record(), "batch": keys})

    def finish(self) -> None:
        """Wait until everything is written. Raises UserError on every rank where it is not."""

        def written() -> None:
            self.saver.finish()
            self.monitor.finish()

        together(self.accelerator, written)

    def _record(self) -> dict:
        return {**vars(self.state), "config": as_json(self.config), **versions()}


@contextmanager
def opened_trainer(config: Config, accelerator: Accelerator, shards: ShardSet, held_out: ShardSet) -> Iterator[Trainer]:
    """Build what is trained, take the run directory, and go on where it is. Raises UserError on every rank."""
    size = config.data.size or shards.size
    flops = together(accelerator, lambda: training_flops(config.model, view_size(size, config.augment)))
    rank, world, writes = accelerator.process_index, accelerator.num_processes, accelerator.is_main_process
    begun = bool(config.debug_from or newest_record(config.run))
    learner = together(accelerator, lambda: Learner(config, accelerator, size, resumes=begun))
    if learner.start and writes:
        say(learner.start.in_words())
    this_run = identity(config, shards.manifest.sha256, held_out.manifest.sha256)
    toml = as_toml(with_whole_paths(config))
    directory = RunDirectory(config.run, this_run, toml, writes, defaults=as_json(Config()))
    troubles: list[UserError] = []

    def complain(error: UserError) -> None:
        if config.train.save_errors == "stop":
            troubles.append(error)
        else:
            say(f"warning: {error}; training goes on")

    with contextlib.ExitStack() as opened:
        together(accelerator, lambda: opened.enter_context(directory))
        state = together(accelerator, lambda: resume(directory, config, learner))
        same_everywhere(accelerator, "the checkpoints to go on from", f"sample {state.samples_seen}")
        total = state.samples_seen + DEBUG_STEPS * config.train.batch_size if config.debug else config.train.samples
        metrics = config.run / "metrics.jsonl" if writes else None
        places = (state.samples_seen, state.evaluated, total)
        monitor = together(accelerator, lambda: Monitor(metrics, *places, complain, live=not config.debug))
        opened.enter_context(monitor)
        if not config.debug:  # a debugger wants the terminal itself
            together(accelerator, lambda: opened.enter_context(rank_log(config.run, rank, world)))
        skip = config.train.nonfinite == "skip"
        learner.wrap(max(0, config.train.max_skipped - state.skipped) if skip else 0)
        account = Account(accelerator.device, flops, peak_flops(accelerator.device, accelerator.mixed_precision))
        saver = opened.enter_context(Saver(complain))
        about = as_json(config)
        run_id = run_id_of(config, this_run)
        trackers = together(
            accelerator,
            lambda: opened.enter_context(
                opened_trackers(accelerator, config.log_with, config.run, run_id, about, state.samples_seen)
            ),
        )
        if state.samples_seen < total:
            monitor.record(samples=state.samples_seen, start=describe_start(config, accelerator, learner))
        yield Trainer(
            *(config, accelerator, shards, held_out, size, total, directory, learner, state, monitor, saver, account),
            *(trackers, complain, troubles),
        )


def resume(directory: RunDirectory, config: Config, learner: Learner) -> State:
    """Put back the newest whole checkpoint, if there is one. Raises UserError."""
    checkpoint = newest_checkpoint(config.debug_from) if config.debug_from else directory.resume()
    if checkpoint is not None:
        directory.note_change(checkpoint, {"train.batch_size": config.train.batch_size})
        if not config.debug:
            directory.refuse_less(checkpoint, config.train.samples)
            directory.note_change(checkpoint, {"train.samples": config.train.samples}, new_rate(checkpoint, config))
        learner.load(checkpoint)
    directory.start()
    return State() if checkpoint is None else checkpoint.state


def run_id_of(config: Config, this_run: Mapping[str, Any]) -> str:
    """A name for trackers that stays as long as the run: a field that a later version adds does not change it."""
    defaults = as_json(Config())
    told = {name: value for name, value in this_run.items() if name not in defaults or value != defaults[name]}
    return hashlib.sha256(json.dumps([str(config.run.resolve()), told]).encode()).hexdigest()[:16]


def new_rate(checkpoint: Checkpoint, config: Config) -> str:
    """Describe the effect of another `train.samples` than the checkpoint's on the learning rate, in words."""
    if config.optim.schedule == "constant":
        return "; the learning rate is constant: it learns what it would have learned with them from the start"
    seen, batch_size = checkpoint.state.samples_seen, config.train.batch_size
    totals = (int(checkpoint.config.get("train.samples", config.train.samples)), config.train.samples)
    before, now = (learning_rate(config.optim, seen, total, batch_size) for total in totals)
    return (
        f"; optim.schedule {config.optim.schedule} ends there: the learning rate goes from {before:.3g} to {now:.3g}, "
        "and what is learned is not what it would have been with them from the start"
    )


def describe_start(config: Config, accelerator: Accelerator, learner: Learner) -> dict[str, Any]:
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
        **({"weights": learner.start.record()} if learner.start else {}),
    }


def _now() -> float:
    """Seconds since 1970, to the millisecond."""
    return round(time.time(), 3)


def _number(value: torch.Tensor) -> float | None:
    """JSON knows no nan."""
    return value.item() if value.isfinite() else None
