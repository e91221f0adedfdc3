"""Where the errors are, against float64 NumPy."""

import numpy as np
import pytest
import torch

from mde_dist.evaluation.breakdown import EDGES, GRID, score_with_breakdown, split_breakdown, summarise_breakdown
from mde_dist.evaluation.metrics import PROTOCOLS, Protocol, crop_slices, image_metrics, score, summarise


def maps(height: int, width: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """(prediction, truth) of three images; truths of 0..12 m with holes, the last one without a pixel to score."""
    draw = np.random.default_rng(seed)
    truth = (draw.uniform(0.5, 12, (3, height, width)) * (draw.random((3, height, width)) > 0.3)).astype(np.float32)
    truth[2] = 0
    return torch.from_numpy(draw.uniform(0.2, 11, truth.shape).astype(np.float32)), torch.from_numpy(truth)


def sums(prediction: torch.Tensor, truth: torch.Tensor, protocol: Protocol) -> torch.Tensor:
    """The sums of a breakdown, whose other half is the score to the last bit."""
    rows, found = split_breakdown(score_with_breakdown(prediction, truth, protocol))
    assert rows.equal(score(prediction, truth, protocol))
    return found


@pytest.mark.parametrize("name", ["eigen", "full", "blog"])
def test_bins_and_cells_are_means_over_the_pixels_that_the_protocol_scores(name):
    protocol = PROTOCOLS[name]
    prediction, truth = maps(50, 70)
    found = summarise_breakdown(sums(prediction, truth, protocol))
    p, g = prediction.double().numpy(), truth.double().numpy()
    scored = (truth.numpy() > protocol.valid[0]) & (truth.numpy() < protocol.valid[1])
    if protocol.crop:
        inside = np.zeros((50, 70), bool)
        inside[crop_slices(protocol.crop, 50, 70)] = True
        scored &= inside
    if protocol.clamp:
        p = p.clip(*protocol.clamp)
    for place, low in enumerate(EDGES[:-1]):
        last = place == len(EDGES) - 2
        chosen = scored & (g >= low) & ((g < low + 1) | last)
        assert found["distance"]["pixels"][place] == chosen.sum()
        if chosen.any():
            e = p[chosen] - g[chosen]
            assert found["distance"]["abs_rel"][place] == pytest.approx(np.mean(abs(e) / g[chosen]), rel=1e-5)
            assert found["distance"]["bias"][place] == pytest.approx(np.mean(e), rel=1e-5, abs=1e-6)
        else:
            assert found["distance"]["abs_rel"][place] is found["distance"]["bias"][place] is None
    rows, columns = np.indices((50, 70))
    for row in range(GRID[0]):
        for column in range(GRID[1]):
            cell = (rows * GRID[0] // 50 == row) & (columns * GRID[1] // 70 == column)
            chosen = scored & cell
            assert found["position"]["pixels"][row][column] == chosen.sum()
            value = found["position"]["abs_rel"][row][column]
            if chosen.any():
                assert value == pytest.approx(np.mean(abs(p - g)[chosen] / g[chosen]), rel=1e-5)
            else:
                assert value is None


def test_the_bins_of_one_image_add_up_to_its_score():
    protocol = PROTOCOLS["eigen"]
    prediction, truth = (x[:1] for x in maps(48, 64, seed=1))
    found = summarise_breakdown(sums(prediction, truth, protocol))["distance"]
    weights = np.array(found["pixels"], float)
    values = np.array([x or 0.0 for x in found["abs_rel"]])
    expected = image_metrics(score(prediction, truth, protocol), protocol)[0, 0].item()
    assert (weights * values).sum() / weights.sum() == pytest.approx(expected, rel=1e-5)


def test_an_image_without_a_pixel_adds_nothing():
    prediction, truth = maps(48, 64)
    rows = sums(prediction, truth, PROTOCOLS["full"])
    assert (rows[2] == 0).all()
    assert (rows[:2].sum(1) != 0).all()
    assert summarise(score(prediction, truth, PROTOCOLS["full"]), PROTOCOLS["full"]).unscored == (2,)
