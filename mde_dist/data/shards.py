"""The shard format: ordinary WebDataset tars, an index to read any sample by one `pread`, and a manifest.

DIR/train-000000.tar …   members KEY.depth.CODEC, KEY.jpg, KEY.json per sample
DIR/train.index.npy      one INDEX row per sample: where its members lie, and their crc32
DIR/train.mean.CODEC     per-pixel mean depth, the baseline that a model has to beat
DIR/manifest.json        counts, bytes, sha256, codec, image size, depth statistics, source
"""

import hashlib
import json
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg

from ..errors import UserError
from . import depth

FORMAT = "mde_dist.shards"
VERSION = 1
MEMBERS = ("depth", "image", "meta")  # in the order in which WebDataset's writer lays them down
INDEX = np.dtype(
    [("shard", "<u4")]
    + [
        (f"{member}_{what}", kind)
        for member in MEMBERS
        for what, kind in (("offset", "<u8"), ("bytes", "<u4"), ("crc", "<u4"))
    ]
)
TAR_BLOCK = 512  # tar pads headers and payloads to this many bytes


class DamagedSample(Exception):
    """A sample whose bytes are not what was packed; the message names shard, key and what is wrong."""


@dataclass(frozen=True)
class SplitInfo:
    """What the manifest says of one split."""

    name: str
    samples: int
    shards: Sequence[Mapping[str, Any]]
    """`name`, `samples`, `bytes`, `sha256` of each tar."""
    index: Mapping[str, str]
    """`name`, `sha256` of the index."""
    mean_map: str
    depth: Mapping[str, float]
    """`min`, `median`, `mean`, `max` in metres over valid pixels; `holes`, the share of pixels without measurement."""


@dataclass(frozen=True)
class Manifest:
    path: Path
    """The directory of the shards."""
    sha256: str
    """Of manifest.json: two runs with one hash saw the same data."""
    codec: str
    size: tuple[int, int]
    """Height and width of every image and depth map, pixels."""
    layout: str
    splits: Mapping[str, SplitInfo]


def read_manifest(directory: Path) -> Manifest:
    """Read and check DIR/manifest.json. Raises UserError."""
    path = directory / "manifest.json"
    if not path.is_file():
        raise UserError(
            f"{directory} holds no shards (no manifest.json); "
            f"pack a data set into it with: python -m mde_dist.shard --source DIR --output {directory}"
        )
    data = path.read_bytes()
    try:
        raw = json.loads(data)
        if raw["format"] != FORMAT or raw["version"] != VERSION:
            raise UserError(f"{path}: format {raw['format']} {raw['version']}, this version reads {FORMAT} {VERSION}")
        height, width = (_count(side) for side in raw["image_size"])
        splits = {name: _split_info(name, split) for name, split in raw["splits"].items()}
        if raw["codec"] not in depth.CODECS:
            raise UserError(f"{path}: depth codec {raw['codec']!r}, this version reads {', '.join(depth.CODECS)}")
        layout, codec = str(raw["source"]["layout"]), raw["codec"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error}); pack the shards again") from None
    return Manifest(directory, hashlib.sha256(data).hexdigest(), codec, (height, width), layout, splits)


def _split_info(name: str, raw: Mapping[str, Any]) -> SplitInfo:
    """A split of the manifest, every value checked. Raises ValueError, KeyError, TypeError or AttributeError."""
    shards = [
        {"name": _plain(s["name"]), "samples": _count(s["samples"]), "bytes": _count(s["bytes"]), "sha256": s["sha256"]}
        for s in raw["shards"]
    ]
    samples = _count(raw["samples"])
    if sum(shard["samples"] for shard in shards) != samples:
        raise ValueError(f"split {name} has {samples} samples, its shards have another number")
    index = {"name": _plain(raw["index"]["name"]), "sha256": raw["index"]["sha256"]}
    statistics = {what: float(raw["depth"][what]) for what in ("min", "median", "mean", "max", "holes")}
    return SplitInfo(name, samples, shards, index, _plain(raw["mean_map"]), statistics)


def _count(value: Any) -> int:
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{value!r} is no count")
    return value


def _plain(name: str) -> str:
    """A file's name that cannot lead out of the directory."""
    if Path(name).name != name or name in ("", "..", "."):
        raise ValueError(f"{name!r} is not the name of a file in it")
    return name


