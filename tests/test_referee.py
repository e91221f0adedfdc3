"""Predictions in files against a data set, as a user scores them: exact, named, and the same however they are read."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image
from test_metrics import by_numpy, formulas, pixels
from trees import bts, folder, jpeg_bytes, packed, picture, write
from warm import warm_run

from mde_dist import evaluate
from mde_dist.data.augmentation import normalise, resize_image
from mde_dist.evaluation.metrics import PROTOCOLS
from mde_dist.models.config import ModelConfig
from mde_dist.models.depth_model import create_pretrained_model
from mde_dist.models.weights import serialize_model
from mde_dist.packing.pack import PackConfig
from mde_dist.utils.errors import UserError

SIZE, COUNT = (480, 640), 3
ALL = ["--protocols", *PROTOCOLS]


def millimetres(number):
    """A slanted wall with a step, 0.6 to 12 m, and 20 % holes."""
    rng = np.random.default_rng(number)
    y, x = np.mgrid[: SIZE[0], : SIZE[1]] / np.array(SIZE)[:, None, None]
    depth = 600 + 3000 * (x + number) * (1.2 - y) + 2500 * (x > 0.3 + number / 5)
    depth[rng.random(SIZE) < 0.2] = 0
    return depth.astype(np.uint16)


def prediction(number):
    rng = np.random.default_rng(100 + number)
    seen = millimetres(number) / 1000
    found = np.where(seen > 0, seen, 3.0) * rng.lognormal(0.05, 0.3, SIZE)
    found[::17, ::13] = rng.choice([np.nan, np.inf, -1.0, 0.0, 40.0], found[::17, ::13].shape)
    return found.astype(np.float32)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder per split with real-sized maps, predictions of the test split, and the splits packed."""
    root = tmp_path_factory.mktemp("referee")
    folder(root / "source/train", 2, size=SIZE)
    for number in range(COUNT):
        write(root / f"source/test/images/{number:04d}.jpg", jpeg_bytes(picture(number, SIZE)))
        write(root / f"source/test/depth/{number:04d}.png", millimetres(number))
        root.joinpath("predictions").mkdir(exist_ok=True)
        np.save(root / f"predictions/{number:04d}.npy", prediction(number))
    packed(root / "source", root / "shards")
    return root


def scored(data, *arguments, target="result.json", predictions="predictions", against="source"):
    path = data / target
    options = ["--predictions", str(data / predictions), f"--{against}", str(data / against), "--json", str(path)]
    evaluate.main([*options, *arguments])
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def result(data):
    return scored(data, *ALL, "--csv", str(data / "images.csv"))


@pytest.mark.parametrize("name", PROTOCOLS)
def test_every_metric_under_every_protocol_is_that_of_numpy(data, result, name):
    truths = [millimetres(number) for number in range(COUNT)]
    found = [prediction(number).astype(np.float64) * 1000 for number in range(COUNT)]
    if name == "densedepth":  # all pixels of all images in one list
        lists = [pixels(p, g, name) for p, g in zip(found, truths, strict=True)]
        expected = formulas(*(np.concatenate(parts) for parts in zip(*lists, strict=True)), name)
    else:
        expected = by_numpy(np.stack(found), np.stack(truths), name)[:, 1:].mean(0)
    got = result["results"]["model"][name]
    assert got["images"] == COUNT
    np.testing.assert_allclose([got[m] for m in PROTOCOLS[name].metrics], expected, rtol=1e-9)


def test_the_table_of_images_is_that_of_numpy(data, result):
    with (data / "images.csv").open() as file:
        rows = list(csv.DictReader(file))
    for number, row in enumerate(rows):
        found = prediction(number).astype(np.float64) * 1000
        count, *metrics = by_numpy(found[None], millimetres(number)[None], "eigen")[0]
        assert row["key"] == f"{number:04d}"
        assert int(row["eigen_pixels"]) == count
        assert float(row["eigen_rmse"]) == pytest.approx(metrics[2], rel=1e-9)
        assert float(row["eigen_delta2"]) == pytest.approx(metrics[7], rel=1e-9)
    assert len(rows) == COUNT


