"""rooms: the embedded sample, a source like any other."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mde_dist.data.depth import DepthScale, metres_to_millimetres
from mde_dist.packing.rooms import render_room
from mde_dist.packing.sources.pairs import Pair, RawPair, Source, Split

ROOMS_SPLITS = {"train": (320, 0), "test": (48, 1_000_000)}  # pairs, seed of the first: no room is in both
_PREFIX = "room:"


def rooms(counts: Mapping[str, int] | None = None) -> Source:
    """The embedded sample: rendered rooms, `counts` pairs per split."""
    splits = {}
    for split, (count, first) in ROOMS_SPLITS.items():
        seeds = range(first, first + (counts or {}).get(split, count))
        pairs = tuple(Pair(f"room-{seed:07d}", f"room_{seed:07d}", f"{_PREFIX}{seed}", "") for seed in seeds)
        splits[split] = Split(pairs, DepthScale(1.0, reason="rendered in metres"))
    return Source("rooms", Path("rooms"), splits, RoomReader())


class RoomReader:
    """Renders rooms from their seeds."""

    def read(self, pair: Pair, scale: DepthScale) -> RawPair:
        image, metres = render_room(int(pair.image.removeprefix(_PREFIX)))
        return RawPair(image, metres_to_millimetres(metres), None, "rendered", "rendered")

    def missing(self, pair: Pair) -> list[Path]:
        return []

    def stamp(self, pair: Pair) -> list[Any]:
        return []
