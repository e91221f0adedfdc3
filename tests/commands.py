"""Start the commands as a user does: real processes, on one rank or several over gloo."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from warm import Warm

# threads that wait for work sleep instead of turning in circles, which on a busy machine takes the time of those that
# have some; OpenMP reads this when it is loaded, so this module is imported before torch
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# few samples at the smallest size by a small model, so that a run takes seconds and its checkpoints a megabyte; 60 are
# two epochs, and a batch straddles them
SMALL = {
    "model.encoder": "tiny",
    "train.total-samples": 60,
    "train.batch-size": 12,
    "train.evaluate-every": 24,
    "train.checkpoint-every": 12,
    "train.log-every": 12,
    "train.cpu-threads": 1,
    "evaluate.batch-size": 3,
    "data.size": "32x32",
}


SPEEDS = {"images_per_second", "data_wait", "slowest_rank", "slower", "memory_gb", "seconds_left", "time"}
"""What two equal runs differ in."""


def environment(**changes: str) -> dict[str, str]:
    """This process's environment without what another launcher may have left in it."""
    leftovers = ("RANK", "WORLD_SIZE", "MASTER_", "SLURM_", "ACCELERATE_", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    return {k: v for k, v in os.environ.items() if not k.startswith(leftovers)} | changes


def command(module: str | Path, *arguments: Any, processes: int = 1, **options: Any) -> list[str]:
    """`python -m mde_dist.MODULE`, or a script by its path, with options; on one rank or several."""
    flags = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    program = [str(module)] if isinstance(module, Path) else ["-m", f"mde_dist.{module}"]
    start = [sys.executable]
    if processes > 1:
        shape = f"--multi_gpu --num_machines 1 --num_processes {processes} --main_process_port 0"
        shape += " --mixed_precision no --dynamo_backend no"
        start += ["-m", "accelerate.commands.launch", *shape.split()]
    return [*start, *program, *map(str, arguments), *flags]


def run(
    module: str | Path,
    *arguments: Any,
    processes: int = 1,
    env: dict[str, str] | None = None,
    cwd: Path | None = None,
    **options: Any,
):
    """Run a command to its end, output captured as text."""
    line = command(module, *arguments, processes=processes, **options)
    return subprocess.run(line, capture_output=True, text=True, env=env or environment(), cwd=cwd, timeout=300)


def start(module: str, *arguments: Any, processes: int = 1, **options: Any) -> subprocess.Popen[str]:
    """Start a command in a process group of its own; its stdout carries stderr as well."""
    line = command(module, *arguments, processes=processes, **options)
    return subprocess.Popen(
        line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment(), start_new_session=True
    )


def wait_for(condition: Callable[[], object], process: subprocess.Popen[str] | Warm, seconds: float = 120) -> None:
    """Wait until the running process has brought something about."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, f"it ended by itself: {process.stdout and process.stdout.read()}"
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def small(**changes: Any) -> dict[str, Any]:
    """Options of a small training; `train_total_samples=…` changes `--train.total-samples`."""
    return SMALL | {name.replace("_", ".", 1).replace("_", "-"): value for name, value in changes.items()}


def records(run_directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_directory / "metrics.jsonl").read_text().splitlines()]


def learned(run_directory: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what may differ between two equal runs: speeds, and where a run was taken up again."""
    found = (r for r in records(run_directory) if "start" not in r)
    return [{k: v for k, v in r.items() if k not in SPEEDS} for r in found]


def files_below(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
