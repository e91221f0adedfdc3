"""A data set as a user names it on the command line: opened, looked at, described, and its units checked.

What `shard` packs and `evaluate` scores goes through here, so that no unit is wrong in one and right in the other.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from mde_dist.data.depth import DepthScale
from mde_dist.packing.probe import INDOOR_METRES, USUAL_METRES, Probe, probe, unit_problems
from mde_dist.packing.sources import DepthMap, Source, open_source
from mde_dist.packing.sources.official import count_in_words, scene_leakage
from mde_dist.utils.console import say
from mde_dist.utils.errors import UserError
from mde_dist.utils.paths import local_path

Layout = Literal["densedepth", "bts", "h5", "labeled", "marigold", "folder", "rooms"]
_SHOWN = 3  # scenes, or pairs, that a warning names


def open_checked(
    root: Path | None,
    layout: Layout | None,
    depth_scale: tuple[str, ...],
    lists: tuple[str, ...] = (),
    depth_map: DepthMap | None = None,
) -> tuple[Source, dict[str, Probe]]:
    """Recognise a data set, look at a few of its pairs, and say what it is. Raises UserError, also for wrong units.

    `depth_scale` and `lists` as on the command line: SPLIT=METRES, SPLIT=FILE.
    """
    scales = given_scales(depth_scale)
    source = open_source(root or Path(), layout, scales, given_lists(lists), depth_map)
    probes = probe(source)
    refused, warned = unit_problems(source, probes, list(scales))
    describe(source, probes)
    if refused:
        raise UserError(refused[0])
    say_warnings([*warned, *warnings(source, probes)])
    return source, probes


def describe(source: Source, probes: Mapping[str, Probe]) -> None:
    """Layout, counts in words, sizes, units."""
    say(f"{source.root}: layout {source.layout}", *source.notes)
    for name, split in source.splits.items():
        found = probes[name]
        say(
            f"  {name}: {len(split.pairs):,} pairs, {sizes_in_words(found)}, median {found.median:.2f} m, "
            f"holes {found.holes:.1%} (from {found.tried}), depth {split.depth_map}; {split.scale}",
            f"  {count_in_words(source.layout, name, len(split.pairs))}",
        )


def sizes_in_words(found: Probe) -> str:
    return " and ".join(f"{height}x{width}" for height, width in found.sizes)


def warnings(source: Source, probes: Mapping[str, Probe]) -> list[str]:
    """Warnings that do not stop packing."""
    found = []
    for name, split in source.splits.items():
        median, (low, high) = probes[name].median, USUAL_METRES
        if INDOOR_METRES[0] <= median < low or high < median <= INDOOR_METRES[1]:
            found.append(
                f"{name}: a median depth of {median:.2f} m is possible, but unusual ({low:g}..{high:g} m); look at the "
                f"unit, and give another as --depth-scale {name}=VALUE"
            )
        turned = probes[name].orientations
        if turned:
            kinds = ", ".join(map(str, sorted(set(turned))))
            found.append(
                f"{name}: {len(turned)} of the {probes[name].tried} images tried are turned by their EXIF data "
                f"(orientation {kinds}); they are turned upright, and depth is taken as upright already"
            )
        bad = probes[name].bad
        if bad:
            found.append(f"{name}: {len(bad)} of the {probes[name].tried} pairs tried cannot be used: {bad[0]}")
        if name != "test":
            count, scenes = scene_leakage(split.pairs)
            if count:
                named = ", ".join(scenes[:_SHOWN]) + (" …" if len(scenes) > _SHOWN else "")
                found.append(
                    f"{name}: {count:,} of its pairs show {len(scenes)} of the 215 official test scenes ({named}); "
                    "a model that learns from them cannot be scored on the official test set"
                )
    return found


def say_warnings(warnings: Sequence[str]) -> None:
    for warning in warnings:
        say(f"  warning: {warning}")


def given_scales(arguments: tuple[str, ...]) -> dict[str, DepthScale]:
    """`SPLIT=METRES` or `METRES` arguments -> scales by split, "" for all. Raises UserError."""
    scales = {}
    for argument in arguments:
        split, _, number = argument.rpartition("=")
        try:
            value = float(number)
        except ValueError:
            value = 0.0
        if not 0 < value < 1000:
            raise UserError(f"--depth-scale {argument}: expected SPLIT=METRES per stored unit, such as train=0.001")
        scales[split] = DepthScale(value, reason="given by --depth-scale")
    return scales


def given_lists(arguments: tuple[str, ...]) -> dict[str, Path]:
    """`SPLIT=FILE` arguments -> files by split. Raises UserError."""
    lists: dict[str, Path] = {}
    for argument in arguments:
        split, _, file = argument.partition("=")
        if split not in ("train", "test") or not file:
            raise UserError(f"--list {argument}: expected train=FILE or test=FILE")
        if split in lists:
            raise UserError(f"--list {argument}: {split} has a list already, {lists[split]}")
        lists[split] = local_path(file)
    return lists
