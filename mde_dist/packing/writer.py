"""Samples -> one WebDataset tar."""

import contextlib
import io
import json
import tarfile
from collections.abc import Mapping
from types import TracebackType
from typing import BinaryIO

from mde_dist.data.manifest import MEMBERS


class ShardWriter:
    """Writes samples into one tar, with fixed times, owners and order. Use it in a `with`.

    Byte for byte what webdataset.TarWriter writes; importing that takes torch, which no packing process needs.
    """

    def __init__(self, file: BinaryIO, codec: str):
        self._tar = tarfile.open(fileobj=file, mode="w|")  # noqa: SIM115  closed at the end of the `with`
        self._extensions = dict(zip(MEMBERS, (f"depth.{codec}", "jpg", "json"), strict=True))

    def write(self, key: str, jpeg: bytes, encoded_depth: bytes, meta: Mapping[str, str]) -> None:
        text = json.dumps(meta, sort_keys=True, ensure_ascii=False).encode()
        self.write_members(key, {"depth": encoded_depth, "image": jpeg, "meta": text})

    def write_members(self, key: str, members: Mapping[str, bytes]) -> None:
        """A sample by the payloads of its MEMBERS, of which `meta` may be missing."""
        for member in MEMBERS:
            if member in members:
                info = tarfile.TarInfo(f"{key}.{self._extensions[member]}")
                info.size, info.mode, info.uname, info.gname = len(members[member]), 0o444, "mde_dist", "mde_dist"
                self._tar.addfile(info, io.BytesIO(members[member]))

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if kind is None:
            self._tar.close()
        else:  # the tar comes to nothing; closed all the same, or tarfile complains when it is collected
            with contextlib.suppress(OSError):
                self._tar.close()
