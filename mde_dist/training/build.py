"""Config and splits -> the trainer, in its run directory, with the newest checkpoint loaded."""

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager

from accelerate import Accelerator

from mde_dist.data.config import view_size
from mde_dist.data.shards import ShardDataset
from mde_dist.distributed.process_group import (
    assert_equal_across_ranks,
    run_on_all_ranks,
)
from mde_dist.distributed.rank_log import redirect_to_rank_log
from mde_dist.distributed.signals import PreemptionHandler
from mde_dist.models.flops import training_flops
from mde_dist.training.checkpoint import Checkpoint, newest_checkpoint, newest_record, versions
from mde_dist.training.checkpoint_writer import AsyncCheckpointWriter
from mde_dist.training.config import ORDER, Config, as_json, resume_key, to_toml, with_whole_paths
from mde_dist.training.monitor import ProgressMonitor
from mde_dist.training.optim import learning_rate
from mde_dist.training.run_dir import RunDirectory
from mde_dist.training.setup import describe_start
from mde_dist.training.state import State
from mde_dist.training.step import TrainModule
from mde_dist.training.throughput import ThroughputMeter, peak_flops
from mde_dist.training.trackers import open_trackers, run_id_of
from mde_dist.training.trainer import Trainer
from mde_dist.training.validation import Validator
from mde_dist.utils.console import say
from mde_dist.utils.errors import UserError

DEBUG_STEPS = 4


@contextmanager
def open_trainer(
    config: Config,
    accelerator: Accelerator,
    stop: PreemptionHandler,
    shards: ShardDataset,
    eval_set: ShardDataset,
) -> Iterator[Trainer]:
    """Build what is trained, take the run directory, and go on where it is. Raises UserError on every rank."""
    size = config.data.size or shards.size
    flops = run_on_all_ranks(accelerator, lambda: training_flops(config.model, view_size(size, config.augment)))
    rank, world, is_main = accelerator.process_index, accelerator.num_processes, accelerator.is_main_process
    begun = bool(config.debug_from or newest_record(config.run))
    train_module = run_on_all_ranks(accelerator, lambda: TrainModule(config, accelerator, size, resumes=begun))
    if train_module.start and is_main:
        say(train_module.start.describe())
    this_run = resume_key(config, shards.manifest.sha256, eval_set.manifest.sha256)
    toml = to_toml(with_whole_paths(config))
    directory = RunDirectory(config.run, this_run, toml, is_main, defaults=as_json(Config()) | {ORDER: 1})
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
        metrics = config.run / "metrics.jsonl" if is_main else None
        monitor = run_on_all_ranks(
            accelerator,
            lambda: ProgressMonitor(
                metrics,
                samples_seen=state.samples_seen,
                evaluated=state.evaluated,
                total=total,
                on_error=on_io_error,
                live=not config.debug,
            ),
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
            monitor.log(
                samples=state.samples_seen, start=describe_start(config, accelerator, train_module) | versions()
            )
        yield Trainer(
            config=config,
            accelerator=accelerator,
            stop=stop,
            shards=shards,
            size=size,
            end_sample=total,
            directory=directory,
            train_module=train_module,
            validator=Validator(config, accelerator, shards, eval_set, size),
            state=state,
            monitor=monitor,
            saver=saver,
            meter=meter,
            trackers=trackers,
            on_io_error=on_io_error,
            io_errors=io_errors,
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
