"""The part of trainer.py that stops real trainings: from a signal to the end of all processes."""

import argparse
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
from turns import start_ranks

NEVER = 10**9


def make_shards(folder: str, test: int) -> str:
    """64 rooms at 48x64 to train on, `test` to evaluate on."""
    from mde_dist.packing.pack import PackConfig, pack
    from mde_dist.packing.sources import rooms

    options, target = PackConfig(size=(48, 64), samples_per_shard=32), Path(folder, "rooms")
    pack(rooms({"train": 64, "test": test}), target, options, workers=2, progress=lambda done, total: None)
    return str(target)


def training(folder: str, shards: str, **changes: object) -> tuple[Path, list[str]]:
    """(run directory, options) of a training that neither ends nor evaluates nor saves, unless told.

    `train_batch_size=…` is `--train.batch-size …`.
    """
    run = Path(folder, f"run-{time.monotonic_ns()}")
    values = {"run": run, "data_shards": shards, "train_total_samples": NEVER, "train_evaluate_every": NEVER}
    values |= {"train_checkpoint_every": NEVER, **changes}
    return run, [t for k, v in values.items() for t in (f"--{k.replace('_', '.', 1).replace('_', '-')}", str(v))]


def stop_once(folder: str, shards: str, world: int, launched: bool, phase: str, number: int) -> list[float]:
    """Seconds until PREEMPTED stands, and until all processes are gone; nothing where the phase was over by then."""
    when = {"evaluation": {"train_evaluate_every": 36}, "save": {"train_checkpoint_every": 24}}.get(phase, {})
    small = {"train_batch_size": 12, "train_log_every": 12, "data_size": "32x32", "evaluate_batch_size": 1, **when}
    run, argv = training(folder, shards, train_cpu_threads=1, **small)
    shape = f"--multi_gpu --num_machines 1 --num_processes {world} --main_process_port 0".split() if world > 1 else []
    launcher = ["-m", "accelerate.commands.launch", *shape, "--mixed_precision", "no", "--dynamo_backend", "no"]
    line = [sys.executable, *(launcher if launched else []), "-m", "mde_dist.train", *argv]
    started = start_ranks(1 if launched else world, line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def records() -> list[dict]:
        lines = (run / "metrics.jsonl").read_bytes().split(b"\n")[:-1] if (run / "metrics.jsonl").is_file() else []
        return [json.loads(text) for text in lines]

    def reached() -> bool:
        if phase == "save":
            return any((run / "checkpoints").glob(".step-*.tmp"))
        return any("loss" in record and record["samples"] >= 36 for record in records())

    def gone(process: psutil.Process) -> bool:
        try:
            return process.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True

    while not reached():
        if started[0].poll() is not None:
            sys.exit(f"a training ended by itself: {line}")
        time.sleep(0.002)
    time.sleep(0 if phase == "save" else 0.3 * random.random())
    there = reached() and not (phase == "evaluation" and "evaluation" in records()[-1])
    ranks = started[0].children(recursive=True) if launched else started
    begin, stands = time.perf_counter(), 0.0
    for process in (started if launched else ranks) if number == signal.SIGTERM else ranks[-1:]:
        process.send_signal(number)
    while not all(map(gone, [*started, *ranks])):
        stands = stands or (run / "PREEMPTED").is_file() * (time.perf_counter() - begin)
        time.sleep(0.005)
    ended = time.perf_counter() - begin
    for process in started:
        process.wait()
    if not (run / "PREEMPTED").is_file():
        sys.exit(f"no PREEMPTED after a signal: {line}")
    return [stands or ended, ended] if there else []


def stop(given: argparse.Namespace, folder: str) -> None:
    shards, phases = make_shards(folder, 300), ("step", "evaluation", "save")
    print("\nseconds from a signal until checkpoint and PREEMPTED stand / until no process is left; median (longest)")
    print("  SIGTERM: to the launcher, or without one to all ranks; SIGUSR1: to the last rank alone")
    for world, launched, phase in itertools.product(given.ranks or [1, 2, 4], (True, False), phases):
        row = f"  {world} rank(s), {'accelerate launch' if launched else 'no launcher':17}, in {phase:10}"
        for number in (signal.SIGTERM, signal.SIGUSR1):
            tries = [stop_once(folder, shards, world, launched, phase, number) for _ in range(given.rounds)]
            hits = np.array([seconds for seconds in tries if seconds] or [[np.nan] * 2])
            (stands, ends), (late, last) = np.median(hits, axis=0), hits.max(axis=0)
            row += f"   {number.name} {stands:.1f} ({late:.1f}) / {ends:.1f} ({last:.1f}) of {len(hits)}"
        print(f"{row}   load {os.getloadavg()[0]:.1f}", flush=True)
