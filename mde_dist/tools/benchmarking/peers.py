"""`bench peers`: the usual loaders and this package's on the same pairs, each on the same cores, in turn."""

import contextlib
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import tyro

from mde_dist.data.shards import ShardDataset, open_split
from mde_dist.distributed.process_group import init_distributed
from mde_dist.tools.benchmarking.metres import metres
from mde_dist.tools.benchmarking.peer_pairs import Truth, bytes_in, bytes_in_shards, take_pairs
from mde_dist.tools.benchmarking.peer_scripts import PEERS, Peer, PeerFailed, call, chosen_interpreters, interpreter_of
from mde_dist.tools.benchmarking.pinned import pinned
from mde_dist.tools.benchmarking.result import (
    Column,
    Result,
    Table,
    Timing,
    cores_at_hand,
    device_name,
    over_rounds,
    plain_config,
    ratio,
)
from mde_dist.training.config import Config
from mde_dist.training.setup import make_sample
from mde_dist.utils.console import say
from mde_dist.utils.errors import UserError
from mde_dist.utils.io import writing
from mde_dist.utils.user import temporary_folder

OURS, IN_MILLIMETRES, LIMIT = "mde_dist", "mde_dist, depth left in millimetres", "limit: bare decoding"
_FAR_BEHIND = 0.9


@dataclass(frozen=True)
class Options(Config, Timing):
    """How many pairs a second other loaders give on this machine, beside the one of this package. The first pairs of
    --data.shards are taken out and converted to the format of each: JPEGs with their own bytes, depth as 16-bit PNG, or
    raw for those marked so. All deliver batches of uint8 images and float32 metres, shuffled, which is checked before
    the clock runs. The PyTorch Datasets and WebDataset are always there, the others where --python names an interpreter
    that has them."""

    python: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """NAME=INTERPRETER of a virtual environment, once per loader: streaming, litdata, dali, ffcv. For example
    --python ffcv=/opt/ffcv/bin/python"""
    pairs: int = 240
    """Pairs to take out of the shards, at most."""
    batch: int = 8
    """Pairs in a batch."""
    cores: tuple[int, ...] = (1, 2)
    """Numbers of cores to measure on, as far as they are at hand: on one with the better of none and one worker, on
    more with a worker (or decoding thread) for each."""
    only: tuple[str, ...] = ()
    """Names of the loaders to measure; none given = all. The limit and this package's are always measured."""
    work: Path | None = None
    """Directory for the converted pairs, which is kept and used again; None = a temporary one."""

    def check(self) -> None:
        """Raises UserError."""
        super().check()
        for name in ("pairs", "batch"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} = {getattr(self, name)}: must be at least 1")
        if self.pairs < self.batch:
            raise UserError(f"pairs = {self.pairs}: must be at least a batch, {self.batch}")
        known = [peer.key for peer in PEERS]
        for name in self.only:
            if name not in known:
                raise UserError(f"only = {name}: must be of {', '.join(known)}")
        if not self.cores or min(self.cores) < 1:
            raise UserError(f"cores = {', '.join(map(str, self.cores))}: must be numbers from 1 on")
        chosen_interpreters(self.python)


@dataclass
class _Entry:
    """A row of the table, and how it is measured."""

    row: dict[str, Any]
    choices: Callable[[int], Sequence[int]]
    """Cores -> numbers of workers to try on them."""
    run: Callable[[Sequence[int], int, float], dict[str, Any]] | None = None
    """(cores, workers, seconds) -> rate; None where it cannot be measured."""


def bench(options: Options) -> Result:
    """Raises UserError."""
    at_hand = cores_at_hand()
    counts = [count for count in sorted(set(options.cores)) if count <= len(at_hand)]
    if not counts:
        raise UserError(f"cores = {min(options.cores)}: {len(at_hand)} are at hand")
    with init_distributed("fp32") as accelerator:
        make_sample(options, accelerator)
    with contextlib.ExitStack() as opened:
        data = options.data
        shards = opened.enter_context(open_split(data.shards, data.train_split, data.cache_options))
        pairs = min(options.pairs, len(shards))
        if pairs < options.batch:
            raise UserError(f"{data.shards} has {pairs} pairs in {data.train_split}, less than a batch")
        work = options.work or Path(opened.enter_context(tempfile.TemporaryDirectory(dir=temporary_folder())))
        with writing(work):
            work.mkdir(parents=True, exist_ok=True)
        task = _Task(options, shards, pairs, work, Truth(shards, pairs), at_hand[: counts[-1]])
        opened.callback(task.proof.unlink, missing_ok=True)
        entries = [*_own(task), *_others(task)]
        _measure(entries, options, {count: at_hand[:count] for count in counts})
        height, width = shards.size
        title = f"{pairs} pairs of {height}x{width}, batches of {options.batch}, pairs/s"
        rows = [entry.row for entry in entries]
        _compare(rows, counts)
        return Result(
            "peers",
            {"peers": Table(title, _columns(counts), rows)},
            _summary(rows, counts[-1]),
            device=device_name(torch.device("cpu")),
            config=plain_config(options),
            notes=[f"{row['what']} ({row['depth']}): {row['note']}" for row in rows if row.get("note")],
        )


