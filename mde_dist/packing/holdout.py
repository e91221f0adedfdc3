"""Training pairs to choose on: whole rooms of the split `train` held out into a split `val`, so that no result is
chosen on the test pairs.
"""

import hashlib
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from mde_dist.packing.sources import Pair, Source, Split
from mde_dist.utils.errors import UserError

TRAIN, VAL = "train", "val"


@dataclass(frozen=True)
class ValSplit:
    """Split `val` that was made from whole rooms of `train`."""

    source: Source
    """Source with the split `val` behind `train`; the pairs of both are in the order of the data set."""
    share: float
    rooms: tuple[str, ...]
    """Rooms that went to `val`, sorted."""
    of: int
    """Rooms in all."""

    def record(self) -> dict[str, object]:
        """Record for the manifest."""
        return {"of": TRAIN, "share": self.share, "places": list(self.rooms)}

    def describe(self) -> list[str]:
        """Lines with the number of pairs and scenes that each split has now."""
        lines = []
        for name, split in self.source.splits.items():
            pairs, scenes = len(split.pairs), len({pair.scene for pair in split.pairs})
            lines.append(f"{name}: {pairs:,} pairs of {scenes:,} {'scene' if scenes == 1 else 'scenes'}")
        chosen = f"{len(self.rooms):,} of {self.of:,} rooms are held out of {TRAIN} as {VAL}"
        return [f"--validation {self.share:g}: {chosen}, to choose on", *lines]


def room_of(scene: str) -> str:
    """Room that a scene shows a part of: `living_room_0001a`, `living_room_0001b_out` -> `living_room_0001`."""
    return re.sub(r"(?<=\d)[a-zA-Z]$", "", scene.removesuffix("_out"))


def make_val_split(source: Source, share: float) -> ValSplit:
    """Whole rooms with a `share` of the pairs of `train` -> the split `val`. Raises UserError where that cannot be.

    What goes where is a function of the names of the scenes, each as often as it has pairs, and of `share`; not of the
    order of the pairs.
    """
    option = f"--validation {share:g}"
    if VAL in source.splits:
        raise UserError(f"{option}: {source.root} has a split {VAL} already; leave the option out")
    if TRAIN not in source.splits:
        raise UserError(f"{option}: {source.root} has no split {TRAIN} to hold pairs out of; leave the option out")
    train = source.splits[TRAIN]
    counts = count_rooms(train.pairs)
    if len(counts) < 2:
        room = next(iter(counts), "")
        shown = f"are all of one room, {room}" if room else "name no scene that they belong to"
        raise UserError(f"{option}: the pairs of {TRAIN} {shown}; whole rooms are held out, and it takes two or more")
    chosen = choose(counts, share)
    if len(chosen) == len(counts):
        raise UserError(f"{option}: no room of the {len(counts)} would be left to train on; name a smaller share")
    parts: dict[str, list[Pair]] = {TRAIN: [], VAL: []}
    for pair in train.pairs:
        parts[VAL if room_of(pair.scene) in chosen else TRAIN].append(pair)
    splits: dict[str, Split] = {}
    for name, split in source.splits.items():
        if name == TRAIN:
            splits |= {part: replace(train, pairs=tuple(pairs)) for part, pairs in parts.items()}
        else:
            splits[name] = split
    return ValSplit(replace(source, splits=splits), share, tuple(sorted(chosen)), len(counts))


def count_rooms(pairs: Iterable[Pair]) -> Counter[str]:
    """Pairs of each room."""
    return Counter(room_of(pair.scene) for pair in pairs)


def choose(counts: Mapping[str, int], share: float) -> frozenset[str]:
    """The rooms to hold out, at least one: those whose pairs come nearest to `share` of all of them.

    The rooms stand in the order of the sha256 of their names. The fewest of the first that can make up the nearest
    count are looked at, and of these the last ones are left out where the others can make it up without them. Of two
    counts that are equally near the smaller one is taken.
    """
    order = sorted(counts, key=lambda room: hashlib.sha256(room.encode(errors="surrogateescape")).digest())
    wanted = share * sum(counts.values())
    whole = max(1, math.ceil(wanted - 0.5))
    reached = [1]  # bit n of entry i: some of the first i rooms have n pairs in all
    for room in order:
        reached.append(reached[-1] | reached[-1] << counts[room])
        if reached[-1] >> whole & 1:
            break
    sums = (
        [whole] if reached[-1] >> whole & 1 else [n for n in range(1, reached[-1].bit_length()) if reached[-1] >> n & 1]
    )
    left = min(sums, key=lambda n: abs(n - wanted))
    chosen = set()
    for number in range(len(reached) - 1, 0, -1):
        room = order[number - 1]
        if not reached[number - 1] >> left & 1:
            chosen.add(room)
            left -= counts[room]
    return frozenset(chosen)
