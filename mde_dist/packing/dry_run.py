"""Plan of a packing, without packing: everything that was recognised, a picture of it, and the problems."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from mde_dist.data.depth import to_metres
from mde_dist.packing.holdout import make_val_split
from mde_dist.packing.inspect import Layout, given_lists, given_scales, say_warnings, sizes_in_words, warnings
from mde_dist.packing.pack import PackConfig, plan
from mde_dist.packing.probe import Probe, linspace_indices, probe, unit_problems
from mde_dist.packing.sources import BadPair, DepthMap, Source, open_source
from mde_dist.packing.sources.official import count_in_words
from mde_dist.utils.console import say
from mde_dist.utils.errors import UserError
from mde_dist.utils.io import writing
from mde_dist.utils.visualization import Thumbnail, draw_thumbnails

PREVIEW = Path("preview.png")
_THUMBNAILS = 8


def dry_run(
    root: Path | None,
    layout: Layout | None,
    depth_scale: tuple[str, ...],
    lists: tuple[str, ...],
    depth_map: DepthMap | None,
    options: PackConfig,
    preview: Path,
    then: str,
) -> None:
    """Say what packing would pack, draw a few pairs into `preview`, and name the command that packs: `then`.

    Raises UserError where packing would be refused; then the rest of what is wrong has been printed.
    """
    scales = given_scales(depth_scale)
    source = open_source(root or Path(), layout, scales, given_lists(lists), depth_map)
    probes = probe(source)
    describe_fully(source, probes)
    shown = list(thumbnails(source))
    if shown:
        with writing(f"--preview {preview}"):
            draw_thumbnails(preview, shown, f"{source.root}: {source.layout}")
        say(f"  preview: {preview}")
    refused, warned = unit_problems(source, probes, list(scales))
    say_warnings([*warned, *warnings(source, probes)])
    if options.validation:
        try:
            held_out = make_val_split(source, options.validation)
        except UserError as error:
            refused.append(str(error))
        else:
            say(*held_out.describe())
            source = held_out.source
    refused += packing_problems(source, probes, options)
    if refused:
        say(*(f"also refused: {problem}" for problem in refused[1:]))
        raise UserError(refused[0])
    say(f"next: {then}")


def describe_fully(source: Source, probes: Mapping[str, Probe]) -> None:
    """A few lines per split: counts in words, how pairs are stored, the unit and why, the metres that come of it."""
    say(f"{source.root}: layout {source.layout}", *source.notes)
    for name, split in source.splits.items():
        found = probes[name]
        stored = f"{' or '.join(found.depth_formats)}, {split.depth_map}"
        metres = f"min {found.low:.2f}, median {found.median:.2f}, max {found.high:.2f} m"
        say(
            f"  {name}: {count_in_words(source.layout, name, len(split.pairs))}",
            f"  image: {sizes_in_words(found)}, {' or '.join(found.image_formats)}",
            f"  depth: {stored}; {split.scale}",
            f"  depth: {metres}; holes {found.holes:.1%} (from {found.tried - len(found.bad)} pairs)",
        )


def thumbnails(source: Source) -> Iterator[Thumbnail]:
    """A few pairs, evenly spaced over the splits; those that cannot be read or have no depth are left out."""
    counts, left = {}, _THUMBNAILS
    for done, name in enumerate(sorted(source.splits, key=lambda name: len(source.splits[name].pairs))):
        counts[name] = min(len(source.splits[name].pairs), max(1, left // (len(source.splits) - done)))
        left -= counts[name]
    for name, split in source.splits.items():
        for index in linspace_indices(len(split.pairs), counts[name]):
            pair = split.pairs[index]
            try:
                raw = source.read(pair, split.scale)
            except BadPair:
                continue
            if raw.depth.any():
                yield Thumbnail(f"{name}\n{pair.key[-26:]}", raw.image, to_metres(raw.depth))


def packing_problems(source: Source, probes: Mapping[str, Probe], options: PackConfig) -> list[str]:
    """List the reasons not to pack: missing files of all pairs, and the faults of the pairs that were tried."""
    problems = []
    try:
        plan(source, options)
    except UserError as error:
        problems.append(str(error))
    for name, found in probes.items():
        if found.bad and not options.skip_bad:
            problems.append(f"split {name}: {found.bad[0]}; mend it, or leave such pairs out with --skip-bad")
    sizes = {size for found in probes.values() for size in found.sizes}
    if len(sizes) > 1 and options.size is None:
        shown = ", ".join(f"{height}x{width}" for height, width in sorted(sizes))
        problems.append(f"the images have several sizes ({shown}); choose one with --size")
    return problems
