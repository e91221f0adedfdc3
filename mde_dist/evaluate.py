"""A checkpoint, or a folder of anybody's predictions -> metrics under named protocols, exact over any number of ranks.

    python -m mde_dist.evaluate --run DIR
    accelerate launch -m mde_dist.evaluate --checkpoint FILE.safetensors --shards DIR --protocols eigen full blog
    python -m mde_dist.evaluate --predictions DIR --source NYUV2 --json result.json --csv images.csv
    python -m mde_dist.evaluate --compare A.json B.json

Two results can be compared where their fingerprints are the same: protocol, number of images, ground truth, version of
the metrics' definitions.
"""

import contextlib
import hashlib
import io
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from accelerate import Accelerator

from mde_dist.data.augmentation import depth_counts
from mde_dist.data.config import CacheOptions
from mde_dist.data.dataset import DepthDataset
from mde_dist.data.depth import COUNTS_PER_METRE
from mde_dist.data.images import stray_in_words
from mde_dist.data.loader import Batch
from mde_dist.data.manifest import NAME
from mde_dist.data.shards import ShardDataset, open_split
from mde_dist.data.storage.remote import NotThere
from mde_dist.data.store import open_store
from mde_dist.distributed.config import Precision
from mde_dist.distributed.heartbeat import monitor_ranks
from mde_dist.distributed.process_group import (
    all_reduce_sum,
    assert_equal_across_ranks,
    init_distributed,
    run_on_all_ranks,
)
from mde_dist.distributed.signals import PreemptionHandler
from mde_dist.evaluation.breakdown import split_breakdown
from mde_dist.evaluation.compare import compare
from mde_dist.evaluation.evaluator import (
    ImageMetric,
    Predict,
    breakdown_metric,
    constant_baselines,
    evaluate_split,
    model_predict,
    protocol_metric,
    score_baselines,
)
from mde_dist.evaluation.metrics import PROTOCOLS, Protocol, resize_to, summarise
from mde_dist.evaluation.predictions import Match, Predictions, open_predictions
from mde_dist.evaluation.results import (
    N_HASH_COLUMNS,
    GroundTruth,
    ground_truth_of,
    show,
    target_hashes,
    to_json,
    write_csv,
    write_json,
)
from mde_dist.evaluation.sanity_checks import N_STATISTICS, detect_failures, image_statistics, mean_depth
from mde_dist.models.depth_model import load_model
from mde_dist.packing.inspect import Layout, open_checked
from mde_dist.packing.raw_dataset import RawDataset
from mde_dist.packing.sources import DepthMap
from mde_dist.training.checkpoint import open_model
from mde_dist.training.config import eval_shards_of
from mde_dist.utils.cli import RUN_DIR, LatePath, Place, Size, option, parse, read_alone, run_command
from mde_dist.utils.console import open_console, say
from mde_dist.utils.errors import UserError
from mde_dist.utils.paths import command_line
from mde_dist.utils.progress import progress_bar
from mde_dist.utils.urls import hide_key, is_remote


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


@dataclass(frozen=True)
class PredictionSource:
    """What is scored."""

    predict: Predict
    title: str
    about: dict[str, Any]
    """For the record."""


Model = tuple[Path, dict[str, Any], dict[str, torch.Tensor]]
"""As `open_model` gives it: where it lies, its metadata, its weights."""