def test_shards_and_source_are_one_ground_truth(data, result):
    """Read from the folder, or packed, or packed otherwise: the same digits and the same fingerprint."""
    packed(data / "source", data / "others", PackConfig(samples_per_shard=1, codec="png"))
    for place in ("shards", "others"):
        other = scored(data, *ALL, "--shards", str(data / place), target="other.json", against="shards")
        assert other["fingerprints"] == result["fingerprints"]
        assert other["results"]["model"] == result["results"]["model"]
        assert set(other["results"]) == {"model", "training mean everywhere", "mean map of training"}
        assert len(other["ground_truth"]["manifest"]) == 64
    assert result["ground_truth"]["manifest"] is None


@pytest.mark.parametrize("batch", ["1", "2", "3", "8"])
def test_batches_do_not_show(data, result, batch):
    assert scored(data, *ALL, "--batch-size", batch, target="batch.json")["results"] == result["results"]


@pytest.mark.distributed
@pytest.mark.parametrize("processes", [2, 3, 4])
def test_ranks_do_not_show(data, result, tmp_path, processes):
    """With more ranks than batches, too: 3 images in batches of 2."""
    options = {"predictions": data / "predictions", "source": data / "source", "json": tmp_path / "r.json"}
    options |= {"csv": tmp_path / "r.csv", "batch-size": 2}
    done = warm_run("evaluate", *ALL, processes=processes, **options)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("protocol eigen") == 1
    assert json.loads((tmp_path / "r.json").read_text()) == result
    assert (tmp_path / "r.csv").read_bytes() == (data / "images.csv").read_bytes()


@pytest.mark.distributed
def test_a_broken_prediction_ends_all_ranks_with_one_line(data, tmp_path):
    target = tmp_path / "predictions"
    target.mkdir()
    for number in range(COUNT):
        np.save(target / f"{number:04d}.npy", prediction(number)[: 40 if number == 2 else None])
    options = {"predictions": target, "source": data / "source", "json": tmp_path / "r.json", "batch-size": 1}
    done = warm_run("evaluate", processes=3, **options)
    assert done.returncode != 0
    assert done.stderr.count("error") == 1
    assert "0002.npy is 40x640, its image 480x640: not the same view" in done.stderr
    assert not (tmp_path / "r.json").exists()


# --- ties ---


