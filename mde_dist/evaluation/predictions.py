"""Depth maps that somebody's model predicted, as files: found, matched to the images of a split, and read in metres.

Nothing here runs code of others: arrays are read without pickle, and what a file claims is checked before it is read.
"""

import re
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import IO, Literal
from unicodedata import normalize

import numpy as np
from PIL import Image

from mde_dist.data.dataset import DepthDataset
from mde_dist.data.depth import COUNTS_PER_METRE
from mde_dist.data.images import IMAGE_FORMATS, hxw
from mde_dist.data.manifest import MAX_SIDE
from mde_dist.utils.errors import UserError
from mde_dist.utils.folders import files_below
from mde_dist.utils.io import refuse_dead_links

SUFFIXES = (".npy", ".npz", ".png")
Match = Literal["name", "order"]

_KINDS = frozenset(("depth", "pred", "prediction", "rgb", "color", "colors", "image", "img", "sync", "disp"))
_UNITS = frozenset(("raw", "metric", "meter", "meters", "metre", "metres", "mm", "16bit", "fp16", "fp32"))
"""Words in a file's name that say what it is, and in which unit, not of which image."""
_ASPECT = 0.01  # by which height / width may differ from the truth's
_STRIDES = (1, 14, 16, 32)  # pixels: the sides that networks predict at are multiples of one of these
_CROPS = {
    ((480, 640), (426, 560)): "Eigen's crop, rows 45:471 and columns 41:601",
    ((480, 640), (427, 561)): "NYU's crop, rows 44:471 and columns 40:601",
    ((480, 640), (440, 592)): "DenseDepth's crop, rows 20:460 and columns 24:616",
}
"""Name of a crop by the size of the whole image and its own."""
_NAMED = "depth"  # the array of a .npz that holds others as well, as Depth Pro and Depth Anything 3 call it


@dataclass(frozen=True)
class _Map:
    """Location of one depth map."""

    file: Path
    row: int | None = None
    """Index in a file that holds all maps."""


class Predictions:
    """One depth map per image of a split, by the image's number."""

    def __init__(self, maps: Sequence[_Map], size: tuple[int, int], scale: float | None = None):
        """`size`: of the ground truth; `scale`: metres per stored unit, by default the usual one of such files, which
        the first of them shows. Raises UserError."""
        self._maps, self._size = maps, size
        self._stack: np.ndarray | None = None
        self._dtype = self._stored(0).dtype
        metres = scale or _usual_scale(maps[0].file, self._dtype)
        # as a fraction of decimals: 0.0002 m a step is a fifth of a millimetre, and 0.2 has no exact float
        self._counts = Fraction(str(metres)) * COUNTS_PER_METRE
        why = "given by --prediction-scale" if scale else "usual for 16-bit PNG; --prediction-scale says otherwise"
        self.units = "floats, taken as metres" if metres == 1 else f"metres = v * {metres:.6g} ({why})"
        """Rule from stored values to metres, in words."""

    def __len__(self) -> int:
        return len(self._maps)

    def name(self, sample: int) -> str:
        """The file of an image's prediction."""
        found = self._maps[sample]
        return str(found.file) if found.row is None else f"{found.file}, map {found.row}"

    def read(self, sample: int) -> np.ndarray:
        """-> float64 (h, w), of any size that has the aspect of the ground truth; COUNTS_PER_METRE a metre, as it has.

        A stored value whose depth is a whole count becomes exactly that. Raises UserError.
        """
        stored, name = self._stored(sample), self.name(sample)
        if stored.dtype != self._dtype:
            raise UserError(f"{name} holds {stored.dtype} values, but {self.name(0)} holds {self._dtype}")
        if stored.ndim == 3 and 1 in (stored.shape[0], stored.shape[-1]):  # a channel that is one
            stored = stored.reshape(stored.shape[1:] if stored.shape[0] == 1 else stored.shape[:-1])
        if stored.ndim != 2 or 0 in stored.shape:
            raise UserError(f"{name}: an array of shape {stored.shape} is no depth map (height, width)")
        if why := _another_view(stored.shape, self._size):
            sides = f"{name} is {hxw(stored.shape)}, its image {hxw(self._size)}"
            raise UserError(f"{sides}: {why}; predictions may have any size, but must show the whole image")
        return stored.astype(np.float64) * self._counts.numerator / self._counts.denominator

    def _stored(self, sample: int) -> np.ndarray:
        found = self._maps[sample]
        if found.row is None:
            return _read_file(found.file)
        if self._stack is None:
            self._stack = _read_array(found.file)
        return self._stack[found.row]


