"""NYU Depth v2 as people have it on disk -> pairs of image and depth, with the scale of each split.

A layout is one function `(root, DepthScale override per split) -> Source | None`; None means "this is not my layout".
"""

import csv
import hashlib
import io
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from ..errors import UserError
from . import depth
from .depth import DepthScale
from .rooms import render_room

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
ROOMS_SPLITS = {"train": (320, 0), "test": (48, 1_000_000)}  # pairs, seed of the first: no room is in both


class BadPair(Exception):
    """A pair that cannot be used; the message names the file and what is wrong with it."""


@dataclass(frozen=True)
class Pair:
    """One image and its depth map, not read yet."""

    key: str
    """Name in the shards: unique, without dot, slash or white space."""
    scene: str
    image: str
    """Path relative to the source's root, or `room:SEED`."""
    depth: str


@dataclass(frozen=True)
class Split:
    pairs: tuple[Pair, ...]
    scale: DepthScale


@dataclass(frozen=True)
class RawPair:
    """A pair as read: image uint8 (height, width, 3), depth uint16 millimetres (height, width)."""

    image: np.ndarray
    depth: np.ndarray
    jpeg: bytes | None = None
    """The source's own bytes where they are a baseline RGB JPEG, so that they can be stored as they are."""


@dataclass(frozen=True)
class Source:
    """A recognised data set: its layout and the pairs of each split."""

    layout: str
    root: Path
    splits: Mapping[str, Split]

    def read(self, pair: Pair, scale: DepthScale) -> RawPair:
        """Read and check one pair. Raises BadPair with the path and what is wrong."""
        if pair.image.startswith("room:"):
            image, metres = render_room(int(pair.image.removeprefix("room:")))
            return RawPair(image, depth.metres_to_millimetres(metres))
        image, jpeg = _read_image(self.root / pair.image)
        millimetres = _read_depth(self.root / pair.depth, scale)
        if image.shape[:2] != millimetres.shape:
            raise BadPair(
                f"{self.root / pair.depth} is {_hxw(millimetres.shape)}, but its image {self.root / pair.image} is "
                f"{_hxw(image.shape)}"
            )
        if not millimetres.any():
            raise BadPair(f"{self.root / pair.depth} has no valid pixel")
        return RawPair(image, millimetres, jpeg)

    def missing(self, pair: Pair) -> list[Path]:
        """The files of the pair that are not there."""
        if pair.image.startswith("room:"):
            return []
        return [path for path in (self.root / pair.image, self.root / pair.depth) if not path.is_file()]


Scales = Mapping[str, DepthScale]


def open_source(root: Path, layout: str | None = None, scales: Scales | None = None) -> Source:
    """Recognise the data set in `root` (or take the layout named), with depth scales by split overruled by `scales`.

    The key "" in `scales` stands for every split. Raises UserError where nothing fits.
    """
    scales = scales or {}
    if layout == "rooms":
        return rooms()
    if not root.is_dir():
        raise UserError(f"--source {root}: no such folder")
    names = [layout] if layout else list(LAYOUTS)
    for name in names:
        source = LAYOUTS[name](root, scales)
        if source:
            unknown = set(scales) - {"", *source.splits}
            if unknown:
                raise UserError(f"--depth-scale names split {sorted(unknown)[0]!r}; {root} has {_names(source.splits)}")
            return source
    wanted = {name: EXPECTED[name] for name in names}
    raise UserError(
        f"--source {root} is not a data set that mde_dist knows; it looked for "
        + "; ".join(f"{name}: {what}" for name, what in wanted.items())
    )


def rooms(counts: Mapping[str, int] | None = None) -> Source:
    """The embedded sample: rendered rooms, `counts` pairs per split."""
    splits = {}
    for split, (count, first) in ROOMS_SPLITS.items():
        seeds = range(first, first + (counts or {}).get(split, count))
        pairs = tuple(Pair(f"room-{seed:07d}", f"room_{seed:07d}", f"room:{seed}", "") for seed in seeds)
        splits[split] = Split(pairs, DepthScale(1.0, reason="rendered in metres"))
    return Source("rooms", Path("rooms"), splits)


