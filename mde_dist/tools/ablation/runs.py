"""Trainings as processes of their own: some side by side, stopped together, each taken up again where it was."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch

from mde_dist.distributed.launcher import PARENT
from mde_dist.distributed.signals import PreemptionHandler
from mde_dist.tools.ablation.table import Training
from mde_dist.training.config import to_toml
from mde_dist.utils.errors import UserError
from mde_dist.utils.io import write_atomic, writing
from mde_dist.utils.jsonl import read_records
from mde_dist.utils.locks import Taken, locked
from mde_dist.utils.paths import as_typed

_TURN = 0.5  # seconds between two looks at the processes
_LEFTOVERS = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "MASTER_",
    "GROUP_",
    "ROLE_",
    "ACCELERATE_",
    "TORCHELASTIC_",
)


@dataclass
class Work:
    """Trainings to run, and their progress."""

    trainings: Sequence[Training]
    processes: int
    """Ranks of each training."""
    jobs: int
    """Trainings side by side."""
    running: dict[int, tuple[Training, subprocess.Popen[bytes]]] = field(default_factory=dict)
    """Running trainings by slot, 0..jobs-1: a slot has GPUs of its own, as long as there are some."""
    locks: dict[int, ExitStack] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    """Name of a training -> why."""
    elsewhere: list[str] = field(default_factory=list)
    """Names of those at which another such command is at work."""

    def samples(self) -> tuple[int, int]:
        """Samples that were trained on, and all that there are to be."""
        return sum(map(_samples_seen, self.trainings)), sum(t.config.train.total_samples for t in self.trainings)


def run_all(
    work: Work, stop: PreemptionHandler, progress: Callable[[int, int], None], ended: Callable[[Training], None]
) -> None:
    """Train what is not finished, in its order; `ended` is called after each. A signal to `stop` stops all."""
    waiting = [training for training in work.trainings if not training.finished]
    told = False
    try:
        while waiting or work.running:
            for slot in range(work.jobs):
                while slot not in work.running and waiting and not stop:
                    _begin(work, waiting.pop(0), slot)
            if stop and not told:  # once: a second Ctrl-C would end a training without a checkpoint
                told = True
                waiting.clear()
                _tell(work, stop.signal or signal.SIGTERM)
            for slot, (training, process) in list(work.running.items()):
                if process.poll() is not None:
                    del work.running[slot]
                    work.locks.pop(slot).close()
                    if process.returncode and not stop:
                        work.failed[training.name] = _last_words(training, process.returncode)
                    ended(training)
            progress(*work.samples())
            time.sleep(_TURN)
    finally:
        if work.running:  # something went wrong here: none is left behind
            _tell(work, signal.SIGTERM)
            for _, process in work.running.values():
                process.wait()


def log_of(training: Training) -> Path:
    """File that takes the terminal output of a training."""
    return training.config.run.with_suffix(".log")


def default_jobs(processes: int) -> int:
    """Number of trainings that there are GPUs for; one on a CPU."""
    return max(1, torch.cuda.device_count() // processes)


def _begin(work: Work, training: Training, slot: int) -> None:
    """Start a training, unless another command is at work at it or has finished it meanwhile."""
    run = training.config.run
    lock = ExitStack()
    try:
        with writing(run):
            lock.enter_context(locked(run.with_suffix(".lock"), f"{run} is being trained"))
    except Taken:
        work.elsewhere.append(training.name)
        return
    if training.finished:
        lock.close()
        return
    work.locks[slot] = lock
    work.running[slot] = training, _start(work, training, slot)


def _start(work: Work, training: Training, slot: int) -> subprocess.Popen[bytes]:
    run = training.config.run
    config = run.with_suffix(".toml")
    with writing(config):
        write_atomic(config, to_toml(training.config))
        log = log_of(training).open("ab")
    shape = f"--multi_gpu --num_machines 1 --num_processes {work.processes} --main_process_port 0"
    shape += " --mixed_precision no --dynamo_backend no"
    launcher = ["-m", "accelerate.commands.launch", *shape.split()] if work.processes > 1 else []
    line = [sys.executable, *launcher, "-m", "mde_dist.train", "--config", as_typed(config)]
    env = {name: value for name, value in os.environ.items() if not name.startswith(_LEFTOVERS)}
    # a launcher dies at signals and leaves the ranks behind, unless told to pass them on
    env["PET_SIGNALS_TO_HANDLE"] = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2"
    env.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "120")
    env[PARENT] = str(os.getpid())
    gpus = gpus_of(slot, work.processes)
    if gpus:
        env["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    elif not training.config.train.cpu_threads:
        line += ["--train.cpu-threads", str(max(1, _cores() // (work.jobs * work.processes)))]
        env.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that wait would take the time of the other trainings
    with log:
        # in a session of its own: Ctrl-C on the terminal comes to it from here, once
        return subprocess.Popen(line, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)


def gpus_of(slot: int, processes: int) -> list[str]:
    """GPUs of a slot, by the names that this process knows them by; where there are too few, slots share them."""
    there = torch.cuda.device_count()
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = given.split(",") if given else [str(number) for number in range(there)]
    first = slot * processes
    return [names[number % there] for number in range(first, first + processes)] if there else []


def check_devices(processes: int) -> None:
    """Raises UserError where there are GPUs, but too few for the ranks of one training."""
    there = torch.cuda.device_count()
    if there and processes > there:
        raise UserError(f"--processes {processes}: a rank has a GPU of its own; there are {there}")


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _tell(work: Work, number: int) -> None:
    for _, process in work.running.values():
        if process.poll() is None:
            process.send_signal(number)


def _samples_seen(training: Training) -> int:
    file = training.config.run / "metrics.jsonl"
    if not file.is_file():
        return 0
    return max((record["samples"] for record in read_records(file)), default=0)


def _last_words(training: Training, code: int) -> str:
    """The line in which a training said why it has ended."""
    lines = log_of(training).read_text("utf-8", errors="replace").splitlines()
    said = [line for line in lines if line.startswith("error")]
    return f"{said[-1] if said else f'it ended with exit code {code}'} (log: {log_of(training)})"