@dataclass(frozen=True)
class _Task:
    """What all loaders are prepared and checked with."""

    options: Options
    shards: ShardDataset
    pairs: int
    work: Path
    truth: Truth
    cores: Sequence[int]
    """To prepare and check on."""

    @property
    def proof(self) -> Path:
        return self.work / "proof.npz"


def _own(task: _Task) -> list[_Entry]:
    """The bare decoders, and this package's loader with depth in metres and in millimetres."""
    options, shards, data = task.options, task.shards, task.options.data
    place: dict[str, Any] = {"place": data.shards, "split": data.train_split, "window": data.shuffle_shards}
    place |= {"cache": [str(data.cache), data.cache_options.limit, data.remote_timeout], "seed": options.train.seed}
    how = place | {"pairs": task.pairs, "batch": options.batch, "ahead": data.prefetch_batches}

    def limit(cores: Sequence[int], workers: int, seconds: float) -> dict[str, Any]:
        with pinned("reading", "limit", cores, **place) as ask:
            return ask(seconds)

    def loader(cores: Sequence[int], workers: int, seconds: float, converted: bool = True) -> dict[str, Any]:
        with pinned("metres", "metres", cores, **how, threads=workers, converted=converted) as ask:
            return ask(seconds)

    with metres(**how, threads=1, check=str(task.proof)) as prove:
        prove(0)
    complaint, known = task.truth.complaint(task.proof)
    if complaint:
        raise RuntimeError(complaint)
    kb = {"depth": shards.manifest.codec, "pair_kb": bytes_in_shards(shards, task.pairs) / task.pairs / 1e3}
    return [
        _Entry({"what": LIMIT, **kb}, lambda cores: [1] if cores == 1 else [], limit),
        _Entry({"what": OURS, **kb, **known}, lambda cores: [0, 1] if cores == 1 else [cores], loader),
        _Entry(
            {"what": IN_MILLIMETRES, **kb},
            lambda cores: [0, 1] if cores == 1 else [cores],
            lambda cores, workers, seconds: loader(cores, workers, seconds, converted=False),
        ),
    ]


def _others(task: _Task) -> list[_Entry]:
    """Every other loader, converted for and checked, or with the reason why it cannot be measured."""
    chosen, entries = chosen_interpreters(task.options.python), []
    for peer in PEERS:
        if task.options.only and peer.key not in task.options.only:
            continue
        entry = _Entry({"what": peer.title, "depth": peer.depth}, _choices(peer))
        entries.append(entry)
        interpreter = interpreter_of(peer, chosen)
        if interpreter is None:
            entry.row["note"] = f"not installed; --python {peer.package}=INTERPRETER"
            continue
        say(f"preparing {peer.title}, depth {peer.depth}")
        try:
            folder = _prepared(task, peer, interpreter)
            how = ("run", folder, "--batch", task.options.batch, "--workers")
            proof = ("--check", task.proof, "--pairs", task.pairs)
            found = call(interpreter, peer.script, task.cores, *how, 1, *proof)
        except PeerFailed as error:
            entry.row["note"] = f"failed: {error}"
            continue
        complaint, known = task.truth.complaint(task.proof)
        entry.row |= {"versions": found["versions"], "pair_kb": bytes_in(folder) / task.pairs / 1e3, **known}
        entry.row["note"] = f"delivers something else: {complaint}" if complaint else _about(entry.row)
        if not complaint:
            entry.run = _runner(peer, interpreter, how)
    return entries


def _choices(peer: Peer) -> Callable[[int], Sequence[int]]:
    return lambda cores: [cores] if cores > 1 or peer.threads else [0, 1]


