"""Processes that measure on given cores when they are asked to, so that several can take turns.

A question is the number of seconds to measure for, a line on stdin; the answer is a line of JSON on stdout. Imports
nothing heavy itself: each process pays for what its measurement needs.
"""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from typing import Any

from mde_dist.utils.errors import UserError

Answer = dict[str, Any]
Measure = Callable[[float], Answer]
"""Seconds to measure for -> what was found."""

_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")  # of a rank that starts a process of its own


@contextlib.contextmanager
def pinned(module: str, name: str, cores: Sequence[int], **arguments: Any) -> Iterator[Measure]:
    """A process on these cores that runs `name(**arguments)` of MODULE in this folder, a context manager that
    yields what measures. Arguments are of JSON's types. Asking raises UserError where the process cannot."""
    command = [sys.executable, "-m", __name__, module, name, json.dumps(arguments)]
    with on_cores(cores):  # inherited, and so in force before its libraries count the cores
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8", env=own_environment()
        )
    with process:
        questions, answers = process.stdin, process.stdout
        assert questions is not None and answers is not None

        def ask(seconds: float) -> Answer:
            with contextlib.suppress(BrokenPipeError):
                questions.write(f"{seconds}\n")
                questions.flush()
            line = answers.readline()
            if not line:
                raise UserError(f"the process that measures {name} ended (exit code {process.wait()}); see above")
            answer = json.loads(line)
            if "error" in answer:
                raise UserError(answer["error"])
            return answer

        try:
            yield ask
        finally:
            with contextlib.suppress(BrokenPipeError):
                questions.close()


def own_environment() -> dict[str, str]:
    """This process's environment without the place that a launcher gave it among its ranks."""
    return {key: value for key, value in os.environ.items() if key not in _LAUNCHER}


@contextlib.contextmanager
def on_cores(cores: Sequence[int]) -> Iterator[None]:
    """This thread, and what it starts, on these cores; where the system knows how."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def serve(module: str, name: str, arguments: str) -> None:
    """The other side: answer until stdin ends."""
    answers = sys.stdout
    sys.stdout = sys.stderr  # what is said meanwhile is no answer
    try:
        with getattr(import_module(f"mde_dist.tools.benchmarking.{module}"), name)(**json.loads(arguments)) as measure:
            for line in sys.stdin:
                print(json.dumps(measure(float(line))), file=answers, flush=True)
    except UserError as error:
        print(json.dumps({"error": str(error)}), file=answers, flush=True)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    serve(*sys.argv[1:])