@pytest.mark.parametrize("kind", ["16-bit PNG", "PNG in fifths of a millimetre", "shards"])
def test_ratios_of_exactly_five_quarters_are_not_below_it(tmp_path, kind):
    """Every pixel is 5/4 or 4/5 of the truth, in whole millimetres, but for some that miss it by one."""
    rng = np.random.default_rng(0)
    truth = 20 * rng.integers(40, 360, SIZE)
    found = np.where(rng.random(SIZE) < 0.5, truth * 5 // 4, truth * 4 // 5)
    near = rng.random(SIZE) < 0.1
    found[near] += rng.choice([-1, 1], SIZE)[near]
    write(tmp_path / "source/test/images/a.jpg", jpeg_bytes(picture(0, SIZE)))
    write(tmp_path / "source/test/depth/a.png", truth.astype(np.uint16))
    (tmp_path / "predictions").mkdir()
    options = []
    if kind == "PNG in fifths of a millimetre":
        write(tmp_path / "predictions/a.png", (np.minimum(found, 13_000) * 5).astype(np.uint16))
        options = ["--prediction-scale", "0.0002"]
    else:
        write(tmp_path / "predictions/a.png", found.astype(np.uint16))
    if kind == "shards":
        packed(tmp_path / "source", tmp_path / "shards")
    against = "shards" if kind == "shards" else "source"
    results = scored(tmp_path, "--protocols", "eigen", "full", *options, against=against)["results"]["model"]
    below = (4 * found < 5 * truth) & (4 * truth < 5 * found)
    assert 0.04 < below.mean() < 0.06  # half of the near ones
    assert results["full"]["delta1"] == pytest.approx(below.mean(), abs=1e-12)
    assert results["eigen"]["delta1"] == pytest.approx(below[45:471, 41:601].mean(), abs=1e-12)


# --- images without a valid pixel ---


@pytest.mark.parametrize("place", ["source", "shards"])
def test_an_image_without_valid_pixels_is_counted_apart_and_named(tmp_path, place, capsys):
    """One has none at all (a source may hold such), one has none in the crop and below 10 m."""
    root = folder(tmp_path / "source/test", 6)
    if place == "source":
        write(root / "depth/0002.png", np.zeros((24, 32), np.uint16))
    write(root / "depth/0004.png", np.full((24, 32), 11_000, np.uint16))
    packed_too = tmp_path / "shards"
    if place == "shards":
        packed(tmp_path / "source", packed_too)
    (tmp_path / "predictions").mkdir()
    for number in range(6):
        np.save(tmp_path / f"predictions/{number:04d}.npy", np.full((24, 32), 2.0))
    found = scored(tmp_path, "--protocols", "eigen", "blog", against=place)
    empty = {"0002"} if place == "source" else set()
    assert set(found["unscored"]["eigen"]) == empty | {"0004"}
    assert set(found["unscored"]["blog"]) == empty
    assert found["fingerprints"]["eigen"]["images"] == 6 - len(empty | {"0004"})
    assert "images without a valid pixel were not scored: " in capsys.readouterr().out
    assert all(np.isfinite(value) for value in found["results"]["model"]["eigen"].values())


# --- known failures are named ---


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """12 images of different walls, and what a fair model predicts of them."""
    root = bts(tmp_path_factory.mktemp("many") / "source", train=0, test=12)
    pairs = sorted((root / "official_splits/test").rglob("*.png"), key=lambda path: path.name)
    rng = np.random.default_rng(0)
    fair = {}
    for number, path in enumerate(pairs):
        y, x = np.mgrid[:24, :32] / 32
        wall = 1 + 3 * rng.random() + rng.uniform(-1, 2) * x + rng.uniform(0, 2) * (0.8 - y)
        write(path, np.rint(1000 * wall).astype(np.uint16))
        fair[f"{path.parent.name}_{path.stem}"] = wall * rng.lognormal(0, 0.08)
        assert f"{number:05d}" in path.name
    return root.parent, fair


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda p: p, []),
        (lambda p: p * 255 / 10_000, ["8-bit depth (255 = 10 m) had been read as millimetres", "worse than mean of"]),
        (lambda p: p / 1000, ["1/1000", "worse than mean of"]),
        (lambda p: p * 1.9, ["off by a constant; multiply them by 0.5", "worse than mean of"]),
        (lambda p: 1 / p, ["inverted", "worse than mean of"]),
        (lambda p: 0 * p + 3.3, ["the same for every image"]),
    ],
)
def test_the_failure_is_named(many, tmp_path, capsys, change, words):
    root, fair = many
    for name, metres in fair.items():
        write(tmp_path / f"p/{name}.png", np.rint(np.clip(change(metres), 0, 65) * 1000).astype(np.uint16))
        if words and "1/1000" in words[0]:
            np.save(tmp_path / f"p/{name}.npy", change(metres))  # 2 mm steps would be most of it
    found = scored(root, "--predictions", str(tmp_path / "p"))["findings"]
    assert len(found) == len(words)
    for line, expected in zip(found, words, strict=True):
        assert expected in line
        assert f"warning: {line}" in capsys.readouterr().out or len(found) > 1


def test_predictions_in_another_order_are_noticed(many, tmp_path):
    root, fair = many
    for number, metres in enumerate(fair.values()):
        write(tmp_path / f"p/{(number + 1) % 12}.png", np.rint(metres * 1000).astype(np.uint16))
    found = scored(root, "--predictions", str(tmp_path / "p"), "--match", "order")["findings"]
    assert "another order than the images" in found[0]


# --- a model ---


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    config = {"model.encoder": "resnet18"}
    path.write_bytes(
        serialize_model(
            create_pretrained_model(ModelConfig(), seed=3).state_dict(), {"config": config, "size": [96, 128]}
        )
    )
    return path


