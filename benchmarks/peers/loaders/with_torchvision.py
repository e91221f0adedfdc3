"""PyTorch's Dataset over JPEG and 16-bit PNG files, decoded by torchvision.io; images with their channels outermost."""

from pathlib import Path

import harness
import plain_files
import torch
from torchvision.io import ImageReadMode, decode_jpeg, decode_png, read_file


def read(image: Path, depth: Path) -> tuple[torch.Tensor, torch.Tensor]:
    millimetres = decode_png(read_file(str(depth)), mode=ImageReadMode.UNCHANGED)[0]
    return decode_jpeg(read_file(str(image)), mode=ImageReadMode.RGB), millimetres.to(torch.float32) / 1000


def batches(out: Path, batch: int, workers: int) -> harness.Batches:
    return plain_files.loader(out, read, batch, workers)


if __name__ == "__main__":
    harness.main(plain_files.prepare, batches, ("torchvision",))
