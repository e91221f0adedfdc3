"""PyTorch's Dataset over JPEG and 16-bit PNG files, decoded by PIL: what nearly every script on NYU Depth v2 does."""

from pathlib import Path

import harness
import numpy as np
import plain_files
from PIL import Image


def read(image: Path, depth: Path) -> tuple[np.ndarray, np.ndarray]:
    with Image.open(image) as picture, Image.open(depth) as millimetres:
        return np.array(picture.convert("RGB")), np.array(millimetres).astype(np.float32) / np.float32(1000)


def batches(out: Path, batch: int, workers: int) -> harness.Batches:
    return plain_files.loader(out, read, batch, workers)


if __name__ == "__main__":
    harness.main(plain_files.prepare, batches, ("torch", "pillow"))
