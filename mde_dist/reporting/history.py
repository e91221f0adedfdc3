"""A run directory -> what its report tells: read once, checked here, so that the rest can trust it.

What an older version, a run that just began or a damaged file leaves out is None or empty, and said in `notes`.
"""

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from mde_dist.evaluation.metrics import PROTOCOLS
from mde_dist.evaluation.results import EVALUATIONS, read_record
from mde_dist.models.weights import MODEL
from mde_dist.training.checkpoint import newest_record
from mde_dist.training.run_dir import PREEMPTED
from mde_dist.training.snapshots import ValidationSnapshots, read_snapshots
from mde_dist.utils.errors import UserError
from mde_dist.utils.jsonl import number, read_lines
from mde_dist.utils.urls import without_keys


@dataclass(frozen=True)
class Line:
    """A line of metrics.jsonl about a step, an evaluation or a baseline."""

    samples: int
    time: float | None
    """Seconds since 1970."""
    attempt: int
    """Number of the start of the run that wrote it, from 0."""
    kind: str
    """`step`; the name of the protocol; the name of a baseline."""
    values: Mapping[str, float]
    """Every finite number of it by its name."""


@dataclass(frozen=True)
class Start:
    """A start of the run, or of its going on."""

    samples: int
    time: float
    values: Mapping[str, Any]
    """Values of `ranks`, `device`, `precision`, `batch_size`, `host`, `versions` that it names."""


@dataclass(frozen=True, eq=False)
class Run:
    """Records of a run."""

    path: Path
    name: str
    """Short, and another one for each run of a page."""
    config: Mapping[str, Any]
    """`section.field` -> value as config.toml writes it."""
    toml: str
    steps: Sequence[Line]
    """Lines by samples seen, each number of samples once."""
    evaluations: Sequence[Line]
    """Lines by samples seen, each once; all of one protocol."""
    baselines: Sequence[Line]
    protocol: str | None
    """Protocol of the evaluations."""
    starts: Sequence[Start]
    state: Mapping[str, Any]
    """state.json of its newest checkpoint."""
    record: Mapping[str, Any] | None
    """The last evaluation, as `evaluate --json` writes it."""
    snapshots: ValidationSnapshots | None
    """Pictures of held-out images while it learned: one prediction of each at least."""
    preempted: bool
    """Stopped by a signal, and waiting to be continued."""
    notes: Sequence[str]
    """Lines about what could not be read."""

    @property
    def samples(self) -> int:
        """Seen so far, as far as a line tells."""
        return max((line.samples for line in (*self.steps, *self.evaluations)), default=0)

    @property
    def total(self) -> int | None:
        """Samples at which it ends."""
        wanted = self.config.get("train.total_samples")
        return wanted if isinstance(wanted, int) and wanted > 0 else None

    @property
    def finished(self) -> bool:
        """True where its weights are published, and it was not given more samples to go on with since."""
        return (self.path / MODEL).is_file() and not (self.total and 0 < self.samples < self.total)

    def manifest(self, split: Literal["manifest", "eval_manifest"]) -> str | None:
        """sha256 of the manifest of the shards that it is trained on, or evaluated on."""
        found = self.state.get("identity", {}).get(split)
        return found if isinstance(found, str) else None

    @property
    def last(self) -> Line | None:
        return self.evaluations[-1] if self.evaluations else None

    @property
    def best(self) -> Line | None:
        """The evaluation with the least abs_rel."""
        scored = [line for line in self.evaluations if "abs_rel" in line.values]
        return min(scored, key=lambda line: line.values["abs_rel"], default=None)

    @property
    def fingerprint(self) -> Mapping[str, Any] | None:
        """The fingerprint of its evaluations."""
        return self.record["fingerprints"].get(self.protocol) if self.record else None

    def spans(self) -> list[tuple[float, float]]:
        """Per start, when it began and when its last line was written, seconds since 1970."""
        ends = [start.time for start in self.starts]
        for line in (*self.steps, *self.evaluations):
            if line.time is not None and ends:
                ends[line.attempt] = max(ends[line.attempt], line.time)
        return [(start.time, end) for start, end in zip(self.starts, ends, strict=True)]


