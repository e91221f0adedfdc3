"""From the command to the first optimizer step in fresh processes, warm and cold, and what a process holds in memory.

    python benchmarks/start.py SHARDS [--rounds N] [OPTION …]    # OPTIONs are those of mde_dist.train
    python benchmarks/start.py --help-of [--rounds N]            # what the --help of each command takes

In turn, every round: the floors (`python -c "import torch, accelerate"`, and one that makes an AdamW as well), training
alone, and under `accelerate launch`; the same with nothing in the page cache (of everything where that is allowed, else
of Python's packages and SHARDS); then the loader alone with one thread and with four. Seconds since the command; MB at
most until then, and MB then without the files that processes share. Median (all rounds). Linux only. Training ends at
its first step.
"""

import argparse
import contextlib
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parents[1]
COMMANDS = ("shard", "train", "evaluate", "predict", "report", "compare", "export", "doctor", "bench")
TELL = "print(open('/proc/self/status').read(), open('/proc/self/smaps_rollup').read(), file=sys.stderr)"
Found = dict[str, tuple[float, ...]]


def memory(text: str) -> tuple[float, float]:
    """What the kernel tells of a process -> (MB at most so far, MB that are no file's now)."""
    held = {name: 1.024e-3 * int(size) for name, size in re.findall(r"^ ?(\w+):\s+(\d+) kB$", text, re.MULTILINE)}
    return held["VmHWM"], held["Anonymous"] + held["RssShmem"]  # the loader's ring is shared memory to the kernel


# --- in the process that is measured ---


def mark(found: Found, name: str) -> None:
    seconds = time.monotonic() - float(os.environ["START_AT"])
    told = (Path("/proc/self", file).read_text() for file in ("status", "smaps_rollup"))
    found.setdefault(name, (seconds, *memory("".join(told))))


def hand_back(found: Found) -> None:
    if os.environ.get("RANK", "0") == "0":
        Path(os.environ["START_FOUND"]).write_text(json.dumps(found))
    sys.stdout.flush()
    os._exit(0)  # what would come now is not measured


def train() -> None:
    found: Found = {}
    mark(found, "Python started")
    from mde_dist import train
    from mde_dist.training import setup, step, trainer

    mark(found, "imports done")

    def after(owner: Any, name: str, label: str, last: bool = False) -> None:
        call = getattr(owner, name)

        def marked(*arguments: Any, **named: Any) -> Any:
            result = call(*arguments, **named)
            mark(found, label)
            return hand_back(found) if last else result

        setattr(owner, name, marked)

    after(train, "read_config", "config read")
    after(train, "check_batch", "process group ready")
    after(setup, "open_splits", "shards open")
    after(trainer, "describe", "model, optimizer and loader ready")
    after(trainer, "next_local_batch", "first batch")
    after(step.TrainModule, "step", "first step done", last=True)
    train.main(sys.argv[1:])


def decode() -> None:
    """Batches of eight from the loader, nothing else; what the loader has added stands in the last mark."""
    import torch

    from mde_dist.data.loader import DataLoader
    from mde_dist.data.sampler import GlobalSampler, rank_indices
    from mde_dist.data.shards import open_split

    found: Found = {}
    with open_split(sys.argv[1], "train") as shards:
        order = GlobalSampler(len(shards), shards.block, 4, 0)
        draws = (order.at(rank_indices(first, 8, 1, 1, 0, 0)) for first in itertools.count(0, 8))
        mark(found, "shards open")
        with DataLoader(shards, draws, 8, torch.device("cpu"), int(sys.argv[2])) as loader:
            for _ in itertools.islice(loader, 64):
                pass
            mark(found, "64 batches read")
            hand_back(found)


# --- in the process that measures ---


def forget(shards: str) -> None:
    """Drop from the page cache what starting reads, as far as the system lets one."""
    os.sync()
    with contextlib.suppress(OSError):
        Path("/proc/sys/vm/drop_caches").write_text("3")
        return
    roots = {Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")} | {HERE, Path(shards)}
    for path in (path for root in roots for path in root.rglob("*") if path.is_file()):
        with contextlib.suppress(OSError), path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def start(what: str, launcher: list[str], *options: str) -> Found:
    with tempfile.TemporaryDirectory() as folder:
        command = [*launcher, __file__, *options, *(["--run", f"{folder}/run"] if what == "train" else [])]
        env = {"PYTHONPATH": str(HERE), "START": what, "START_FOUND": f"{folder}/found", "START_AT": time.monotonic()}
        env = os.environ | {name: str(value) for name, value in env.items()}
        done = subprocess.run(command, env=env, check=False, capture_output=True, text=True)
        found = Path(folder, "found")
        return json.loads(found.read_text()) if found.is_file() else sys.exit(done.stdout + done.stderr)


def alone(label: str, code: str, *words: str) -> Found:
    command, begin = [sys.executable, "-c", f"import sys; {code}", *words], time.monotonic()
    env = os.environ | {"PYTHONPATH": str(HERE)}
    done = subprocess.run(command, env=env, check=True, capture_output=True, text=True)
    return {label: (time.monotonic() - begin, *memory(done.stderr))}


def starts(shards: str, options: list[str]) -> Iterator[tuple[str, bool, Callable[[], Found]]]:
    """What to start: its name, whether cold, and how."""
    python, options = [sys.executable], ["--data.shards", shards, *options]
    launch = [*python, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    floor, adamw = "import torch, accelerate; ", "torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))]); "
    for cold, state in ((False, "warm"), (True, "cold")):
        yield f"floors, {state}", cold, lambda: alone("torch, accelerate", floor + TELL)
        yield f"floors, {state}", cold, lambda: alone("torch, accelerate, an AdamW", floor + adamw + TELL)
        yield f"python -m mde_dist.train, {state}", cold, lambda: start("train", python, *options)
        yield f"accelerate launch -m mde_dist.train, {state}", cold, lambda: start("train", launch, *options)
    for threads in ("1", "4"):
        yield f"loader, {threads} thread(s)", False, lambda threads=threads: start("decode", python, shards, threads)


def helps() -> Iterator[tuple[str, bool, Callable[[], Found]]]:
    run = "del sys.argv[0]; runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)"
    code = f"import atexit, runpy; atexit.register(lambda: {TELL}); {run}"
    for name in COMMANDS:
        yield "--help of", False, lambda name=name: alone(name, code, f"mde_dist.{name}", "--help")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("shards", nargs="?", metavar="SHARDS")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--help-of", action="store_true")
    given, options = parser.parse_known_args()
    if not given.help_of and not given.shards:
        parser.error("which SHARDS?")
    found: dict[str, dict[str, list]] = {}
    for _ in range(given.rounds):
        for name, cold, begin in helps() if given.help_of else starts(given.shards, options):
            if cold:
                forget(given.shards)
            for label, values in begin().items():
                found.setdefault(name, {}).setdefault(label, []).append(values)
    for name, rows in found.items():
        print(f"{name:46} seconds (all rounds)          MB at most, own")
        for label, rounds in rows.items():
            seconds, most, own = zip(*rounds, strict=True)
            spread = f"{statistics.median(seconds):.2f} ({', '.join(f'{value:.2f}' for value in seconds)})"
            print(f"  {label:44} {spread:32} {statistics.median(most):8.0f} {statistics.median(own):8.0f}")


if __name__ == "__main__":
    {"train": train, "decode": decode}.get(os.environ.get("START", ""), main)()
