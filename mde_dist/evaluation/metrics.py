"""Per-image depth metrics under named protocols, in float64.

Formulas, over valid pixels with prediction p and ground truth g in metres, d = ln p - ln g (Eigen et al., NIPS 2014):
abs_rel = mean |p-g|/g; sq_rel = mean (p-g)^2/g; rmse = sqrt(mean (p-g)^2); rmse_log = sqrt(mean d^2);
log10 = mean |log10 p - log10 g|; silog = 100 sqrt(mean d^2 - (mean d)^2); delta_k = mean [max(p/g, g/p) < 1.25^k].
The score of a split is the mean over its images, or over all its pixels where the protocol pools them.

Every metric is a function of a few means over pixels (`SUFFICIENT_STATISTICS`), which are kept per image.

Depth comes in any unit, of which a metre has `per_metre`. It is scored in the unit of the stored counts: 1.1 m has no
exact float, so that a ratio of exactly 5/4 would fall to either side of 1.25; 1100 mm has one.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

METRICS = ("abs_rel", "sq_rel", "rmse", "rmse_log", "log10", "silog", "delta1", "delta2", "delta3")
HIGHER_IS_BETTER = ("delta1", "delta2", "delta3")
DEFINITIONS = 2
"""Version of what the metrics mean, in the fingerprint of a result; raised when a number changes for the same input.
1, of mde_dist 0.1: the truth rounded to float32 metres, so that half of the ratios of exactly 5/4 were below 1.25.
2: the truth as it is stored."""
SUFFICIENT_STATISTICS = ("abs_rel", "sq_rel", "square", "log", "log_square", "log10", "delta1", "delta2", "delta3")
"""Means over the valid pixels of an image: |p-g|/g, (p-g)^2/g, (p-g)^2, d, d^2, |log10 p - log10 g|, the deltas."""
N_COLUMNS = 1 + len(SUFFICIENT_STATISTICS)


@dataclass(frozen=True)
class Protocol:
    """Rules of a comparison: the pixels, the treatment of the prediction before, and the mean over pixels and
    images."""

    name: str
    metrics: tuple[str, ...] = METRICS
    align: Literal["none", "scale and shift"] = "none"
    """Fit the prediction to each image's ground truth by least squares before it is held within the clamp."""
    clamp: tuple[float, float] | None = (1e-3, 10.0)
    """Metres: predictions are held within, nan and negative to the low end, inf to the high end; None: taken as is."""
    valid: tuple[float, float] = (1e-3, 10.0)
    """Metres: ground truth strictly between these is scored."""
    crop: tuple[int, int, int, int] | None = None
    """Top, bottom, left, right of the scored rectangle, in pixels of a 480x640 map; other sizes in proportion."""
    mean_over: Literal["images", "pixels"] = "images"
    """Unit of equal weight: every image, or every pixel of all images."""
    resize: str = "bilinear, half-pixel centres"
    """Method by which a prediction is resized to the ground truth."""


EIGEN_CROP = (45, 471, 41, 601)  # of Eigen et al., as in BTS, AdaBins, NeWCRFs, ZoeDepth

PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol("eigen", crop=EIGEN_CROP),
        Protocol("full"),
        # as the seed's blog reports: every valid pixel, the prediction as it is; wrong signs and nan count as wrong
        Protocol("blog", metrics=("abs_rel", "delta1"), clamp=None, valid=(0.0, math.inf)),
        # as Alhashim and Wonka (2018) mean it: errors relative to the truth, where their script divides by the
        # prediction; held within the range that the script holds it in
        Protocol("densedepth", clamp=(0.1, 10.0), valid=(0.0, math.inf), crop=(20, 460, 24, 616), mean_over="pixels"),
        # affine-invariant work (Marigold): never to be mixed with the metric protocols
        Protocol("lsq", align="scale and shift", crop=EIGEN_CROP),
    )
}


def score(prediction: torch.Tensor, depth: torch.Tensor, protocol: Protocol, per_metre: float = 1) -> torch.Tensor:
    """-> float64 (batch, N_COLUMNS): number of valid pixels, then the terms of each image, in metres.

    prediction: (batch, h, w), brought bilinearly to the ground truth's size; depth: (batch, height, width), 0 = hole;
    both in a unit of which a metre has `per_metre`, so that counts come as they are stored (a protocol that aligns the
    prediction takes it in any unit). An image without a valid pixel is a row of 0, never nan.
    """
    images = valid_pairs(prediction, depth, protocol, per_metre)
    return torch.stack([image_terms(p, g, per_metre) for p, g, _ in images])


