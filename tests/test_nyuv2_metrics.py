"""Known figures on real NYU Depth v2: what predicting one depth everywhere scores. Needs MDE_DIST_NYUV2."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from mde_dist.data.depth import to_metres
from mde_dist.data.sources import open_source
from mde_dist.learning.metrics import PROTOCOLS, score, summarise

ROOT = os.environ.get("MDE_DIST_NYUV2")
pytestmark = pytest.mark.skipif(not ROOT, reason="MDE_DIST_NYUV2 does not name a folder with NYU Depth v2")


@pytest.fixture(scope="module")
def truth():
    """float32 metres (202, 480, 640)."""
    source = open_source(Path(ROOT) / "bts", "bts")
    split = source.splits["test"]
    return torch.from_numpy(np.stack([to_metres(source.read(pair, split.scale).depth) for pair in split.pairs]))


@pytest.mark.parametrize(("metres", "abs_rel", "delta1"), [(2.84, 0.479, 0.372), (2.53, 0.414, 0.377)])
def test_one_depth_everywhere(truth, metres, abs_rel, delta1):
    eigen = PROTOCOLS["eigen"]
    rows = [score(torch.full_like(image, metres), image, eigen) for image in truth.split(1)]
    summary = summarise(torch.cat(rows), eigen)
    assert (summary.images, summary.unscored) == (202, ())
    assert summary.metrics["abs_rel"] == pytest.approx(abs_rel, abs=6e-4)
    assert summary.metrics["delta1"] == pytest.approx(delta1, abs=6e-4)
