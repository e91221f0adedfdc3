"""Images -> depth maps and pictures.

python -m mde_dist.predict --checkpoint RUN/model.safetensors --output DIR IMAGE_OR_FOLDER …
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from PIL import Image
from rich.progress import track

from .command import parse, run_command
from .data.depth import metres_to_millimetres, png_bytes
from .data.sources import IMAGE_SUFFIXES, reason
from .errors import UserError
from .files import write_atomic
from .pictures import colorize, save_image
from .predictor import open_predictor, pick_device
from .run.checkpoint import find_model


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


def write_prediction(target: Path, depth: np.ndarray) -> None:
    """`target`_depth.png and `target`_color.png, coloured over the map's own range."""
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(target.with_name(f"{target.name}_depth.png"), png_bytes(metres_to_millimetres(depth)))
    low, high = np.percentile(depth, (1, 99))
    save_image(target.with_name(f"{target.name}_color.png"), colorize(depth, float(low), float(high)))


if __name__ == "__main__":
    run_command(main)
