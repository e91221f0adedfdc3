"""mde_dist: its loader on the shards that the pairs were taken from, with depth in metres as the others deliver it."""

import itertools
import json
import shutil
from pathlib import Path

import harness
import numpy as np
import torch

from mde_dist.data.loader import DataLoader
from mde_dist.data.sampler import GlobalSampler
from mde_dist.data.shards import open_split

_WINDOW = 4  # shards that are shuffled together
_AHEAD = 3  # batches


def prepare(pairs: Path, out: Path) -> None:
    out.mkdir()
    shutil.copy(pairs.with_name("pairs.json"), out)


def batches(out: Path, batch: int, workers: int, metres: bool = True) -> harness.Batches:
    """Without `metres` depth stays in millimetres, as training takes it to its device."""
    note = json.loads((out / "pairs.json").read_text("utf-8"))
    pairs = note["pairs"]
    with open_split(note["shards"], note["split"]) as shards:
        order = GlobalSampler(pairs, min(pairs, shards.block), _WINDOW, 0)
        draws = (order.at(np.arange(first, first + batch)) for first in itertools.count(0, batch))
        buffer, thousand = np.empty((batch, *shards.size), np.float32), np.float32(1000)
        with DataLoader(shards, draws, batch, torch.device("cpu"), workers, _AHEAD, replace=True) as loader:
            for one in loader:
                depth = one.depth.numpy()
                if metres:
                    np.copyto(buffer, depth)  # half the time of one division from whole numbers to floats
                    depth = np.divide(buffer, thousand, out=buffer)
                yield one.image, depth


if __name__ == "__main__":
    harness.main(prepare, batches, ())