def open_predictions(
    path: Path, samples: DepthDataset, match: Match = "name", scale: float | None = None
) -> tuple[Predictions, list[str]]:
    """The predictions in `path` for every image of a split, and what is to be said of how they were found.

    `path`: a folder with a file per image, or one .npy or .npz with all maps in the order of the split, (images, h,
    w). `scale`: as of Predictions. Raises UserError where not every image has exactly one.
    """
    last = len(samples) - 1
    if path.is_file():
        count, notes = _header(path)[0][0], list[str]()
        _check_count(path, count, samples)
        maps = [_Map(path, row) for row in range(count)]
        how = f"in the order of the split: map 0 to {samples.key(0)}, map {last} to {samples.key(last)}"
    else:
        chosen, notes = _choose(path, samples, match)
        maps = [_Map(file) for file in chosen]
        ends = (f"{chosen[sample].relative_to(path)} to {samples.key(sample)}" for sample in (0, last))
        order = ", files in natural order of their names (2 before 10)" if match == "order" else ""
        how = f"matched by {match}{order}: {', '.join(ends)}"
    predictions = Predictions(maps, samples.size, scale)
    size = predictions.read(0).shape
    brought = "" if size == samples.size else f"; {hxw(size)}, brought to {hxw(samples.size)}"
    return predictions, [f"{path}: {len(maps)} predictions, {how}; {predictions.units}{brought}", *notes]


def _another_view(size: tuple[int, ...], whole: tuple[int, int]) -> str:
    """Reason why a map of `size` cannot be the whole image, scaled and its sides rounded; empty where it can."""
    (height, width), (rows, columns) = size, whole
    if crop := _CROPS.get((whole, (height, width))):
        return f"that is {crop}"
    off = abs(height * columns - width * rows)
    if off > _ASPECT * width * rows:
        return "not the same view"
    stride = max(stride for stride in _STRIDES if height % stride == width % stride == 0)
    # h = s rows and w = s columns, each of them rounded by less than a stride, whatever the scale s is
    return "" if off <= stride * (rows + columns) else "a part of the view, as no one scale gives both sides"


def _check_count(path: Path, count: int, samples: DepthDataset) -> None:
    if count != len(samples):
        raise UserError(f"{path} holds {count} predictions, the split has {len(samples)} images")


def _choose(path: Path, samples: DepthDataset, match: Match) -> tuple[list[Path], list[str]]:
    """The file of each image, all arrays or else all pictures, and what is to be said of the others. Raises UserError.

    Arrays say more than pictures, but what lies beside predictions (`intrinsics.npy`) does not stand for them.
    """
    arrays, pictures, coloured = _find(path)
    chosen, failures = list[Path](), list[tuple[int, UserError]]()
    for files in filter(None, (arrays, pictures)):
        try:
            chosen = _by_name(path, files, samples) if match == "name" else _by_order(path, files, samples)
            break
        except UserError as error:
            failures.append((len(files), error))
    else:
        raise max(failures, key=lambda failure: failure[0])[1]
    left = len(files) - len(chosen)
    notes = [f"{left} files have the name of none of the images and were left out"] if left else []
    if match == "order" and (other := _named_otherwise(path, chosen, samples)):
        notes.append(other)
    if files is arrays and (beside := len(pictures) + len(coloured)):
        notes.append(f"{beside} pictures beside them were left out")
    elif files is pictures:
        notes += [f"{len(coloured)} coloured pictures beside them were left out"] if coloured else []
        notes += [f"{len(arrays)} arrays beside them, such as {arrays[0].name}, were left out"] if arrays else []
    return chosen, notes


