"""Facts about NYU Depth v2: the official split of its labelled pairs, and how many pairs each layout has."""

from collections.abc import Iterable
from functools import cache
from importlib.resources import files

from mde_dist.packing.sources.pairs import Pair

LABELED = 1449
"""Labelled pairs in all."""
KNOWN_TRAINING = {
    24_231: "the bts training list",
    36_253: "the NeWCRFs training list",
    47_584: "the h5 training set",
    50_688: "the densedepth training set",
    795: "the official labelled training set",
}
_HAS = {"densedepth": (50_688,), "bts": (24_231, 36_253), "h5": (47_584,), "labeled": (795,), "marigold": (795,)}
OFFICIAL_TEST = 654


@cache
def official_split() -> tuple[tuple[str, str], ...]:
    """(`train` or `test`, scene) of each labelled pair, by its index from 0.

    Names of pairs count differently: `rgb_00045` of bts and `00045_colors` of densedepth are this index; `00046.h5` and
    Marigold's `rgb_0046` are one more.
    """
    table = files(__package__).joinpath("official_split.txt").read_text(encoding="utf-8")
    runs = (line.split() for line in table.splitlines() if not line.startswith("#"))
    return tuple((split, scene) for count, split, scene in runs for _ in range(int(count)))


def test_scenes() -> frozenset[str]:
    """The 215 scenes that nobody may train on who reports numbers on the official test set."""
    return frozenset(scene for split, scene in official_split() if split == "test")


test_scenes.__test__ = False  # type: ignore[attr-defined]  # it is no test, whatever pytest makes of its name


def scene_leakage(pairs: Iterable[Pair]) -> tuple[int, list[str]]:
    """Count the training pairs that show official test scenes -> their number, and the scenes, sorted."""
    scenes = test_scenes()
    found = [pair.scene for pair in pairs if pair.scene in scenes]
    return len(found), sorted(set(found))


def count_in_words(layout: str, split: str, count: int) -> str:
    """Number of pairs in words, compared with what a data set of this kind has."""
    shown = f"{count:,} {'pair' if count == 1 else 'pairs'}"
    if layout == "rooms":
        return f"{shown} of the embedded sample"
    if split == "test":
        return (
            f"{shown}: the whole official test set"
            if count == OFFICIAL_TEST
            else (f"{shown} (the official test set has {OFFICIAL_TEST})")
        )
    has = _HAS.get(layout, ())
    name = KNOWN_TRAINING.get(count)
    if count in has:
        return f"{shown}: {str(name).replace('the ', 'the whole ', 1)}"
    if name and has:
        return f"{count:,} of the {has[0]:,} that {layout} has; it is the size of {name}"
    if name:
        return f"{shown}: the size of {name}"
    sizes = " or ".join(f"{size:,}" for size in has or KNOWN_TRAINING)
    known = f"{layout if has else 'NYU Depth v2'} has {sizes}"
    return f"{shown}: not a size that is known ({known})"
