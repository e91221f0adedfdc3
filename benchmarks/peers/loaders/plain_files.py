"""A Dataset over the raw files, as most training scripts have it; how a pair is decoded is up to the caller."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
from torch.utils.data import DataLoader, Dataset


class Pairs(Dataset):
    def __init__(self, folder: Path, read: Callable[[Path, Path], Any]):
        self._files, self._read = harness.files(folder), read

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, number: int) -> Any:
        return self._read(*self._files[number])


def prepare(pairs: Path, out: Path) -> None:
    shutil.copytree(pairs / "images", out / "images")
    shutil.copytree(pairs / "depth", out / "depth")


def loader(folder: Path, read: Callable[[Path, Path], Any], batch: int, workers: int) -> harness.Batches:
    pairs = Pairs(folder, read)
    return iter(DataLoader(pairs, batch, sampler=harness.Shuffled(len(pairs)), num_workers=workers))
