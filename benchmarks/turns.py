"""Measuring in turn on a machine that others use: quiet rounds, ranks in fresh processes, tables of ratios.

What is compared runs in one measurement, a few steps at a time. A round waits for a quiet moment, and counts only where
all other processes together took less than a tenth of a core meanwhile; without three such rounds the quietest third
counts. Every table says how many counted, and what the others took.
"""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil

QUIET = 0.1  # cores


class Rounds:
    """So many quiet rounds, or what can be had in so many minutes (at least three). Of use in a child of `in_ranks`."""

    def __init__(self, rounds: int, minutes: float):
        self.others: list[float] = []
        """Cores that other processes took, by round."""
        self._wanted, self._end = rounds, time.monotonic() + 60 * minutes
        self._ranks = psutil.Process(os.getppid()).children()
        self._mark = self._now()

    def _now(self) -> np.ndarray:
        """(seconds, of CPU time that others have taken)."""
        times = psutil.cpu_times()
        busy = sum(times) - times.idle - times.iowait - times.guest - times.guest_nice
        return np.array([time.perf_counter(), busy - sum(sum(rank.cpu_times()[:2]) for rank in self._ranks)])

    def _cores(self) -> float:
        """That others took since this was last asked."""
        before, self._mark = self._mark, self._now()
        seconds, taken = self._mark - before
        return taken / seconds

    def begin(self) -> bool:
        """Wait for a quiet moment; False where no further round is wanted."""
        if sum(cores < QUIET for cores in self.others) >= self._wanted:
            return False
        cores = 1.0
        while cores > QUIET and time.monotonic() < self._end:
            self._cores()
            time.sleep(0.5)
            cores = self._cores()
        return len(self.others) < 3 or time.monotonic() < self._end

    def end(self) -> None:
        self.others.append(self._cores())


def kept(others: list[float]) -> list[int]:
    """The rounds that count."""
    quiet = [place for place, cores in enumerate(others) if cores < QUIET]
    return quiet if len(quiet) > 2 else np.argsort(others)[: max(1, len(others) // 3)].tolist()


def company(others: list[float]) -> str:
    return (
        f"{len(kept(others))} of {len(others)} rounds, others took {np.median(np.take(others, kept(others))):.2f} cores"
    )


def timed(call: Callable[[], object]) -> tuple[float, float]:
    """Milliseconds: on the wall, and of CPU time of this process with all its threads."""
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return 1e3 * (time.perf_counter() - wall), 1e3 * (time.process_time() - cpu)


def show(title: str, found: dict[str, list], others: list[float]) -> None:
    """A row per variant (rounds, steps, 2); ratios are to the first one, round by round."""
    rounds = kept(others)
    print(f"\n{title}; {company(others)}")
    print(f"  {'ms per step':38} {'median':>9} {'more':>8}   {'ratio (quartiles)':22}   {'CPU':>9} {'ratio':>7}")
    tables = {name: np.array(table)[rounds].mean(1) for name, table in found.items() if table}
    base = next(iter(tables.values()))
    for name, table in tables.items():
        wall, cpu = np.median(table, axis=0)
        low, ratio, high = np.percentile(table[:, 0] / base[:, 0], [25, 50, 75])
        more, spent = np.median(table[:, 0] - base[:, 0]), np.median(table[:, 1] / base[:, 1])
        quartiles = f"{ratio:.3f} ({low:.3f} to {high:.3f})"
        print(f"  {name:38} {wall:9.2f} {more:8.2f}   {quartiles:22}   {cpu:9.2f} {spent:7.3f}", flush=True)


def start_ranks(world: int, command: list[str], **how: Any) -> list[psutil.Popen]:
    """Each rank with the environment that torchrun would give it, without a launcher; a lone one is a plain process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": probe.getsockname()[1], "OMP_NUM_THREADS": 1}
    group |= {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    places = [group | {"RANK": rank, "LOCAL_RANK": rank} for rank in range(world)] if world > 1 else [{}]
    return [psutil.Popen(command, env=os.environ | {k: str(v) for k, v in place.items()}, **how) for place in places]


def in_ranks(world: int, measure: Callable[..., dict], **arguments: Any) -> dict[str, Any]:
    """What a function of the script found on rank 0 of fresh processes; its main() begins with `child`."""
    with tempfile.TemporaryDirectory() as folder:
        line = [sys.executable, sys.argv[0], "--child", measure.__name__, json.dumps({**arguments, "folder": folder})]
        started = start_ranks(world, line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        said = [process.communicate()[0] for process in started]
        result = Path(folder, "found.json")
        return json.loads(result.read_text()) if result.is_file() else sys.exit("\n".join(said))


def child(*measures: Callable[..., dict]) -> bool:
    """In a process of `in_ranks`, do what it is there for."""
    if sys.argv[1:2] != ["--child"]:
        return False
    name, arguments = sys.argv[2], json.loads(sys.argv[3])
    found = {measure.__name__: measure for measure in measures}[name](**arguments)
    if os.environ.get("RANK", "0") == "0":
        Path(arguments["folder"], "found.json").write_text(json.dumps(found))
    return True
