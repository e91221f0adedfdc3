"""mosaicml-streaming: MDS shards with a `jpeg` column, which keeps a file's own bytes, depth as bytes of its PNG."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import numpy as np
from PIL import Image
from streaming import MDSWriter, Stream, StreamingDataset
from streaming.base.util import clean_stale_shared_memory
from torch.utils.data import DataLoader

_EPOCHS = 100  # in one of its own, between which it would start its workers anew


def write(pairs: Path, out: Path, kind: str, read: Callable[[Path], Any]) -> None:
    """`kind` of the column of depth, which `read` gets from the file."""
    with MDSWriter(out=str(out), columns={"image": "jpeg", "depth": kind}) as writer:
        for image, depth in harness.files(pairs):
            writer.write({"image": Image.open(image), "depth": read(depth)})


def prepare(pairs: Path, out: Path) -> None:
    write(pairs, out, "bytes", Path.read_bytes)


class Pairs(StreamingDataset):
    def millimetres(self, depth: Any) -> np.ndarray:
        return np.array(Image.open(io.BytesIO(depth)))

    def __getitem__(self, number: Any) -> Any:
        sample = super().__getitem__(number)
        metres = self.millimetres(sample["depth"]).astype(np.float32) / np.float32(1000)
        return np.array(sample["image"]), metres


def batches(out: Path, batch: int, workers: int, kind: type[Pairs] = Pairs) -> harness.Batches:
    clean_stale_shared_memory()
    data = kind(streams=[Stream(local=str(out), repeat=_EPOCHS)], shuffle=True, batch_size=batch)
    return iter(DataLoader(data, batch, num_workers=workers, drop_last=True))


if __name__ == "__main__":
    harness.main(prepare, batches, ("mosaicml-streaming",))
