"""Every image of a split -> a row of numbers, exact over any number of ranks: what training and `evaluate` share."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from accelerate import Accelerator

from mde_dist.data.augmentation import depth_counts, prepare_images
from mde_dist.data.dataset import DepthDataset
from mde_dist.data.depth import COUNTS_PER_METRE
from mde_dist.data.loader import Batch, BatchIndices, DataLoader, Stopped
from mde_dist.data.prefetch import Prefetch
from mde_dist.data.shards import ShardDataset
from mde_dist.distributed.process_group import all_reduce_sum, raise_on_all_ranks
from mde_dist.evaluation.breakdown import COLUMNS, score_with_breakdown
from mde_dist.evaluation.metrics import N_COLUMNS, Protocol, score
from mde_dist.models.depth_model import estimate
from mde_dist.utils.errors import UserError

Predict = Callable[[Batch], torch.Tensor]
"""A batch of images -> depth float64 (batch, h, w), of any size; in the unit of the truth, COUNTS_PER_METRE a metre."""


@contextmanager
def one_thread() -> Iterator[None]:
    """Sums add up in another order for every number of threads, and for every size of a batch: images are measured one
    by one, in one thread, so that a split has the same digits to the last bit however it was shared out."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class Interrupted(Exception):
    """An evaluation that all ranks agreed to leave."""


@dataclass(frozen=True)
class ImageMetric:
    """Numbers to be taken of each image."""

    columns: int
    of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    """(prediction (batch, h, w), truth (batch, height, width) as stored, 0 = hole) -> float64 (batch, columns).

    Both float64, COUNTS_PER_METRE a metre."""


def protocol_metric(protocol: Protocol) -> ImageMetric:
    """The rows that `evaluation.metrics.summarise` takes."""
    return ImageMetric(N_COLUMNS, partial(score, protocol=protocol, per_metre=COUNTS_PER_METRE))


def breakdown_metric(protocol: Protocol) -> ImageMetric:
    """The same, and where the errors are: the rows that `evaluation.breakdown.split_breakdown` takes."""
    return ImageMetric(COLUMNS, partial(score_with_breakdown, protocol=protocol, per_metre=COUNTS_PER_METRE))


def model_predict(
    model: Callable[[torch.Tensor], torch.Tensor], size: tuple[int, int], accelerator: Accelerator, flip: bool = False
) -> Predict:
    """A model that sees the images at `size`; with `flip` its mean over the image and the mirrored image."""

    def predict(batch: Batch) -> torch.Tensor:
        with accelerator.autocast():
            metres = estimate(model, prepare_images(batch, size), flip)
        return metres.double() * COUNTS_PER_METRE

    return predict


def evaluate_split(
    accelerator: Accelerator,
    predict: Predict,
    samples: DepthDataset,
    metrics: Sequence[ImageMetric],
    batch_size: int,
    threads: int,
    limit: int | None = None,
    stop: Callable[[], bool] = lambda: False,
    progress: Callable[[int, int], None] = lambda done, images: None,
) -> list[torch.Tensor]:
    """Measure every image of a split once -> per measure, on all ranks, float64 (images, columns) in its order.

    Batches are the same images for every number of ranks (batch b goes to rank b % world), so that each image meets the
    same arithmetic; each rank fills its rows of one table of zeros, and one sum over the ranks puts them together.
    `stop` is asked once a round of batches; where it is true on any rank, all raise Interrupted. A UserError on one
    rank ends all, see `raise_on_all_ranks`. `progress(done, images)` is called after each batch.
    """
    images = min(len(samples), limit or len(samples))
    world, rank = accelerator.num_processes, accelerator.process_index
    starts = range(rank * batch_size, images, world * batch_size)
    widths = [metric.columns for metric in metrics]
    table = torch.zeros((images, sum(widths) + 1), dtype=torch.float64, device=accelerator.device)

    def batch_indices(prefetch: Prefetch) -> Iterator[BatchIndices]:
        for start in starts:
            prefetch.advance(start)
            indices = np.arange(start, min(start + batch_size, images))
            yield np.zeros_like(indices), indices

    def score_batch(batch: Batch) -> None:
        target, prediction = depth_counts(batch), predict(batch)
        with one_thread():
            for sample, p, g in zip(batch.sample, prediction.split(1), target.split(1), strict=True):
                row = torch.cat([metric.of(p, g)[0] for metric in metrics])
                table[int(sample), :-1], table[int(sample), -1] = row, 1
        progress(int(batch.sample[-1]) + 1, images)

    with (
        Prefetch(samples, samples.in_order()) as prefetch,
        DataLoader(samples, batch_indices(prefetch), batch_size, accelerator.device, threads, stop=stop) as loader,
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
            stops, failures = all_reduce_sum(accelerator, told).tolist()
            if failures:
                raise_on_all_ranks(accelerator, error)
            if stops:
                raise Interrupted
    table = all_reduce_sum(accelerator, table).cpu()
    if not (table[:, -1] == 1).all():
        raise RuntimeError("an image was not scored exactly once")
    return list(table[:, :-1].split(widths, dim=1))


def constant_baselines(train: ShardDataset, device: torch.device) -> dict[str, torch.Tensor]:
    """Name -> a map that a model has to beat, the same for every image: float64 (height, width), in counts."""
    mean_map = torch.from_numpy(train.mean_map().astype(np.float64)).to(device)
    return {
        "training mean everywhere": torch.full_like(mean_map, train.info.depth["mean"] * COUNTS_PER_METRE),
        "mean map of training": mean_map,
    }


def score_baselines(maps: Mapping[str, torch.Tensor], protocols: Sequence[Protocol]) -> list[ImageMetric]:
    """Metrics that score a constant map in place of the prediction: for each map, one for each protocol."""

    def constant(metric: ImageMetric, baseline: torch.Tensor) -> ImageMetric:
        return ImageMetric(metric.columns, lambda _, target: metric.of(baseline.expand(len(target), -1, -1), target))

    return [constant(protocol_metric(protocol), baseline) for baseline in maps.values() for protocol in protocols]
