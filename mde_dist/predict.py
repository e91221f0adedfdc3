"""Images, folders of them, and the frames of videos -> depth maps, pictures and point clouds.

    python -m mde_dist.predict --run RUN --output DIR IMAGE_OR_FOLDER_OR_VIDEO …
    python -m mde_dist.predict --checkpoint model.safetensors --output DIR photos --flip --npy --ply
    python -m mde_dist.predict --run RUN --output DIR walk.mp4 --every 10 --range 0.5 5

What cannot be read is named, the rest is done, and the exit code is 2.
"""

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from mde_dist.data.images import stray_in_words
from mde_dist.distributed.config import Precision
from mde_dist.inference.inputs import Inputs, find_inputs
from mde_dist.inference.outputs import Results
from mde_dist.inference.point_cloud import Intrinsics
from mde_dist.utils.cli import RUN_DIR, option, parse, run_command
from mde_dist.utils.console import say
from mde_dist.utils.errors import UserError
from mde_dist.utils.paths import command_line

if TYPE_CHECKING:
    from mde_dist.inference.pipeline import Summary
    from mde_dist.inference.predictor import Predictor

_NAMED = 20  # unreadable inputs that are listed


@dataclass(frozen=True)
class PredictCommand:
    """Estimate depth: per image a 16-bit PNG in millimetres and a picture, at the image's size; more if asked for.

    Earlier results of the same names are replaced, file by file. A model sees each image with as many pixels as it was
    trained at, aspect kept.
    """

    images: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Image files, folders with images in them (and in folders of these, linked ones too), or videos. An image is
    turned as its EXIF data say, and laid on white where it is transparent. Videos need PyAV: pip install
    'mde_dist[video]'."""
    output: Path
    """Folder for the results. Those of FOLDER/sub/cat.jpg are sub/cat_depth.png and so on, those of walk.mp4
    walk/000123_depth.png, by the number of the frame."""
    run: Annotated[Path | None, RUN_DIR] = None
    """Run directory, for the weights of its newest checkpoint."""
    checkpoint: Path | None = None
    """A model.safetensors, or the folder that it lies in, instead of --run; it needs nothing else."""
    every: int = option(1, low=1, high=1e9)
    """Predict one of so many frames of a video."""
    flip: bool = False
    """Average with the prediction of the mirrored image: a little better, at twice the time."""
    pictures: bool = True
    """Also NAME_color.png: image and coloured depth side by side, near is bright, with a scale in metres. It is brought
    to a size to look at, 320 to 800 pixels along an image's longer side."""
    range: tuple[float, float] | None = None
    """Metres that the colours begin and end at, for all images alike, so that they can be compared; by default those
    within which 98 % of an image's own depth lies."""
    npy: bool = False
    """Also NAME_depth.npy: float32 metres, not rounded."""
    ply: bool = False
    """Also NAME_points.ply: a coloured point cloud in metres, x to the right, y down, z forward, for MeshLab,
    CloudCompare, Open3D and others."""
    intrinsics: tuple[float, float, float, float] | None = None
    """FX FY CX CY of the camera, for --ply, in pixels of the input image, whose first pixel has its centre at 0 0. By
    default those of NYU Depth v2's Kinect for images of 4:3, scaled to their size, and for others a typical camera with
    its centre in the middle: shapes are then about right."""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps …; auto = a GPU where there is one."""
    precision: Precision = "auto"
    """auto = bf16 on GPUs that have it, else fp32."""
    batch_size: int | None = option(None, low=1, high=1e6)
    """Images per forward pass; by default 4 on a CPU and 32 on a GPU. Where memory runs out it is halved."""


def main(argv: list[str]) -> None:
    command = parse(PredictCommand, argv, "python -m mde_dist.predict")
    inputs = find_inputs(command.images, command.output)
    results = open_results(command)
    check(command, inputs, results)
    # imported here: torch takes seconds and hundreds of megabytes, which --help and a wrong option do without
    from mde_dist.inference.pipeline import predict_all
    from mde_dist.inference.predictor import Predictor, pick_device
    from mde_dist.models.depth_model import load_model
    from mde_dist.training.checkpoint import open_model

    device = pick_device(command.device)
    _, metadata, tensors = open_model(command.run, command.checkpoint)
    predictor = Predictor(load_model(metadata, tensors), metadata, device, command.flip, command.precision)
    predictor.batch_size = command.batch_size or predictor.batch_size
    for note in inputs.notes:
        say(note)
    began = time.monotonic()
    summary = predict_all(predictor, inputs, results, command.every)
    show(summary, predictor, results, time.monotonic() - began)


def open_results(command: PredictCommand) -> Results:
    camera = Intrinsics(*command.intrinsics) if command.intrinsics else None
    return Results(command.output, command.pictures, command.range, command.npy, command.ply, camera)


def check(command: PredictCommand, inputs: Inputs, results: Results) -> None:
    """Refuse what does not go together. Raises UserError."""
    if command.every > 1 and not inputs.videos:
        raise UserError(f"--every {command.every} is for videos, and none is named")
    if command.range:
        low, high = command.range
        if not 0 <= low < high < math.inf:
            raise UserError(f"--range {low:g} {high:g}: two distances in metres, the nearer one first")
        if not command.pictures:
            raise UserError("--range is for the colours of pictures, and --no-pictures makes none")
    if results.camera:
        if not command.ply:
            raise UserError("--intrinsics are for point clouds; with --ply they are made")
        if not (0 < results.camera.fx < math.inf and 0 < results.camera.fy < math.inf):
            raise UserError(f"--intrinsics: {results.camera}: focal lengths are above 0, in pixels")
    read = {file.resolve(): file for file, _ in inputs.entries}
    for file, name in inputs.entries:
        replaced = next((read[path.resolve()] for path in results.targets(name) if path.resolve() in read), None)
        if replaced:
            raise UserError(f"a result of {file} would replace {replaced}; name another folder for --output")


def show(summary: "Summary", predictor: "Predictor", results: Results, seconds: float) -> None:
    """Say how many results were made, where, how fast, and the next command. Raises UserError where inputs were bad."""
    if summary.images:
        made = f"{summary.images:,} depth maps in {results.folder}"
        speed = f"{summary.images / seconds:.1f} images/s on {predictor.device}, {predictor.precision}"
        kinds = [f"NAME{kind}: {words}" for kind, words in results.kinds().items()]
        say(f"made: {made} ({speed})", *kinds, *(results.cameras(summary.sizes) if results.ply else ()))
        score = command_line("evaluate", "--predictions", results.folder, then="--source DATA")
        say(f"next: {score}  (where truth is known)")
    if summary.stray:
        say(stray_in_words(summary.stray))
    for line in summary.damage[:_NAMED]:
        say(f"skipped {line}")
    damaged = len(summary.damage)
    if damaged > _NAMED:
        say(f"skipped {damaged - _NAMED:,} more")
    if damaged:
        total = damaged + summary.images
        raise UserError(f"{damaged:,} of {total:,} images could not be read; they are named above")


if __name__ == "__main__":
    run_command(main)
