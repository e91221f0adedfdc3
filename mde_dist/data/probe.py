"""A look at a few pairs before anything is written: their size, and whether the depths can be metres of rooms."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import UserError
from .sources import BadPair, Source

INDOOR_METRES = (0.3, 10.0)
"""Where the median of an indoor depth map lies, generously; outside, the scale is wrong."""
MAX_MEDIAN_RATIO = 3.0
"""Medians of two splits of one data set that differ by more than this speak of different units."""
_PROBES = 16  # pairs per split that are read


@dataclass(frozen=True)
class Probe:
    """What a look at a few pairs of a split shows."""

    size: tuple[int, int]
    median: float
    """Metres, over the valid pixels."""
    holes: float
    """Share of pixels without measurement."""


def probe(source: Source) -> dict[str, Probe]:
    """Read a few pairs of each split, evenly spaced. Raises UserError where none can be read."""
    probes = {}
    for name, split in source.splits.items():
        raw, error = [], None
        for pair in split.pairs[:: max(1, len(split.pairs) // _PROBES)][:_PROBES]:
            try:
                raw.append(source.read(pair, split.scale))
            except BadPair as bad:
                error = bad
        if not raw:
            raise UserError(f"split {name}: none of the pairs that were tried can be used; {error}")
        millimetres = np.concatenate([pair.depth.reshape(-1) for pair in raw])
        median = float(np.median(millimetres[millimetres > 0])) / 1000
        sizes = [pair.image.shape[:2] for pair in raw]
        probes[name] = Probe(max(set(sizes), key=sizes.count), median, float(np.mean(millimetres == 0)))
    return probes


def check_units(source: Source, probes: Mapping[str, Probe], overruled: Sequence[str]) -> None:
    """Refuse depths that cannot be an indoor data set in metres, unless the user gave the scale. Raises UserError."""
    low, high = INDOOR_METRES
    checked = {name: found.median for name, found in probes.items() if name not in overruled and "" not in overruled}
    for name, median in checked.items():
        if not low <= median <= high:
            raise UserError(
                f"split {name}: the median depth is {median:.4g} m with {source.splits[name].scale}; an indoor median "
                f"lies within {low:g}..{high:g} m; give metres per stored unit: --depth-scale {name}=VALUE"
            )
    if checked and max(checked.values()) > MAX_MEDIAN_RATIO * min(checked.values()):
        shown = ", ".join(f"{name} {median:.3g} m" for name, median in checked.items())
        raise UserError(
            f"median depths differ by more than {MAX_MEDIAN_RATIO:g}x between splits ({shown}): "
            "one of them is in another unit; give its metres per stored unit: --depth-scale SPLIT=VALUE"
        )
