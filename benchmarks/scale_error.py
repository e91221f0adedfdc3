"""How much of a model's error is the scale of whole images: what accuracy.md says of learning by heart.

    python benchmarks/scale_error.py SHARDS SPLIT RUN...

d = log p - log g over the valid pixels of an image, at the size of training, with flip averaging, weights of the newest
checkpoint. Printed for each run: the mean over images of an image's mean of d, its standard deviation over images, and
the root of the mean over images of the variance of d within an image.
"""

import sys
from pathlib import Path

import numpy as np
import torch

from mde_dist.data.augmentation import prepare, prepare_images
from mde_dist.data.config import AugmentConfig
from mde_dist.data.loader import Batch
from mde_dist.data.shards import ShardDataset, open_split
from mde_dist.models.depth_model import DepthModel, estimate, load_model
from mde_dist.training.checkpoint import find_model, read_model


def newest(run: Path) -> tuple[DepthModel, tuple[int, int]]:
    """The weights that `evaluate --run` scores, and the size of training."""
    metadata, tensors = read_model(find_model(run, None))
    return load_model(metadata, tensors).eval(), tuple(metadata["size"])


def moments(model: DepthModel, size: tuple[int, int], shards: ShardDataset) -> np.ndarray:
    """(images, 2): mean and variance of d."""
    view, found = AugmentConfig(flip=0), []
    for sample in range(len(shards)):
        image, depth = np.zeros((1, 480, 640, 3), np.uint8), np.zeros((1, 480, 640), np.uint16)
        shards.read_into(sample, image[0], depth[0])
        batch = Batch(torch.from_numpy(image), torch.from_numpy(depth), np.zeros(1, np.int64), np.array([sample]))
        _, truth = prepare(batch, size, view, seed=0)
        with torch.inference_mode():
            p = estimate(model, prepare_images(batch, size), flip=True)
        d = (p.log() - truth.log())[truth > 0].double()
        found.append((d.mean().item(), d.var(correction=0).item()))
    return np.array(found)


def main() -> None:
    place, split, *runs = sys.argv[1:]
    torch.set_num_threads(1)
    with open_split(place, split) as shards:
        for run in runs:
            mean, variance = moments(*newest(Path(run)), shards).T
            print(
                f"{run}, {split}: mean {mean.mean():+.3f}, over images {mean.std():.3f}, "
                f"within images {np.sqrt(variance.mean()):.3f}"
            )


if __name__ == "__main__":
    main()
