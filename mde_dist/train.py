"""Shards -> a trained model in a run directory.

    accelerate launch -m mde_dist.train [--config FILE.toml] [--run DIR] [--section.field value …]

The same command for a CPU, one GPU, several GPUs and several nodes. Run again, it resumes.
"""

import contextlib
import os
import signal
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator

from mde_dist.distributed.heartbeat import monitor_ranks
from mde_dist.distributed.process_group import init_distributed, raise_on_all_ranks
from mde_dist.distributed.rendezvous import read_alone
from mde_dist.distributed.signals import PreemptionHandler
from mde_dist.evaluation.evaluator import Interrupted
from mde_dist.inference.model_card import write_card
from mde_dist.training.config import Config, for_all_ranks, read_config
from mde_dist.training.data_stream import check_bad_sample_quota, next_local_batch, reduce_batch_info, training_stream
from mde_dist.training.scores import show_scores
from mde_dist.training.setup import check_batch, describe, describe_batch, make_sample, open_shards
from mde_dist.training.trainer import Trainer, open_trainer
from mde_dist.utils.cli import run_command
from mde_dist.utils.console import say
from mde_dist.utils.errors import UserError
from mde_dist.utils.jsonl import read_records
from mde_dist.utils.paths import command_line
from mde_dist.utils.user import temporary_folder


def main(argv: list[str]) -> None:
    config, error = read_alone(lambda: read_config(argv), Config())
    if config.debug:
        config = replace(config, run=Path(tempfile.mkdtemp(prefix="mde_dist-debug-", dir=temporary_folder())))
    stop = PreemptionHandler()
    with (
        init_distributed(*config.train.joining, error=error, settings=for_all_ranks(config)) as accelerator,
        monitor_ranks(accelerator, stop, config.train.heartbeat_timeout, config.run) as explain_lost_ranks,
    ):
        if config.debug:
            enable_debugging(accelerator)
        check_batch(config, accelerator.num_processes)
        make_sample(config, accelerator)
        with stop.install(), contextlib.ExitStack() as opened:
            splits, finished = open_shards(config, accelerator, opened, stop), False
            if splits is not None:
                with open_trainer(config, accelerator, *splits) as trainer, explain_lost_ranks():
                    finished = train(trainer, stop)
    if not finished:
        sys.exit(128 + int(stop.signal or signal.SIGTERM))


def enable_debugging(accelerator: Accelerator) -> None:
    """Slow, single and reproducible, with errors that point at their cause."""
    if accelerator.num_processes > 1:
        raise UserError("--debug is for a single process: python -m mde_dist.train --debug")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it deterministic matmuls on CUDA raise
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.autograd.set_detect_anomaly(True)


def train(trainer: Trainer, stop: PreemptionHandler) -> bool:
    """Train to the end, or until a signal; returns whether it was the end."""
    config, accelerator, shards, state = trainer.config, trainer.accelerator, trainer.shards, trainer.state
    train_module, meter, monitor = trainer.train_module, trainer.meter, trainer.monitor
    batch_size = config.train.batch_size

    with (
        contextlib.suppress(Interrupted),
        training_stream(config, shards, state.samples_seen, accelerator, stop) as loader,
    ):
        describe(monitor, config, accelerator, shards, state.samples_seen)
        if state.samples_seen == 0:
            trainer.record_baselines(stop)
        meter.restart()
        while True:
            if trainer.evaluation_due():
                trainer.evaluate(stop)
            if state.samples_seen >= trainer.end_sample:
                break
            # one optimizer step: this rank's local_batch of the global batch at samples_seen
            local_batch = next_local_batch(loader, config, trainer.size, meter)
            if config.debug and local_batch.views:
                describe_batch(monitor, local_batch.samples, *local_batch.views[0])
            local_batch.error = local_batch.error or next(iter(trainer.io_errors), None)
            info = reduce_batch_info(accelerator, local_batch, stop)
            if info.stopped:
                break
            replaced, behind = state.replaced + info.replaced, state.samples_seen + batch_size
            error = local_batch.error or check_bad_sample_quota(config, replaced, behind, shards)
            if info.failed or error is not None:
                trainer.save()  # what was learned so far is whole
                raise_on_all_ranks(accelerator, error)
            rate = train_module.set_rate(state.samples_seen)
            losses = train_module.backward(local_batch.views, info.counted, meter.working)
            result = train_module.step(losses, batch_size, state.step + 1)
            before = replace(state)
            state.samples_seen, state.replaced, state.step = behind, replaced, state.step + 1
            trainer.on_step(result, before)
            meter.step(batch_size)
            monitor.moved(state.samples_seen)
            if state.samples_seen >= trainer.end_sample or state.due(config.train.log_every, before.samples_seen):
                trainer.log(result, rate, info)
            if state.due(config.train.checkpoint_every, before.samples_seen) and not trainer.evaluation_due():
                trainer.save()

    finished = state.samples_seen >= trainer.end_sample and not trainer.evaluation_due()
    if not finished:
        trainer.save()
    trainer.finish()
    if not finished:
        trainer.directory.mark_preempted(f"stopped at sample {state.samples_seen}")
        monitor.say(f"stopped at sample {state.samples_seen} by a signal; the same command continues from there")
    elif accelerator.is_main_process:
        publish(trainer)
    return finished


def publish(trainer: Trainer) -> None:
    """Publish the weights with their card, draw what there is to see, and say where everything is.

    Raises UserError where the weights cannot be written; what fails after that is a warning.
    """
    run = trainer.directory.path
    made = [trainer.directory.export_final_model(trainer.train_module.published())]

    def draw() -> None:
        from mde_dist.reporting.report import draw_report  # no run has to wait for it before its first step

        made.extend(draw_report(run))

    for make in (
        lambda: made.append(write_card(run)),
        draw,
        lambda: show_scores(run, read_records(run / "metrics.jsonl")),
    ):
        try:
            make()
        except Exception as error:
            kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
            say(f"warning: the weights are whole, but after that: {kind}{' '.join(str(error).split())}")
    for path in made:
        say(f"made: {path}")
    say(f"next: {command_line('evaluate', '--run', run, '--protocols', 'eigen', 'full', 'blog')}")
    say(f"      {command_line('predict', '--run', run, '--output', 'depth', then='IMAGE …')}")
    say(f"      {command_line('export', '--run', run, '--output', 'model')}")


if __name__ == "__main__":
    run_command(main, logged=True)
