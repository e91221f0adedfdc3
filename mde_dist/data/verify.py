"""Shards that nobody vouches for: verify every byte, repair what can be, index what was packed elsewhere.

A repair never touches a file in place. Whole samples of a damaged tar are written to a tar of a new name, index and
mean map as well; the new manifest is what switches over, and what it does not name any more moves to DIR/quarantine.
Cut off at any point, the directory is as before or repaired.
"""

import io
import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg

from ..errors import UserError
from ..files import atomic_file, sync_directory, write_atomic
from . import depth
from .examine import Report, examine
from .manifest import (
    INDEX,
    MAX_SIDE,
    MEMBERS,
    NAME,
    Manifest,
    SplitInfo,
    check_name,
    command_for,
    file_info,
    parse_manifest,
    write_manifest,
    write_split,
)
from .pool import Progress, run_jobs
from .statistics import Statistics
from .tars import DEPTH_CODECS, scan
from .writer import ShardWriter

QUARANTINE = "quarantine"
_LOOKED_AT = 64  # images, to tell the size that all should have
_REVISION = re.compile(r"-r(\d+)$")


@dataclass
class Verdict:
    """What a look at everything has shown."""

    manifest: Manifest
    problems: list[str] = field(default_factory=list)
    """One line each."""
    reports: dict[str, list[Report]] = field(default_factory=dict)
    """By split, in the order of the manifest."""
    broken: set[str] = field(default_factory=set)
    """Splits with problems."""


def verify(directory: Path, workers: int, progress: Progress) -> Verdict:
    """Check every byte of a directory of shards. Raises UserError where its manifest cannot be read."""
    try:
        manifest = parse_manifest((directory / NAME).read_bytes(), str(directory))
    except OSError as error:
        advice = f"index the tars in it with: {command_for('index', str(directory))}"
        raise UserError(f"{directory / NAME}: {error.strerror}; {advice}") from None
    verdict = Verdict(manifest)
    jobs = []
    unindexed = {}
    for split in manifest.splits.values():
        index, unindexed[split.name] = _index(directory, split)
        for number, shard in enumerate(split.shards):
            expected = None if index is None else index[index["shard"] == number]
            jobs.append((directory / shard.name, manifest.codec, manifest.size, expected))
    reports = _examine(jobs, workers, progress, sum(split.samples for split in manifest.splits.values()))
    for split in manifest.splits.values():
        ordered = [reports[directory / shard.name] for shard in split.shards]
        verdict.reports[split.name] = _unique(ordered, manifest.codec, manifest.size)
        known = manifest.raw["splits"][split.name].get("skipped", [])
        known = known if isinstance(known, list) else []
        for report in verdict.reports[split.name]:
            report.problems = [problem for problem in report.problems if _within(directory, problem) not in known]
        against = _against_manifest(directory, split, verdict.reports[split.name], manifest, not unindexed[split.name])
        problems = unindexed[split.name] + against
        verdict.problems += problems
        verdict.broken |= {split.name} if problems else set()
    return verdict


def repair(directory: Path, verdict: Verdict) -> Manifest:
    """Leave out what is damaged; see the head of this file. Raises UserError where nothing whole is left of a split."""
    before, revision = verdict.manifest, _revision(directory)
    splits = dict(before.raw["splits"])
    broken = sorted(verdict.broken)
    for name in broken:
        if not any(len(report.rows) for report in verdict.reports[name]):
            raise UserError(f"{directory}: no sample of split {name} is whole; pack the shards again")
    for name in broken:
        reports = verdict.reports[name]
        whole = [_rewrite(r, before, revision) if r.problems else r for r in reports if len(r.rows)]
        splits[name] = {**splits[name], **_record(directory, name, whole, before.codec, revision)}
    quarantine = directory / QUARANTINE
    quarantine.mkdir(exist_ok=True)
    write_atomic(quarantine / f"manifest{revision}.json", (directory / NAME).read_bytes())
    repaired = write_manifest(directory, before.codec, before.size, before.layout, splits)
    for file in sorted(_named(before) - _named(repaired)):
        if (directory / file).exists():
            (directory / file).rename(quarantine / file)
    sync_directory(directory)
    return repaired


