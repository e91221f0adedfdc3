"""The shard format: ordinary WebDataset tars, an index to read any sample by one `pread` a member, and a manifest.

DIR/train-000000.tar …   members KEY.depth.CODEC, KEY.jpg, KEY.json per sample
DIR/train.index.npy      one INDEX row per sample: where its members lie, and their crc32
DIR/train.mean.CODEC     per-pixel mean depth, the baseline that a model has to beat
DIR/manifest.json        counts, bytes, sha256, codec, image size, depth statistics, source
"""

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import numpy as np
import simplejpeg

from mde_dist.data import depth
from mde_dist.data.checksum import crc32
from mde_dist.data.config import CacheOptions
from mde_dist.data.dataset import DepthDataset
from mde_dist.data.images import decode_jpeg
from mde_dist.data.index import Index
from mde_dist.data.manifest import INDEX, MEMBERS, TAR_BLOCK, FileInfo, Manifest, command_for
from mde_dist.data.storage.file_handles import FileDescriptorCache
from mde_dist.data.store import Store, open_store
from mde_dist.utils.errors import UserError

T = TypeVar("T")
Payload = bytes | memoryview
_COLUMNS = INDEX.names or ()
_NAME_BLOCKS = 8  # before a member's header, in which a name of its own is looked for
_WHERE = ("offset", "bytes", "crc")  # what the index says of a member


def split_name(member: str) -> tuple[str, str]:
    """A tar member's name -> (key, extension), at the first dot of its last part, as WebDataset does."""
    folder, slash, name = member.rpartition("/")
    stem, _, extension = name.partition(".")
    return folder + slash + stem, extension


def _key_in(header: bytes) -> str:
    """The key in a tar header's name, which other tools split at a slash into two fields (POSIX ustar)."""
    name, prefix = (part.split(b"\0", 1)[0] for part in (header[:100], header[345:500]))
    if prefix and header[257:263] == b"ustar\0":
        name = prefix + b"/" + name
    return split_name(name.decode(errors="replace"))[0]


def _key_at(file: int, offset: int) -> str:
    """The key of the member whose header is at `offset`, checked, in an open tar. Raises ValueError or OSError.

    A name that is long or not ASCII may lie in a header of its own before it (POSIX pax, GNU).
    """
    start = max(0, offset - _NAME_BLOCKS * TAR_BLOCK)
    data = os.pread(file, offset + TAR_BLOCK - start, start)
    header = data[-TAR_BLOCK:]
    tarfile.TarInfo.frombuf(header, "utf-8", "replace")  # which checks the header's own sum
    for first in range(len(data) - 3 * TAR_BLOCK, -1, -TAR_BLOCK):
        if data[first + 156 : first + 157] in (tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME):  # its type
            with suppress(tarfile.TarError), tarfile.open(fileobj=io.BytesIO(data[first:])) as tar:
                if (info := tar.next()) and info.offset_data == len(data) - first:
                    return split_name(info.name)[0]
    return _key_in(header)


def _member(file: int, name: str, offset: int, size: int, crc: int) -> tuple[str, memoryview]:
    """(key, payload) of a member, checked. Raises ValueError or OSError."""
    data = os.pread(file, TAR_BLOCK + size, offset - TAR_BLOCK)
    if len(data) != TAR_BLOCK + size or crc32(data) != crc:
        raise ValueError(f"{name} fails its checksum")
    return _key_in(data), memoryview(data)[TAR_BLOCK:]


def decode_pair(jpeg: Payload, encoded: Payload, codec: str, image: np.ndarray, target: np.ndarray) -> bool:
    """Decode into `image`, uint8 (height, width, 3) RGB, and `target`, uint16 (height, width) millimetres, contiguous.

    -> whether the JPEG has stray bytes, see `decode_jpeg`. Raises ValueError where the bytes are not a colour JPEG and
    a depth map of that size.
    """
    depth.decode(encoded, codec, target)
    height, width, colorspace, _ = simplejpeg.decode_jpeg_header(jpeg)
    if (height, width) != image.shape[:2]:
        raise ValueError(f"image is {height}x{width}, not of the size that the manifest states")
    if colorspace == "Gray":
        raise ValueError("image is grey, not in colour")
    return decode_jpeg(jpeg, image)[1]