def _densedepth(root: Path, scales: Scales) -> Source | None:
    """data/nyu2_{train,test}.csv with rows `image,depth`; 8-bit 0..10 m for training, 16-bit millimetres for test."""
    bases = [root, root / "nyu_data", *([root.parent] if root.name == "data" else [])]
    found = [base for base in bases if any((base / f"data/nyu2_{split}.csv").is_file() for split in ("train", "test"))]
    if not found:
        return None
    base, splits = found[0], {}
    for split, scale in (("train", depth.DENSEDEPTH_8BIT), ("test", depth.MILLIMETRES)):
        table = base / f"data/nyu2_{split}.csv"
        if table.is_file():
            rows = [row for row in csv.reader(io.StringIO(_text(table))) if row]
            splits[split] = Split(_pairs(table, rows, "", "data"), _scale(scales, split, scale))
    return Source("densedepth", base, splits)


def _bts(root: Path, scales: Scales) -> Source | None:
    """nyudepthv2_{train,test}_files_with_gt.txt: image, depth, focal; train paths start with '/', test paths do not."""
    splits = {}
    for split, folder in (("train", "sync"), ("test", "official_splits/test")):
        table = root / f"nyudepthv2_{split}_files_with_gt.txt"
        if table.is_file():
            rows = [line.split() for line in _text(table).splitlines() if line.strip()]
            splits[split] = Split(_pairs(table, rows, folder, folder), _scale(scales, split, depth.MILLIMETRES))
    return Source("bts", root, splits) if splits else None


