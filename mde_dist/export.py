"""Run or checkpoint -> a folder to hand on: weights, model card, and programs that do without mde_dist, checked.

    python -m mde_dist.export --run DIR --output DIR
    python -m mde_dist.export --checkpoint FILE.safetensors --output DIR --formats onnx --images IMAGE_OR_FOLDER …

OUTPUT/README.md           the model card, see card.py
       model.safetensors   the weights, as they were
       model.onnx          for ONNX runtimes
       model.pt2           for torch.export.load
"""

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from mde_dist.utils.cli import RUN_DIR, Place, Size, parse, run_command
from mde_dist.utils.console import say
from mde_dist.utils.errors import UserError
from mde_dist.utils.io import write_atomic
from mde_dist.utils.publish import is_free, whole_folder
from mde_dist.utils.urls import hide_key

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
    # imported here: torch takes seconds and hundreds of megabytes, which --help and a wrong option do without
    import torch

    from mde_dist.inference.export_check import ABSOLUTE, RELATIVE, check_depth, compare, real_images
    from mde_dist.inference.export_formats import FORMATS, about, trace
    from mde_dist.inference.model_card import NAME as CARD
    from mde_dist.inference.model_card import Program, write_card
    from mde_dist.models.depth_model import estimate, load_model
    from mde_dist.models.weights import MODEL
    from mde_dist.training.checkpoint import open_model, run_of

    weights, metadata, tensors = open_model(command.run, command.checkpoint)
    size = command.size or (metadata["size"][0], metadata["size"][1])
    images, checked_on = real_images(command.images, command.shards, metadata["config"], size)
    with torch.inference_mode():
        expected = estimate(load_model(metadata, tensors).eval(), images)
    check_depth(expected, f"{weights} on {checked_on}")
    files = [MODEL, *(FORMATS[name].file for name in command.formats), CARD]
    with whole_folder(command.output, files, _WORK) as folder:
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
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if "onnx" in command.formats and missing:
        raise UserError(
            f"--formats onnx needs {', '.join(missing)}: pip install -e '.[export]'; or leave it out: --formats torch"
        )
    import torch

    from mde_dist.inference.export_formats import OLDEST_TORCH
    from mde_dist.inference.predictor import SMALLEST

    if command.size and min(command.size) < SMALLEST:
        raise UserError(f"--size {command.size[0]}x{command.size[1]}: must be at least {SMALLEST}x{SMALLEST}")
    if torch.torch_version.TorchVersion(torch.__version__) < OLDEST_TORCH:
        raise UserError(
            f"torch {torch.__version__} is too old to export; this needs {OLDEST_TORCH} or newer: "
            "pip install -e '.[export]'"
        )


if __name__ == "__main__":
    run_command(main)
