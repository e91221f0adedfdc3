"""A few held-out images, and how they are predicted as a run learns: kept small in its directory, for its report.

RUN/panels/keys.json            the keys of the images
           image.png            the images, one above the other
           truth.png            their depth, 16-bit millimetres, 0 = hole
           samples-00000800.png their predicted depth after 800 samples, 16-bit millimetres
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image

from mde_dist.data.augmentation import depth_counts, prepare_images
from mde_dist.data.depth import MILLIMETRES, png_bytes, to_metres, to_millimetres
from mde_dist.data.loader import Batch
from mde_dist.distributed.process_group import all_reduce_sum
from mde_dist.evaluation.evaluator import Predict
from mde_dist.evaluation.metrics import resize_to
from mde_dist.utils.errors import UserError
from mde_dist.utils.io import atomic_file, write_atomic, writing

FOLDER = "panels"
COUNT = 6
"""Images, evenly spaced over the split."""
_ROWS = 240  # pixels: larger images are kept smaller
_DAMAGE = (OSError, ValueError, TypeError, SyntaxError, RecursionError, Image.DecompressionBombError)
"""Errors of reading files that may hold anything; of PNG files PIL makes a SyntaxError."""


class PredictionRecorder:
    """Records the predictions for a fixed set of validation images while a split is scored."""

    def __init__(self, images: int, size: tuple[int, int]):
        """`images`: of the split that are scored; `size`: height and width of its depth maps."""
        self.chosen = [int(sample) for sample in np.unique(np.linspace(0, images - 1, min(COUNT, images)).astype(int))]
        self._every = -(-size[0] // _ROWS)  # pixels
        self._size = (-(-size[0] // self._every), -(-size[1] // self._every))
        self._recorded: dict[int, torch.Tensor] = {}

    def wrap(self, predict: Predict) -> Predict:
        """`predict` with its predictions recorded."""

        def recorded(batch: Batch) -> torch.Tensor:
            prediction = predict(batch)
            wanted = [index for index, sample in enumerate(batch.sample) if int(sample) in self.chosen]
            if wanted:
                self._record(batch, prediction, wanted)
            return prediction

        return recorded

    def _record(self, batch: Batch, prediction: torch.Tensor, wanted: Sequence[int]) -> None:
        target = depth_counts(batch)[wanted]
        # every so many pixels of the maps, not a mean: that would run over holes and edges
        maps = torch.stack([target, resize_to(prediction[wanted], target)], 1).float()[
            ..., :: self._every, :: self._every
        ]
        both = torch.cat([prepare_images(batch, self._size)[wanted], maps], dim=1)
        self._recorded |= {int(batch.sample[index]): one for index, one in zip(wanted, both, strict=True)}

    def all_gather(self, accelerator: Accelerator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Gather the recordings of all ranks -> (images uint8 (count, h, w, 3), targets and predictions uint16 mm
        (count, h, w))."""
        table = torch.zeros((len(self.chosen), 5, *self._size), dtype=torch.float32, device=accelerator.device)
        for index, sample in enumerate(self.chosen):
            if sample in self._recorded:
                table[index] = self._recorded[sample]
        self._recorded.clear()
        found = all_reduce_sum(accelerator, table).cpu().numpy()
        images = np.rint(found[:, :3] * 255).astype(np.uint8).transpose(0, 2, 3, 1)
        return images, to_millimetres(found[:, 3], MILLIMETRES), to_millimetres(found[:, 4], MILLIMETRES)


def make_image_strips(image: np.ndarray, target: np.ndarray, prediction: np.ndarray) -> np.ndarray:
    """Join the arrays of `PredictionRecorder.all_gather` -> RGB uint8 (count, h, 3 w, 3): image, ground truth and
    prediction, all depth in one scale."""
    from mde_dist.utils.visualization import colorize  # takes matplotlib; only trackers show pictures while training

    seen = target[target > 0]
    low, high = (float(edge) for edge in np.percentile(to_metres(seen), (1, 99))) if len(seen) else (0.0, 10.0)
    maps = (colorize(to_metres(depth), low, high) for depth in (target, prediction))
    return np.concatenate([image, *maps], axis=2)


@dataclass(frozen=True)
class ValidationSnapshots:
    """The images of a run."""

    keys: list[str]
    image: np.ndarray
    """uint8 (count, height, width, 3)."""
    target: np.ndarray
    """float32 (count, height, width) metres, 0 = hole."""
    predictions: dict[int, np.ndarray]
    """Predictions by samples seen: float32 (count, height, width) metres."""


def write_snapshots(
    run: Path, samples_seen: int, keys: Sequence[str], image: np.ndarray, target: np.ndarray, prediction: np.ndarray
) -> None:
    """Write the arrays of `PredictionRecorder.all_gather` into the run directory. Raises UserError where the disk does
    not take them."""
    folder, width = run / FOLDER, image.shape[2]
    with writing(folder):
        folder.mkdir(exist_ok=True)
        if not _kept(folder, keys, image):
            for left in folder.glob("samples-*.png"):  # by a run that was given up
                left.unlink()
            with atomic_file(folder / "image.png") as file:
                Image.fromarray(image.reshape(-1, width, 3)).save(file, format="PNG")
            write_atomic(folder / "truth.png", png_bytes(target.reshape(-1, width)))
            write_atomic(folder / "keys.json", json.dumps(list(keys)) + "\n")
        write_atomic(folder / f"samples-{samples_seen:08d}.png", png_bytes(prediction.reshape(-1, width)))


def _kept(folder: Path, keys: Sequence[str], image: np.ndarray) -> bool:
    """Say whether these very images are in the folder already."""
    try:
        with Image.open(folder / "image.png", formats=["PNG"]) as picture:
            same = picture.size == (image.shape[2], image.shape[0] * image.shape[1])
        return same and json.loads((folder / "keys.json").read_text("utf-8")) == list(keys)
    except _DAMAGE:
        return False


def read_snapshots(run: Path) -> ValidationSnapshots | None:
    """Read the snapshots of a run; None where it has none. Raises UserError where they are broken."""
    folder = run / FOLDER
    if not (folder / "keys.json").is_file():
        return None
    try:
        keys = [str(key) for key in json.loads((folder / "keys.json").read_text("utf-8"))]
        image = _read(folder / "image.png", len(keys))
        target = _read(folder / "truth.png", len(keys))
        found = {}
        for path in sorted(folder.glob("samples-*.png")):
            if match := re.fullmatch(r"samples-(\d+)", path.stem):
                found[int(match[1])] = _read(path, len(keys))
        if image.shape[3:] != (3,) or any(maps.shape != image.shape[:3] for maps in (target, *found.values())):
            raise ValueError("its pictures do not fit each other")
    except _DAMAGE as error:
        raise UserError(f"{folder}: {' '.join(str(error).split())}") from None
    return ValidationSnapshots(
        keys, image, to_metres(target), {samples: to_metres(maps) for samples, maps in found.items()}
    )


def _read(path: Path, count: int) -> np.ndarray:
    """A picture of several, one above the other -> (count, height, width, …)."""
    with Image.open(path, formats=["PNG"]) as picture:
        pixels = np.asarray(picture)
    pixels = pixels.astype(np.uint8 if pixels.ndim == 3 else np.uint16)
    return pixels.reshape(count, -1, *pixels.shape[1:])
