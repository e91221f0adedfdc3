"""litdata with depth as an array: nothing to decode, and four times the bytes."""

from pathlib import Path

import harness
import numpy as np
import with_litdata
from PIL import Image


def encoded(pair: tuple[Path, Path]) -> with_litdata.Sample:
    return {"image": pair[0].read_bytes(), "depth": np.array(Image.open(pair[1]))}


def decoded(samples: tuple[with_litdata.Sample]) -> with_litdata.Decoded:
    return with_litdata.picture(samples[0]), samples[0]["depth"].astype(np.float32) / np.float32(1000)


def prepare(pairs: Path, out: Path) -> None:
    with_litdata.prepare(pairs, out, encoded)


def batches(out: Path, batch: int, workers: int) -> harness.Batches:
    return with_litdata.batches(out, batch, workers, decoded)


if __name__ == "__main__":
    harness.main(prepare, batches, ("litdata",))
