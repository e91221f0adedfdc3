"""Inputs of an evaluation: the images with their ground truth, the training split, and the predictions to score."""

import contextlib
import io
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from mde_dist.data.config import CacheOptions, eval_shards_of
from mde_dist.data.dataset import DepthDataset
from mde_dist.data.loader import Batch
from mde_dist.data.manifest import NAME
from mde_dist.data.shards import ShardDataset, open_split
from mde_dist.data.storage.remote import NotThere
from mde_dist.data.store import open_store
from mde_dist.evaluation.evaluator import Predict, model_predict
from mde_dist.evaluation.metrics import resize_to
from mde_dist.evaluation.predictions import Match, Predictions, open_predictions
from mde_dist.models.depth_model import load_model
from mde_dist.packing.inspect import Layout, open_checked
from mde_dist.packing.raw_dataset import RawDataset
from mde_dist.packing.sources import DepthMap
from mde_dist.utils.console import say
from mde_dist.utils.errors import UserError
from mde_dist.utils.urls import is_remote

Model = tuple[Path, dict[str, Any], dict[str, torch.Tensor]]
"""A model as `open_model` gives it: path, metadata, tensors by name."""


@dataclass(frozen=True)
class PredictionSource:
    """A model, or a folder of predictions, to be scored."""

    predict: Predict
    title: str
    about: dict[str, Any]
    """Description of it in the record."""


def open_images(
    opened: contextlib.ExitStack,
    config: Mapping[str, Any],
    split: str,
    cache: CacheOptions,
    *,
    shards: str | None,
    source: Path | None,
    layout: Layout | None,
    depth_scale: tuple[str, ...],
    lists: tuple[str, ...],
    depth_map: DepthMap | None,
    quiet: bool,
) -> DepthDataset:
    """Open a split of shards, by default of those in the model's config, or of a source, a data set as it lies on disk.

    The options of a source are those of `open_checked`, which describes it unless `quiet`. Raises UserError.
    """
    if not source:
        return opened.enter_context(open_split(shards or eval_shards_of(config), split, cache))
    with contextlib.redirect_stdout(io.StringIO()) if quiet else contextlib.nullcontext():
        found, probes = open_checked(source, layout, depth_scale, lists, depth_map)
    if split not in found.splits:
        raise UserError(f"{found.root} has no split {split!r}; it has {', '.join(found.splits)}")
    return opened.enter_context(RawDataset(found, split, probes[split].size))


def open_train_split(
    opened: contextlib.ExitStack, config: Mapping[str, Any], shards: str | None, cache: CacheOptions
) -> ShardDataset | None:
    """Open the training split of the model's config, or the one beside the shards; None where neither is there.

    Raises UserError.
    """
    split = config.get("data.train_split", "train")
    for source in (config.get("data.shards"), shards):  # a checkpoint may be far from where it was trained
        if source and (is_remote(source) or Path(source, NAME).is_file()):
            try:
                manifest, store = open_store(source, cache)
            except NotThere:  # it has moved, or its URL was a signed one
                continue
            if split in manifest.splits:
                return opened.enter_context(ShardDataset(manifest, store, split))
    return None


def open_source(
    source: Model | Path | None,
    samples: DepthDataset,
    accelerator: Accelerator,
    *,
    size: tuple[int, int] | None,
    flip: bool,
    match: Match,
    scale: float | None,
) -> PredictionSource:
    """A model, which sees images at `size` or at its training size; or a folder of predictions, matched to the images.

    Raises UserError.
    """
    if isinstance(source, tuple):
        path, metadata, tensors = source
        size = size or (metadata["size"][0], metadata["size"][1])
        network = load_model(metadata, tensors).to(accelerator.device).eval()
        about = {"path": str(path), "size": list(size), "flip": flip, "precision": accelerator.mixed_precision}
        title = f"{path}{', with flip averaging,' if flip else ''}"
        return PredictionSource(model_predict(network, size, accelerator, flip), title, about)
    assert source
    predictions, notes = open_predictions(source, samples, match, scale)
    if accelerator.is_main_process:
        say(*notes)
    about = {"path": str(source), "match": match, "units": predictions.units}
    return PredictionSource(partial(_read, predictions, accelerator.device), str(source), about)


def _read(predictions: Predictions, device: torch.device, batch: Batch) -> torch.Tensor:
    """Predictions of any sizes -> float64 (batch, height, width), in the unit and at the size of the truth.

    Raises UserError.
    """
    maps = (torch.from_numpy(predictions.read(int(sample))).to(device) for sample in batch.sample)
    return torch.cat([resize_to(one[None], batch.depth) for one in maps])


def identity(samples: DepthDataset | None) -> str:
    """Text that is the same on all ranks that read the same images."""
    if isinstance(samples, ShardDataset):
        return samples.manifest.sha256
    return f"{samples.location}, {len(samples)} images" if samples else "not at hand"