class ShardSet:
    """The samples of one split, readable at random and from several threads. Use it in a `with`."""

    def __init__(self, manifest: Manifest, split: str):
        if split not in manifest.splits:
            raise UserError(f"{manifest.path} has no split {split!r}; it has {', '.join(manifest.splits)}")
        self.manifest, self.info = manifest, manifest.splits[split]
        self.size = manifest.size
        self._files: list[int] = []
        self._index = self._open_index()
        try:
            for shard in self.info.shards:
                self._files.append(self._open_shard(manifest.path / shard["name"], shard["bytes"]))
        except UserError:
            self.close()
            raise

    def __len__(self) -> int:
        return self.info.samples

    def __enter__(self) -> "ShardSet":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._index = np.empty(0, INDEX)  # which unmaps the file
        while self._files:
            os.close(self._files.pop())

    @property
    def block(self) -> int:
        """Samples in the largest shard: what the order keeps together."""
        return max(int(shard["samples"]) for shard in self.info.shards)

    def key(self, sample: int) -> str:
        """The sample's key, from the header of its depth map."""
        row = self._index[sample]
        header = os.pread(self._files[row["shard"]], TAR_BLOCK, int(row["depth_offset"]) - TAR_BLOCK)
        return header[:100].split(b"\0")[0].decode(errors="replace").split(".")[0]

    def meta(self, sample: int) -> dict[str, str]:
        """The sample's own record: scene, source, split. Raises DamagedSample."""
        try:
            return json.loads(self._payload(sample, "meta"))
        except (ValueError, OSError) as error:
            raise self._damaged(sample, error) from None

    def read_into(self, sample: int, image: np.ndarray, target: np.ndarray) -> None:
        """Read a sample into `image`, uint8 (height, width, 3), and `target`, uint16 millimetres (height, width).

        Both must be contiguous. Raises DamagedSample where the bytes are not what was packed.
        """
        try:
            depth.decode(self._payload(sample, "depth"), self.manifest.codec, target)
            jpeg = self._payload(sample, "image")
            if simplejpeg.decode_jpeg_header(jpeg)[:2] != image.shape[:2]:
                raise ValueError("image is not of the size that the manifest states")
            simplejpeg.decode_jpeg(jpeg, colorspace="RGB", buffer=image)
        except (ValueError, OSError) as error:
            raise self._damaged(sample, error) from None

    def shard_of(self, sample: int) -> str:
        """Path of the tar that holds the sample."""
        return str(self.manifest.path / self.info.shards[self._index[sample]["shard"]]["name"])

    def _damaged(self, sample: int, error: Exception) -> DamagedSample:
        return DamagedSample(f"{self.shard_of(sample)}, key {self.key(sample)}: {error}")

    def mean_map(self) -> np.ndarray:
        """Per-pixel mean depth of the split, float32 metres (height, width)."""
        stored = np.empty(self.size, np.uint16)
        try:
            depth.decode((self.manifest.path / self.info.mean_map).read_bytes(), self.manifest.codec, stored)
        except (OSError, ValueError) as error:
            raise UserError(f"{self.manifest.path / self.info.mean_map}: {error}; pack the shards again") from None
        return depth.to_metres(stored)

    def _payload(self, sample: int, member: str) -> bytes:
        row = self._index[sample]
        offset, size, crc = (int(row[f"{member}_{what}"]) for what in ("offset", "bytes", "crc"))
        data = os.pread(self._files[row["shard"]], size, offset)
        if zlib.crc32(data) != crc or len(data) != size:
            raise ValueError(f"{member} fails its checksum")
        return data

    def _open_index(self) -> np.ndarray:
        path = self.manifest.path / self.info.index["name"]
        try:
            whole = hashlib.sha256(path.read_bytes()).hexdigest() == self.info.index["sha256"]
            index = np.load(path, mmap_mode="r", allow_pickle=False) if whole else None
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: {error}; pack the shards again") from None
        if index is None or index.dtype != INDEX or len(index) != self.info.samples:
            raise UserError(f"{path} is not the index that the manifest names; pack the shards again")
        return index

    @staticmethod
    def _open_shard(path: Path, size: int) -> int:
        try:
            file = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}, but the manifest names it; pack the shards again") from None
        if os.fstat(file).st_size != size:
            os.close(file)
            raise UserError(f"{path}: {path.stat().st_size} bytes, the manifest says {size}; pack the shards again")
        return file


def open_split(directory: Path, split: str) -> ShardSet:
    """Open one split of a directory of shards. Raises UserError."""
    return ShardSet(read_manifest(directory), split)
