"""Leave out what is damaged in a directory of shards, without touching a file in place.

Whole samples of a damaged tar are written to a tar of a new name, index and mean map as well; the new manifest is what
switches over, and what it does not name any more moves to DIR/quarantine. Cut off at any point, the directory is as
before or repaired.
"""

import os
import re
from pathlib import Path

from mde_dist.data.manifest import MEMBERS, NAME, Manifest, write_manifest
from mde_dist.packing.examine import Report, record, validate_shard
from mde_dist.packing.validate import ValidationReport
from mde_dist.packing.writer import ShardWriter
from mde_dist.utils.errors import UserError
from mde_dist.utils.io import atomic_file, sha256_of, sync_directory, write_atomic
from mde_dist.utils.locks import locked

QUARANTINE = "quarantine"
LOCK = ".lock"
"""Lock file in the directory while it is repaired or indexed."""
REVISION = re.compile(r"-r(\d+)$")
"""End of the name of a repaired tar."""


def repair(directory: Path, verdict: ValidationReport) -> Manifest:
    """Leave out what is damaged; see the head of this file.

    Raises UserError where nothing whole is left of a split, or where another command is at work at the directory.
    """
    with locked(directory / LOCK, f"{directory}: another command repairs or indexes it"):
        if sha256_of(directory / NAME) != verdict.manifest.sha256:
            raise UserError(f"{directory}: another command has changed its manifest meanwhile; look at it again")
        return _repair(directory, verdict)


def _repair(directory: Path, verdict: ValidationReport) -> Manifest:
    before, revision = verdict.manifest, _revision(directory)
    splits = dict(before.raw["splits"])
    broken = sorted(verdict.broken)
    for name in broken:
        if not any(len(report.rows) for report in verdict.reports[name]):
            raise UserError(f"{directory}: no sample of split {name} is whole; pack the shards again")
    for name in broken:
        reports = verdict.reports[name]
        whole = [_rewrite(r, before, revision) if r.problems else r for r in reports if len(r.rows)]
        splits[name] = {**splits[name], **record(directory, name, whole, before.codec, revision)}
    quarantine = directory / QUARANTINE
    quarantine.mkdir(exist_ok=True)
    write_atomic(quarantine / f"manifest{revision}.json", (directory / NAME).read_bytes())
    repaired = write_manifest(directory, before.codec, before.size, before.layout, splits)
    for file in sorted(before.files - repaired.files):
        if (directory / file).exists():
            (directory / file).rename(quarantine / file)
    sync_directory(directory)
    return repaired


def _rewrite(report: Report, manifest: Manifest, revision: str) -> Report:
    """The whole samples of a damaged tar in a tar of a new name."""
    stem = REVISION.sub("", report.path.stem)
    target = report.path.with_name(f"{stem}{revision}.tar")
    with report.path.open("rb") as old, atomic_file(target) as new, ShardWriter(new, manifest.codec) as writer:
        for key, row in zip(report.keys, report.rows, strict=True):
            extents = {member: (int(row[f"{member}_bytes"]), int(row[f"{member}_offset"])) for member in MEMBERS}
            writer.write_members(
                key, {m: os.pread(old.fileno(), *extent) for m, extent in extents.items() if extent[0]}
            )
    written = validate_shard(target, manifest.codec, manifest.size, None)
    if written.problems or written.keys != report.keys:
        raise UserError(f"{target} did not come out whole ({written.problems}); nothing was changed")
    return written


def _revision(directory: Path) -> str:
    """Suffix for the names of new files: -r1, -r2, …"""
    names = (REVISION.search(path.name.split(".")[0]) for path in directory.iterdir())
    return f"-r{1 + max((int(found[1]) for found in names if found), default=0)}"
