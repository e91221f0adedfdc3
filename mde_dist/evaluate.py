"""Checkpoint -> metrics under named protocols, exact over any number of ranks.

python -m mde_dist.evaluate --run DIR
accelerate launch -m mde_dist.evaluate --checkpoint FILE.safetensors --shards DIR --protocols eigen full blog
"""

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from . import __version__
from .command import Size, parse, run_command
from .data.augment import normalise, prepare_depth, prepare_images
from .data.loader import Batch, Draw, Loader, Stopped
from .data.manifest import Manifest
from .data.prefetch import Prefetch
from .data.remote import is_remote
from .data.shards import ShardSet, open_split
from .data.store import CacheOptions
from .errors import UserError
from .files import write_atomic
from .learning.metrics import PROTOCOLS, Protocol, Summary, score, summarise
from .learning.model import restore
from .run.checkpoint import find_model, read_model
from .run.distributed import Precision, agree, all_sum, processes, same_everywhere, together
from .run.peers import watched_peers
from .run.preemption import StopFlag

Predict = Callable[[torch.Tensor], torch.Tensor]
"""image float32 (batch, 3, h, w), normalised -> depth (batch, h', w') metres."""


class Interrupted(Exception):
    """An evaluation that all ranks agreed to leave."""


@dataclass(frozen=True)
class EvaluateCommand:
    """Score a checkpoint on the shards of a split."""

    run: Path | None = None
    """Run directory: its newest checkpoint, shards, split and training size are taken."""
    checkpoint: Path | None = None
    """A model.safetensors, instead of --run."""
    shards: str | None = None
    """Directory or URL of shards; by default those that the run was trained on."""
    split: str | None = None
    """Split to score; by default the run's evaluation split, else `test`."""
    protocols: tuple[Literal["eigen", "full", "blog"], ...] = ("eigen",)
    """Protocols, scored in one pass."""
    size: Size | None = None
    """Size at which the model sees the images; by default the one it was trained at."""
    batch_size: int = 8
    """Images per forward pass."""
    threads: int = 2
    """Decoding threads per rank."""
    cache: Path = CacheOptions.directory
    """Where shards of a server are kept."""
    cache_gb: float = 100
    """Gigabytes that it may take."""
    precision: Precision = "auto"
    """auto = bf16 on GPUs that have it, else fp32."""
    json: Path | None = None
    """Also write the results to this file."""


def main(argv: list[str]) -> None:
    command = parse(EvaluateCommand, argv, "python -m mde_dist.evaluate")
    path = find_model(command.run, command.checkpoint)
    metadata, tensors = read_model(path)
    config = metadata["config"]
    split = command.split or config["data.eval_split"]
    size = command.size or tuple(metadata["size"])
    protocols = [PROTOCOLS[name] for name in command.protocols]
    if command.batch_size < 1:
        raise UserError(f"--batch-size {command.batch_size}: must be at least 1")
    with processes(command.precision) as accelerator, contextlib.ExitStack() as opened:
        opened.enter_context(watched_peers(accelerator, StopFlag()))
        cache = CacheOptions(command.cache, int(command.cache_gb * 1e9))
        place = command.shards or held_out_shards(config)
        shards = together(accelerator, lambda: opened.enter_context(open_split(place, split, cache)))
        same_everywhere(accelerator, "the shards", shards.manifest.sha256)
        model = restore(metadata, tensors).to(accelerator.device).eval()
        with Progress(disable=not accelerator.is_main_process) as bar:
            task = bar.add_task("scoring", total=len(shards))
            rows = score_split(
                accelerator,
                model,
                shards,
                protocols,
                size,
                command.batch_size,
                command.threads,
                progress=lambda done, images: bar.update(task, completed=done),
            )
            bar.update(task, completed=len(shards))
        baselines: dict[str, list[torch.Tensor]] = {}
        trained_on = config["data.shards"]
        # a checkpoint may be far from where it was trained, on some of the nodes or on all
        at_hand = is_remote(trained_on) or Path(trained_on, "manifest.json").is_file()
        absent = torch.tensor(float(not at_hand), device=accelerator.device)
        if not all_sum(accelerator, absent).item():
            names = trained_on, config["data.train_split"]
            train = together(accelerator, lambda: opened.enter_context(open_split(*names, cache)))
            baselines = score_baselines(accelerator, shards, train, protocols)
        if accelerator.is_main_process:
            results = {"model": rows, **baselines}
            summaries = {
                name: [summarise(table, protocol) for table, protocol in zip(tables, protocols, strict=True)]
                for name, tables in results.items()
            }
            show(summaries, f"{path} on {shards.manifest.place} {split}")
            name_unscored(summaries["model"], shards)
            if command.json:
                record = as_record(summaries, shards.manifest, split, size, path)
                write_atomic(command.json, json.dumps(record, indent=1) + "\n")
        del model  # before the process group goes: see `processes`


def held_out_shards(config: dict[str, Any]) -> str:
    """Where the evaluation split of a trained model's config lies."""
    return config["data.eval_shards"] or config["data.shards"]


