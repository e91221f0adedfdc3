"""Images -> depth maps and pictures.

python -m mde_dist.predict --checkpoint RUN/model.safetensors --output DIR IMAGE_OR_FOLDER …
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from PIL import Image
from rich.progress import track

from .command import parse, run_command
from .data.augment import normalise, resize_image
from .data.depth import metres_to_millimetres, png_bytes
from .data.sources import IMAGE_SUFFIXES, reason
from .errors import UserError
from .files import write_atomic
from .learning.model import DepthModel, restore
from .pictures import colorize, save_image
from .run.checkpoint import find_model, read_model

SMALLEST = 32  # pixels; the encoder halves five times


@dataclass(frozen=True)
class PredictCommand:
    """Estimate depth: a 16-bit PNG in millimetres and a coloured picture per image."""

    images: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Image files, or folders of them."""
    output: Path
    """Folder for the results: NAME_depth.png (16-bit, millimetres) and NAME_color.png."""
    run: Path | None = None
    """Run directory, for the weights of its newest checkpoint."""
    checkpoint: Path | None = None
    """A model.safetensors, instead of --run; it needs nothing else."""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps …; auto = a GPU where there is one."""


class Predictor:
    """A trained model that takes images of any size."""

    def __init__(self, model: DepthModel, metadata: dict[str, Any], device: torch.device):
        self.config: dict[str, Any] = metadata["config"]
        """The config that it was trained with, by `section.field`."""
        self._model, self._device = model.to(device).eval(), device
        self._area = metadata["size"][0] * metadata["size"][1]

    @torch.inference_mode()
    def __call__(self, image: np.ndarray) -> np.ndarray:
        """RGB uint8 (height, width, 3) -> depth float32 (height, width), metres.

        The model sees the image with as many pixels as it was trained at, aspect kept.
        """
        height, width = image.shape[:2]
        scale = (self._area / (height * width)) ** 0.5
        size = max(SMALLEST, round(height * scale)), max(SMALLEST, round(width * scale))
        pixels = torch.from_numpy(np.array(image)).to(self._device).permute(2, 0, 1)[None].float() / 255
        depth = self._model(normalise(resize_image(pixels, size)))[:, None]
        return resize_image(depth, (height, width))[0, 0].float().cpu().numpy()


def open_predictor(path: Path, device: torch.device) -> Predictor:
    """The model of a model.safetensors, ready for images. Raises UserError."""
    metadata, tensors = read_model(path)
    return Predictor(restore(metadata, tensors), metadata, device)


def main(argv: list[str]) -> None:
    command = parse(PredictCommand, argv, "python -m mde_dist.predict")
    files = list(find_images(command.images))
    predictor = open_predictor(find_model(command.run, command.checkpoint), pick_device(command.device))
    skipped = []
    for path, name in track(files, "predicting"):
        try:
            with Image.open(path) as picture:
                image = np.asarray(picture.convert("RGB"))
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            skipped.append(f"skipped {path}: not a readable image ({reason(error)})")
            continue
        write_prediction(command.output / name, predictor(image))
    print("\n".join([*skipped, f"made: {len(files) - len(skipped)} depth maps in {command.output}"]))
    if skipped:
        raise UserError(f"{len(skipped)} of {len(files)} images could not be read; they are named above")


def find_images(inputs: Sequence[Path]) -> list[tuple[Path, Path]]:
    """(file, its name below the output without suffix). Raises UserError."""
    found: dict[Path, Path] = {}
    for path in inputs:
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
            pairs = [(p, p.relative_to(path).with_suffix("")) for p in inside]
        elif path.is_file():
            pairs = [(path, Path(path.stem))]
        else:
            raise UserError(f"{path}: no such file or folder")
        for file, name in pairs:
            if name in found:
                raise UserError(f"{file} and {found[name]} would both be written as {name}; predict them one by one")
            found[name] = file
    if not found:
        raise UserError(f"no image in {', '.join(map(str, inputs))} ({', '.join(IMAGE_SUFFIXES)})")
    return [(file, name) for name, file in found.items()]


def pick_device(name: str) -> torch.device:
    """Raises UserError where the device is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: not there ({str(error).splitlines()[0]})") from None
    return device


def write_prediction(target: Path, depth: np.ndarray) -> None:
    """`target`_depth.png and `target`_color.png, coloured over the map's own range."""
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(target.with_name(f"{target.name}_depth.png"), png_bytes(metres_to_millimetres(depth)))
    low, high = np.percentile(depth, (1, 99))
    save_image(target.with_name(f"{target.name}_color.png"), colorize(depth, float(low), float(high)))


if __name__ == "__main__":
    run_command(main)