def index(
    directory: Path, workers: int, progress: Progress, skip_bad: bool, check: Callable[[str, float], None]
) -> tuple[Manifest, list[str]]:
    """Make index, mean maps and manifest for the tars in a directory -> the manifest, and what was left out.

    The tars that have one name before their number are a split. `check(split, median)` may refuse a median depth in
    metres. Raises UserError.
    """
    if (directory / NAME).exists():
        raise UserError(f"{directory / NAME} is there already; check it with: {command_for('verify', str(directory))}")
    tars = sorted(directory.glob("*.tar"))
    for tar in tars:
        try:
            check_name(tar.name)
        except ValueError:
            raise UserError(f"{tar}: rename it: letters, digits and . _ - + @ = , and blanks only") from None
    codec, size, samples = _look(directory, tars)
    found = _examine([(tar, codec, size, None) for tar in tars], workers, progress, samples)
    by_split: dict[str, list[Report]] = {}
    for tar in tars:
        by_split.setdefault(_split_of(tar), []).append(found[tar])
    kept: dict[str, list[Report]] = {}
    left_out: dict[str, list[str]] = {}
    for name, reports in by_split.items():
        reports = _unique(reports, codec, size)
        wrong = [problem for report in reports for problem in report.problems]
        if wrong and not skip_bad:
            more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
            raise UserError(f"{wrong[0]}{more}; leave such samples out with --skip-bad")
        whole = [report for report in reports if len(report.rows)]
        if not whole:
            raise UserError(f"{directory}: no sample of split {name} is whole; {(wrong or ['its tars are empty'])[0]}")
        check(name, _statistics(whole).summary()["median"])
        kept[name], left_out[name] = whole, wrong
    splits = {
        name: _record(directory, name, whole, codec, "")
        | {"skipped": [_within(directory, it) for it in left_out[name]]}
        for name, whole in kept.items()
    }
    problems = [problem for wrong in left_out.values() for problem in wrong]
    return write_manifest(directory, codec, size, "tars", splits), problems


def _examine(jobs: Sequence[tuple], workers: int, progress: Progress, total: int) -> dict[Path, Report]:
    try:
        return {report.path: report for report in run_jobs(examine, jobs, workers, progress, total)}
    except BrokenProcessPool:
        raise UserError("a process was killed (out of memory?); nothing was changed") from None


def _index(directory: Path, split: SplitInfo) -> tuple[np.ndarray | None, list[str]]:
    """The index as the manifest names it, or None and what is wrong with it."""
    path = directory / split.index.name
    try:
        if file_info(path) != split.index:
            raise ValueError("not the index that the manifest names")
        rows = np.lib.format.read_array(io.BytesIO(path.read_bytes()), allow_pickle=False)
        if rows.dtype != INDEX or rows.shape != (split.samples,):
            raise ValueError("not an index of this many samples")
        return rows, []
    except (OSError, ValueError) as error:
        return None, [f"{path}: {error.strerror if isinstance(error, OSError) else error}"]


def _against_manifest(
    directory: Path, split: SplitInfo, reports: list[Report], manifest: Manifest, indexed: bool
) -> list[str]:
    """What contradicts the manifest, behind what the shards say of themselves."""
    problems = []
    for shard, report in zip(split.shards, reports, strict=True):
        if report.statistics is not None and report.info != shard and not report.problems:
            for what in ("bytes", "sha256", "samples"):
                now, then = getattr(report.info, what), getattr(shard, what)
                if now != then:
                    report.problems.append(f"{report.path}: {what} {now}, the manifest says {then}")
                    break
        if not indexed and report.problems and (report.bytes, report.sha256) != (shard.bytes, shard.sha256):
            report.keys, report.rows, report.statistics = [], report.rows[:0], Statistics.empty(manifest.size)
            report.problems.append(f"{report.path}: without its index nobody can tell which samples are whole")
        problems += report.problems
    mean = directory / split.mean_map.name
    try:
        if file_info(mean) != split.mean_map:
            raise ValueError("not the mean map that the manifest names")
        depth.decode(mean.read_bytes(), manifest.codec, np.empty(manifest.size, np.uint16))
    except (OSError, ValueError) as error:
        problems.append(f"{mean}: {error.strerror if isinstance(error, OSError) else error}")
    if not problems and _statistics(reports).summary() != dict(split.depth):
        problems.append(f"{directory / NAME}: depth statistics of split {split.name} are not those of its samples")
    return problems


