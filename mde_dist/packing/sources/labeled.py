"""labeled: nyu_depth_v2_labeled.mat, which is MATLAB v7.3 and so HDF5 inside; with the official split.

`images` uint8 (1449, 3, 640, 480), `depths` (filled) and `rawDepths` float32 metres (1449, 640, 480): all transposed.
"""

import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mde_dist.data.depth import DepthScale, to_millimetres
from mde_dist.packing.sources.choice import SourceOptions
from mde_dist.packing.sources.hdf5 import FLOAT_METRES, array, check_depth, check_image, import_h5py, open_hdf5, opened
from mde_dist.packing.sources.official import LABELED, official_split
from mde_dist.packing.sources.pairs import BadPair, Pair, RawPair, Source, Split
from mde_dist.packing.sources.tree import FolderTree, Tree
from mde_dist.utils.errors import UserError

NAME = "nyu_depth_v2_labeled.mat"
EXPECTED = NAME
_MAPS = {None: "depths", "filled": "depths", "raw": "rawDepths"}


@dataclass(frozen=True)
class Entry(Pair):
    """A pair that is an entry of arrays; `image` and `depth` are MAT/ARRAY/INDEX."""

    index: int
    """Number from 0."""


def labeled(tree: Tree, choice: SourceOptions, name: str = NAME) -> Source | None:
    """The file `name` of a folder. Raises UserError where it is not the 1449 labelled pairs."""
    if not isinstance(tree, FolderTree) or not tree.is_file(name):
        return None
    path, depths = tree.root / name, _MAPS[choice.depth_map]
    import_h5py()
    try:
        _check(path, depths)
    except BadPair as error:
        raise UserError(f"{error}; expected MATLAB v7.3 with images, depths and rawDepths") from None
    pairs: dict[str, list[Entry]] = {"train": [], "test": []}
    for index, (split, scene) in enumerate(official_split()):
        image, depth = (f"{name}/{what}/{index}" for what in ("images", depths))
        pairs[split].append(Entry(f"{scene}-{index:05d}", scene, image, depth, index))
    kind = "raw" if depths == "rawDepths" else "filled"
    splits = {split: Split(tuple(found), choice.scale(split, FLOAT_METRES), kind) for split, found in pairs.items()}
    return Source("labeled", tree.root, splits, MatReader(path, depths), (f"{path}, with the official split",))


def _check(path: Path, depths: str) -> None:
    """Raises BadPair where the file lacks an array, or has another number of pairs."""
    with opened(path, path) as entries:
        for name, sides in (("images", 4), (depths, 3)):
            shape = array(entries, name, path).shape
            if len(shape) != sides or shape[0] != LABELED:
                raise BadPair(f"{path}: {name!r} is {'x'.join(map(str, shape))}; the official split is of {LABELED}")


class MatReader:
    """Reads entries of the arrays; the file is opened once per process, when it is needed."""

    def __init__(self, path: Path, depths: str):
        self._path, self._depths = path, depths
        self._open: Any = None
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return MatReader, (self._path, self._depths)

    def read(self, pair: Entry, scale: DepthScale) -> RawPair:
        try:
            entries = self._entries()
            images, depths = array(entries, "images", self._path), array(entries, self._depths, self._path)
            check_image(images, images.shape[1:], self._path)
            stored = check_depth(depths, depths.shape[1:], self._path, scale)
            image, depth = images[pair.index], depths[pair.index]
        except (OSError, RuntimeError, KeyError, ValueError, TypeError, IndexError) as error:
            raise BadPair(f"{self._path}, entry {pair.index}, cannot be read ({error})") from None
        millimetres = np.ascontiguousarray(to_millimetres(depth.T, scale))
        return RawPair(np.ascontiguousarray(image.transpose(2, 1, 0)), millimetres, None, "uint8 array", stored)

    def missing(self, pair: Entry) -> list[Path]:
        return [] if self._path.is_file() else [self._path]

    def stamp(self, pair: Entry) -> list[Any]:
        status = self._path.stat()
        return [status.st_size, status.st_mtime_ns]

    def _entries(self) -> Any:
        """The open file. Raises OSError."""
        with self._lock:
            if self._open is None:
                self._open = open_hdf5(self._path)
            return self._open
