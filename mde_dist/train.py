"""Shards -> a trained model in a run directory.

    accelerate launch -m mde_dist.train [--config FILE.toml] [--run DIR] [--section.field value …]

The same command for a CPU, one GPU, several GPUs and several nodes. Run again, it resumes.
"""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator

from mde_dist.data.shards import ShardSet, open_split
from mde_dist.distributed.heartbeat import watched_peers
from mde_dist.distributed.process_group import agree, gather_rows, processes, same_everywhere, together
from mde_dist.distributed.rendezvous import read_alone
from mde_dist.distributed.signals import StopFlag, unless_stopped
from mde_dist.evaluation.evaluator import Interrupted
from mde_dist.inference.model_card import write_card
from mde_dist.training.announce import describe, describe_batch
from mde_dist.training.config import SAMPLE_SHARDS, Config, for_all_ranks, read_config
from mde_dist.training.data_stream import poisoned, share_news, take_share, training_stream
from mde_dist.training.scores import show_scores
from mde_dist.training.trainer import Trainer, opened_trainer
from mde_dist.utils.cli import run_command
from mde_dist.utils.console import say
from mde_dist.utils.errors import UserError
from mde_dist.utils.io import writing
from mde_dist.utils.jsonl import read_records
from mde_dist.utils.locks import locked
from mde_dist.utils.paths import command_line
from mde_dist.utils.user import temporary_folder


def main(argv: list[str]) -> None:
    config, error = read_alone(lambda: read_config(argv), Config())
    if config.debug:
        config = replace(config, run=Path(tempfile.mkdtemp(prefix="mde_dist-debug-", dir=temporary_folder())))
    stop = StopFlag()
    with (
        processes(*config.train.joining, error=error, settings=for_all_ranks(config)) as accelerator,
        watched_peers(accelerator, stop, config.train.lost_after, config.run) as naming_the_lost,
    ):
        if config.debug:
            start_debugging(accelerator)
        check_batch(config, accelerator.num_processes)
        make_sample(config, accelerator)
        with stop.catching(), contextlib.ExitStack() as opened:
            splits, finished = open_shards(config, accelerator, opened, stop), False
            if splits is not None:
                with opened_trainer(config, accelerator, *splits) as trainer, naming_the_lost():
                    finished = train(trainer, stop)
    if not finished:
        sys.exit(128 + int(stop.signal or signal.SIGTERM))


def start_debugging(accelerator: Accelerator) -> None:
    """Slow, single and reproducible, with errors that point at their cause."""
    if accelerator.num_processes > 1:
        raise UserError("--debug is for a single process: python -m mde_dist.train --debug")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it deterministic matmuls on CUDA raise
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.autograd.set_detect_anomaly(True)


def check_batch(config: Config, world: int) -> None:
    """The global batch has to divide by ranks and accumulation steps. Raises UserError."""
    batch, accumulate = config.train.batch_size, config.train.accumulate
    parts = world * accumulate
    if batch % parts:
        near = max(parts, round(batch / parts) * parts)
        raise UserError(
            f"train.batch_size = {batch} (global) does not divide by {world} ranks x {accumulate} accumulated; "
            f"try --train.batch-size {near}, or another number of processes"
        )


def make_sample(config: Config, accelerator: Accelerator) -> None:
    """Render and pack the embedded sample if it is what to train on and is not there: one process, the others wait."""
    if config.data.shards != SAMPLE_SHARDS:
        return
    # once more per node for nodes that share no disk; the bytes are the same
    for turn in (accelerator.is_main_process, accelerator.is_local_main_process):
        together(accelerator, pack_sample if turn else lambda: None)


def pack_sample() -> None:
    """Render and pack it, unless another training has done so or is about to. Raises UserError."""
    place = Path(SAMPLE_SHARDS)
    if (place / "manifest.json").is_file():
        return
    taken = "another training renders the sample"
    with writing(place), locked(place / ".rendering.lock", taken, wait=True):
        if not (place / "manifest.json").is_file():
            render_sample()


