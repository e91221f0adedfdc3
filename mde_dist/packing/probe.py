"""A look at a few pairs before anything is written: their size, and whether the depths can be metres of rooms."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from mde_dist.packing.sources import BadPair, Source
from mde_dist.utils.errors import UserError

INDOOR_METRES = (0.8, 10.0)
"""Plausible range of an indoor data set's median depth, generously; outside, the scale is wrong."""
USUAL_METRES = (1.0, 6.0)
"""Range of the medians of NYU Depth v2; between here and there a scale may be wrong, and the user is told."""
MAX_MEDIAN_RATIO = 3.0
"""Medians of two splits of one data set that differ by more than this speak of different units."""
_PROBES = 16  # pairs per split that are read


@dataclass(frozen=True)
class Probe:
    """Facts from reading a few pairs of a split."""

    size: tuple[int, int]
    """The most frequent height and width, pixels."""
    median: float
    """Metres, over the valid pixels; so are `low` and `high`, the smallest and the largest."""
    holes: float
    """Share of pixels without measurement."""
    low: float
    high: float
    sizes: tuple[tuple[int, int], ...]
    """All sizes that occur, sorted."""
    image_formats: tuple[str, ...]
    depth_formats: tuple[str, ...]
    tried: int
    """Pairs that were read, or could not be."""
    bad: tuple[str, ...]
    """Reasons why some could not be read."""
    orientations: tuple[int, ...] = ()
    """EXIF orientations of the images that are not stored upright."""


def probe(source: Source) -> dict[str, Probe]:
    """Read a few pairs of each split, evenly spaced. Raises UserError where none can be read."""
    probes = {}
    for name, split in source.splits.items():
        raw, bad = [], []
        chosen = linspace_indices(len(split.pairs), _PROBES)
        for index in chosen:
            try:
                found = source.read(split.pairs[index], split.scale)
                if not found.depth.any():
                    raise BadPair(f"{source.path_of(split.pairs[index].depth)} has no valid pixel")
                raw.append(found)
            except BadPair as error:
                bad.append(str(error))
        tried = [split.pairs[index] for index in chosen]
        if not raw and all(source.path_of(pair.image) in source.missing(pair) for pair in tried):
            raise UserError(
                f"split {name}: {source.path_of(tried[0].image)} is missing, and so are the other images "
                "that were tried; --source has to be the folder that the paths of its list start from"
            )
        if not raw:
            raise UserError(f"split {name}: none of the pairs that were tried can be used; {bad[-1]}")
        millimetres = np.concatenate([pair.depth.reshape(-1) for pair in raw])
        valid = millimetres[millimetres > 0] / 1000
        sizes = [pair.depth.shape for pair in raw]
        probes[name] = Probe(
            max(sorted(set(sizes)), key=sizes.count),
            float(np.median(valid)),
            float(np.mean(millimetres == 0)),
            float(valid.min()),
            float(valid.max()),
            tuple(sorted(set(sizes))),
            tuple(sorted({pair.image_format for pair in raw})),
            tuple(sorted({pair.depth_format for pair in raw})),
            len(chosen),
            tuple(bad),
            tuple(pair.orientation for pair in raw if pair.orientation != 1),
        )
    return probes


def linspace_indices(count: int, most: int) -> list[int]:
    """At most `most` of `count` indices, evenly spaced."""
    return list(range(0, count, max(1, count // most)))[:most]


def check_units(source: Source, probes: Mapping[str, Probe], overruled: Sequence[str]) -> list[str]:
    """Refuse depths that cannot be an indoor data set in metres, unless the user gave the scale. Raises UserError.

    `overruled`: splits whose scale was given, "" for all. Returns what would have been refused but for that.
    """
    refused, warned = unit_problems(source, probes, overruled)
    if refused:
        raise UserError(refused[0])
    return warned


def unit_problems(source: Source, probes: Mapping[str, Probe], overruled: Sequence[str]) -> tuple[list[str], list[str]]:
    """List signs of a wrong unit, implausible for an indoor data set in metres: those that are refused, and those that
    the user has overruled."""
    low, high = INDOOR_METRES
    refused, warned = [], []
    medians = {name: found.median for name, found in probes.items()}
    given = {name for name in medians if name in overruled or "" in overruled}
    for name, median in medians.items():
        if low <= median <= high:
            continue
        seen = f"split {name}: the median depth is {median:.4g} m with {source.splits[name].scale}"
        if name in given:
            warned.append(f"{seen}, not within {low:g}..{high:g} m; without --depth-scale this would be refused")
        else:
            refused.append(
                f"{seen}; an indoor median lies within {low:g}..{high:g} m; give metres per stored unit: "
                f"--depth-scale {name}=VALUE"
            )
    for one, other in combinations(medians, 2):
        if max(medians[one], medians[other]) <= MAX_MEDIAN_RATIO * min(medians[one], medians[other]):
            continue
        seen = (
            f"median depths differ by more than {MAX_MEDIAN_RATIO:g}x between splits "
            f"({one} {medians[one]:.3g} m, {other} {medians[other]:.3g} m)"
        )
        if given & {one, other}:
            warned.append(f"{seen}; without --depth-scale this would be refused")
        else:
            refused.append(
                f"{seen}: one of them is in another unit; give its metres per stored unit: --depth-scale SPLIT=VALUE"
            )
    return refused, warned
