"""The known ways in which depth numbers go wrong, recognised by the numbers: units, inverse depth, order, collapse,
values that are none, the truth in place of predictions."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from mde_dist.evaluation.metrics import is_finite32, resize_to

GRID = (6, 8)
"""Cells, rows by columns, in which a map is summed up to tell images apart."""
_CELLS = GRID[0] * GRID[1]
N_STATISTICS = 4 + 2 * _CELLS + 2

_COLUMNS = 160  # of the pixels that are looked at, evenly spaced: enough to tell
_SCALE_OFF = 1.35  # a median ratio beyond this (or below its inverse) is no bias of a model that learned metres
_AGREE = 1.25  # images whose ratio is within this factor of the median one agree on it
_LEARNED = 0.15  # correlation, in the median image, below which the image plays no part
_INVERTED = 0.4  # correlation, in the median image, beyond which the order of near and far is clear
_FEWEST = 10  # images below which their order cannot be told
_MOST = 2000  # images whose order is looked at: the distances between all of them are taken
_CHANCE, _CLEAR = 3.0, 5.0  # standard deviations: what chance brings about, what it does not
_FLAT = 0.03  # of depth: below it an image does not differ from the mean of all
_EQUAL = 1e-6  # relative: the truth itself, whether it was kept as counts or as float32 metres

_EIGHT_BIT = 255 / 10_000
_KNOWN_RATIOS = {
    _EIGHT_BIT: "8-bit depth (255 = 10 m) had been read as millimetres where the model was trained or its predictions "
    "were written (255/10000; abs_rel is then near 0.9745 whatever the model)",
    1 / _EIGHT_BIT: "the ground truth were 8-bit depth (255 = 10 m) read as millimetres (10000/255)",
    1e-3: "metres were written where millimetres are read, or millimetres divided by 1000 twice (1/1000)",
    1e3: "millimetres were taken for metres",
    1e2: "centimetres were taken for metres",
    1e-2: "the ground truth were in centimetres and taken for metres",
    0.1: "they were scaled to 0..1 of 10 m, or the ground truth written as metres * 10000 and read as millimetres",
    10.0: "they were written as metres * 10000 and read as millimetres, or the ground truth scaled to 0..1 of 10 m",
}
for _factor in (256, 5000, 6000):  # of 16-bit PNGs in the wild
    _KNOWN_RATIOS |= {
        _factor / 1000: f"they were written as metres * {_factor} and read as millimetres",
        1000 / _factor: f"they were millimetres read as metres * {_factor}, or the ground truth were written as metres "
        f"* {_factor} and read as millimetres",
        float(_factor): f"they were written as metres * {_factor} and taken for metres",
    }
_KNOWN_WITHIN = 1.15  # factor, which leaves room for the bias of a model


def image_statistics(prediction: torch.Tensor, depth: torch.Tensor, per_metre: float = 1) -> torch.Tensor:
    """-> float64 (batch, SIGNALS): what `detect_failures` takes of each image; nan where there is nothing to take.

    prediction (batch, h, w) as the model gave it, depth (batch, height, width), 0 = hole, both in a unit of which a
    metre has `per_metre`. Columns: median of prediction / truth; correlation of prediction and truth over the pixels;
    that of 1 / prediction and truth; mean of the truth, metres; logarithms of the means of prediction and of truth,
    metres, in the cells of GRID; of the pixels with a truth, how many predictions are not finite, and how many are not
    the truth itself.
    """
    prediction, depth = resize_to(prediction, depth) / per_metre, depth.double() / per_metre
    measured = depth > 0
    mean = _masked_mean(depth, measured)
    counts = [
        (measured & ~is_finite32(prediction)).sum((-2, -1)),
        (measured & ~((prediction - depth).abs() <= _EQUAL * depth)).sum((-2, -1)),
    ]
    step = max(1, depth.shape[-1] // _COLUMNS)
    prediction, depth = (x[:, ::step, ::step] for x in (prediction, depth))
    valid = (depth > 0) & torch.isfinite(depth) & is_finite32(prediction)
    target, p = torch.where(valid, depth, 1.0), torch.where(valid, prediction, 1.0)
    ratio = torch.where(valid, p / target, math.nan).flatten(1).nanmedian(dim=1).values
    positive = valid & (p > 0)
    inverse = torch.where(positive, 1 / torch.where(positive, p, 1.0), 0.0)
    cells = [_cells(x, valid).clamp(min=1e-6).log() for x in (p, target)]
    correlations = _correlation(p, target, valid), _correlation(inverse, target, positive)
    columns = [ratio, *correlations, mean]
    return torch.cat([torch.stack(columns, dim=1), *cells, torch.stack(counts, dim=1).double()], dim=1)


def _correlation(a: torch.Tensor, b: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Pearson's, over the valid pixels of each image; nan where one of them is the same everywhere."""
    a, b = (x - _masked_mean(x, valid)[:, None, None] for x in (a, b))
    spread = (_masked_mean(a.square(), valid) * _masked_mean(b.square(), valid)).sqrt()
    return torch.where(spread > 1e-12, _masked_mean(a * b, valid) / spread, math.nan)