def _by_order(path: Path, files: list[Path], samples: DepthDataset) -> list[Path]:
    _check_count(path, len(files), samples)
    return files


def _named_otherwise(path: Path, files: list[Path], samples: DepthDataset) -> str:
    """A warning where the names of files that were matched by their order say that they are of other images."""
    try:
        named = _by_name(path, files, samples)
    except UserError:
        return ""
    wrong = next((sample for sample, file in enumerate(files) if file != named[sample]), None)
    if wrong is None:
        return ""
    return (
        f"warning: by their names they belong to other images, such as {named[wrong].relative_to(path)} to "
        f"{samples.key(wrong)}, for which {files[wrong].relative_to(path)} is taken; --match name goes by the names"
    )


def _find(folder: Path) -> tuple[list[Path], list[Path], list[Path]]:
    """List the files of a folder, in natural order: arrays, grey pictures, coloured ones. Raises UserError."""
    if not folder.is_dir():
        raise UserError(f"--predictions {folder}: no such folder or file")
    entries = files_below(folder)
    refuse_dead_links(path for path in entries if path.suffix.lower() in (*SUFFIXES, ""))  # "" may be a folder
    found = [path for path in entries if path.suffix.lower() in SUFFIXES]
    arrays = [path for path in found if path.suffix.lower() != ".png"]
    pictures, coloured = list[Path](), list[Path]()
    for path in found:
        if path.suffix.lower() == ".png":
            (coloured if _is_coloured(path) else pictures).append(path)
    if not (arrays or pictures):
        raise UserError(f"--predictions {folder}: no depth map in it (16-bit PNG, .npy or .npz)")
    return arrays, pictures, coloured


def _is_coloured(path: Path) -> bool:
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as picture:
            return picture.mode in ("RGB", "RGBA", "P", "LA", "CMYK")
    except (OSError, ValueError, Image.DecompressionBombError):
        return False  # said when it is read


def _parts(name: str) -> tuple[str, ...]:
    """A path's words and numbers without what says its kind: `test/bathroom/rgb_00045.jpg` -> test, bathroom, 45."""
    stem = re.sub(r"(\.(jpe?g|png|npy|npz|h5|webp|bmp|tiff?))+$", "", normalize("NFC", name).lower())
    words = (word.lstrip("0") or "0" if word.isdigit() else word for word in re.findall(r"[a-z0-9]+|[^\0-\x7f]+", stem))
    return tuple(word for word in words if word not in _KINDS | _UNITS)


def _by_name(path: Path, files: Sequence[Path], samples: DepthDataset) -> list[Path]:
    """The file of each image: the one whose name ends in most of the same words and numbers. Raises UserError."""
    endings: dict[tuple[str, ...], set[int]] = {}
    for sample in range(len(samples)):
        for name in {samples.key(sample), samples.meta(sample).get("source", "")}:
            parts = _parts(name)
            for start in range(len(parts)):
                endings.setdefault(parts[start:], set()).add(sample)
    known = {word for ending in endings for word in ending}
    best: dict[int, tuple[int, Path]] = {}
    for file in files:
        words = _parts(file.relative_to(path).as_posix())
        parts = tuple(word for word in words if word.isascii() or word in known)  # "depth" in any language is none
        ending = next((parts[start:] for start in range(len(parts)) if parts[start:] in endings), ())
        matches = endings.get(ending, set())
        if len(matches) > 1:
            first, second, *_ = sorted(matches)
            raise UserError(
                f"{file}: its name fits {len(matches)} images, such as {samples.key(first)} and {samples.key(second)}; "
                "name predictions as their images, or say --match order"
            )
        for sample in matches:
            length, other = best.get(sample, (0, file))
            if length == len(ending) and not file.samefile(other):  # it may, through a linked folder
                raise UserError(f"{other} and {file} both have the name of image {samples.key(sample)}")
            if length < len(ending):
                best[sample] = len(ending), file
    lacking = [sample for sample in range(len(samples)) if sample not in best]
    if lacking:
        raise UserError(
            f"{path}: {len(lacking)} of {len(samples)} images have no prediction of their name, such as "
            f"{samples.key(lacking[0])}; it holds {len(files)} files, such as {files[0].name}; where they are in the "
            "order of the split, say --match order"
        )
    return [best[sample][1] for sample in range(len(samples))]


