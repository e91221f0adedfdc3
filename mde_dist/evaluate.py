"""A checkpoint, or a folder of anybody's predictions -> metrics under named protocols, exact over any number of ranks.

    python -m mde_dist.evaluate --run DIR
    accelerate launch -m mde_dist.evaluate --checkpoint FILE.safetensors --shards DIR --protocols eigen full blog
    python -m mde_dist.evaluate --predictions DIR --source NYUV2 --json result.json --csv images.csv
    python -m mde_dist.evaluate --compare A.json B.json

Two results can be compared where their fingerprints are the same: protocol, number of images, ground truth, version of
the metrics' definitions.
"""

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from mde_dist.data.config import CacheOptions
from mde_dist.distributed.config import Precision
from mde_dist.distributed.signals import PreemptionHandler
from mde_dist.evaluation.predictions import Match
from mde_dist.packing.inspect import Layout
from mde_dist.packing.sources import DepthMap
from mde_dist.utils.cli import RUN_DIR, LatePath, Place, Size, option, parse, read_alone, run_command
from mde_dist.utils.console import say
from mde_dist.utils.errors import UserError
from mde_dist.utils.paths import command_line
from mde_dist.utils.urls import hide_key

if TYPE_CHECKING:
    from mde_dist.evaluation.inputs import Model


@dataclass(frozen=True)
class EvaluateCommand:
    """Score a model, or a folder of predictions, on the images of a split."""

    run: Annotated[Path | None, RUN_DIR] = None
    """Run directory: its newest checkpoint, shards, split and training size are taken. Under torchrun: --run-dir."""
    checkpoint: Path | None = None
    """A model.safetensors, instead of --run."""
    predictions: Path | None = None
    """Instead of a model: a folder with one depth map per image, of any model of yours: 16-bit PNG, .npy or .npz, of
    any size that shows the whole image; or one .npy or .npz with all of them, (images, height, width)."""
    prediction_scale: float | None = None
    """Metres per stored unit of the predictions; by default floats are metres and 16-bit PNGs millimetres."""
    match: Match = "name"
    """Match predictions to images by their names, or by the order of these, in which 2 comes before 10. One file with
    all of them is in the order of the split."""
    shards: Place | None = None
    """Directory or URL of shards; by default those that the run was trained on."""
    source: Path | None = None
    """Instead of shards: a data set as it lies on disk, in any layout that `python -m mde_dist.shard` knows."""
    layout: Layout | None = None
    """Layout of the source; None = recognise it."""
    depth_scale: tuple[str, ...] = ()
    """Unit of the source: SPLIT=METRES per stored unit, overruling layout and checks."""
    list: tuple[str, ...] = ()
    """Lists of the source's pairs that do not lie in it: SPLIT=FILE."""
    depth_map: DepthMap | None = None
    """Depth maps to take from a source that has both: raw or filled."""
    split: str | None = None
    """Split to score; by default the run's evaluation split, else `test`."""
    protocols: tuple[Literal["eigen", "full", "blog", "densedepth", "lsq"], ...] = ("eigen",)
    """Protocols, scored in one pass. eigen is the field's standard; lsq fits scale and shift to each image's truth."""
    flip: bool = False
    """Average the model's prediction with that of the mirrored image, as AdaBins, NeWCRFs and ZoeDepth report."""
    size: Size | None = None
    """Size at which the model sees the images; by default the one it was trained at."""
    batch_size: int = option(8, low=1, high=1e6)
    """Images per forward pass."""
    threads: int = option(2, low=0, high=1024)
    """Decoding threads per rank."""
    cache: LatePath = CacheOptions.directory
    """Directory in which shards of a server are kept."""
    cache_gb: float = option(100, low=0, high=1e9)
    """Gigabytes that it may take."""
    precision: Precision = "auto"
    """auto = bf16 on GPUs that have it, else fp32."""
    json: Path | None = None
    """Also write the results to this file, with what --compare needs."""
    csv: Path | None = None
    """Also write a table with one row per image to this file."""
    compare: tuple[Path, Path] | None = None
    """Instead of scoring: tell whether two files of --json differ by more than chance."""

    def __post_init__(self) -> None:
        if self.shards is not None:
            object.__setattr__(self, "shards", hide_key(self.shards))


def main(argv: list[str]) -> None:
    nothing: tuple[EvaluateCommand, Model | None] = EvaluateCommand(), None
    (command, model), error = read_alone(lambda: read_command(argv), nothing)
    if command.compare:
        from mde_dist.evaluation.compare import compare

        compare(*command.compare)
    else:
        evaluate(command, model, error)


def read_command(argv: list[str]) -> tuple[EvaluateCommand, "Model | None"]:
    """Read the options, and the model that they name, if any. Raises UserError."""
    command = parse(EvaluateCommand, argv, "python -m mde_dist.evaluate")
    if command.compare:
        return command, None
    check(command)
    # imported late, here and below: torch takes seconds and hundreds of megabytes, which --help does without
    from mde_dist.training.checkpoint import open_model

    return command, None if command.predictions else open_model(command.run, command.checkpoint)