def test_a_model_is_scored_against_a_source_that_was_never_packed(data, checkpoint):
    options = ["--checkpoint", str(checkpoint), "--protocols", "eigen", "lsq", "--json", str(data / "model.json")]
    evaluate.main([*options, "--source", str(data / "source")])
    source = json.loads((data / "model.json").read_text())
    evaluate.main([*options, "--shards", str(data / "shards")])
    shards = json.loads((data / "model.json").read_text())
    assert source["results"]["model"] == shards["results"]["model"]
    assert source["predictor"] == {"path": str(checkpoint), "size": [96, 128], "flip": False, "precision": "no"}
    with pytest.raises(UserError, match="does not say what it was trained on"):
        evaluate.main(options)


def test_flip_averages_the_two_views(data, checkpoint):
    """Against the mean of the predictions for the images and for mirrored images, made one by one."""
    model = create_pretrained_model(ModelConfig(), seed=3).eval()
    target = data / "flipped"
    target.mkdir(exist_ok=True)
    for number in range(COUNT):
        image = np.asarray(Image.open(data / f"source/test/images/{number:04d}.jpg").convert("RGB"))
        views = []
        for view in (image, image[:, ::-1]):
            pixels_seen = torch.from_numpy(view.copy()).permute(2, 0, 1)[None].float() / 255
            seen = normalise(resize_image(pixels_seen, (96, 128)))
            with torch.inference_mode():
                views.append(model(seen)[0].double().numpy())
        np.save(target / f"{number:04d}.npy", (views[0] + views[1][:, ::-1]) / 2)
    by_hand = scored(data, predictions="flipped", target="f.json")["results"]["model"]["eigen"]
    options = ["--checkpoint", str(checkpoint), "--source", str(data / "source"), "--json", str(data / "m.json")]
    evaluate.main([*options, "--flip"])
    flipped = json.loads((data / "m.json").read_text())
    assert flipped["predictor"]["flip"] is True
    for name, value in flipped["results"]["model"]["eigen"].items():
        assert value == pytest.approx(by_hand[name], rel=2e-4), name
    evaluate.main(options)
    plain = json.loads((data / "m.json").read_text())["results"]["model"]["eigen"]
    assert abs(plain["silog"] - by_hand["silog"]) > 1e-3


# --- mistakes ---


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--predictions", "P"], "--shards DIR or --source DIR"),
        (["--predictions", "P", "--source", "S", "--checkpoint", "x"], "name one thing to score"),
        (["--predictions", "P", "--source", "S", "--shards", "x"], "name one ground truth"),
        (["--predictions", "P", "--source", "S", "--flip"], "--flip and --size are for a model"),
        (["--predictions", "P", "--source", "S", "--split", "val"], "no split 'val'; it has test, train"),
        (["--predictions", "P", "--source", "S", "--split", "train"], "2 images"),
        (["--predictions", "P", "--source", "S", "--prediction-scale", "0"], "metres per stored unit"),
        (["--predictions", "P", "--source", "S", "--protocols", "eigen", "eigen"], "each protocol once"),
        (["--predictions", "P", "--source", "S", "--json", "/nowhere/x.json"], "/nowhere is no folder"),
        (["--predictions", "/nowhere", "--source", "S"], "no such folder"),
        (["--predictions", "P", "--source", "/nowhere"], "/nowhere"),
        (["--predictions", "P", "--source", "S", "--depth-scale", "test=-1"], "expected SPLIT=METRES"),
    ],
)
def test_mistakes_are_one_line(data, arguments, words):
    places = {"P": str(data / "predictions"), "S": str(data / "source")}
    if "2 images" in words:
        arguments = [*arguments, "--match", "order"]
    with pytest.raises(UserError) as error:
        evaluate.main([places.get(argument, argument) for argument in arguments])
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_images_of_different_sizes_are_refused_with_what_to_do(tmp_path):
    root = folder(tmp_path / "source/test", 3)
    write(root / "images/0001.jpg", jpeg_bytes(picture(1, (48, 64))))
    write(root / "depth/0001.png", np.full((48, 64), 2000, np.uint16))
    (tmp_path / "predictions").mkdir()
    for number in range(3):
        np.save(tmp_path / f"predictions/{number:04d}.npy", np.full((24, 32), 2.0))
    with pytest.raises(UserError, match=r"0001\.jpg, key 0001: is 48x64, but the others are 24x32; pack the split"):
        scored(tmp_path)