def main(argv: list[str]) -> None:
    nothing: tuple[EvaluateCommand, Model | None] = EvaluateCommand(), None
    (command, model), error = read_alone(lambda: read_command(argv), nothing)
    if command.compare:
        compare(*command.compare)
        return
    config: dict[str, Any] = model[1]["config"] if model else {}
    with (
        init_distributed(command.precision, error=error, settings=for_all_ranks(command)) as accelerator,
        contextlib.ExitStack() as opened,
    ):
        opened.enter_context(monitor_ranks(accelerator, PreemptionHandler()))
        samples, split = run_on_all_ranks(accelerator, lambda: open_ground_truth(command, config, accelerator, opened))
        train = run_on_all_ranks(accelerator, lambda: training_shards(command, config, opened))
        if all_reduce_sum(accelerator, torch.tensor(float(train is None), device=accelerator.device)).item():
            train = None  # on some of the nodes
        # of a run, a node whose disk is damaged would take another checkpoint
        assert_equal_across_ranks(
            accelerator, "the weights", run_on_all_ranks(accelerator, lambda: weights_hash(model))
        )
        assert_equal_across_ranks(accelerator, "the images", f"{identity(samples)}, training {identity(train)}")
        source_of_predictions = run_on_all_ranks(
            accelerator, lambda: open_contestant(command, model, samples, accelerator)
        )
        record, rows, truth = evaluate(accelerator, command, source_of_predictions, samples, split, train)
        stray = all_reduce_sum(accelerator, torch.tensor(float(len(samples.stray)), device=accelerator.device)).item()
        if accelerator.is_main_process:
            if command.json:
                write_json(command.json, record)
            if command.csv:
                write_csv(command.csv, [PROTOCOLS[name] for name in command.protocols], rows, truth)
            show(record, f"{source_of_predictions.title} on {samples.place} {split}")
            for line in [*([stray_in_words(int(stray))] if stray else []), *summary(command)]:
                say(line)
        del source_of_predictions  # and with it the model, before the process group goes: see `init_distributed`


def read_command(argv: list[str]) -> tuple[EvaluateCommand, Model | None]:
    """The command, and the model that it names, if any. Raises UserError."""
    command = parse(EvaluateCommand, argv, "python -m mde_dist.evaluate")
    if command.compare:
        return command, None
    check(command)
    return command, None if command.predictions else open_model(command.run, command.checkpoint)


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


def open_ground_truth(
    command: EvaluateCommand, config: dict[str, Any], accelerator: Accelerator, opened: contextlib.ExitStack
) -> tuple[DepthDataset, str]:
    """The images and their ground truth, and the split they are. Raises UserError."""
    if command.source:
        quiet = contextlib.nullcontext() if accelerator.is_main_process else contextlib.redirect_stdout(io.StringIO())
        with quiet:
            source, probes = open_checked(
                command.source, command.layout, command.depth_scale, command.list, command.depth_map
            )
        split = command.split or "test"
        if split not in source.splits:
            raise UserError(f"{source.root} has no split {split!r}; it has {', '.join(source.splits)}")
        return opened.enter_context(RawDataset(source, split, probes[split].size)), split
    place = command.shards or eval_shards_of(config)
    split = command.split or config.get("data.eval_split", "test")
    return opened.enter_context(open_split(place, split, cache_options(command))), split


def training_shards(
    command: EvaluateCommand, config: dict[str, Any], opened: contextlib.ExitStack
) -> ShardDataset | None:
    """What the model was trained on, or the training split beside the shards, where it is at hand. Raises UserError."""
    split = config.get("data.train_split", "train")
    for place in (config.get("data.shards"), command.shards):  # a checkpoint may be far from where it was trained
        if place and (is_remote(place) or Path(place, NAME).is_file()):
            try:
                manifest, store = open_store(place, cache_options(command))
            except NotThere:  # it has moved, or its URL was a signed one
                continue
            if split in manifest.splits:
                return opened.enter_context(ShardDataset(manifest, store, split))
    return None


def open_contestant(
    command: EvaluateCommand,
    model: Model | None,
    samples: DepthDataset,
    accelerator: Accelerator,
) -> PredictionSource:
    """The model (as `open_model` gave it) or the folder of predictions. Raises UserError."""
    if model:
        path, metadata, tensors = model
        size = command.size or tuple(metadata["size"])
        network = load_model(metadata, tensors).to(accelerator.device).eval()
        about = {"path": str(path), "size": list(size), "flip": command.flip, "precision": accelerator.mixed_precision}
        title = f"{path}{', with flip averaging,' if command.flip else ''}"
        return PredictionSource(model_predict(network, size, accelerator, command.flip), title, about)
    assert command.predictions
    predictions, notes = open_predictions(command.predictions, samples, command.match, command.prediction_scale)
    if accelerator.is_main_process:
        say(*notes)
    about = {"path": str(command.predictions), "match": command.match, "units": predictions.units}
    return PredictionSource(partial(_read, predictions, accelerator.device), str(command.predictions), about)