def _folder(root: Path, scales: Scales) -> Source | None:
    """images/ and depth/ with the same names, in the root (split `train`) or once in a folder per split."""
    bases = {"train": root} if (root / "images").is_dir() else {p.name: p for p in sorted(root.iterdir()) if p.is_dir()}
    splits = {}
    for split, base in bases.items():
        if not ((base / "images").is_dir() and (base / "depth").is_dir()):
            continue
        prefix = base.relative_to(root).as_posix()
        images = sorted(p for p in (base / "images").iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
        rows = [(f"{prefix}/images/{p.name}", f"{prefix}/depth/{p.stem}.png") for p in images]
        if not rows:
            raise UserError(f"{base / 'images'} holds no image ({', '.join(IMAGE_SUFFIXES)})")
        scale = scales.get(split) or scales.get("") or _guess_scale([root / row[1] for row in rows], split)
        splits[split] = Split(_pairs(base, rows, "", f"{prefix}/images"), scale)
    return Source("folder", root, splits) if splits else None


LAYOUTS: dict[str, Callable[[Path, Scales], Source | None]] = {
    "densedepth": _densedepth,
    "bts": _bts,
    "folder": _folder,
}
EXPECTED = {
    "densedepth": "data/nyu2_train.csv or data/nyu2_test.csv",
    "bts": "nyudepthv2_train_files_with_gt.txt or nyudepthv2_test_files_with_gt.txt",
    "folder": "images/NAME.* with depth/NAME.png, or one such folder per split",
}


def _scale(scales: Scales, split: str, declared: DepthScale) -> DepthScale:
    return scales.get(split) or scales.get("") or declared


def _guess_scale(paths: list[Path], split: str) -> DepthScale:
    """The scale of a plain folder from its first depth map: 16 bits are nearly always millimetres, 8 bits anything."""
    path = next((path for path in paths if path.is_file()), paths[0])
    try:
        with Image.open(path) as picture:
            bits = 8 if picture.mode in ("L", "P", "1") else 16
    except OSError:
        raise UserError(f"{path}: missing or unreadable; every image needs a depth map of its name") from None
    if bits == 8:
        raise UserError(
            f"{path} is 8-bit and a plain folder does not say what a step means; "
            f"give metres per step, for example --depth-scale {split}=0.0392157"
        )
    return DepthScale(1e-3, reason="guessed: millimetres, because the files are 16-bit PNG")


def _text(path: Path) -> str:
    """A list file as text: without the mark that some editors put first, with '/' as the separator of paths."""
    try:
        return path.read_text(encoding="utf-8-sig").replace("\\", "/")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a readable list of files ({error})") from None


def _pairs(table: Path, rows: Iterable[Iterable[str]], folder: str, drop: str) -> tuple[Pair, ...]:
    """Rows `image, depth[, …]` with paths below `folder` -> pairs; keys are the image paths less `drop`."""
    pairs: dict[str, Pair] = {}
    for number, row in enumerate(rows, 1):
        columns = [column.strip() for column in row]
        if len(columns) < 2 or not all(columns[:2]):
            raise UserError(f"{table}, row {number}: expected an image and a depth path, found {' '.join(columns)!r}")
        image, target = (PurePosixPath(folder, column.lstrip("/")) for column in columns[:2])
        for path in (image, target):
            if ".." in path.parts or ":" in path.parts[0]:
                raise UserError(f"{table}, row {number}: {path} leaves the data set's folder")
        name = image.relative_to(drop) if drop and image.is_relative_to(drop) else image
        key = _key(name)
        if key in pairs:
            raise UserError(f"{table}, row {number}: {image} is listed twice or collides with {pairs[key].image}")
        pairs[key] = Pair(key, name.parent.name.removesuffix("_out"), str(image), str(target))
    if not pairs:
        raise UserError(f"{table} lists no pairs")
    return tuple(pairs.values())


def _key(path: PurePosixPath) -> str:
    key = re.sub(r"[^A-Za-z0-9_-]+", "-", str(path.with_suffix("")))
    # a tar header holds 100 characters, and `.depth.zst` has to fit as well
    return key if len(key) <= 80 else f"{key[:63]}-{hashlib.sha256(str(path).encode()).hexdigest()[:16]}"


def _read_image(path: Path) -> tuple[np.ndarray, bytes | None]:
    data = _bytes(path)
    try:
        if _is_baseline_rgb_jpeg(data):
            return simplejpeg.decode_jpeg(data, colorspace="RGB"), data
        with Image.open(io.BytesIO(data)) as picture:
            return np.asarray(picture.convert("RGB")), None
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise BadPair(f"{path} is not a readable image ({reason(error)})") from None


def _is_baseline_rgb_jpeg(data: bytes) -> bool:
    """True for a three-component JPEG in baseline mode (SOF0), which every decoder reads at full speed."""
    if data[:2] != b"\xff\xd8":
        return False
    place = 2
    while place + 10 <= len(data) and data[place] == 0xFF:
        marker, length = data[place + 1], int.from_bytes(data[place + 2 : place + 4], "big")
        if marker == 0xC0:
            return data[place + 9] == 3 and simplejpeg.decode_jpeg_header(data)[2] == "YCbCr"
        if marker in (0xC1, 0xC2, 0xC3, 0xDA):
            return False
        place += 2 + length
    return False


def _read_depth(path: Path, scale: DepthScale) -> np.ndarray:
    data = _bytes(path)
    try:
        with Image.open(io.BytesIO(data)) as picture:
            mode, stored = picture.mode, np.asarray(picture)
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise BadPair(f"{path} is not a readable depth map ({reason(error)})") from None
    if mode not in ("L", "I;16", "I"):
        raise BadPair(f"{path} is a {mode} picture; a depth map has one channel of 8 or 16 bits")
    bits = 8 if mode == "L" else 16
    if scale.bits and bits != scale.bits:
        raise BadPair(f"{path} is {bits}-bit, but the layout declares {scale.bits}-bit depth ({scale.reason})")
    return depth.to_millimetres(stored, scale)


def reason(error: Exception) -> str:
    """Why a picture cannot be read, in words that are the same in every run (PIL's own name an address in memory)."""
    return "of no known format" if isinstance(error, UnidentifiedImageError) else str(error)


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise BadPair(f"{path} cannot be read ({error.strerror})") from None


def _hxw(shape: tuple[int, ...]) -> str:
    return f"{shape[0]}x{shape[1]}"


def _names(names: Iterable[str]) -> str:
    return ", ".join(names)
