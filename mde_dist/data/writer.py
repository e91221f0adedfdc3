"""Samples -> one WebDataset tar."""

import contextlib
import json
from collections.abc import Mapping
from types import TracebackType
from typing import BinaryIO

import webdataset

from .manifest import MEMBERS


class ShardWriter:
    """Writes samples into one tar, with fixed times, owners and order. Use it in a `with`."""

    def __init__(self, file: BinaryIO, codec: str):
        self._tar = webdataset.TarWriter(
            file, encoder=False, compress=False, mtime=0, user="mde_dist", group="mde_dist"
        )
        self._extensions = dict(zip(MEMBERS, (f"depth.{codec}", "jpg", "json"), strict=True))

    def write(self, key: str, jpeg: bytes, encoded_depth: bytes, meta: Mapping[str, str]) -> None:
        text = json.dumps(meta, sort_keys=True, ensure_ascii=False).encode()
        self.write_members(key, {"depth": encoded_depth, "image": jpeg, "meta": text})

    def write_members(self, key: str, members: Mapping[str, bytes]) -> None:
        """A sample by the payloads of its MEMBERS, of which `meta` may be missing."""
        self._tar.write({"__key__": key} | {self._extensions[member]: data for member, data in members.items()})

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if kind is None:
            self._tar.close()
        else:  # the tar comes to nothing; closed all the same, or tarfile complains when it is collected
            with contextlib.suppress(OSError):
                self._tar.close()
