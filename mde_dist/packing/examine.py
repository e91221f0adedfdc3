"""Shards, looked at in full: every header, checksum and picture. The ground of --verify, --repair and --index."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mde_dist.data.images import jpeg_orientation
from mde_dist.data.manifest import INDEX, MEMBERS, ShardInfo, write_split
from mde_dist.data.shards import decode_pair
from mde_dist.data.statistics import Statistics
from mde_dist.data.tar import TarSample, index_rows, scan
from mde_dist.packing.pool import Progress, WorkerLost, count, run_jobs
from mde_dist.utils.errors import UserError
from mde_dist.utils.io import sha256_of


@dataclass
class Report:
    """Content of a shard, and its problems."""

    path: Path
    problems: list[str] = field(default_factory=list)
    """One line each: shard, key, what."""
    keys: list[str] = field(default_factory=list)
    """Keys of the whole samples."""
    rows: np.ndarray = field(default_factory=lambda: np.empty(0, INDEX))
    """Index rows of the whole samples."""
    bytes: int = 0
    sha256: str = ""
    statistics: Statistics | None = None
    """Statistics of the whole samples; None where the file cannot be read."""

    @property
    def info(self) -> ShardInfo:
        return ShardInfo(self.path.name, self.bytes, self.sha256, len(self.rows))


def validate_shard(path: Path, codec: str, size: tuple[int, int], expected: np.ndarray | None) -> Report:
    """Look at a shard in full; `expected`: the INDEX rows that it should have, None where there is no index."""
    report = Report(path)
    try:
        contents = scan(path)
        found = [sample for sample in contents.samples if not sample.missing]
        rows = index_rows(path, found)
        report.bytes, report.sha256 = path.stat().st_size, sha256_of(path)
    except OSError as error:
        report.problems.append(f"{path}: {error.strerror}")
        count(0 if expected is None else len(expected))
        return report
    report.problems += [f"{path}: {problem}" for problem in contents.problems]
    report.statistics = Statistics.empty(size)
    wanted = None if expected is None else {int(row["depth_offset"]): row for row in expected}
    whole = []
    with path.open("rb") as file:
        for number, (sample, row) in enumerate(zip(found, rows, strict=True)):
            target = None if wanted is None else wanted.pop(int(row["depth_offset"]), None)
            if wanted is not None and target is None:
                continue  # not in the index: left out when it was made
            wrong = _differs(row, target) or _unreadable(file.fileno(), sample, codec, size, report.statistics)
            if wrong:
                report.problems.append(f"{path}, key {sample.key}: {wrong}")
            else:
                whole.append(number)
            count(1)
    if wanted:
        count(len(wanted))
        if not contents.problems:  # which say why
            report.problems.append(f"{path}: {len(wanted)} samples of the index are not in the tar")
    report.keys, report.rows = [found[number].key for number in whole], rows[whole]
    return report


def _differs(row: np.ndarray, expected: np.ndarray | None) -> str | None:
    """First difference between a sample's row and the index; None where they agree."""
    if expected is None:
        return None
    for member in MEMBERS:
        if any(row[f"{member}_{what}"] != expected[f"{member}_{what}"] for what in ("offset", "bytes")):
            return f"no {member} where the index says"
        if row[f"{member}_crc"] != expected[f"{member}_crc"]:
            return f"{member} fails its checksum"
    return None


def _unreadable(file: int, sample: TarSample, codec: str, size: tuple[int, int], statistics: Statistics) -> str | None:
    """Reason why a sample cannot be used; if it can, it goes into the statistics."""
    image, target = np.empty((*size, 3), np.uint8), np.empty(size, np.uint16)
    try:
        jpeg = sample.read(file, "image")
        stray = decode_pair(jpeg, sample.read(file, "depth"), codec, image, target)
    except ValueError as error:
        return str(error)
    if not target.any():
        return "depth has no valid pixel"
    statistics.add(target, reencoded=False, turned=jpeg_orientation(jpeg) != 1, stray=stray)
    return None


def validate_shards(jobs: Sequence[tuple], workers: int, progress: Progress, total: int) -> dict[Path, Report]:
    """`validate_shard` with the arguments of each job, in parallel; by path. `total`: samples. Raises UserError."""
    try:
        return {report.path: report for report in run_jobs(validate_shard, jobs, workers, progress, total)}
    except WorkerLost:
        raise UserError("a process was killed (out of memory?); nothing was changed") from None


def drop_duplicate_keys(reports: Sequence[Report], codec: str, size: tuple[int, int]) -> list[Report]:
    """The reports of a split, less the samples whose key is in an earlier shard, which become problems."""
    seen: set[str] = set()
    result = []
    for report in reports:
        twice = [key in seen for key in report.keys]
        seen.update(report.keys)
        if any(twice):
            again = validate_shard(report.path, codec, size, report.rows[~np.array(twice)])
            said = (key for key, double in zip(report.keys, twice, strict=True) if double)
            again.problems = report.problems + [f"{report.path}, key {key}: in an earlier shard, too" for key in said]
            report = again
        result.append(report)
    return result


def record(directory: Path, split: str, reports: Sequence[Report], codec: str, revision: str) -> dict[str, Any]:
    """Write index and mean map of a split that is these shards; its record for the manifest. Raises OSError."""
    shards, statistics = [(report.info, report.rows) for report in reports], statistics_of(reports)
    counts = {"exif_orientations": int(statistics.turned[0]), "stray_bytes": int(statistics.stray[0])}
    return write_split(directory, split, shards, statistics, codec, revision) | counts


def statistics_of(reports: Sequence[Report]) -> Statistics:
    """Statistics of all whole samples."""
    parts = [report.statistics for report in reports if report.statistics is not None]
    total = Statistics.empty(parts[0].total.shape)
    for part in parts:
        total.merge(vars(part))
    return total


def relative(directory: Path, problem: str) -> str:
    """A problem without the path of the directory, which may move."""
    return problem.removeprefix(f"{directory}/")
