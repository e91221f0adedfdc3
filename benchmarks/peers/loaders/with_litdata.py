"""litdata: chunks of samples, JPEGs as the files' own bytes, depth as the bytes of its 16-bit PNG."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import numpy as np
from litdata import ParallelStreamingDataset, StreamingDataLoader, StreamingDataset, optimize
from PIL import Image

Sample = dict[str, Any]
Decoded = tuple[np.ndarray, np.ndarray]


def encoded(pair: tuple[Path, Path]) -> Sample:
    return {"image": pair[0].read_bytes(), "depth": pair[1].read_bytes()}


def decoded(samples: tuple[Sample]) -> Decoded:
    millimetres = np.array(Image.open(io.BytesIO(samples[0]["depth"])))
    return picture(samples[0]), millimetres.astype(np.float32) / np.float32(1000)


def picture(sample: Sample) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(sample["image"])))


def prepare(pairs: Path, out: Path, encode: Callable[[tuple[Path, Path]], Sample] = encoded) -> None:
    optimize(encode, inputs=harness.files(pairs), output_dir=str(out), chunk_bytes="16MB", num_workers=1)


def batches(
    out: Path, batch: int, workers: int, decode: Callable[[tuple[Sample]], Decoded] = decoded
) -> harness.Batches:
    data = StreamingDataset(str(out), shuffle=True, seed=0, drop_last=True)
    endless = ParallelStreamingDataset([data], length=float("inf"), transform=decode)
    return iter(StreamingDataLoader(endless, batch_size=batch, num_workers=workers))


if __name__ == "__main__":
    harness.main(prepare, batches, ("litdata",))
