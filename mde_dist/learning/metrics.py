"""Per-image depth metrics under named protocols, in float64.

Formulas, over valid pixels with prediction p and ground truth g in metres, d = ln p - ln g (Eigen et al., NIPS 2014):
abs_rel = mean |p-g|/g; sq_rel = mean (p-g)^2/g; rmse = sqrt(mean (p-g)^2); rmse_log = sqrt(mean d^2);
log10 = mean |log10 p - log10 g|; silog = 100 sqrt(mean d^2 - (mean d)^2); delta_k = mean [max(p/g, g/p) < 1.25^k].
The score of a split is the mean over its images.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

METRICS = ("abs_rel", "sq_rel", "rmse", "rmse_log", "log10", "silog", "delta1", "delta2", "delta3")


@dataclass(frozen=True)
class Protocol:
    """What is compared: which pixels, and what is done to the prediction before."""

    name: str
    metrics: tuple[str, ...] = METRICS
    clamp: tuple[float, float] | None = (1e-3, 10.0)
    """Metres: predictions are held within, nan and negative to the low end, inf to the high end; None: taken as is."""
    valid: tuple[float, float] = (1e-3, 10.0)
    """Metres: ground truth strictly between these is scored."""
    crop: tuple[int, int, int, int] | None = None
    """Top, bottom, left, right of the scored rectangle, in pixels of a 480x640 map; other sizes in proportion."""


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        # the crop of Eigen et al. as in BTS, AdaBins, NeWCRFs, ZoeDepth: rows 45:471, columns 41:601
        Protocol("eigen", crop=(45, 471, 41, 601)),
        Protocol("full"),
        # as the seed's blog reports: every valid pixel, the prediction as it is; wrong signs and nan count as wrong
        Protocol("blog", metrics=("abs_rel", "delta1"), clamp=None, valid=(0.0, math.inf)),
    )
}


def score(prediction: torch.Tensor, depth: torch.Tensor, protocol: Protocol) -> torch.Tensor:
    """-> float64 (batch, 1 + len(protocol.metrics)): number of valid pixels, then the metrics of each image.

    prediction: (batch, h, w) metres, brought bilinearly to the ground truth's size; depth: (batch, height, width)
    metres, 0 = hole. An image without a valid pixel has count 0 and metrics 0, never nan.
    """
    # compared in the depth's own precision: 1 mm as float32 is a hair above 1e-3 as float64
    valid = (depth > protocol.valid[0]) & (depth < protocol.valid[1])
    prediction, depth = prediction.double(), depth.double()
    if prediction.shape[-2:] != depth.shape[-2:]:
        prediction = F.interpolate(prediction[:, None], depth.shape[-2:], mode="bilinear", align_corners=False)[:, 0]
    if protocol.crop is not None:
        rows, columns = crop_slices(protocol.crop, depth.shape[-2], depth.shape[-1])
        prediction, depth, valid = (x[:, rows, columns] for x in (prediction, depth, valid))
    truth = torch.where(valid, depth, 1.0)
    if protocol.clamp is not None:
        low, high = protocol.clamp
        prediction = torch.nan_to_num(prediction, nan=low, posinf=high, neginf=low).clamp(low, high)
    else:
        # a value that is not finite is no prediction: as wrong as predicting nothing at all
        prediction = torch.where(torch.isfinite(prediction), prediction, 0.0)
    columns_ = _pixel_terms(prediction, truth)
    count = valid.sum((-2, -1)).double()
    # mean over valid pixels; where, not multiplication: 0 * inf is nan
    mean = {name: torch.where(valid, term, 0.0).sum((-2, -1)) / count.clamp(min=1) for name, term in columns_.items()}
    values = _image_metrics(mean)
    return torch.stack([count, *(values[name] for name in protocol.metrics)], dim=1)


def _pixel_terms(p: torch.Tensor, g: torch.Tensor) -> dict[str, torch.Tensor]:
    positive = p > 0
    safe = torch.where(positive, p, 1.0)
    d = safe.log() - g.log()
    ratio = torch.where(positive, torch.maximum(safe / g, g / safe), math.inf)
    error = p - g
    terms = {"abs_rel": error.abs() / g, "sq_rel": error.square() / g, "square": error.square()}
    terms |= {"log": d, "log_square": d.square(), "log10": d.abs() / math.log(10)}
    return terms | {f"delta{k}": (ratio < 1.25**k).double() for k in (1, 2, 3)}


def _image_metrics(mean: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    rooted = {
        "rmse": mean["square"].sqrt(),
        "rmse_log": mean["log_square"].sqrt(),
        # rounding can leave a variance of a constant error a hair below 0
        "silog": 100 * (mean["log_square"] - mean["log"].square()).clamp(min=0).sqrt(),
    }
    return mean | rooted


def crop_slices(crop: tuple[int, int, int, int], height: int, width: int) -> tuple[slice, slice]:
    """The crop, given for 480x640, in proportion to height x width and rounded."""
    top, bottom, left, right = crop
    rows = slice(round(top * height / 480), round(bottom * height / 480))
    return rows, slice(round(left * width / 640), round(right * width / 640))


@dataclass(frozen=True)
class Summary:
    """The score of a split under one protocol."""

    protocol: str
    images: int
    """Images that were scored."""
    unscored: tuple[int, ...]
    """Images without a valid pixel, by their place in the split: counted apart."""
    metrics: dict[str, float]


def summarise(rows: torch.Tensor, protocol: Protocol) -> Summary:
    """`score` rows of all images of a split, float64 (images, 1 + metrics), in the split's order -> their mean."""
    scored = rows[:, 0] > 0
    count = int(scored.sum())
    means = rows[scored, 1:].sum(0) / count if count else torch.full((len(protocol.metrics),), math.nan)
    metrics = dict(zip(protocol.metrics, means.tolist(), strict=True))
    return Summary(protocol.name, count, tuple((~scored).nonzero()[:, 0].tolist()), metrics)