def render_sample() -> None:
    """Render and pack it with the command that does so for a user. Raises UserError."""
    # small shards, so that all cores have some to render
    options = f"--layout rooms --samples-per-shard 32 --output {SAMPLE_SHARDS}"
    command = ["-m", "mde_dist.shard", *options.split()]
    say(f"no shards at {SAMPLE_SHARDS} yet; rendering the sample: python {' '.join(command)}")
    alone = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    if subprocess.run([sys.executable, *command], env=alone, check=False).returncode:
        raise UserError(f"the sample could not be packed into {SAMPLE_SHARDS}; the line above says why")


def open_shards(
    config: Config, accelerator: Accelerator, opened: contextlib.ExitStack, stop: StopFlag
) -> tuple[ShardSet, ShardSet] | None:
    """The splits to train on and to evaluate on, the same on all ranks; None where a signal came first.

    Called by every rank. Raises UserError.
    """
    splits = together(accelerator, lambda: unless_stopped(stop, lambda: open_splits(config, opened)))
    if gather_rows(accelerator, [float(splits is None)]).any() or splits is None:
        if accelerator.is_main_process:
            say("stopped by a signal while the shards were opened; the same command begins again")
        return None
    same_everywhere(accelerator, "the shards", "".join(split.manifest.sha256 for split in splits))
    return splits


def open_splits(config: Config, opened: contextlib.ExitStack) -> tuple[ShardSet, ShardSet]:
    """All that is read of a server before the first step. Raises UserError."""
    data = config.data
    shards = opened.enter_context(open_split(data.shards, data.train_split, data.cache_options))
    if shards.remote:
        shards.local(shards.info.mean_map)  # of which the baselines are made
    held_out = open_split(data.eval_shards or data.shards, data.eval_split, data.cache_options)
    return shards, opened.enter_context(held_out)


def train(trainer: Trainer, stop: StopFlag) -> bool:
    """Train to the end, or until a signal; returns whether it was the end."""
    config, accelerator, shards, state = trainer.config, trainer.accelerator, trainer.shards, trainer.state
    learner, account, monitor = trainer.learner, trainer.account, trainer.monitor
    batch_size = config.train.batch_size

    with (
        contextlib.suppress(Interrupted),
        training_stream(config, shards, state.samples_seen, accelerator, stop) as loader,
    ):
        describe(monitor, config, accelerator, shards, state.samples_seen)
        if state.samples_seen == 0:
            trainer.record_baselines(stop)
        account.restart()
        while True:
            if trainer.evaluation_due():
                trainer.evaluate(stop)
            if state.samples_seen >= trainer.total:
                break
            # one optimizer step: this rank's share of the global batch at samples_seen
            share = take_share(loader, config, trainer.size, account)
            if config.debug and share.views:
                describe_batch(monitor, share.samples, *share.views[0])
            share.error = share.error or next(iter(trainer.troubles), None)
            news = share_news(accelerator, share, stop)
            if news.stopped:
                break
            replaced, behind = state.replaced + news.replaced, state.samples_seen + batch_size
            error = share.error or poisoned(config, replaced, behind, shards)
            if news.failed or error is not None:
                trainer.save()  # what was learned so far is whole
                agree(accelerator, error)
            rate = learner.set_rate(state.samples_seen)
            losses = learner.backward(share.views, news.counted, account.working)
            verdict = learner.step(losses, batch_size, state.step + 1)
            before = replace(state)
            state.samples_seen, state.replaced, state.step = behind, replaced, state.step + 1
            trainer.stepped(verdict, before)
            account.step(batch_size)
            monitor.moved(state.samples_seen)
            if state.samples_seen >= trainer.total or state.due(config.train.log_every, before.samples_seen):
                trainer.log(verdict, rate, news)
            if state.due(config.train.checkpoint_every, before.samples_seen) and not trainer.evaluation_due():
                trainer.save()

    finished = state.samples_seen >= trainer.total and not trainer.evaluation_due()
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
    made = [trainer.directory.publish_model(trainer.learner.published())]

    def draw() -> None:
        from mde_dist import report  # no run has to wait for it before its first step

        made.extend(report.draw(run))

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
