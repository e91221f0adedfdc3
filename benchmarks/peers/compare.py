"""Compare the usual data loaders with that of mde_dist: pairs/s on the same pairs and the same cores, in turn.

    python benchmarks/peers/compare.py --shards DIR [--python NAME=INTERPRETER ...] [--help]

The first pairs of the shards are taken out and converted to the format of each loader: JPEGs with their own bytes,
depth as 16-bit PNG, or raw in the rows marked so. All deliver shuffled batches of uint8 images and float32 metres,
which is checked before the clock runs. PyTorch's Dataset and WebDataset run in this interpreter (pip install
webdataset), the others where --python names an interpreter of an environment that has them.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pairs import Truth, take_pairs

from mde_dist.data.shards import open_split
from mde_dist.tools.benchmarking.harness import Column, Table, available_cores, on_cores, over_rounds, ratio
from mde_dist.utils.cli import run_command
from mde_dist.utils.console import say
from mde_dist.utils.errors import UserError

SCRIPTS = Path(__file__).with_name("loaders")
_PATIENCE = 600.0  # seconds for a conversion; to start, compile and measure
_ONE_THREAD = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
_NOT_INHERITED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
_OURS = "mde_dist"


class PeerFailed(Exception):
    """A script ended without an answer; the message is its last line."""


@dataclass(frozen=True)
class Peer:
    """A loader to measure."""

    key: str
    """Names its script."""
    title: str
    depth: str
    """Format in which it stores depth."""
    package: str = ""
    """Key of its interpreter in --python; empty = this interpreter."""
    threads: bool = False
    """Decodes in threads: at least one. Worker processes may be none."""
    checked: bool = True
    """Delivers metres, which are compared with the shards'."""
    most_cores: int = 10**6

    @property
    def script(self) -> Path:
        return SCRIPTS / f"with_{self.key}.py"

    def workers(self, cores: int) -> list[int]:
        """Numbers of workers to try: on one core none and one."""
        if cores > self.most_cores:
            return []
        return [cores] if cores > 1 or self.threads else [0, 1]


OWN = (
    Peer("bare_decoders", "limit: bare decoding", "as packed", threads=True, checked=False, most_cores=1),
    Peer("mde_dist", _OURS, "as packed"),
    Peer("mde_dist_mm", "mde_dist, depth left in millimetres", "as packed", checked=False),
)
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


def parse_options(argv: Sequence[str]) -> argparse.Namespace:
    packages = ", ".join(dict.fromkeys(peer.package for peer in PEERS if peer.package))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", required=True, help="directory of shards of mde_dist.shard")
    parser.add_argument("--split", default="train")
    parser.add_argument("--python", action="append", default=[], metavar="NAME=INTERPRETER", help=f"of {packages}")
    parser.add_argument("--only", nargs="+", metavar="NAME", help=f"of {', '.join(peer.key for peer in PEERS)}")
    parser.add_argument("--pairs", type=int, default=240, help="to take out of the shards, at most (240)")
    parser.add_argument("--batch", type=int, default=8, help="pairs in a batch (8)")
    parser.add_argument("--cores", type=int, nargs="+", default=[1, 2], help="numbers of cores to measure on (1 2)")
    parser.add_argument("--seconds", type=float, default=6, help="of each row, over all rounds (6)")
    parser.add_argument("--rounds", type=int, default=3, help="in which the rows take turns (3)")
    parser.add_argument("--work", type=Path, help="directory for converted pairs, kept and used again")
    parser.add_argument("--json", type=Path, help="file to write the rows into, with every round")
    options = parser.parse_args(argv)
    if min(options.batch, options.rounds, *options.cores) < 1 or options.pairs < options.batch:
        parser.error("--batch, --rounds and --cores must be at least 1, --pairs at least a batch")
    return options


def chosen_interpreters(given: Sequence[str]) -> dict[str, str]:
    """NAME=INTERPRETER of --python -> interpreter by name. Raises UserError."""
    known, found = [peer.package for peer in PEERS if peer.package], {}
    for text in given:
        name, _, path = text.partition("=")
        if name not in known or shutil.which(path) is None:
            raise UserError(f"--python {text}: write NAME=INTERPRETER, NAME of {', '.join(dict.fromkeys(known))}")
        found[name] = path
    return found


def main(argv: list[str]) -> None:
    options = parse_options(argv)
    with tempfile.TemporaryDirectory() as temporary, open_split(options.shards, options.split) as shards:
        rows, counts = compare(options, shards, options.work or Path(temporary))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", "utf-8")
    height, width = shards.size
    Table(f"pairs of {height}x{width}, batches of {options.batch}, pairs/s", columns(counts), rows).show()
    for row in rows:
        if row.get("note"):
            say(f"{row['what']} ({row['depth']}): {row['note']}")


