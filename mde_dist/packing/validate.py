"""A directory of shards against its manifest: every byte of it."""

import io
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mde_dist.data import depth
from mde_dist.data.config import CacheOptions
from mde_dist.data.manifest import INDEX, NAME, Manifest, SplitInfo, file_info
from mde_dist.data.statistics import Statistics
from mde_dist.data.store import open_store
from mde_dist.packing.examine import Report, drop_duplicate_keys, relative, statistics_of, validate_shards
from mde_dist.packing.pool import Progress


@dataclass
class ValidationReport:
    """Result of validating a directory of shards."""

    manifest: Manifest
    problems: list[str] = field(default_factory=list)
    """One line each."""
    reports: dict[str, list[Report]] = field(default_factory=dict)
    """Reports by split, in the order of the manifest."""
    broken: set[str] = field(default_factory=set)
    """Splits with problems."""


def verify(directory: Path, workers: int, progress: Progress) -> ValidationReport:
    """Check every byte of a directory of shards. Raises UserError where its manifest cannot be read."""
    manifest, _ = open_store(directory, CacheOptions())
    verdict = ValidationReport(manifest)
    jobs = []
    unindexed = {}
    for split in manifest.splits.values():
        index, unindexed[split.name] = _index(directory, split)
        for number, shard in enumerate(split.shards):
            expected = None if index is None else index[index["shard"] == number]
            jobs.append((directory / shard.name, manifest.codec, manifest.size, expected))
    reports = validate_shards(jobs, workers, progress, sum(split.samples for split in manifest.splits.values()))
    for split in manifest.splits.values():
        ordered = [reports[directory / shard.name] for shard in split.shards]
        verdict.reports[split.name] = drop_duplicate_keys(ordered, manifest.codec, manifest.size)
        known = manifest.raw["splits"][split.name].get("skipped", [])
        known = known if isinstance(known, list) else []
        for report in verdict.reports[split.name]:
            report.problems = [problem for problem in report.problems if relative(directory, problem) not in known]
        against = _against_manifest(directory, split, verdict.reports[split.name], manifest, not unindexed[split.name])
        problems = unindexed[split.name] + against
        verdict.problems += problems
        verdict.broken |= {split.name} if problems else set()
    return verdict


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
    """List contradictions to the manifest, besides what the shards say of themselves."""
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
    if not problems and statistics_of(reports).summary() != dict(split.depth):
        problems.append(f"{directory / NAME}: depth statistics of split {split.name} are not those of its samples")
    return problems
