"""Errors by distance and by position in the image, over all pixels of a split, in float64."""

from typing import Any

import torch

from mde_dist.evaluation.metrics import N_COLUMNS, Protocol, image_terms, valid_pairs

EDGES = tuple(range(11))
"""Edges of the bins of distance, metres; the last bin takes everything beyond as well."""
GRID = (12, 16)
"""Cells of the image, rows by columns."""
_BINS, _CELLS = len(EDGES) - 1, GRID[0] * GRID[1]
COLUMNS = N_COLUMNS + 3 * _BINS + 2 * _CELLS


def score_with_breakdown(
    prediction: torch.Tensor, depth: torch.Tensor, protocol: Protocol, per_metre: float = 1
) -> torch.Tensor:
    """-> float64 (batch, COLUMNS): rows of `evaluation.metrics.score`, and beside them sums over the same pixels.

    Per bin of true distance the number of pixels, their |p-g|/g and their p-g in metres; per cell of the image the
    number of pixels and their |p-g|/g. Arguments as of `evaluation.metrics.score`.
    """
    images = valid_pairs(prediction, depth, protocol, per_metre)
    return torch.stack(
        [torch.cat([image_terms(p, g, per_metre), _sums(p, g, mask, per_metre)]) for p, g, mask in images]
    )


def split_breakdown(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """-> rows of `score`, and rows that `summarise_breakdown` takes."""
    return rows[:, :N_COLUMNS], rows[:, N_COLUMNS:]


def _sums(p: torch.Tensor, g: torch.Tensor, mask: torch.Tensor, per_metre: float) -> torch.Tensor:
    error = p - g
    relative, one = error.abs() / g, torch.ones_like(g)
    distance = (g / per_metre).long().clamp(0, _BINS - 1)
    row, column = mask.nonzero(as_tuple=True)
    cell = row * GRID[0] // mask.shape[0] * GRID[1] + column * GRID[1] // mask.shape[1]
    by_distance = [torch.bincount(distance, weights, _BINS) for weights in (one, relative, error / per_metre)]
    by_cell = [torch.bincount(cell, weights, _CELLS) for weights in (one, relative)]
    return torch.cat([*by_distance, *by_cell])


def summarise_breakdown(rows: torch.Tensor) -> dict[str, Any]:
    """The rows of all images, from `split_breakdown` -> plain tables of means over pixels; None where there is none.

    {"distance": {"edges", "pixels", "abs_rel", "bias"}, "position": {"pixels", "abs_rel"}}; bias in metres, positive
    where the prediction is too far; positions in rows of the image.
    """
    pixels, relative, error, *cells = rows.sum(0).split([_BINS] * 3 + [_CELLS] * 2)
    count, beside = (sums.view(GRID) for sums in cells)
    distance = {"edges": list(EDGES), "pixels": pixels.long().tolist()}
    distance |= {"abs_rel": _means(relative, pixels), "bias": _means(error, pixels)}
    position = {"pixels": count.long().tolist(), "abs_rel": [_means(*row) for row in zip(beside, count, strict=True)]}
    return {"distance": distance, "position": position}


def _means(sums: torch.Tensor, counts: torch.Tensor) -> list[float | None]:
    # rounded: a sum on a GPU adds up in any order
    pairs = zip(sums.tolist(), counts.tolist(), strict=True)
    return [float(f"{total / count:.6g}") if count else None for total, count in pairs]