class ShardDataset(DepthDataset):
    """The samples of one split of a directory or URL of shards."""

    def __init__(self, manifest: Manifest, store: Store, split: str):
        if split not in manifest.splits:
            raise UserError(f"{manifest.location} has no split {split!r}; it has {', '.join(manifest.splits)}")
        super().__init__()
        self.manifest, self.info, self.size = manifest, manifest.splits[split], manifest.size
        self.location, self.remote = manifest.location, store.remote
        self.advice = f"see what is whole with: {command_for('verify', manifest.location)}"
        self._store = store
        self._hopeless: set[int] = set()  # samples that are damaged in a file that is the one of the manifest
        for shard in self.info.shards:
            store.check(shard)
        self._ends = np.cumsum([shard.samples for shard in self.info.shards])
        self._index = self._open_index()
        # a file that is open keeps its room on the disk even when the cache has thrown it out
        self.most_open = min(len(self.info.shards), 16 if store.remote else 256)
        """Shards whose files are kept open at once."""
        self._handles = FileDescriptorCache(self._open_shard, self.most_open)

    def __len__(self) -> int:
        return self.info.samples

    def __enter__(self) -> "ShardDataset":
        return self

    def close(self) -> None:
        """Close all files and end what is being fetched."""
        self._closing.set()
        self._handles.close()
        self._index.close()

    @property
    def block(self) -> int:
        """Samples in the largest shard: what the order keeps together."""
        return max(shard.samples for shard in self.info.shards)

    def read_into(self, sample: int, image: np.ndarray, target: np.ndarray) -> None:
        """Read one pair into the given arrays. Raises DamagedSample where the bytes are not those that were packed."""

        def read() -> None:
            row = self._index[sample]
            (depth_key, encoded), (image_key, jpeg) = self._members(row, ("depth", "image"))
            if depth_key != image_key:
                raise ValueError(f"the index pairs the depth of {depth_key} with the image of {image_key}")
            if decode_pair(jpeg, encoded, self.manifest.codec, image, target):
                self.stray.add(sample)

        self._read(sample, read)

    def read_encoded(self, sample: int) -> tuple[memoryview, memoryview]:
        """Payloads of one pair, depth map and image, as they were packed. Raises DamagedSample."""

        def read() -> tuple[memoryview, memoryview]:
            (_, encoded), (_, jpeg) = self._members(self._index[sample], ("depth", "image"))
            return encoded, jpeg

        return self._read(sample, read)

    def meta(self, sample: int) -> dict[str, str]:
        def read() -> dict[str, str]:
            row = self._index[sample]
            return json.loads(bytes(self._members(row, ("meta",))[0][1])) if row["meta_bytes"] else {}

        return self._read(sample, read)

    def key(self, sample: int) -> str:
        """The sample's key, from the first header of it that is whole; the sample's number where none is."""
        return self._key(sample) or (self._renewed(sample) and self._key(sample)) or f"of sample {sample}"

    def _read(self, sample: int, read: Callable[[], T]) -> T:
        """Read a part of a sample with `read`. Raises DamagedSample where the bytes are not what was packed.

        A file in the cache may be damaged while that on the server is whole: then it is fetched anew and read again, so
        that a sample counts as damaged on every node or on none.
        """
        try:
            return read()
        except (ValueError, OSError) as error:
            if not self._renewed(sample):
                raise self.damaged(sample, error) from None
        try:
            return read()
        except (ValueError, OSError) as error:
            self._hopeless.add(sample)
            raise self.damaged(sample, error) from None

    def _renewed(self, sample: int) -> bool:
        """Make sure that the sample's file is the one of the manifest -> whether to read it again. Raises UserError."""
        number = self._number(sample)
        if sample in self._hopeless or self._closing.is_set():
            return False
        if not self._store.renew(self.info.shards[number], self._closing):
            return False
        self._handles.forget(number)
        return True

    def _key(self, sample: int) -> str:
        """The sample's key, from the first header of it that is whole; empty where none is."""
        for member in MEMBERS:
            try:
                row = self._index[sample]
                with self._handles.use(int(row["shard"])) as file:
                    key = _key_at(file, int(row[f"{member}_offset"]) - TAR_BLOCK)
                return "".join(letter if letter.isprintable() else "?" for letter in key)
            except (tarfile.TarError, ValueError, OSError, UserError):
                continue
        return ""

    def file_of(self, sample: int) -> str:
        """Path or URL of the tar that holds the sample."""
        return f"{self.manifest.location}/{self.info.shards[self._number(sample)].name}"

    def shards_of(self, ranges: np.ndarray) -> list[int]:
        """Numbers of the shards that hold the samples of `ranges`, int64 (n, 2), first and end of each."""
        spans = ((self._number(first), self._number(end - 1)) for first, end in ranges)
        return list(dict.fromkeys(shard for first, last in spans for shard in range(first, last + 1)))

    def in_order(self) -> Iterator[tuple[int, list[int]]]:
        """Every shard once: (the sample where it ends, its number)."""
        return ((end, [number]) for number, end in enumerate(self._ends.tolist()))

    def prefetch(self, shard: int) -> None:
        """Have a shard on this machine's disks before it is read. Raises UserError."""
        self.local(self.info.shards[shard])

    def local(self, info: FileInfo) -> Path:
        """A shard or the index as a file of this machine, fetched first where it lies on a server. Raises UserError."""
        return self._store.fetch(info, self._closing)

    def mean_map(self) -> np.ndarray:
        """Per-pixel mean depth of the split, uint16 millimetres (height, width)."""
        stored, info = np.empty(self.size, np.uint16), self.info.mean_map

        def read(path: Path) -> None:
            data = path.read_bytes()
            if hashlib.sha256(data).hexdigest() != info.sha256:
                raise ValueError("not the mean map that the manifest names")
            depth.decode(data, self.manifest.codec, stored)

        self._read_file(info, read)
        return stored

    def _number(self, sample: int) -> int:
        """The shard of a sample."""
        return int(np.searchsorted(self._ends, sample, side="right"))

    def _members(self, row: np.void, members: Iterable[str]) -> list[tuple[str, memoryview]]:
        """(key, payload) of members of one sample, checked. Raises ValueError or OSError."""
        fields = dict(zip(_COLUMNS, row.item(), strict=True))  # a tenth of the time of row[name] for each
        with self._handles.use(fields["shard"]) as file:
            return [_member(file, name, *(fields[f"{name}_{what}"] for what in _WHERE)) for name in members]

    def _open_index(self) -> Index:
        info = self.info.index
        self._store.check(info)
        return self._read_file(info, lambda path: Index(path, info, self.info.shards))

    def _read_file(self, info: FileInfo, read: Callable[[Path], T]) -> T:
        """Read a file beside the shards with `read`; a damaged copy of it is fetched anew. Raises UserError."""
        try:
            return read(self.local(info))
        except (OSError, ValueError, EOFError) as error:
            if not self._store.renew(info, self._closing):
                raise self._broken(info, error) from None
        try:
            return read(self.local(info))
        except (OSError, ValueError, EOFError) as error:
            raise self._broken(info, error) from None

    def _broken(self, info: FileInfo, error: object) -> UserError:
        what = error.strerror if isinstance(error, OSError) else error
        return UserError(
            f"{self.manifest.location}/{info.name}: {what}; repair the shards with: "
            f"{command_for('repair', self.manifest.location)}"
        )

    def _open_shard(self, number: int) -> int:
        """A descriptor of a shard. Raises OSError or ValueError; UserError where a server does not give it."""
        info = self.info.shards[number]
        for _ in range(3):
            path = self._store.fetch(info, self._closing)
            try:
                file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                if not self.remote:
                    raise
                continue  # another process needed its place in the cache just now
            if os.fstat(file).st_size != info.bytes:
                os.close(file)
                raise ValueError(f"the shard's size is not the {info.bytes} bytes that the manifest states")
            return file
        raise UserError(f"{path} is taken out of the cache at once; give it more room with --data.cache-gb")


def open_split(location: str | os.PathLike[str], split: str, cache: CacheOptions = CacheOptions()) -> ShardDataset:  # noqa: B008
    """Open one split of a directory of shards, or of a URL. Raises UserError."""
    manifest, store = open_store(location, cache)
    return ShardDataset(manifest, store, split)
