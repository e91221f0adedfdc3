"""Shards that are there: verified, repaired, indexed, and shown. The part of `mde_dist.shard` behind the packing."""

from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Table

from mde_dist.data.depth import DepthScale
from mde_dist.data.images import stray_in_words
from mde_dist.data.manifest import Manifest, command_for
from mde_dist.packing.index_tars import index_tars
from mde_dist.packing.probe import INDOOR_METRES
from mde_dist.packing.repair import QUARANTINE, repair
from mde_dist.packing.validate import verify
from mde_dist.utils.console import say
from mde_dist.utils.errors import UserError
from mde_dist.utils.io import writing
from mde_dist.utils.paths import command_line
from mde_dist.utils.progress import progress_bar

_SHOWN = 20  # problems that are listed
_AS_IT_WAS = "what was there is as it was"  # the manifest is written last


def verify_shards(console: Console, directory: Path, workers: int, mend: bool) -> int:
    """Check a directory of shards, with `mend` repair it; returns the exit code: 1 where something is left wrong."""
    with progress_bar(console, "verifying", "samples") as progress:
        verdict = verify(directory, workers, progress)
    for name, reports in verdict.reports.items():
        say_turned(name, sum(int(report.statistics.turned[0]) for report in reports if report.statistics))
    looked_at = [report.statistics for reports in verdict.reports.values() for report in reports]
    say_stray(sum(int(statistics.stray[0]) for statistics in looked_at if statistics))
    splits = verdict.manifest.splits.values()
    total, shards = sum(split.samples for split in splits), sum(len(split.shards) for split in splits)
    if not verdict.problems:
        say(f"{directory}: {total:,} samples in {shards:,} shards, all whole")
        say(training_command(directory))
        return 0
    whole = sum(len(report.rows) for reports in verdict.reports.values() for report in reports)
    say(*verdict.problems[:_SHOWN])
    if len(verdict.problems) > _SHOWN:
        say(f"and {len(verdict.problems) - _SHOWN:,} more")
    problems = "1 problem" if len(verdict.problems) == 1 else f"{len(verdict.problems):,} problems"
    say(f"{directory}: {problems}; {whole:,} of {total:,} samples are whole")
    if not mend:
        say(
            f"repair: {command_for('repair', str(directory))}  (sets damaged files aside and keeps the whole samples), "
            "or pack again from the source"
        )
        return 1
    with writing(directory, _AS_IT_WAS):
        repaired = repair(directory, verdict)
    show_splits(console, repaired, directory)
    say(f"repaired; what was damaged is in {directory / QUARANTINE}, to be removed when nobody needs it")
    say("the manifest is a new one: runs that were begun on the old one cannot be continued on these shards")
    say(training_command(directory))
    return 0


def index_shards(
    console: Console, directory: Path, workers: int, skip_bad: bool, scales: Mapping[str, DepthScale]
) -> None:
    """Make index and manifest for tars from elsewhere. Raises UserError."""
    for name, scale in scales.items():
        if scale.metres_per_unit != 1e-3:
            raise UserError(
                f"--depth-scale {name or scale.metres_per_unit}: tars are indexed as they are, and their depth is read "
                "as uint16 millimetres (0.001); pack from the source to convert it"
            )

    def check(split: str, median: float) -> None:
        low, high = INDOOR_METRES
        if not low <= median <= high and not {split, ""} & set(scales):
            raise UserError(
                f"split {split}: the median depth is {median:g} m if it is stored in millimetres; an indoor median "
                f"lies within {low:g}..{high:g} m; if they are millimetres, say --depth-scale {split}=0.001"
            )

    with writing(directory, _AS_IT_WAS), progress_bar(console, "indexing", "samples") as progress:
        manifest, problems = index_tars(directory, workers, progress, skip_bad, check)
    show_splits(console, manifest, directory)
    for name, split in manifest.raw["splits"].items():
        say_turned(name, split["exif_orientations"])
    say_stray(sum(split["stray_bytes"] for split in manifest.raw["splits"].values()))
    if problems:
        say(f"{len(problems):,} left out:", *problems[:_SHOWN])
    say(training_command(directory))


def say_turned(split: str, count: int) -> None:
    """A line about images in shards with an EXIF orientation, which neither the loader nor plain WebDataset obeys."""
    if count:
        say(
            f"{split}: {count:,} images have an EXIF orientation, which is not looked at in shards; where they do not "
            "lie as their depth does, pack them again from the source"
        )


def say_stray(count: int) -> None:
    if count:
        say(stray_in_words(count))


def training_command(shards: Path) -> str:
    """Line with the command that trains on these shards."""
    return f"next: {command_line('train', '--data.shards', shards, launcher='accelerate launch')}"


def show_splits(console: Console, manifest: Manifest, path: Path) -> None:
    """The table of what a directory of shards holds."""
    height, width = manifest.size
    table = Table(title=f"{path} ({height}x{width}, depth as {manifest.codec})", title_justify="left")
    for column in ("split", "pairs", "shards", "MB", "metres: min, median, mean, max", "holes"):
        table.add_column(column, justify="left" if column == "split" else "right")
    for name, split in manifest.splits.items():
        size = sum(shard.bytes for shard in split.shards) / 1e6
        metres = "  ".join(f"{split.depth[what]:.3f}" for what in ("min", "median", "mean", "max"))
        holes = f"{split.depth['holes']:.1%}"
        table.add_row(name, f"{split.samples:,}", f"{len(split.shards):,}", f"{size:.1f}", metres, holes)
    console.print(table)


def show_packed(console: Console, manifest: Manifest, output: Path, seconds: float) -> None:
    """Print the packed splits, and the command to run next."""
    show_splits(console, manifest, output)
    for name, split in manifest.raw["splits"].items():
        if split["reencoded_images"]:
            why = "resized, turned, or no baseline JPEG before"
            say(f"{name}: {split['reencoded_images']:,} images stored as new JPEG ({why})")
        if split["turned_images"]:
            say(f"{name}: {split['turned_images']:,} images turned as their EXIF data say; depth is taken as upright")
        if split["skipped"]:
            say(f"{name}: {len(split['skipped']):,} pairs skipped:", *split["skipped"][:10])
    say_stray(sum(split["stray_bytes"] for split in manifest.raw["splits"].values()))
    pairs = sum(split.samples for split in manifest.splits.values())
    say(f"{pairs:,} pairs in {seconds:.1f} s, {pairs / seconds:.0f} pairs/s")
    say(training_command(output))