def _usual_scale(file: Path, dtype: np.dtype) -> float:
    """Metres per stored unit where none was given. Raises UserError where there is no usual one."""
    if dtype.kind == "f":
        return 1.0
    if dtype == np.uint16 and file.suffix.lower() == ".png":
        return 1e-3
    raise UserError(
        f"{file} holds {dtype} values, and nothing says what a step of them means; give metres per step, for example "
        f"--prediction-scale {'0.0392157' if dtype == np.uint8 else '0.001'}"
    )


def _read_file(path: Path) -> np.ndarray:
    """The stored values of a file with one depth map. Raises UserError."""
    if path.suffix.lower() != ".png":
        return _read_array(path)
    try:
        with Image.open(path, formats=["PNG"]) as picture:
            if max(picture.size) > MAX_SIDE:
                raise ValueError(f"it claims {picture.height}x{picture.width} pixels")
            if picture.mode not in ("L", "I", "I;16", "I;16B"):
                raise ValueError(f"a {picture.mode} picture; a depth map has one channel of 8 or 16 bits")
            stored = np.asarray(picture)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} is not a readable depth map ({error})") from None
    return stored if stored.dtype == np.uint8 else stored.astype(np.uint16)


def _read_array(path: Path) -> np.ndarray:
    """The array of a .npy, or that of a .npz which `_member` names. Raises UserError."""
    _header(path)
    try:
        if path.suffix.lower() == ".npy":
            return np.load(path, mmap_mode="r", allow_pickle=False)
        with np.load(path, allow_pickle=False) as arrays:
            return arrays[_member(arrays.files)]
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is not a readable array ({error})") from None


def _header(path: Path) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and type of an array file, checked before any of it is read. Raises UserError."""
    try:
        if path.suffix.lower() == ".npy":
            with path.open("rb") as file:
                shape, dtype = _array_header(file)
        elif path.suffix.lower() == ".npz":
            with zipfile.ZipFile(path) as archive:
                members = {name.removesuffix(".npy"): name for name in archive.namelist()}
                name = members[_member(list(members))]
                with archive.open(name) as member:
                    shape, dtype = _array_header(member)
                size = archive.getinfo(name).file_size
                if not 0 <= size - int(np.prod(shape)) * dtype.itemsize <= 65536:
                    raise ValueError(f"its {size} bytes are not those of an array of shape {shape}")
        else:
            raise ValueError(f"not one of {', '.join(SUFFIXES)}")
        if dtype.kind not in "fiu" or not 2 <= len(shape) <= 4:
            raise ValueError(f"an array of {dtype} of shape {shape} is no depth map")
        if max(shape[-2:]) > MAX_SIDE:
            raise ValueError(f"it claims {shape[-2]}x{shape[-1]} pixels")
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, RuntimeError, NotImplementedError) as error:
        raise UserError(f"{path} is not a readable array ({' '.join(str(error).split())})") from None
    return shape, dtype


def _member(names: Sequence[str]) -> str:
    """The array of a .npz that is the depth map: the only one, or the one called so. Raises ValueError."""
    if len(names) != 1 and _NAMED not in names:
        raise ValueError(f"it holds {len(names)} arrays instead of one depth map, and none is called {_NAMED!r}")
    return names[0] if len(names) == 1 else _NAMED


def _array_header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype]:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    return shape, dtype
