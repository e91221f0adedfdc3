"""Images, folders of them, and the frames of videos -> depth maps, pictures and point clouds.

    python -m mde_dist.predict --run RUN --output DIR IMAGE_OR_FOLDER_OR_VIDEO …
    python -m mde_dist.predict --checkpoint model.safetensors --output DIR photos --flip --npy --ply
    python -m mde_dist.predict --run RUN --output DIR walk.mp4 --every 10 --range 0.5 5

What cannot be read is named, the rest is done, and the exit code is 2.
"""

import math
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from mde_dist.data.images import stray_in_words
from mde_dist.distributed.config import Precision
from mde_dist.inference.inputs import Frame, Inputs, ReadError, find_inputs
from mde_dist.inference.outputs import Results
from mde_dist.inference.point_cloud import Intrinsics
from mde_dist.inference.predictor import Predictor, pick_device
from mde_dist.inference.prefetch import in_order, threads
from mde_dist.models.depth_model import load_model
from mde_dist.training.checkpoint import open_model
from mde_dist.utils.cli import RUN_DIR, option, parse, run_command
from mde_dist.utils.console import open_console, say
from mde_dist.utils.errors import UserError
from mde_dist.utils.paths import command_line
from mde_dist.utils.progress import progress_bar

_NAMED = 20  # unreadable inputs that are listed
_MOST_THREADS = 16
_HELD = 3  # batches' worth of images that wait for others of their size


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


@dataclass
class Summary:
    """What came of it."""

    sizes: Counter[tuple[int, int]]
    """How many images were predicted, by height and width."""
    damage: list[str]
    """A line about each input that could not be read."""
    stray: int = 0
    """JPEGs with stray bytes that were read."""

    @property
    def images(self) -> int:
        return self.sizes.total()


def main(argv: list[str]) -> None:
    command = parse(PredictCommand, argv, "python -m mde_dist.predict")
    inputs = find_inputs(command.images, command.output)
    results = open_results(command)
    check(command, inputs, results)
    device = pick_device(command.device)
    _, metadata, tensors = open_model(command.run, command.checkpoint)
    predictor = Predictor(load_model(metadata, tensors), metadata, device, command.flip, command.precision)
    predictor.batch_size = command.batch_size or predictor.batch_size
    for note in inputs.notes:
        say(note)
    began = time.monotonic()
    outcome = predict(predictor, inputs, results, command.every)
    summarise(outcome, predictor, results, time.monotonic() - began)


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


def predict(predictor: Predictor, inputs: Inputs, results: Results, every: int) -> Summary:
    """Read, predict and write all, each beside the others. Raises UserError where results cannot be written."""
    outcome = Summary(Counter(), [])
    number = min(_MOST_THREADS, os.cpu_count() or 1)
    ahead = predictor.batch_size + number
    expected = inputs.expected(every)
    with (
        threads(number) as pool,
        closing(inputs.frames(every, pool, ahead)) as found,
        progress_bar(open_console(), "predicting", "images") as progress,
    ):
        predicted = estimate_all(predictor, readable(found, outcome))
        for size in in_order((partial(results.save, *pair) for pair in predicted), pool, ahead):
            outcome.sizes[size] += 1
            done = outcome.images + len(outcome.damage)
            progress(done, max(expected, done))
    return outcome


def readable(found: Iterable[Frame | ReadError], outcome: Summary) -> Iterator[Frame]:
    """The frames; what is said of the others, and of stray bytes, is added to the outcome."""
    for one in found:
        if isinstance(one, Frame):
            outcome.stray += one.stray_bytes
            yield one
        else:
            outcome.damage.append(one.what)


def estimate_all(predictor: Predictor, frames: Iterable[Frame]) -> Iterator[tuple[Frame, np.ndarray]]:
    """Each frame with its depth, float32 metres (height, width)."""
    for batch in batches(predictor, frames):
        before = predictor.batch_size
        depths = predictor.predict_batch([frame.image for frame in batch])
        if predictor.batch_size < before:
            say(
                f"{predictor.device}: too little memory for {len(batch)} images at once; on with {predictor.batch_size}"
            )
        yield from zip(batch, depths, strict=True)


def batches(predictor: Predictor, frames: Iterable[Frame]) -> Iterator[list[Frame]]:
    """Frames that the model sees at one size, together. Where sizes are many, few wait for others of theirs."""
    waiting: dict[tuple[int, int], list[Frame]] = {}
    for frame in frames:
        size = predictor.input_size(*frame.image.shape[:2])
        waiting.setdefault(size, []).append(frame)
        if len(waiting[size]) >= predictor.batch_size:
            yield waiting.pop(size)
        elif sum(map(len, waiting.values())) >= _HELD * predictor.batch_size:
            yield waiting.pop(max(waiting, key=lambda size: len(waiting[size])))
    yield from waiting.values()


def summarise(outcome: Summary, predictor: Predictor, results: Results, seconds: float) -> None:
    """What was made, where, how fast, and what can be done with it. Raises UserError where something was not."""
    if outcome.images:
        made = f"{outcome.images:,} depth maps in {results.folder}"
        speed = f"{outcome.images / seconds:.1f} images/s on {predictor.device}, {predictor.precision}"
        kinds = [f"NAME{kind}: {words}" for kind, words in results.kinds().items()]
        say(f"made: {made} ({speed})", *kinds, *(results.cameras(outcome.sizes) if results.ply else ()))
        score = command_line("evaluate", "--predictions", results.folder, then="--source DATA")
        say(f"next: {score}  (where truth is known)")
    if outcome.stray:
        say(stray_in_words(outcome.stray))
    for line in outcome.damage[:_NAMED]:
        say(f"skipped {line}")
    damaged = len(outcome.damage)
    if damaged > _NAMED:
        say(f"skipped {damaged - _NAMED:,} more")
    if damaged:
        total = damaged + outcome.images
        raise UserError(f"{damaged:,} of {total:,} images could not be read; they are named above")


if __name__ == "__main__":
    run_command(main)