def compare(options: argparse.Namespace, shards: Any, work: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """Prepare, check and measure all loaders -> (rows, numbers of cores). Raises UserError."""
    at_hand, pairs = available_cores(), min(options.pairs, len(shards))
    counts = sorted(count for count in set(options.cores) if count <= len(at_hand))
    work.mkdir(parents=True, exist_ok=True)
    interpreters = {"": sys.executable} | chosen_interpreters(options.python)
    folder, truth = take_pairs(shards, options.shards, options.split, pairs, work), Truth(shards, pairs)
    rows, running = list[dict[str, Any]](), list[tuple[Peer, dict[str, Any]]]()
    for peer in OWN + tuple(peer for peer in PEERS if not options.only or peer.key in options.only):
        row: dict[str, Any] = {"what": peer.title, "depth": peer.depth}
        rows.append(row)
        if peer.package not in interpreters:
            row["note"] = f"not installed; --python {peer.package}=INTERPRETER"
            continue
        say(f"preparing {peer.title}, depth {peer.depth}")
        try:
            complaint = prepare(peer, interpreters[peer.package], row, folder, truth, options.batch)
        except PeerFailed as error:
            row["note"] = f"failed: {error}"
            continue
        row["note"] = f"delivers something else: {complaint}" if complaint else row["versions"]
        if not complaint:
            running.append((peer, row))
    rates: dict[tuple[int, int, int], list[float]] = {}  # (row, cores, workers)
    for number in range(options.rounds):
        say(f"measuring, round {number + 1} of {options.rounds}")
        for count in counts:
            for place, (peer, row) in enumerate(running):
                for workers in peer.workers(count):
                    how = ("run", work / peer.key, "--batch", options.batch, "--workers", workers)
                    seconds = ("--seconds", options.seconds / options.rounds)
                    try:
                        answer = call(interpreters[peer.package], peer.script, at_hand[:count], *how, *seconds)
                    except PeerFailed as error:
                        row["note"] = f"failed: {error}"
                        continue
                    rates.setdefault((place, count, workers), []).append(answer["rate"])
    for (place, count, workers), found in rates.items():
        better = {f"{name}_{count}": value for name, value in over_rounds("rate", found).items()}
        if better[f"rate_{count}"] > running[place][1].get(f"rate_{count}", 0):
            running[place][1].update(better, **{f"workers_{count}": workers})
    ours = next(row for row in rows if row["what"] == _OURS)
    for row in rows:
        for count in counts:
            row[f"ahead_{count}"] = ratio(ours.get(f"rate_{count}"), row.get(f"rate_{count}"))
    return rows, counts


def prepare(peer: Peer, interpreter: str, row: dict[str, Any], pairs: Path, truth: Truth, batch: int) -> str:
    """Convert the pairs to the loader's own format and check what it delivers -> a complaint, or an empty string.

    Fills in the row. Raises PeerFailed.
    """
    work = pairs.parent
    folder, note, cores = work / peer.key, json.loads((work / "pairs.json").read_text("utf-8")), available_cores()
    if not folder.is_dir():
        with tempfile.TemporaryDirectory(dir=work) as temporary:
            call(interpreter, peer.script, cores, "prepare", pairs, Path(temporary, "out"))
            Path(temporary, "out").replace(folder)
    converted = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    row["pair_kb"] = (note["bytes"] if peer in OWN else converted) / note["pairs"] / 1e3
    proof = work / "proof.npz"
    how = ("run", folder, "--batch", batch, "--workers", 1, "--check", proof, "--pairs", note["pairs"])
    row["versions"] = call(interpreter, peer.script, cores, *how)["versions"] if peer.checked else ""
    if not peer.checked:
        return ""
    complaint, known = truth.complaint(proof)
    proof.unlink()
    row |= known
    return complaint


def call(interpreter: str, script: Path, cores: Sequence[int], *arguments: object) -> dict[str, Any]:
    """Run a script on these cores with one thread for each of its libraries -> its answer. Raises PeerFailed."""
    hidden = _NOT_INHERITED if interpreter == sys.executable else (*_NOT_INHERITED, "PYTHONPATH", "PYTHONHOME")
    env = {key: value for key, value in os.environ.items() if key not in hidden} | dict.fromkeys(_ONE_THREAD, "1")
    command = [interpreter, str(script), *map(str, arguments)]
    pipe = subprocess.PIPE
    with (
        on_cores(cores),
        subprocess.Popen(command, env=env, stdout=pipe, stderr=pipe, text=True, start_new_session=True) as process,
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
    return {} if arguments[0] == "prepare" else json.loads(answer.splitlines()[-1])


def columns(counts: Sequence[int]) -> list[Column]:
    found = [Column("what", "loader"), Column("depth", "depth"), Column("pair_kb", "KB/pair", ",.0f")]
    for count in counts:
        name = "1 core" if count == 1 else f"{count} cores"
        found += [
            Column(f"rate_{count}", name, ",.0f"),
            Column(f"spread_{count}", "rounds"),
            Column(f"workers_{count}", "workers", "d"),
            Column(f"ahead_{count}", "mde_dist:", ".2f"),
        ]
    return found


if __name__ == "__main__":
    run_command(main)