def _runner(
    peer: Peer, interpreter: str, how: tuple[object, ...]
) -> Callable[[Sequence[int], int, float], dict[str, Any]]:
    return lambda cores, workers, seconds: call(interpreter, peer.script, cores, *how, workers, "--seconds", seconds)


def _prepared(task: _Task, peer: Peer, interpreter: str) -> Path:
    """The folder of the peer's own format. Raises PeerFailed."""
    pairs, folder = take_pairs(task.shards, task.pairs, task.work), task.work / peer.key
    if not folder.is_dir():
        with tempfile.TemporaryDirectory(dir=task.work) as temporary:
            call(interpreter, peer.script, task.cores, "prepare", pairs, Path(temporary, "out"))
            Path(temporary, "out").replace(folder)
    return folder


def _about(row: dict[str, Any]) -> str:
    words = [row["versions"], row["layout"]]
    if row["image_mean_difference"]:
        mean, most = row["image_mean_difference"], row["image_max_difference"]
        words.append(f"images differ from libjpeg-turbo's best by {mean:.2f} levels on average, {most} at most")
    return "; ".join(filter(None, words))


def _measure(entries: Sequence[_Entry], options: Options, cores: dict[int, list[int]]) -> None:
    """All rows in turn, round by round, each time in a new process; of several numbers of workers the best counts."""
    found: dict[tuple[int, int], dict[int, list[float]]] = {}  # (row, cores) -> workers -> rate of each round
    for number in range(options.rounds):
        say(f"measuring, round {number + 1} of {options.rounds}")
        for count, where in cores.items():
            for place, entry in enumerate(entries):
                rates = found.setdefault((place, count), {workers: [] for workers in entry.choices(count)})
                for workers in _in_the_running(rates) if entry.run else ():
                    try:
                        answer = entry.run(where, workers, options.seconds / options.rounds)  # type: ignore[misc]
                    except PeerFailed as error:
                        entry.run, entry.row["note"] = None, f"failed: {error}"
                        break
                    rates[workers].append(answer["rate"])
    for (place, count), rates in found.items():
        row = entries[place].row
        row[f"rate_{count}"] = None
        if entries[place].run and rates:
            workers = max(_in_the_running(rates), key=lambda workers: median(rates[workers]))
            row[f"workers_{count}"] = workers
            row |= {f"{name}_{count}": value for name, value in over_rounds("rate", rates[workers]).items()}


def _in_the_running(rates: dict[int, list[float]]) -> list[int]:
    """The numbers of workers that may still be the best: far behind in the first round is behind."""
    first = {workers: of_rounds[0] for workers, of_rounds in rates.items() if of_rounds}
    if len(first) < len(rates):  # which is being measured
        return list(rates)
    return [workers for workers, rate in first.items() if rate > _FAR_BEHIND * max(first.values())]


def _compare(rows: Sequence[dict[str, Any]], counts: Sequence[int]) -> None:
    """Note in each row how many times as many pairs this package gives."""
    ours = next(row for row in rows if row["what"] == OURS)
    for row in rows:
        for count in counts:
            row[f"ahead_{count}"] = ratio(ours[f"rate_{count}"], row[f"rate_{count}"])


def _columns(counts: Sequence[int]) -> list[Column]:
    columns = [Column("what", "loader"), Column("depth", "depth"), Column("pair_kb", "KB/pair", ",.0f")]
    for count in counts:
        name = "1 core" if count == 1 else f"{count} cores"
        columns += [
            Column(f"rate_{count}", name, ",.0f"),
            Column(f"spread_{count}", "rounds"),
            Column(f"workers_{count}", "workers", "d"),
            Column(f"ahead_{count}", "mde_dist:", ".2f"),
        ]
    return columns


def _summary(rows: Sequence[dict[str, Any]], count: int) -> str:
    """In words: this package's loader beside the best other one."""
    rate = f"rate_{count}"
    ours = next(row for row in rows if row["what"] == OURS)
    others = [row for row in rows if row[rate] and row["what"] not in (OURS, IN_MILLIMETRES, LIMIT)]
    where = f"on {count} core{'s' if count > 1 else ''}"
    if not others:
        return f"{OURS} gives {ours[rate]:,.0f} pairs/s {where}; nothing else was measured"
    best = max(others, key=lambda row: row[rate])
    name = f"{best['what']} with depth {best['depth']}"
    return f"{OURS} gives {ours[rate]:,.0f} pairs/s {where}, {ours[rate] / best[rate]:.2f} times {name}, the best other"
