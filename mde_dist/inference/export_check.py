"""Check of exported programs: real images go through the model and each program, and the depths are compared."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mde_dist.data.augmentation import resize_image
from mde_dist.data.config import CacheOptions, eval_shards_of
from mde_dist.data.dataset import DamagedSample
from mde_dist.data.images import IMAGE_SUFFIXES
from mde_dist.data.shards import open_split
from mde_dist.inference.export_formats import Run
from mde_dist.inference.images import Unreadable, read_image
from mde_dist.utils.errors import UserError
from mde_dist.utils.folders import files_below

BATCHES = (1, 3, 5)
"""Batch sizes that every program is tried with."""
ABSOLUTE, RELATIVE = 1e-3, 1e-4
"""A program's depth may differ from the model's by 1 mm, the step in which depth maps are stored, and 0.01 %. Sums of
float32 in another order differ by a thousandth of that."""
FARTHEST = 1000.0
"""Metres. No depth sensor measures farther. Damaged weights give 1e30 m, of which 0.01 % would allow anything."""


def real_images(
    paths: Sequence[Path], shards: str | None, config: Mapping[str, Any], size: tuple[int, int]
) -> tuple[torch.Tensor, str]:
    """Images to check on, RGB 0..1 float32 (batch, 3, *size), and a description of them: of files, or of shards, by
    default those that the model of this config was evaluated on.

    Raises UserError.
    """
    try:
        found, where = from_files(paths) if paths else from_shards(shards, config)
    except UserError as error:
        raise UserError(
            f"no images to check the programs on: {error}; name some: --images FILE_OR_FOLDER … or --shards DIR"
        ) from None
    pixels = [torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255 for image in found]
    images = torch.cat([resize_image(image, size) for image in pixels])
    # mirrored ones as well, so that there are enough for a batch
    views = torch.cat([images, images.flip(-1), images.flip(-2)])[: max(BATCHES)]
    count = "1 image" if len(images) == 1 else f"{len(images)} images"
    return views, f"{count} of {where}, in batches of {', '.join(map(str, batches(views)))}"


def from_files(paths: Sequence[Path]) -> tuple[list[np.ndarray], str]:
    """Some images, RGB uint8 (height, width, 3), and where they lie. Raises UserError."""
    files = [file for path in paths for file in (images_below(path) if path.is_dir() else [path])]
    if not files:
        raise UserError(f"no image in {', '.join(map(str, paths))} ({', '.join(IMAGE_SUFFIXES)})")
    try:
        return [read_image(files[place]) for place in evenly(len(files))], f"{paths[0]}{' …' if paths[1:] else ''}"
    except Unreadable as error:
        raise UserError(str(error)) from None


def images_below(folder: Path) -> list[Path]:
    return [path for path in files_below(folder) if path.suffix.lower() in IMAGE_SUFFIXES]


def from_shards(place: str | None, config: Mapping[str, Any]) -> tuple[list[np.ndarray], str]:
    """Some images of a split, by default of the one that the model was evaluated on. Raises UserError."""
    place, split = place or eval_shards_of(config), config.get("data.eval_split") or "test"
    cache = CacheOptions(Path(config.get("data.cache") or CacheOptions.directory))
    with open_split(place, split, cache) as shards:
        found, depth = [], np.empty(shards.size, np.uint16)
        for sample in evenly(len(shards)):
            found.append(np.empty((*shards.size, 3), np.uint8))
            try:
                shards.read_into(sample, found[-1], depth)
            except DamagedSample as error:
                raise UserError(str(error)) from None
    return found, f"{place}, split {split}"


def evenly(count: int) -> list[int]:
    """Places of as many of `count` things as the largest batch takes, evenly spaced."""
    return np.linspace(0, count - 1, min(count, max(BATCHES))).astype(int).tolist()


def batches(images: torch.Tensor) -> list[int]:
    """Batch sizes to try with so many images."""
    return sorted({min(size, len(images)) for size in BATCHES})


def check_depth(depth: torch.Tensor, what: str) -> None:
    """Refuse metres that no model which has learned anything gives. Raises UserError."""
    low, high = depth.min().item(), depth.max().item()  # nan where one of them is
    if not 0 < low <= high <= FARTHEST:
        found = f"from {low:.3g} m to {high:.3g} m" if depth.isfinite().all() else "that are not finite"
        raise UserError(
            f"{what}: gives depths {found}; above 0 m and up to {FARTHEST:g} m make sense; nothing was written; see "
            "whether the file is damaged"
        )


def compare(run: Run, images: torch.Tensor, expected: torch.Tensor, file: str) -> float:
    """The largest difference of a program from what the model says, metres, over all batch sizes.

    Raises UserError where it is larger than what is allowed.
    """
    largest = 0.0
    for size in batches(images):
        found, wanted = run(images[:size]), expected[:size]
        if found.shape != wanted.shape:
            raise UserError(f"{file} gives {tuple(found.shape)}, the model {tuple(wanted.shape)}; nothing was written")
        difference = (found - wanted).abs()
        if not (difference <= ABSOLUTE + RELATIVE * wanted).all():  # false for nan, too
            raise UserError(
                f"{file} differs from the model by up to {difference.max():.4g} m in a batch of {size}, of which "
                f"{ABSOLUTE:g} m + {RELATIVE:.2%} is allowed; nothing was written"
            )
        largest = max(largest, difference.max().item())
    return largest
