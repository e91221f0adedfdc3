"""Run or checkpoint -> a folder to hand on: weights, model card, and programs that do without mde_dist, checked.

    python -m mde_dist.export --run DIR --output DIR
    python -m mde_dist.export --checkpoint FILE.safetensors --output DIR --formats onnx --images IMAGE_OR_FOLDER …

OUTPUT/README.md           the model card, see card.py
       model.safetensors   the weights, as they were
       model.onnx          for ONNX runtimes
       model.pt2           for torch.export.load
"""

import importlib.util
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch

from mde_dist import __version__
from mde_dist.data.augmentation import resize_image
from mde_dist.data.config import CacheOptions, eval_shards_of
from mde_dist.data.dataset import DamagedSample
from mde_dist.data.images import IMAGE_SUFFIXES
from mde_dist.data.shards import open_split
from mde_dist.inference.export_formats import FORMATS, OLDEST_TORCH, Run, trace
from mde_dist.inference.images import Unreadable, read_image
from mde_dist.inference.model_card import NAME as CARD
from mde_dist.inference.model_card import Program, write_card
from mde_dist.inference.predictor import SMALLEST
from mde_dist.models.depth_model import estimate, load_model
from mde_dist.models.weights import MODEL
from mde_dist.training.checkpoint import open_model, run_of
from mde_dist.utils.cli import RUN_DIR, Place, Size, parse, run_command
from mde_dist.utils.console import say
from mde_dist.utils.errors import UserError
from mde_dist.utils.folders import files_below
from mde_dist.utils.io import write_atomic, writing
from mde_dist.utils.locks import locked
from mde_dist.utils.publish import is_free, publish, take_back, work_folder
from mde_dist.utils.urls import hide_key

BATCHES = (1, 3, 5)
"""Batch sizes that every program is tried with."""
ABSOLUTE, RELATIVE = 1e-3, 1e-4
"""A program's depth may differ from the model's by 1 mm, the step in which depth maps are stored, and 0.01 %. Sums of
float32 in another order differ by a thousandth of that."""
FARTHEST = 1000.0
"""Metres. No depth sensor measures farther. Damaged weights give 1e30 m, of which 0.01 % would allow anything."""

_WORK = ".exporting"
"""Hidden folder in the output, where the files stand until all are made and checked."""


@dataclass(frozen=True)
class ExportCommand:
    """Write a folder that can be handed on: weights, model card, ONNX and torch.export programs."""

    output: Path
    """Folder to make; it must not hold anything yet."""
    run: Annotated[Path | None, RUN_DIR] = None
    """Run directory, for the weights of its newest checkpoint."""
    checkpoint: Path | None = None
    """A model.safetensors, instead of --run."""
    formats: tuple[Literal["onnx", "torch"], ...] = ("onnx", "torch")
    """Programs to write: model.onnx, which needs the extra `export`, and model.pt2."""
    size: Size | None = None
    """Size of the images that the programs take; by default the one that it was trained at."""
    shards: Place | None = None
    """Directory or URL of shards with images to check on; by default those that it was evaluated on."""
    images: tuple[Path, ...] = ()
    """Instead of shards: image files, or folders of them, to check on."""

    def __post_init__(self) -> None:
        if self.shards is not None:
            object.__setattr__(self, "shards", hide_key(self.shards))


def main(argv: list[str]) -> None:
    command = parse(ExportCommand, argv, "python -m mde_dist.export")
    check(command)
    weights, metadata, tensors = open_model(command.run, command.checkpoint)
    size = command.size or (metadata["size"][0], metadata["size"][1])
    images, checked_on = real_images(command, metadata["config"], size)
    with torch.inference_mode():
        expected = estimate(load_model(metadata, tensors).eval(), images)
    check_depth(expected, f"{weights} on {checked_on}")
    files = [MODEL, *(FORMATS[name].file for name in command.formats), CARD]
    with whole_folder(command.output, files) as folder:
        write_atomic(folder / MODEL, weights.read_bytes())
        exported = trace(metadata, tensors, size)
        programs = []
        for name in command.formats:
            kind = FORMATS[name]
            kind.write(exported, folder / kind.file, about(size))
            difference = compare(kind.open(folder / kind.file), images, expected, kind.file)
            programs.append(Program(kind, size, difference))
        write_card(folder, run_of(weights), command.output.absolute().name, programs, checked_on)
    say(f"checked on {checked_on}; allowed {1000 * ABSOLUTE:g} mm + {RELATIVE:.2%} of the depth")
    for program in programs:
        say(f"made: {command.output / program.kind.file}: differs by at most {1000 * program.difference:.4f} mm")
    say(f"made: {command.output / MODEL}, {command.output / 'README.md'}")
    say(f"next: hand on {command.output} as it is; its README.md says how to use each file, in three lines")


def check(command: ExportCommand) -> None:
    """Refuse what cannot work before any work is done. Raises UserError."""
    output = command.output
    if not is_free(output, output / _WORK):
        raise UserError(f"--output {output}: is there already; name a folder that is not, or is empty")
    if len(set(command.formats)) != len(command.formats) or not command.formats:
        raise UserError("--formats: name each format once: onnx, torch")
    if command.shards and command.images:
        raise UserError("name what to check on once: --shards DIR or --images FILE_OR_FOLDER …")
    if command.size and min(command.size) < SMALLEST:
        raise UserError(f"--size {command.size[0]}x{command.size[1]}: must be at least {SMALLEST}x{SMALLEST}")
    if torch.torch_version.TorchVersion(torch.__version__) < OLDEST_TORCH:
        raise UserError(
            f"torch {torch.__version__} is too old to export; this needs {OLDEST_TORCH} or newer: "
            "pip install -e '.[export]'"
        )
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if "onnx" in command.formats and missing:
        raise UserError(
            f"--formats onnx needs {', '.join(missing)}: pip install -e '.[export]'; or leave it out: --formats torch"
        )


def real_images(command: ExportCommand, config: dict[str, Any], size: tuple[int, int]) -> tuple[torch.Tensor, str]:
    """Images to check on, RGB 0..1 float32 (batch, 3, *size), and what they are in words. Raises UserError."""
    try:
        found, where = from_files(command.images) if command.images else from_shards(command.shards, config)
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


def from_shards(place: str | None, config: dict[str, Any]) -> tuple[list[np.ndarray], str]:
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


def about(size: tuple[int, int]) -> dict[str, str]:
    """What a program says of itself, in its file."""
    height, width = size
    return {
        "input": f"image: float32 (batch, 3, {height}, {width}), RGB, 0 to 1; the normalisation is inside",
        "output": f"depth: float32 (batch, {height}, {width}), metres",
        "made_by": f"mde_dist {__version__}, torch {torch.__version__}",
    }


@contextmanager
def whole_folder(path: Path, files: Sequence[str]) -> Iterator[Path]:
    """A folder to make files in, which move to `path` when the block ends well, and vanish otherwise. Raises UserError.

    The last one of `files` comes last; what another export, which was killed, has left is replaced.
    """
    taken = f"--output {path}: another export into it is at work"
    with writing(path), work_folder(path, _WORK) as work, locked(work / ".lock", taken):
        try:
            take_back(work, path)
            yield work
            publish(work, path, files)
        finally:
            with suppress(OSError):  # then the next export does so
                take_back(work, path)
                shutil.rmtree(work)


if __name__ == "__main__":
    run_command(main)
