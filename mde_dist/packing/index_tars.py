"""Index, mean maps and manifest for WebDataset tars that were packed elsewhere."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import simplejpeg

from mde_dist.data.manifest import MAX_SIDE, NAME, PACKING, Manifest, check_name, command_for, write_manifest
from mde_dist.data.store import tars_in
from mde_dist.data.tar import DEPTH_CODECS, scan
from mde_dist.packing.examine import Report, drop_duplicate_keys, record, relative, statistics_of, validate_shards
from mde_dist.packing.pool import Progress
from mde_dist.packing.repair import LOCK, REVISION
from mde_dist.utils.errors import UserError
from mde_dist.utils.locks import locked

_LOOKED_AT = 64  # images, to tell the size that all should have


def index_tars(
    directory: Path, workers: int, progress: Progress, skip_bad: bool, check: Callable[[str, float], None]
) -> tuple[Manifest, list[str]]:
    """Make index, mean maps and manifest for the tars in a directory -> the manifest, and what was left out.

    The tars that have one name before their number are a split. `check(split, median)` may refuse a median depth in
    metres. Raises UserError.
    """
    _refuse_indexed(directory)
    tars = tars_in(directory)
    for tar in tars:
        try:
            check_name(tar.name)
        except ValueError:
            raise UserError(f"{tar}: rename it: letters, digits and . _ - + @ = , and blanks only") from None
    codec, size, samples = _look(directory, tars)
    found = validate_shards([(tar, codec, size, None) for tar in tars], workers, progress, samples)
    by_split: dict[str, list[Report]] = {}
    for tar in tars:
        by_split.setdefault(_split_of(tar), []).append(found[tar])
    kept: dict[str, list[Report]] = {}
    left_out: dict[str, list[str]] = {}
    for name, reports in by_split.items():
        reports = drop_duplicate_keys(reports, codec, size)
        wrong = [problem for report in reports for problem in report.problems]
        if wrong and not skip_bad:
            more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
            raise UserError(f"{wrong[0]}{more}; leave such samples out with --skip-bad")
        whole = [report for report in reports if len(report.rows)]
        if not whole:
            raise UserError(f"{directory}: no sample of split {name} is whole; {(wrong or ['its tars are empty'])[0]}")
        check(name, statistics_of(whole).summary()["median"])
        kept[name], left_out[name] = whole, wrong
    problems = [problem for wrong in left_out.values() for problem in wrong]
    with locked(directory / LOCK, f"{directory}: another command repairs or indexes it"):
        _refuse_indexed(directory)
        splits = {}
        for name, whole in kept.items():
            skipped = [relative(directory, it) for it in left_out[name]]
            splits[name] = record(directory, name, whole, codec, "") | {"skipped": skipped}
        return write_manifest(directory, codec, size, "tars", splits), problems


def _refuse_indexed(directory: Path) -> None:
    """Raises UserError where the tars have a manifest, or are some of a set that gets one when all are there."""
    if (directory / NAME).exists():
        raise UserError(f"{directory / NAME} is there already; check it with: {command_for('verify', str(directory))}")
    if (directory / PACKING).exists():
        raise UserError(
            f"{directory}: its packing is not finished; give the command that packs it again, or remove "
            f"{directory / PACKING} to index what is there"
        )


def _split_of(tar: Path) -> str:
    name = re.sub(r"[-_.]?\d+$", "", REVISION.sub("", tar.stem))
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