def _unique(reports: Sequence[Report], codec: str, size: tuple[int, int]) -> list[Report]:
    """The reports of a split, less the samples whose key is in an earlier shard, which become problems."""
    seen: set[str] = set()
    result = []
    for report in reports:
        twice = [key in seen for key in report.keys]
        seen.update(report.keys)
        if any(twice):
            again = examine(report.path, codec, size, report.rows[~np.array(twice)])
            said = (key for key, double in zip(report.keys, twice, strict=True) if double)
            again.problems = report.problems + [f"{report.path}, key {key}: in an earlier shard, too" for key in said]
            report = again
        result.append(report)
    return result


def _rewrite(report: Report, manifest: Manifest, revision: str) -> Report:
    """The whole samples of a damaged tar in a tar of a new name."""
    stem = _REVISION.sub("", report.path.stem)
    target = report.path.with_name(f"{stem}{revision}.tar")
    with report.path.open("rb") as old, atomic_file(target) as new, ShardWriter(new, manifest.codec) as writer:
        for key, row in zip(report.keys, report.rows, strict=True):
            places = {member: (int(row[f"{member}_bytes"]), int(row[f"{member}_offset"])) for member in MEMBERS}
            writer.write_members(key, {m: os.pread(old.fileno(), *place) for m, place in places.items() if place[0]})
    written = examine(target, manifest.codec, manifest.size, None)
    if written.problems or written.keys != report.keys:
        raise UserError(f"{target} did not come out whole ({written.problems}); nothing was changed")
    return written


def _record(directory: Path, split: str, reports: Sequence[Report], codec: str, revision: str) -> dict[str, Any]:
    shards = [(report.info, report.rows) for report in reports]
    return write_split(directory, split, shards, _statistics(reports), codec, revision)


def _statistics(reports: Sequence[Report]) -> Statistics:
    parts = [report.statistics for report in reports if report.statistics is not None]
    total = Statistics.empty(parts[0].total.shape)
    for part in parts:
        total.merge(vars(part))
    return total


def _within(directory: Path, problem: str) -> str:
    """A problem without the place of the directory, which may move."""
    return problem.removeprefix(f"{directory}/")


def _named(manifest: Manifest) -> set[str]:
    """The files of a manifest."""
    splits = manifest.splits.values()
    return {file.name for split in splits for file in (*split.shards, split.index, split.mean_map)}


def _revision(directory: Path) -> str:
    """What to add to the names of new files: -r1, -r2, …"""
    names = (_REVISION.search(path.name.split(".")[0]) for path in directory.iterdir())
    return f"-r{1 + max((int(found[1]) for found in names if found), default=0)}"


def _split_of(tar: Path) -> str:
    name = re.sub(r"[-_.]?\d+$", "", _REVISION.sub("", tar.stem))
    return name or "train"


def _look(directory: Path, tars: Sequence[Path]) -> tuple[str, tuple[int, int], int]:
    """Depth codec, the most common size of the first images, and the number of samples. Raises UserError."""
    sizes: list[tuple[int, int]] = []
    codec, samples = "", 0
    extensions: set[str] = set()
    for tar in tars:
        try:
            contents = scan(tar)
        except OSError as error:
            raise UserError(f"{tar}: {error.strerror}") from None
        extensions |= contents.extensions
        samples += len(contents.samples)
        for sample in contents.samples:
            if len(sizes) > _LOOKED_AT or sample.missing:
                continue
            try:
                with tar.open("rb") as file:
                    height, width = simplejpeg.decode_jpeg_header(sample.read(file.fileno(), "image"))[:2]
            except ValueError:
                continue
            if max(height, width) <= MAX_SIDE:
                codec = codec or sample.codec
                sizes.append((height, width))
    if not sizes:
        wanted = " or ".join(f"KEY.{extension}" for extension in DEPTH_CODECS)
        found = ", ".join(sorted(extensions)) or "no tar with samples"
        raise UserError(f"{directory}: no sample has a KEY.jpg and a {wanted}; found: {found}; pack from the source")
    return codec, max(set(sizes), key=sizes.count), samples