def valid_pairs(
    prediction: torch.Tensor, depth: torch.Tensor, protocol: Protocol, per_metre: float = 1
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Yield for each image the pairs that the protocol scores: predictions, clamped as the protocol says, and ground
    truth, float64 (pixels,) in the unit of the arguments, which are those of `score`; and the mask of these pixels,
    bool (height, width)."""
    # compared in the depth's own precision: 1 mm as float32 metres is a hair above 1e-3 as float64
    low, high = (metres * per_metre for metres in protocol.valid)
    scored = (depth > low) & (depth < high)
    if protocol.crop is not None:
        rows, columns = crop_slices(protocol.crop, depth.shape[-2], depth.shape[-1])
        inside = torch.zeros_like(scored[0])
        inside[rows, columns] = True
        scored &= inside
    for p, g, mask in zip(resize_to(prediction, depth), depth, scored, strict=True):
        target = g[mask].double()
        yield (clamp_prediction(p[mask], target, protocol, per_metre) if len(target) else target), target, mask


def clamp_prediction(p: torch.Tensor, g: torch.Tensor, protocol: Protocol, per_metre: float) -> torch.Tensor:
    """Predictions (pixels,) as a protocol takes them."""
    if protocol.align == "scale and shift":
        p = align(p, g)
    if protocol.clamp is not None:
        low, high = (metres * per_metre for metres in protocol.clamp)
        return torch.nan_to_num(p, nan=low, posinf=high, neginf=low).clamp(low, high)
    # a value that is not finite is no prediction: as wrong as predicting nothing at all
    return torch.where(is_finite32(p), p, 0.0)


def image_terms(p: torch.Tensor, g: torch.Tensor, per_metre: float = 1) -> torch.Tensor:
    """The row of `score` of one image from what is `valid_pairs` in it."""
    if not len(g):
        return torch.zeros(N_COLUMNS, dtype=torch.float64, device=g.device)
    terms = _pixel_terms(p, g, per_metre)
    return torch.stack([torch.full_like(g[0], len(g)), *(terms[name].mean() for name in SUFFICIENT_STATISTICS)])


def resize_to(prediction: torch.Tensor, depth: torch.Tensor) -> torch.Tensor:
    """A prediction (batch, h, w), in float64 and at the size of `depth` (batch, height, width)."""
    prediction = prediction.double()
    if prediction.shape[-2:] == depth.shape[-2:]:
        return prediction
    return F.interpolate(prediction[:, None], depth.shape[-2:], mode="bilinear", align_corners=False)[:, 0]


def is_finite32(prediction: torch.Tensor) -> torch.Tensor:
    """Finite as float32: what is beyond that has no square either."""
    return torch.isfinite(prediction.float())


def align(p: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    """scale * p + shift with the least squared error to g, both (pixels,), as in Ranftl et al. (2020).

    Pixels without a finite prediction take no part in the fit and stay what they are. A prediction that is the same
    everywhere becomes the mean of the truth.
    """
    finite = is_finite32(p)
    if not finite.any():
        return p
    p_mean, g_mean = p[finite].mean(), g[finite].mean()
    centred = p[finite] - p_mean
    variance = centred.square().mean()
    covariance = (centred * (g[finite] - g_mean)).mean()
    scale = torch.where(variance > 1e-24 * p_mean.square(), covariance / variance, 0.0)
    return torch.where(finite, scale * (p - p_mean) + g_mean, p)


def _pixel_terms(p: torch.Tensor, g: torch.Tensor, per_metre: float) -> dict[str, torch.Tensor]:
    d = (torch.where(p > 0, p, per_metre) / g).log()
    error = p - g
    square, distance = error.square(), error.abs()
    terms = {"abs_rel": distance / g, "sq_rel": square / g / per_metre, "square": square / per_metre**2}
    terms |= {"log": d, "log_square": d.square(), "log10": d.abs() / math.log(10)}
    # 1.25, its square and its cube have a few bits each, so the products of counts are exact; p <= 0 is below neither
    return terms | {f"delta{k}": ((p < 1.25**k * g) & (g < 1.25**k * p)).double() for k in (1, 2, 3)}


def image_metrics(rows: torch.Tensor, protocol: Protocol) -> torch.Tensor:
    """`score` rows (images, 1 + terms) -> (images, len(protocol.metrics)): the metrics of each image."""
    terms = dict(zip(SUFFICIENT_STATISTICS, rows[:, 1:].T, strict=True))
    terms["rmse"] = terms["square"].sqrt()
    terms["rmse_log"] = terms["log_square"].sqrt()
    # rounding can leave a variance of a constant error a hair below 0
    terms["silog"] = 100 * (terms["log_square"] - terms["log"].square()).clamp(min=0).sqrt()
    return torch.stack([terms[name] for name in protocol.metrics], dim=1)


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
    """Images without a valid pixel, by their index in the split: counted apart."""
    metrics: dict[str, float]


def summarise(rows: torch.Tensor, protocol: Protocol) -> Summary:
    """`score` rows of all images of a split, float64 (images, 1 + terms), in the split's order -> their mean."""
    scored = rows[rows[:, 0] > 0]
    if not len(scored):
        means = torch.full((len(protocol.metrics),), math.nan)
    elif protocol.mean_over == "pixels":
        means = image_metrics((scored * scored[:, :1]).sum(0, keepdim=True) / scored[:, 0].sum(), protocol)[0]
    else:
        means = image_metrics(scored, protocol).mean(0)
    metrics = dict(zip(protocol.metrics, means.tolist(), strict=True))
    return Summary(protocol.name, len(scored), tuple((rows[:, 0] == 0).nonzero()[:, 0].tolist()), metrics)
