"""Which loaders `bench peers` knows, and how their scripts are run: each in an interpreter that has the loader."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mde_dist.tools.benchmarking.pinned import on_cores
from mde_dist.utils.errors import UserError
from mde_dist.utils.paths import expanded

_SCRIPTS = Path(__file__).with_name("peer_loaders")
_PATIENCE = 600.0  # seconds for a conversion; to start, compile and measure
_ONE_THREAD = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
_NOT_INHERITED = ("PYTHONPATH", "PYTHONHOME", "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")


class PeerFailed(Exception):
    """A script ended without an answer; the message is its last line."""


@dataclass(frozen=True)
class Peer:
    """One of the other loaders."""

    key: str
    """Names its script."""
    title: str
    depth: str
    """How it stores depth."""
    package: str = ""
    """Whose interpreter has to be named; empty = this one will do."""
    threads: bool = False
    """Whether it decodes in threads: at least one. Worker processes may be none."""

    @property
    def script(self) -> Path:
        return _SCRIPTS / f"with_{self.key}.py"


PEERS = (
    Peer("pil", "PyTorch Dataset, PIL", "PNG"),
    Peer("torchvision", "PyTorch Dataset, torchvision.io", "PNG"),
    Peer("webdataset", "WebDataset, PIL", "PNG"),
    Peer("streaming", "mosaicml-streaming", "PNG", "streaming"),
    Peer("litdata", "litdata", "PNG", "litdata"),
    Peer("dali", "DALI on the CPU", "PNG", "dali", threads=True),
    Peer("streaming_raw", "mosaicml-streaming", "raw", "streaming"),
    Peer("litdata_raw", "litdata", "raw", "litdata"),
    Peer("ffcv", "FFCV", "raw", "ffcv", threads=True),
)


def chosen_interpreters(given: Sequence[str]) -> dict[str, str]:
    """NAME=INTERPRETER, of `--python` -> interpreter by name. Raises UserError."""
    names = [peer.package or peer.key for peer in PEERS]
    found = {}
    for text in given:
        name, sign, path = text.partition("=")
        if not sign or name not in names:
            known = ", ".join(dict.fromkeys(names))
            raise UserError(f"--python {text}: write NAME=INTERPRETER, where NAME is one of {known}")
        path = expanded(path)
        if shutil.which(path) is None:
            raise UserError(f"--python {text}: {path} is no program")
        found[name] = path
    return found


def interpreter_of(peer: Peer, chosen: dict[str, str]) -> str | None:
    return chosen.get(peer.package or peer.key, None if peer.package else sys.executable)


def call(interpreter: str, script: Path, cores: Sequence[int], *arguments: object) -> dict[str, Any]:
    """Run a script on these cores with one thread for each of its libraries -> its answer. Raises PeerFailed."""
    env = {key: value for key, value in os.environ.items() if key not in _NOT_INHERITED}
    env |= dict.fromkeys(_ONE_THREAD, "1")
    command = [interpreter, str(script), *map(str, arguments)]
    with (
        on_cores(cores),
        subprocess.Popen(
            command,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
        ) as process,
    ):
        try:
            answer, complaint = process.communicate(timeout=_PATIENCE)
        except subprocess.TimeoutExpired:
            raise PeerFailed(f"no answer within {_PATIENCE:.0f} s") from None
        finally:
            if process.poll() is None:  # with its workers
                os.killpg(process.pid, signal.SIGKILL)
    if process.returncode:
        lines = [line.strip() for line in complaint.splitlines() if line.strip()]
        raise PeerFailed(lines[-1] if lines else f"exit code {process.returncode}")
    if arguments[0] == "prepare":
        return {}
    try:
        return json.loads(answer.splitlines()[-1])
    except (IndexError, ValueError):
        raise PeerFailed("it printed no answer") from None