RunPoint = tuple[int, Run]
"""A run, and its index among the runs of the page, which decides its colour."""


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Raises UserError where one of them is no run directory."""
    if not paths:
        raise UserError("name at least one run directory: --run DIR")
    if len({path.resolve() for path in paths}) != len(paths):
        raise UserError("--run: a run is named twice")
    return [read_run(path, name) for path, name in zip(paths, short_names(paths), strict=True)]


def short_names(paths: Sequence[Path]) -> list[str]:
    """The last part of each path, and as many parts before it as tell it from the others."""
    parts = [path.resolve().parts for path in paths]
    for count in range(1, max(map(len, parts))):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [str(path.resolve()) for path in paths]


def read_run(path: Path, name: str) -> Run:
    """Raises UserError where `path` is no run directory."""
    metrics = path / "metrics.jsonl"
    if not metrics.is_file():
        raise UserError(f"--run {path}: no metrics.jsonl in it; is it a run directory?")
    try:
        records, note = read_lines(metrics)
    except OSError as error:
        raise UserError(f"{metrics}: cannot be read ({error.strerror})") from None
    starts, lines = parse_records(records)
    notes = [note] if note else []
    toml, config = _config(path / "config.toml", notes)
    evaluations = dedupe(line for line in lines if line.kind in PROTOCOLS)
    protocol = evaluations[-1].kind if evaluations else None
    return Run(
        path=path,
        name=name,
        config=config,
        toml=toml,
        steps=dedupe(line for line in lines if line.kind == "step"),
        evaluations=[line for line in evaluations if line.kind == protocol],
        baselines=[line for line in lines if line.kind not in ("step", *PROTOCOLS)],
        protocol=protocol,
        starts=starts,
        state=newest_record(path),
        record=_record(path / EVALUATIONS / "last.json", protocol, notes),
        snapshots=_snapshots(path, notes),
        preempted=(path / PREEMPTED).is_file(),
        notes=notes,
    )


def parse_records(records: Sequence[Mapping[str, Any]]) -> tuple[list[Start], list[Line]]:
    """The records of a metrics.jsonl, in their order; those of kinds that are not known here are left out."""
    starts: list[Start] = []
    lines: list[Line] = []
    for record in records:
        samples, start = record["samples"], record.get("start")
        if start is not None:
            began = number(start.get("time"))
            if began is not None:
                starts.append(Start(samples, began, start))
            continue
        kind = "step" if "loss" in record else record.get("baseline", record.get("evaluation"))
        if isinstance(kind, str):
            values = {name: value for name, raw in record.items() if (value := number(raw)) is not None}
            lines.append(Line(samples, values.get("time"), max(len(starts) - 1, 0), kind, values))
    return starts, lines


def dedupe(lines: Iterator[Line]) -> list[Line]:
    """Sort lines by samples seen; of several at one number the last one written counts."""
    found = {line.samples: line for line in lines}
    return [found[samples] for samples in sorted(found)]


def _config(path: Path, notes: list[str]) -> tuple[str, dict[str, Any]]:
    try:
        text = without_keys(path.read_text("utf-8"))  # which older versions wrote with keys
        return text, dict(_flat(tomllib.loads(text)))
    except (OSError, ValueError) as error:
        notes.append(f"{path.name} cannot be read ({getattr(error, 'strerror', None) or error})")
        return "", {}


def _flat(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _record(path: Path, protocol: str | None, notes: list[str]) -> Mapping[str, Any] | None:
    if protocol is None:
        return None
    try:
        record = read_record(path)
        if protocol not in record["fingerprints"] or not isinstance(record.get("ground_truth"), dict):
            raise UserError(f"{path} has no {protocol} evaluation")
    except UserError as error:
        missing = f"{path} is not there: no single images and no errors by distance and position are known"
        notes.append(str(error) if path.exists() else missing)
        return None
    return record


def _snapshots(path: Path, notes: list[str]) -> ValidationSnapshots | None:
    try:
        found = read_snapshots(path)
    except UserError as error:
        notes.append(str(error))
        return None
    if found is None or not found.keys or not found.predictions:
        return None
    return replace(found, predictions=dict(sorted(found.predictions.items())))
