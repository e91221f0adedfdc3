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
from typing import TYPE_CHECKING

from mde_dist.distributed.signals import PreemptionHandler
from mde_dist.training.config import Config, for_all_ranks, read_config
from mde_dist.utils.cli import read_alone, run_command
from mde_dist.utils.console import say
from mde_dist.utils.errors import UserError
from mde_dist.utils.jsonl import read_records
from mde_dist.utils.paths import command_line
from mde_dist.utils.user import temporary_folder

if TYPE_CHECKING:
    from accelerate import Accelerator

    from mde_dist.training.trainer import Trainer


def main(argv: list[str]) -> None:
    config, error = read_alone(lambda: read_config(argv), Config())
    if config.debug:
        config = replace(config, run=Path(tempfile.mkdtemp(prefix="mde_dist-debug-", dir=temporary_folder())))
    # imported here: torch takes seconds and hundreds of megabytes, which --help and a wrong option do without
    from mde_dist.distributed.heartbeat import monitor_ranks
    from mde_dist.distributed.process_group import init_distributed
    from mde_dist.training.build import open_trainer
    from mde_dist.training.setup import check_batch, make_sample, open_shards

    stop = PreemptionHandler()
    with (
        init_distributed(**config.train.process_group_args, error=error, settings=for_all_ranks(config)) as accelerator,
        monitor_ranks(accelerator, stop, config.train.heartbeat_timeout, config.run) as explain_lost_ranks,
    ):
        if config.debug:
            enable_debugging(accelerator)
        check_batch(config, accelerator.num_processes)
        make_sample(config, accelerator)
        with stop.install(), contextlib.ExitStack() as opened:
            splits, finished = open_shards(config, accelerator, opened, stop), False
            if splits is not None:
                with open_trainer(config, accelerator, stop, *splits) as trainer, explain_lost_ranks():
                    finished = trainer.train()
                    if finished and accelerator.is_main_process:
                        publish(trainer)
    if not finished:
        sys.exit(128 + int(stop.signal or signal.SIGTERM))


def enable_debugging(accelerator: "Accelerator") -> None:
    """Slow, single and reproducible, with errors that point at their cause."""
    import torch

    if accelerator.num_processes > 1:
        raise UserError("--debug is for a single process: python -m mde_dist.train --debug")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it deterministic matmuls on CUDA raise
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.autograd.set_detect_anomaly(True)


def publish(trainer: "Trainer") -> None:
    """Publish the weights with their card, draw what there is to see, and say where everything is.

    Raises UserError where the weights cannot be written; what fails after that is a warning.
    """
    from mde_dist.inference.model_card import write_card
    from mde_dist.training.scores import show_scores

    run = trainer.directory.path
    made = [trainer.directory.export_final_model(trainer.train_module.final_model())]

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
