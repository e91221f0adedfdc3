"""Known figures on real NYU Depth v2, and known failures named there. Needs MDE_DIST_NYUV2."""

import json
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from trees import write

from mde_dist import evaluate, shard
from mde_dist.data.depth import to_metres
from mde_dist.packing.sources import open_source
from mde_dist.utils.errors import UserError

pytestmark = pytest.mark.skipif(
    "MDE_DIST_NYUV2" not in os.environ, reason="MDE_DIST_NYUV2 does not name a folder with NYU Depth v2"
)


@pytest.fixture(scope="module")
def pairs(nyuv2):
    """(name, float32 metres (480, 640)) of the 202 test pairs."""
    source = open_source(nyuv2 / "bts", "bts")
    split = source.splits["test"]
    return [(pair.key, to_metres(source.read(pair, split.scale).depth)) for pair in split.pairs]


def scored(predictions, target, *arguments):
    evaluate.main(["--predictions", str(predictions), "--json", str(target), *map(str, arguments)])
    return json.loads(target.read_text())


@pytest.mark.slow
@pytest.mark.parametrize(("metres", "abs_rel", "delta1"), [(2.84, 0.479, 0.372), (2.53, 0.414, 0.377)])
def test_one_depth_everywhere(nyuv2, pairs, tmp_path, metres, abs_rel, delta1):
    for name, _ in pairs:
        write(tmp_path / f"p/{name}.png", np.full((24, 32), round(metres * 1000), np.uint16))
    found = scored(tmp_path / "p", tmp_path / "r.json", "--source", nyuv2 / "bts")
    result = found["results"]["model"]["eigen"]
    assert (result["images"], found["unscored"]["eigen"]) == (202, [])
    assert result["abs_rel"] == pytest.approx(abs_rel, abs=6e-4)
    assert result["delta1"] == pytest.approx(delta1, abs=6e-4)
    assert "the predictions are the same for every image" in found["findings"]


def fair(metres, random):
    """What a fair model would say: blurred, and wrong by a factor per image."""
    small = F.avg_pool2d(torch.from_numpy(metres)[None, None], 16)
    return small[0, 0].numpy() * random.lognormal(0, 0.1)


@pytest.mark.slow
def test_a_wrong_scale_is_refused_and_where_it_is_overruled_the_failure_is_named(nyuv2, pairs, tmp_path):
    """40 real test pairs as somebody might keep them: 8-bit, 255 = 10 m, in a plain folder beside true predictions."""
    random = np.random.default_rng(0)
    source = open_source(nyuv2 / "bts", "bts")
    for pair, (name, metres) in list(zip(source.splits["test"].pairs, pairs, strict=True))[::5][:40]:
        write(tmp_path / f"source/test/images/{name}.jpg", (nyuv2 / "bts" / pair.image).read_bytes())
        write(tmp_path / f"source/test/depth/{name}.png", np.floor(metres / 10 * 255).astype(np.uint8))
        (tmp_path / "p").mkdir(exist_ok=True)
        np.save(tmp_path / "p" / f"{name}.npy", fair(metres, random))
    place = ["--source", str(tmp_path / "source")]
    with pytest.raises(UserError, match="8-bit and a plain folder does not say what a step means"):
        shard.main([*place, "--output", str(tmp_path / "shards")])
    assert not (tmp_path / "shards").exists()
    # a wrong unit, insisted on
    shard.main([*place, "--output", str(tmp_path / "shards"), "--depth-scale", "test=0.001"])
    for against in (["--shards", str(tmp_path / "shards")], [*place, "--depth-scale", "test=0.001"]):
        found = scored(tmp_path / "p", tmp_path / "r.json", *against)
        assert "as if the ground truth were 8-bit depth (255 = 10 m) read as millimetres" in found["findings"][0]
        assert "worse than" in found["findings"][1]
    # the right one
    right = scored(tmp_path / "p", tmp_path / "r.json", *place, "--depth-scale", f"test={10 / 255}")
    assert right["findings"] == []
    assert right["results"]["model"]["eigen"]["abs_rel"] < 0.15


@pytest.mark.slow
def test_the_same_pairs_in_two_layouts_score_alike(nyuv2, pairs, tmp_path):
    """The 40 densedepth test pairs are among the bts ones; predictions named as bts names them fit both."""
    random = np.random.default_rng(0)
    (tmp_path / "p").mkdir()
    for name, metres in pairs:
        np.save(tmp_path / "p" / f"{name}.npy", fair(metres, random))
    first = scored(tmp_path / "p", tmp_path / "a.json", "--source", nyuv2 / "densedepth")
    second = scored(tmp_path / "p", tmp_path / "b.json", "--source", nyuv2 / "bts")
    number = {key.split("_")[-1]: place for place, key in enumerate(second["images"]["keys"])}
    terms = [record["images"]["terms"]["eigen"]["abs_rel"] for record in (first, second)]
    assert len(first["images"]["keys"]) == 40
    for key, value in zip(first["images"]["keys"], terms[0], strict=True):
        assert value == pytest.approx(terms[1][number[key.split("-")[1].split("_")[0]]], abs=1e-12), key
    assert first["findings"] == second["findings"] == []
    with pytest.raises(UserError, match="40 images against 202"):
        evaluate.main(["--compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")])
