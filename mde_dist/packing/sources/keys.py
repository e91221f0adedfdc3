"""Keys of pairs: their names in the shards, made of the paths of their images.

WebDataset splits a member's name at the first dot of its last part, so a key has none, and no slash; a tar header holds
100 bytes.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import PurePosixPath
from unicodedata import normalize

from mde_dist.utils.errors import UserError

_MOST = 80  # bytes of a key; `.depth.zst` has to fit in the header as well


def unique_keys(names: Sequence[PurePosixPath], locations: Sequence[str]) -> list[str]:
    """The key of each image by its path: no dot, slash or white space, and short. `locations`: where each is, in words.

    Keys are ASCII where that tells all names apart, and something is left of each. Elsewhere they keep the letters of
    all scripts, in one Unicode form (NFC), and what still is the same ends in a hash of the name. Raises UserError
    where two names differ in nothing but their suffix or their Unicode form.
    """
    stems = [normalize("NFC", str(name.with_suffix(""))) for name in names]
    _refuse_twins(stems, names, locations)
    keys = [_shortened(re.sub(r"[^A-Za-z0-9_-]+", "-", str(name.with_suffix(""))), str(name)) for name in names]
    collide = len(set(keys)) < len(keys)
    for index, (key, stem) in enumerate(zip(keys, stems, strict=True)):
        if collide or not re.search("[A-Za-z0-9]", key):
            keys[index] = _shortened(_of_any_script(stem), stem)
    counts = Counter(keys)
    keys = [_hashed(key, stem) if counts[key] > 1 else key for key, stem in zip(keys, stems, strict=True)]
    _refuse_twins(keys, names, locations)
    return keys


def _refuse_twins(texts: Sequence[str], names: Sequence[PurePosixPath], locations: Sequence[str]) -> None:
    """Raises UserError where two texts, made of `names`, are the same."""
    first: dict[str, int] = {}
    for number, text in enumerate(texts):
        other = first.setdefault(text, number)
        if other == number:
            continue
        one, two = str(names[other]), str(names[number])
        if one != two and normalize("NFC", one) == normalize("NFC", two):
            why = f"one name in two Unicode forms, {one!a} and {two!a}; rename or remove one"
            raise UserError(f"{locations[number]} and {locations[other]}: {why}")
        raise UserError(f"{locations[number]} is listed twice or collides with {locations[other]}")


def _of_any_script(stem: str) -> str:
    kept = (c if (c.isalnum() or c in "_-" if c.isascii() else c.isprintable()) else " " for c in stem)
    return re.sub(" +", "-", "".join(kept))


def _shortened(key: str, name: str) -> str:
    return key if len(key.encode()) <= _MOST else _hashed(key, name)


def _hashed(key: str, name: str) -> str:
    """A key with a hash of the name that it was made of."""
    digest = hashlib.sha256(name.encode(errors="surrogateescape")).hexdigest()[:16]
    return f"{key.encode()[: _MOST - 17].decode(errors='ignore')}-{digest}"