def _masked_mean(values: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """(batch, height, width) -> (batch,): mean over the valid pixels, 0 where there is none."""
    # where, not multiplication: 0 * inf is nan
    return torch.where(valid, values, 0.0).sum((-2, -1)) / valid.sum((-2, -1)).double().clamp(min=1)


def _cells(values: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Mean over the valid pixels of each cell of GRID, or of the image where a cell has none -> (batch, cells)."""
    sums = F.adaptive_avg_pool2d(torch.where(valid, values, 0.0)[:, None], GRID).flatten(1)
    shares = F.adaptive_avg_pool2d(valid.double()[:, None], GRID).flatten(1)
    whole = (sums.sum(1) / shares.sum(1))[:, None]
    return torch.where(shares > 0, sums / shares.clamp(min=1e-12), whole)


def mean_depth(rows: torch.Tensor) -> float:
    """Mean of the truth, metres, every image with the same weight, from the `image_statistics` of all images."""
    means = rows[:, 3]
    return float(means[means > 0].mean())


def detect_failures(rows: torch.Tensor, scale_matters: bool = True) -> list[str]:
    """Name the known failures of predictions, from the `image_statistics` of all images; empty where there are none.

    `scale_matters`: off for predictions that are scored up to scale and shift only.
    """
    found = [_copied(rows), _not_finite(rows)]
    rows = rows[rows[:, 0].isfinite() & rows[:, 4:].isfinite().all(1)]
    if len(rows):
        found += _misread(rows, scale_matters)
    return [line for line in found if line]


def _copied(rows: torch.Tensor) -> str:
    count = int(((rows[:, 3] > 0) & (rows[:, -1] == 0)).sum())
    where = "in every image" if count == len(rows) else f"in {count} of {len(rows)} images"
    return f"the predictions are the ground truth itself {where}: it was scored against itself" if count else ""


def _not_finite(rows: torch.Tensor) -> str:
    pixels, images = int(rows[:, -2].sum()), int((rows[:, -2] > 0).sum())
    where = f"in {images} of {len(rows)} images"
    return f"{pixels:,} pixels of the predictions {where} are not finite, and count as wrong" if pixels else ""


def _misread(rows: torch.Tensor, scale_matters: bool) -> list[str]:
    inverted = _inverted(rows)
    if inverted:
        return [inverted]
    if scale_matters and float(rows[:, 0].median()) <= 0:
        return ["predictions are not positive: the median of prediction / truth is 0 or less"]
    return [_scale_off(rows) if scale_matters else "", _shuffled(rows)]


def _scale_off(rows: torch.Tensor) -> str:
    ratios = rows[:, 0]
    ratio = float(ratios.median())
    if abs(math.log(ratio)) < math.log(_SCALE_OFF):
        return ""
    agree = float((ratios.clamp(min=1e-12).log() - math.log(ratio)).abs().le(math.log(_AGREE)).double().mean())
    known = _known(ratio)
    # what has not learned the image has no unit either
    learned = float(rows[:, 1].nanmedian()) > _LEARNED
    what = f"predictions are {ratio:.4g} times the truth in the median image"
    if known and learned and agree >= 0.15:
        return f"{what}, as if {known}"
    if learned and agree >= 0.5:
        return (
            f"{what}, and alike in {agree:.0%} of the images: the scale is off by a constant; multiply them by "
            f"{1 / ratio:.4g}, or mend the scale of whichever is wrong"
        )
    return f"{what}, and not by the same factor in all"


def _known(ratio: float) -> str:
    """Known causes of a ratio of prediction and truth, in words; empty where there is none.

    Where several mistakes come near, those of the predictions are named first: a truth was checked when it was packed.
    """
    off = {known: abs(math.log(ratio / known)) for known in _KNOWN_RATIOS}
    near = sorted((known for known in off if off[known] < math.log(_KNOWN_WITHIN)), key=lambda known: off[known])
    causes = [_KNOWN_RATIOS[known] for known in near]
    causes.sort(key=lambda words: words.startswith("the ground truth"))
    return ", or ".join(causes)


def _inverted(rows: torch.Tensor) -> str:
    direct, inverse = (float(rows[:, column].nanmedian()) for column in (1, 2))
    if not (direct < -_INVERTED and inverse > _INVERTED):
        return ""
    return (
        f"predictions are inverted: what is near is predicted far (correlation with the truth {direct:.2f}, of their "
        f"inverse {inverse:+.2f}); they look like disparity or inverse depth, so write 1 / prediction"
    )


@dataclass(frozen=True)
class _Order:
    """An order in which predictions may have come."""

    target: torch.Tensor
    """int64 (images,): which image prediction i is of."""
    words: str


def _shuffled(rows: torch.Tensor) -> str:
    """Name the order in which predictions fit better than their own; empty where each is nearest to its own ground
    truth."""
    rows = rows[:_MOST]
    count = len(rows)
    if count < _FEWEST:
        return ""
    predicted, target = rows[:, 4 : 4 + _CELLS], rows[:, 4 + _CELLS : 4 + 2 * _CELLS]
    if float((predicted - predicted.mean(0)).abs().mean()) < 0.01:  # 1 % of depth
        return "the predictions are the same for every image"
    shapes = _shapes(predicted) @ _shapes(target).T  # correlations
    predicted = predicted - (predicted.median() - target.median())  # the scale is another matter
    distance = torch.cdist(predicted, target, p=1) / _CELLS
    own = distance.diagonal()
    gains = {order.words: own - distance[torch.arange(count), order.target] for order in _orders(count)}
    words, gain = max(gains.items(), key=lambda item: float(item[1].mean()))
    # images of one scene follow one another, so the next image's truth fits as well, but not better than the own
    if float(gain.mean()) > _CLEAR * float(gain.std()) / math.sqrt(count):
        return f"the predictions are in another order than the images: they fit {words}"
    # a weak model says little about how far an image is, and all the same how it differs from the usual one
    if min(_deviations(distance), _deviations(-shapes)) < -_CHANCE:
        return ""
    if len(distance.argmin(1).unique()) > count / 2:  # what says nothing is nearest to a few images in the middle
        return "the predictions are in another order than the images: they fit other images than their own"
    return (
        "the predictions fit their own images no better than other images: they are in another order, or say nothing "
        "about the image"
    )


def _shapes(cells: torch.Tensor) -> torch.Tensor:
    """Logarithms of depth in the cells of each image (images, cells) -> their differences from the mean over the
    images, without the image's own distance and contrast: rows of mean 0 and length 1, or 0 where nothing is left."""
    differences = cells - cells.mean(0)
    differences = differences - differences.mean(1, keepdim=True)
    length = differences.norm(dim=1, keepdim=True)
    # a mean map differs between images by their holes
    return torch.where(length > _FLAT * math.sqrt(_CELLS), differences / length.clamp(min=1e-12), 0.0)


def _orders(count: int) -> list[_Order]:
    numbers = torch.arange(count)
    shifts = [
        _Order((numbers + by) % count, f"images {by} further on" if by <= count // 2 else f"images {count - by} before")
        for by in range(1, count)
    ]
    lexical = torch.tensor(sorted(range(count), key=str))
    return [
        *shifts,
        _Order(numbers.flip(0), "the images in reverse"),
        _Order(lexical, "the order of names in which 10 comes before 2"),
        _Order(lexical.argsort(), "images listed so that 10 comes before 2, where the predictions are numbered"),
    ]


def _deviations(distance: torch.Tensor) -> float:
    """The mean of the diagonal against that of all permutations, in standard deviations (Hoeffding, 1951)."""
    count = len(distance)
    centred = distance - distance.mean(0) - distance.mean(1, keepdim=True) + distance.mean()
    deviation = math.sqrt(float(centred.square().sum()) / (count - 1)) / count
    return float(distance.diagonal().mean() - distance.mean()) / max(deviation, 1e-12)
