"""HDF5 files within limits: arrays that are looked at before they are read, and lie in the file itself."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mde_dist.data.depth import DepthScale
from mde_dist.data.manifest import MAX_SIDE
from mde_dist.packing.sources.pairs import BadPair
from mde_dist.packing.sources.pictures import check_bits
from mde_dist.utils.errors import UserError

FLOAT_METRES = DepthScale(1.0, bits=32, reason="float metres, declared by the layout")


def import_h5py() -> Any:
    """h5py, which is imported only where it is needed. Raises UserError where it is not installed."""
    try:
        import h5py
    except ImportError:
        raise UserError("this data set is HDF5, and h5py is not installed: pip install 'mde_dist[h5]'") from None
    return h5py


def open_hdf5(file: Path | BinaryIO) -> Any:
    """Open a file to read from, without HDF5's own locks: a file system may have none, and nobody writes it here."""
    return import_h5py().File(file, "r", locking=False)


@contextmanager
def opened(file: Path | BinaryIO, path: Path) -> Iterator[Any]:
    """An HDF5 file to read from. Whatever h5py says of a damaged one becomes BadPair with `path`."""
    try:
        with open_hdf5(file) as entries:
            yield entries
    except (OSError, RuntimeError, KeyError, ValueError, TypeError, AttributeError, OverflowError) as error:
        raise BadPair(f"{path} is not a readable HDF5 file ({type(error).__name__}: {error})") from None


def array(entries: Any, name: str, path: Path) -> Any:
    """The array `name` of an open file, not read yet. Raises BadPair."""
    h5py = import_h5py()
    if not isinstance(entries.get(name, getlink=True), h5py.HardLink):  # others lead to other files
        raise BadPair(f"{path} has no array {name!r}; it has {', '.join(sorted(entries)[:5]) or 'none'}")
    found = entries[name]
    if not isinstance(found, h5py.Dataset) or found.is_virtual or found.external:
        raise BadPair(f"{path}: {name!r} is not an array of the file's own")
    return found


def check_image(found: Any, shape: tuple[int, ...], path: Path) -> None:
    """`shape`: of one image, planes first. Raises BadPair where it is no RGB uint8 image."""
    if found.dtype != np.uint8 or len(shape) != 3 or shape[0] != 3 or not 1 <= max(shape[1:]) <= MAX_SIDE:
        raise BadPair(f"{path}: the image is {found.dtype} {_shown(shape)}, expected uint8 (3, height, width)")


def check_depth(found: Any, shape: tuple[int, ...], path: Path, scale: DepthScale) -> str:
    """`shape`: of one map. How it is stored, in words. Raises BadPair where it is no map in the scale's type."""
    if found.dtype.kind not in "fiu" or len(shape) != 2 or not 1 <= max(shape) <= MAX_SIDE:
        raise BadPair(f"{path}: the depth is {found.dtype} {_shown(shape)}, expected float metres (height, width)")
    check_bits(32 if found.dtype.kind == "f" else 8 * found.dtype.itemsize, path, scale)
    return f"{found.dtype} array"


def _shown(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"
