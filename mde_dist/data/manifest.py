"""manifest.json of a directory of shards: what it holds, every value checked, and the files it names."""

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mde_dist import __version__
from mde_dist.data import depth
from mde_dist.data.statistics import Statistics
from mde_dist.data.storage.cache import FileInfo
from mde_dist.utils.errors import UserError
from mde_dist.utils.io import atomic_file, sha256_of, write_atomic
from mde_dist.utils.paths import command_line
from mde_dist.utils.urls import is_remote

FORMAT = "mde_dist.shards"
VERSION = 2
NAME = "manifest.json"
PACKING = ".packing"
"""Hidden folder in a directory of shards: what is packed stays there until all is."""
MAX_SIDE = 8192
"""Pixels that an image is high or wide at most."""
TAR_BLOCK = 512
"""Bytes to which tar pads headers and payloads."""
MEMBERS = ("depth", "image", "meta")  # in the order in which WebDataset's writer lays them down
INDEX = np.dtype(
    [("shard", "<u4")]
    + [
        (f"{member}_{what}", kind)
        for member in MEMBERS
        for what, kind in (("offset", "<u8"), ("bytes", "<u4"), ("crc", "<u4"))
    ]
)
"""A row of the index. `offset` is where a member's payload begins, `bytes` its length; `crc` is the crc32 of the 512
bytes of its tar header and the payload. A sample without a record has `meta_bytes` 0."""


@dataclass(frozen=True)
class ShardInfo(FileInfo):
    samples: int
    waited_for_by_loader = True


@dataclass(frozen=True)
class SplitInfo:
    """Entry of one split in the manifest."""

    name: str
    samples: int
    shards: tuple[ShardInfo, ...]
    index: FileInfo
    mean_map: FileInfo
    depth: Mapping[str, float]
    """`min`, `median`, `mean`, `max` in metres over valid pixels; `holes`, the share of pixels without measurement."""


@dataclass(frozen=True)
class Manifest:
    location: str
    """The directory or URL of the shards."""
    sha256: str
    """Hash of manifest.json: two runs with one hash saw the same data."""
    codec: str
    size: tuple[int, int]
    """Height and width of every image and depth map, pixels."""
    layout: str
    splits: Mapping[str, SplitInfo]
    raw: Mapping[str, Any]
    """Content of manifest.json as it was read."""

    @property
    def files(self) -> set[str]:
        """Names of the files that it names."""
        return {file.name for split in self.splits.values() for file in (*split.shards, split.index, split.mean_map)}


def parse_manifest(data: bytes, location: str) -> Manifest:
    """The manifest of the shards at `location` from its bytes. Raises UserError."""
    where = f"{location}/{NAME}"
    try:
        raw = json.loads(data)
        if raw["format"] != FORMAT or raw["version"] != VERSION:
            raise UserError(
                f"{where}: format {raw['format']} {raw['version']}, this version reads {FORMAT} {VERSION}; "
                f"move the manifest away and make a new one with: {command_for('index', location)}"
            )
        if raw["codec"] not in depth.CODECS:
            raise UserError(f"{where}: depth codec {raw['codec']!r}, this version reads {', '.join(depth.CODECS)}")
        height, width = (_count(side, MAX_SIDE) for side in raw["image_size"])
        splits = {check_name(name): _split(name, split) for name, split in raw["splits"].items()}
        layout, codec = str(raw["source"]["layout"]), raw["codec"]
        names = [shard.name for split in splits.values() for shard in split.shards]
        if not splits or len(set(names)) != len(names):
            raise ValueError("it names a shard twice" if splits else "no split")
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise UserError(
            f"{where} is damaged ({type(error).__name__}: {error}); move it away and make a new one from the tars "
            f"with: {command_for('index', location)}"
        ) from None
    return Manifest(location, hashlib.sha256(data).hexdigest(), codec, (height, width), layout, splits, raw)


def command_for(action: str, location: str) -> str:
    """The command that verifies, repairs or indexes shards; a server's shards where they were made."""
    if is_remote(location):
        return command_line("shard", f"--{action}", then="DIR (where they were packed)")
    return command_line("shard", f"--{action}", Path(location))


def _split(name: str, raw: Mapping[str, Any]) -> SplitInfo:
    """A split of the manifest, every value checked. Raises ValueError, KeyError, TypeError or AttributeError."""
    shards = tuple(ShardInfo(**vars(_file(s)), samples=_count(s["samples"])) for s in raw["shards"])
    samples = _count(raw["samples"])
    if sum(shard.samples for shard in shards) != samples:
        raise ValueError(f"split {name} has {samples} samples, its shards have another number")
    statistics = {what: float(raw["depth"][what]) for what in ("min", "median", "mean", "max", "holes")}
    if not all(math.isfinite(value) for value in statistics.values()):
        raise ValueError(f"split {name} has depth statistics that are no numbers")
    return SplitInfo(name, samples, shards, _file(raw["index"]), _file(raw["mean_map"]), statistics)


def _file(raw: Mapping[str, Any]) -> FileInfo:
    if not re.fullmatch("[0-9a-f]{64}", raw["sha256"]):
        raise ValueError(f"{raw['sha256']!r} is no sha256")
    return FileInfo(check_name(raw["name"]), _count(raw["bytes"]), raw["sha256"])


def _count(value: Any, most: int = 2**62) -> int:
    if type(value) is not int or not 1 <= value <= most:
        raise ValueError(f"{value!r} is no count")
    return value


def check_name(name: str) -> str:
    """A file's name that cannot lead out of the directory, whatever the system."""
    if not re.fullmatch(r"[\w][\w.+@=, -]*", name):
        raise ValueError(f"{name!r} is not the name of a file in it")
    return name


def write_split(
    directory: Path,
    name: str,
    shards: Iterable[tuple[ShardInfo, np.ndarray]],
    statistics: Statistics,
    codec: str,
    revision: str = "",
) -> dict[str, Any]:
    """Write index and mean map of a split whose tars stand in `directory` -> its record for the manifest.

    `shards`: each with its INDEX rows, whose `shard` is set here. `revision` goes into the names of the files.
    """
    infos, rows = [], []
    for number, (info, index) in enumerate(shards):
        index["shard"] = number
        infos.append(asdict(info))
        rows.append(index)
    index_path = directory / f"{name}{revision}.index.npy"
    with atomic_file(index_path) as file:
        np.save(file, np.concatenate(rows), allow_pickle=False)
    mean_path = directory / f"{name}{revision}.mean.{codec}"
    write_atomic(mean_path, depth.encode(statistics.mean_map(), codec))
    return {
        "samples": sum(len(index) for index in rows),
        "shards": infos,
        "index": asdict(file_info(index_path)),
        "mean_map": asdict(file_info(mean_path)),
        "depth": statistics.summary(),
    }


def write_manifest(directory: Path, codec: str, size: tuple[int, int], layout: str, splits: dict[str, Any]) -> Manifest:
    """Write manifest.json, the last file of a directory of shards."""
    raw = {
        "format": FORMAT,
        "version": VERSION,
        "made_by": f"mde_dist {__version__}",
        "codec": codec,
        "image_size": list(size),
        "source": {"layout": layout},
        "splits": splits,
    }
    data = json.dumps(raw, indent=1) + "\n"
    manifest = parse_manifest(data.encode(), str(directory))  # what cannot be read is not written
    write_atomic(directory / NAME, data)
    return manifest


def file_info(path: Path) -> FileInfo:
    return FileInfo(path.name, path.stat().st_size, sha256_of(path))
