"""Samples -> one WebDataset tar and its index rows."""

import contextlib
import json
import zlib
from collections.abc import Mapping
from types import TracebackType
from typing import BinaryIO

import numpy as np
import webdataset

from .shards import INDEX, MEMBERS, TAR_BLOCK


class ShardWriter:
    """Writes samples into one tar, with fixed times, owners and order. Use it in a `with`, then take `rows`."""

    def __init__(self, file: BinaryIO, codec: str):
        self._tar = webdataset.TarWriter(
            file, encoder=False, compress=False, mtime=0, user="mde_dist", group="mde_dist"
        )
        self._extensions = dict(zip(MEMBERS, (f"depth.{codec}", "jpg", "json"), strict=True))
        self._offset = 0
        self._rows: list[tuple[int, ...]] = []

    def write(self, key: str, jpeg: bytes, encoded_depth: bytes, meta: Mapping[str, str]) -> None:
        text = json.dumps(meta, sort_keys=True, ensure_ascii=False).encode()
        payloads = dict(zip(MEMBERS, (encoded_depth, jpeg, text), strict=True))
        self._tar.write({"__key__": key} | {self._extensions[member]: data for member, data in payloads.items()})
        row = [0]
        for data in payloads.values():
            row += [self._offset + TAR_BLOCK, len(data), zlib.crc32(data)]
            self._offset += TAR_BLOCK + -(-len(data) // TAR_BLOCK) * TAR_BLOCK
        self._rows.append(tuple(row))

    def rows(self) -> np.ndarray:
        """The INDEX rows of what was written (shard number 0)."""
        return np.array(self._rows, dtype=INDEX)

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if kind is None:
            self._tar.close()
        else:  # the tar comes to nothing; closed all the same, or tarfile complains when it is collected
            with contextlib.suppress(OSError):
                self._tar.close()