def _read(predictions: Predictions, device: torch.device, batch: Batch) -> torch.Tensor:
    """Predictions of any sizes -> float64 (batch, height, width), in the unit and at the size of the truth.

    Raises UserError.
    """
    maps = (torch.from_numpy(predictions.read(int(sample))).to(device) for sample in batch.sample)
    return torch.cat([resize_to(one[None], batch.depth) for one in maps])


def evaluate(
    accelerator: Accelerator,
    command: EvaluateCommand,
    source_of_predictions: PredictionSource,
    samples: DepthDataset,
    split: str,
    train: ShardDataset | None,
) -> tuple[dict[str, Any], list[torch.Tensor], GroundTruth]:
    """Score the predictions and the constant baselines in one pass. Called by every rank, same result.

    -> (record, `score` rows by protocol, what was predicted). Raises UserError.
    """
    protocols = [PROTOCOLS[name] for name in command.protocols]
    maps = constant_baselines(train, accelerator.device) if train else {}
    metrics = [breakdown_metric(protocols[0]), *map(protocol_metric, protocols[1:])]
    metrics += [ImageMetric(N_STATISTICS, partial(image_statistics, per_metre=COUNTS_PER_METRE))]
    metrics += [ImageMetric(N_HASH_COLUMNS, target_hashes), *score_baselines(maps, protocols)]
    options: dict[str, Any] = {"batch_size": command.batch_size, "threads": command.threads}
    with progress_of("scoring", accelerator) as progress:
        found = evaluate_split(
            accelerator, source_of_predictions.predict, samples, metrics, progress=progress, **options
        )
    first, where = split_breakdown(found[0])
    rows = [first, *found[1 : len(protocols)]]
    signs, hashes, *scored = found[len(protocols) :]
    if not train:  # nothing else is known of the depth than the very truth that is scored: read it again
        mean = torch.full(samples.size, mean_depth(signs) * COUNTS_PER_METRE, dtype=torch.float64)
        maps = {"mean of this truth everywhere": mean.to(accelerator.device)}
        with progress_of("baselines", accelerator) as progress:
            metrics = score_baselines(maps, protocols)
            scored = evaluate_split(accelerator, depth_counts, samples, metrics, progress=progress, **options)
    baselines = {name: scored[k * len(protocols) : (k + 1) * len(protocols)] for k, name in enumerate(maps)}
    truth = ground_truth_of(samples, split, hashes)
    findings = detect_failures(signs, scale_matters=any(protocol.align == "none" for protocol in protocols))
    findings += worse_than_baseline(rows, baselines, protocols)
    return (
        to_json({"model": rows, **baselines}, protocols, truth, source_of_predictions.about, findings, where),
        rows,
        truth,
    )


def worse_than_baseline(
    rows: Sequence[torch.Tensor], baselines: dict[str, list[torch.Tensor]], protocols: Sequence[Protocol]
) -> list[str]:
    """A warning where one depth everywhere scores better, by the first protocol that compares metres."""
    name, blind = next(iter(baselines.items()))
    for protocol, found, other in zip(protocols, rows, blind, strict=True):
        if protocol.align == "none":
            model, constant = (summarise(table, protocol).metrics["abs_rel"] for table in (found, other))
            worse = f"worse than {name}: abs_rel {model:.4f} against {constant:.4f} under {protocol.name}"
            return [worse] if model >= constant else []
    return []


def weights_hash(model: Model | None) -> str:
    """sha256 of names and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model[2].items()) if model else ():
        digest.update(name.encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def cache_options(command: EvaluateCommand) -> CacheOptions:
    return CacheOptions(command.cache, int(command.cache_gb * 1e9))


def identity(samples: DepthDataset | None) -> str:
    """What has to be the same on all ranks."""
    if isinstance(samples, ShardDataset):
        return samples.manifest.sha256
    return f"{samples.place}, {len(samples)} images" if samples else "not at hand"


def progress_of(doing: str, accelerator: Accelerator) -> AbstractContextManager[Callable[[int, int], None]]:
    """What the main process shows of a pass over the images."""
    if accelerator.is_main_process:
        return progress_bar(open_console(), doing, "images")
    return contextlib.nullcontext(lambda done, images: None)


def summary(command: EvaluateCommand) -> list[str]:
    """What was made, and what to do next."""
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
