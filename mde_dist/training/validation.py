"""Evaluation while training: the held-out split scored in one pass, with what its report shows."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from mde_dist.data.shards import ShardDataset
from mde_dist.distributed.process_group import broadcast_buffers_of
from mde_dist.evaluation.breakdown import split_breakdown
from mde_dist.evaluation.evaluator import (
    ImageMetric,
    breakdown_metric,
    constant_baselines,
    evaluate_split,
    model_predict,
    score_baselines,
)
from mde_dist.evaluation.metrics import PROTOCOLS, Summary, summarise
from mde_dist.evaluation.results import EVALUATIONS, N_HASH_COLUMNS, ground_truth_of, target_hashes, to_json, write_json
from mde_dist.training.config import Config
from mde_dist.training.snapshots import PredictionRecorder, make_image_strips, write_snapshots
from mde_dist.training.trackers import Trackers


@dataclass(frozen=True)
class Validation:
    """One evaluation."""

    summary: Summary
    rows: torch.Tensor
    """float64 (images, columns) of `metrics.score`."""
    breakdown: torch.Tensor
    baselines: dict[str, Summary]
    """Scores of the constant baselines by name; empty but at the first evaluation of a run."""
    chosen: list[int]
    """Images of which predictions are kept."""
    maps: tuple[np.ndarray, np.ndarray, np.ndarray]
    """Images, ground truths and predictions of these, as `PredictionRecorder.all_gather` gives them."""


class Validator:
    """Scores a model on the evaluation split. Every method but `write` is called by every rank."""

    def __init__(
        self,
        config: Config,
        accelerator: Accelerator,
        train_set: ShardDataset,
        eval_set: ShardDataset,
        size: tuple[int, int],
    ):
        """`size`: of the whole training images, pixels."""
        self._config, self._accelerator, self._size = config, accelerator, size
        self._train_set, self._eval_set = train_set, eval_set
        self._hashes: torch.Tensor | None = None  # of the truth, which does not change

    def run(
        self,
        model: nn.Module,
        with_baselines: bool,
        stop: Callable[[], bool],
        progress: Callable[[int, int], None],
    ) -> Validation:
        """Score the split, each image read once. Raises Interrupted, and UserError on every rank."""
        options, protocol = self._config.evaluate, PROTOCOLS[self._config.evaluate.protocol]
        baselines = constant_baselines(self._train_set, self._accelerator.device) if with_baselines else {}
        metrics = [breakdown_metric(protocol), *score_baselines(baselines, [protocol])]
        if self._hashes is None:
            metrics.append(ImageMetric(N_HASH_COLUMNS, target_hashes))
        images = min(len(self._eval_set), options.limit or len(self._eval_set))
        recorder = PredictionRecorder(images, self._eval_set.size)
        broadcast_buffers_of(self._accelerator, model)
        model.eval()
        # forward, not the call: a compiled model would be compiled again for these batches
        predict = recorder.wrap(model_predict(model.forward, self._size, self._accelerator, options.flip))
        scored, *others = evaluate_split(
            self._accelerator,
            predict,
            self._eval_set,
            metrics,
            batch_size=options.batch_size,
            threads=self._config.data.threads,
            limit=options.limit,
            stop=stop,
            progress=progress,
        )
        model.train()
        if self._hashes is None:
            self._hashes = others.pop()
        rows, breakdown = split_breakdown(scored)
        summaries = {name: summarise(table, protocol) for name, table in zip(baselines, others, strict=True)}
        maps = recorder.all_gather(self._accelerator)
        return Validation(summarise(rows, protocol), rows, breakdown, summaries, recorder.chosen, maps)

    def write(self, found: Validation, samples_seen: int, best: bool, trackers: Trackers) -> None:
        """Write the numbers of every image, as `evaluate --json` has them, and how a few images are predicted now.

        Raises UserError where the disk does not take them.
        """
        run, protocol = self._config.run, PROTOCOLS[self._config.evaluate.protocol]
        assert self._hashes is not None
        ground_truth = ground_truth_of(self._eval_set, self._config.data.eval_split, self._hashes)
        predictor = {
            "path": str(run),
            "samples": samples_seen,
            "size": list(self._size),
            "flip": self._config.evaluate.flip,
            "precision": self._accelerator.mixed_precision,
        }
        record = to_json({"model": [found.rows]}, [protocol], ground_truth, predictor, [], found.breakdown)
        for name in ("last", "best") if best else ("last",):
            write_json(run / EVALUATIONS / f"{name}.json", record)
        keys = [self._eval_set.key(sample) for sample in found.chosen]
        write_snapshots(run, samples_seen, keys, *found.maps)
        if trackers:
            strips = zip(keys, make_image_strips(*found.maps), strict=True)
            trackers.show(samples_seen, {f"held-out/{key}": strip for key, strip in strips})
