"""Score predictions and constant baselines in one pass, and put together the record of the evaluation."""

import contextlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator

from mde_dist.data.augmentation import depth_counts
from mde_dist.data.dataset import DepthDataset
from mde_dist.data.depth import COUNTS_PER_METRE
from mde_dist.data.shards import ShardDataset
from mde_dist.evaluation.breakdown import split_breakdown
from mde_dist.evaluation.evaluator import (
    ImageMetric,
    breakdown_metric,
    constant_baselines,
    evaluate_split,
    protocol_metric,
    score_baselines,
)
from mde_dist.evaluation.inputs import PredictionSource
from mde_dist.evaluation.metrics import Protocol, summarise
from mde_dist.evaluation.results import N_HASH_COLUMNS, GroundTruth, ground_truth_of, target_hashes, to_json
from mde_dist.evaluation.sanity_checks import N_STATISTICS, detect_failures, image_statistics, mean_depth
from mde_dist.utils.console import open_console
from mde_dist.utils.progress import progress_bar


def score_predictions(
    accelerator: Accelerator,
    source: PredictionSource,
    samples: DepthDataset,
    split: str,
    train: ShardDataset | None,
    protocols: Sequence[Protocol],
    batch_size: int,
    threads: int,
) -> tuple[dict[str, Any], list[torch.Tensor], GroundTruth]:
    """Score the predictions and the constant baselines in one pass. Called by every rank, same result.

    -> (record, `score` rows by protocol, what was predicted). Raises UserError.
    """
    maps = constant_baselines(train, accelerator.device) if train else {}
    metrics = [breakdown_metric(protocols[0]), *map(protocol_metric, protocols[1:])]
    metrics += [ImageMetric(N_STATISTICS, partial(image_statistics, per_metre=COUNTS_PER_METRE))]
    metrics += [ImageMetric(N_HASH_COLUMNS, target_hashes), *score_baselines(maps, protocols)]
    options: dict[str, Any] = {"batch_size": batch_size, "threads": threads}
    with progress_of("scoring", accelerator) as progress:
        found = evaluate_split(accelerator, source.predict, samples, metrics, progress=progress, **options)
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
        to_json({"model": rows, **baselines}, protocols, truth, source.about, findings, where),
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


def progress_of(doing: str, accelerator: Accelerator) -> AbstractContextManager[Callable[[int, int], None]]:
    """Progress of a pass over the images, which the main process shows."""
    if accelerator.is_main_process:
        return progress_bar(open_console(), doing, "images")
    return contextlib.nullcontext(lambda done, images: None)