def evaluate(command: EvaluateCommand, model: "Model | None", error: Exception | None) -> None:
    """Score on all ranks; the main process writes and shows the result.

    `error`: why this rank could not read its command, if so. Raises UserError.
    """
    from mde_dist.data.images import stray_in_words
    from mde_dist.distributed import process_group as ranks
    from mde_dist.distributed.heartbeat import monitor_ranks
    from mde_dist.evaluation import inputs, results
    from mde_dist.evaluation.metrics import PROTOCOLS
    from mde_dist.evaluation.scoring import score_predictions
    from mde_dist.models.weights import hash_tensors

    config: dict[str, Any] = model[1]["config"] if model else {}
    split = command.split or ("test" if command.source else config.get("data.eval_split", "test"))
    cache = CacheOptions(command.cache, int(command.cache_gb * 1e9))
    protocols = [PROTOCOLS[name] for name in command.protocols]
    with (
        ranks.init_distributed(command.precision, error=error, settings=for_all_ranks(command)) as accelerator,
        contextlib.ExitStack() as opened,
    ):
        opened.enter_context(monitor_ranks(accelerator, PreemptionHandler()))
        samples = ranks.run_on_all_ranks(
            accelerator,
            lambda: inputs.open_images(
                opened,
                config,
                split,
                cache,
                shards=command.shards,
                source=command.source,
                layout=command.layout,
                depth_scale=command.depth_scale,
                lists=command.list,
                depth_map=command.depth_map,
                quiet=not accelerator.is_main_process,
            ),
        )
        train = ranks.run_on_all_ranks(
            accelerator, lambda: inputs.open_train_split(opened, config, command.shards, cache)
        )
        if ranks.gather_rows(accelerator, [float(train is None)]).any():
            train = None  # on some of the nodes
        # of a run, a node whose disk is damaged would take another checkpoint
        weights = ranks.run_on_all_ranks(accelerator, lambda: hash_tensors(model[2] if model else {}))
        ranks.assert_equal_across_ranks(accelerator, "the weights", weights)
        images = f"{inputs.identity(samples)}, training {inputs.identity(train)}"
        ranks.assert_equal_across_ranks(accelerator, "the images", images)
        source = ranks.run_on_all_ranks(
            accelerator,
            lambda: inputs.open_source(
                model or command.predictions,
                samples,
                accelerator,
                size=command.size,
                flip=command.flip,
                match=command.match,
                scale=command.prediction_scale,
            ),
        )
        record, rows, truth = score_predictions(
            accelerator, source, samples, split, train, protocols, command.batch_size, command.threads
        )
        stray = int(ranks.gather_rows(accelerator, [len(samples.stray)]).sum())
        if accelerator.is_main_process:
            if command.json:
                results.write_json(command.json, record)
            if command.csv:
                results.write_csv(command.csv, protocols, rows, truth)
            results.show(record, f"{source.title} on {samples.location} {split}")
            for line in [*([stray_in_words(stray)] if stray else []), *summary(command)]:
                say(line)
        del source  # and with it the model, before the process group goes: see `init_distributed`


def for_all_ranks(command: EvaluateCommand) -> dict[str, Any]:
    """Options that have to be the same on all ranks: all but places, as a node may have its own paths."""
    places = ("shards", "list", "cache_gb")
    return {k: v for k, v in vars(command).items() if not isinstance(v, Path) and k not in places}


def check(command: EvaluateCommand) -> None:
    """Refuse what does not go together. Raises UserError."""
    if command.prediction_scale is not None and not 0 < command.prediction_scale < 1000:
        raise UserError(f"--prediction-scale {command.prediction_scale:g}: metres per stored unit, such as 0.001")
    if sum(thing is not None for thing in (command.run, command.checkpoint, command.predictions)) != 1:
        raise UserError(
            "name one thing to score: either --run DIR or --checkpoint FILE.safetensors or --predictions DIR "
            "(or --compare A.json B.json)"
        )
    if command.predictions and not (command.shards or command.source):
        raise UserError("--predictions needs what they are to be held against: --shards DIR or --source DIR")
    if command.predictions and (command.flip or command.size):
        raise UserError("--flip and --size are for a model; predictions are scored as they are")
    if command.shards and command.source:
        raise UserError("name one ground truth: --shards DIR or --source DIR")
    if len(set(command.protocols)) != len(command.protocols) or not command.protocols:
        raise UserError("--protocols: name each protocol once")
    for path in (command.json, command.csv):
        if path and not path.absolute().parent.is_dir():
            raise UserError(f"{path} cannot be written: {path.absolute().parent} is no folder")


def summary(command: EvaluateCommand) -> list[str]:
    """Lines that name the files made, and the next command."""
    if command.json:
        line = command_line("evaluate", "--compare", command.json, then="OTHER.json")
        then = f"{line}  (does another result differ by more than chance?)"
    elif command.predictions:
        then = "the same with --json FILE, to --compare it with another"
    elif command.run:
        then = command_line("report", "--run", command.run)
    else:
        assert command.checkpoint
        then = command_line("predict", "--checkpoint", command.checkpoint, "--output", "depth", then="IMAGE …")
    return [*(f"made: {path}" for path in (command.json, command.csv) if path), f"next: {then}"]


if __name__ == "__main__":
    run_command(main)
