"""mosaicml-streaming with depth in an `ndarray` column: nothing to decode, and four times the bytes."""

from pathlib import Path
from typing import Any

import harness
import numpy as np
import with_streaming
from PIL import Image


def prepare(pairs: Path, out: Path) -> None:
    with_streaming.write(pairs, out, "ndarray:uint16", lambda depth: np.array(Image.open(depth)))


class Pairs(with_streaming.Pairs):
    def millimetres(self, depth: Any) -> np.ndarray:
        return depth


def batches(out: Path, batch: int, workers: int) -> harness.Batches:
    return with_streaming.batches(out, batch, workers, Pairs)


if __name__ == "__main__":
    harness.main(prepare, batches, ("mosaicml-streaming",))