def score_split(
    accelerator: Accelerator,
    predict: Predict,
    shards: ShardSet,
    protocols: Sequence[Protocol],
    size: tuple[int, int],
    batch_size: int,
    threads: int,
    limit: int | None = None,
    stop: Callable[[], bool] = lambda: False,
    progress: Callable[[int, int], None] = lambda done, images: None,
) -> list[torch.Tensor]:
    """Score every image of a split once -> per protocol, on all ranks, float64 (images, 1 + metrics) in its order.

    Batches are the same images for every number of ranks (batch b goes to rank b % world), so that each image meets the
    same arithmetic; each rank fills its rows of one table of zeros, and one sum over the ranks puts them together.
    `stop` is asked once a round of batches; where it is true on any rank, all raise Interrupted. A UserError on one
    rank ends all, see `agree`. `progress(done, images)` is called after each batch.
    """
    images = min(len(shards), limit or len(shards))
    world, rank = accelerator.num_processes, accelerator.process_index
    starts = range(rank * batch_size, images, world * batch_size)
    widths = [1 + len(protocol.metrics) for protocol in protocols]
    table = torch.zeros((images, sum(widths) + 1), dtype=torch.float64, device=accelerator.device)

    def draws(prefetch: Prefetch) -> Iterator[Draw]:
        for start in starts:
            prefetch.reached(start)
            samples = np.arange(start, min(start + batch_size, images))
            yield np.zeros_like(samples), samples

    def score_batch(batch: Batch) -> None:
        image, truth = normalise(prepare_images(batch, size)), prepare_depth(batch)
        image = image.contiguous(memory_format=torch.channels_last)  # as while training: it shows in the last digits
        with accelerator.autocast():
            prediction = predict(image)
        scores = [score(prediction, truth, protocol) for protocol in protocols]
        ones = torch.ones(len(batch.sample), 1, dtype=torch.float64, device=truth.device)
        table[torch.from_numpy(batch.sample).to(table.device)] = torch.cat([*scores, ones], dim=1)
        progress(int(batch.sample[-1]) + 1, images)

    with (
        Prefetch(shards, shards.in_order()) as prefetch,
        Loader(shards, draws(prefetch), batch_size, accelerator.device, threads, stop=stop) as loader,
        torch.inference_mode(),
    ):
        for _ in range(-(-images // (world * batch_size))):
            error = None
            try:
                batch = next(loader, None)  # in the last round some ranks have none
                if batch is not None and not stop():
                    score_batch(batch)
            except Stopped:
                pass  # `stop` says so
            except UserError as failure:
                error = failure
            told = torch.tensor([float(stop()), float(error is not None)], device=accelerator.device)
            stops, failures = all_sum(accelerator, told).tolist()
            if failures:
                agree(accelerator, error)
            if stops:
                raise Interrupted
    table = all_sum(accelerator, table).cpu()
    if not (table[:, -1] == 1).all():
        raise RuntimeError("an image was not scored exactly once")
    return list(table[:, :-1].split(widths, dim=1))


def score_baselines(
    accelerator: Accelerator,
    shards: ShardSet,
    train: ShardSet,
    protocols: Sequence[Protocol],
    limit: int | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, list[torch.Tensor]]:
    """Rows as of `score_split` for predicting without looking: the training mean, and its mean map."""
    mean_map = torch.from_numpy(train.mean_map()).to(accelerator.device)
    maps = {
        "training mean everywhere": torch.full_like(mean_map, train.info.depth["mean"]),
        "mean map of training": mean_map,
    }
    return {
        name: score_split(
            accelerator,
            partial(_blind, blind),
            shards,
            protocols,
            shards.size,
            batch_size=4,
            threads=1,
            limit=limit,
            stop=stop,
        )
        for name, blind in maps.items()
    }


def _blind(depth: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
    return depth.expand(len(image), -1, -1)


def show(summaries: dict[str, list[Summary]], title: str) -> None:
    """One table per protocol: what was scored against predicting without looking."""
    for column in zip(*summaries.values(), strict=True):
        protocol = PROTOCOLS[column[0].protocol]
        table = Table(title=f"{title}: protocol {protocol.name}, {column[0].images} images", title_justify="left")
        for name in ("", *summaries):
            table.add_column(name, justify="right" if name else "left")
        for metric in protocol.metrics:
            table.add_row(metric, *(f"{summary.metrics[metric]:.4f}" for summary in column))
        Console().print(table)


def name_unscored(summaries: list[Summary], shards: ShardSet) -> None:
    """Say which images had no valid pixel."""
    for summary in summaries:
        if summary.unscored:
            keys = ", ".join(shards.key(sample) for sample in summary.unscored[:10])
            print(f"{summary.protocol}: {len(summary.unscored)} images without a valid pixel were not scored: {keys}")


def as_record(
    summaries: dict[str, list[Summary]], manifest: Manifest, split: str, size: tuple[int, int], path: Path
) -> dict[str, Any]:
    """The results with all that they depend on."""
    return {
        "version": __version__,
        "checkpoint": str(path),
        "manifest": manifest.sha256,
        "split": split,
        "ground_truth_size": manifest.size,
        "input_size": size,
        "protocols": {summary.protocol: asdict(PROTOCOLS[summary.protocol]) for summary in summaries["model"]},
        "results": {
            name: {summary.protocol: {"images": summary.images, **summary.metrics} for summary in column}
            for name, column in summaries.items()
        },
    }


if __name__ == "__main__":
    run_command(main)
