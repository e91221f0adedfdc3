"""The evaluate command against an independent computation, and its mistakes."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import save

from mde_dist import evaluate
from mde_dist.data.shards import open_split
from mde_dist.evaluation import results as results_module
from mde_dist.inference.predictor import open_predictor
from mde_dist.models.config import ModelConfig
from mde_dist.models.depth_model import create_pretrained_model
from mde_dist.models.weights import serialize_model
from mde_dist.utils.errors import UserError


@pytest.fixture(scope="module")
def checkpoint(room_shards, tmp_path_factory):
    """An untrained model that says it was trained on the rendered rooms at 48x64."""
    config = {
        **{"model.encoder": "resnet18", "data.shards": str(room_shards), "data.eval_shards": None},
        **{"data.train_split": "train", "data.eval_split": "test"},
    }
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    path.write_bytes(
        serialize_model(
            create_pretrained_model(ModelConfig(), seed=3).state_dict(), {"config": config, "size": [48, 64]}
        )
    )
    return path


def results(checkpoint, tmp_path, *arguments):
    target = tmp_path / "result.json"
    evaluate.main(["--checkpoint", str(checkpoint), "--json", str(target), *arguments])
    return json.loads(target.read_text())


def by_hand(shards, predict):
    """abs_rel and delta1 of the full protocol, image by image in float64 NumPy, in millimetres."""
    scores = []
    image, depth = np.empty((*shards.size, 3), np.uint8), np.empty(shards.size, np.uint16)
    for sample in range(len(shards)):
        shards.read_into(sample, image, depth)
        valid = (depth > 1) & (depth < 10_000)
        g, p = depth[valid].astype(np.int64), np.clip(predict(image).astype(np.float64) * 1000, 1, 10_000)[valid]
        scores.append((np.mean(np.abs(p - g) / g), np.mean((4 * p < 5 * g) & (4 * g < 5 * p))))
    return np.mean(scores, axis=0)


def test_the_scores_are_those_of_an_independent_computation(checkpoint, room_shards, tmp_path):
    found = results(checkpoint, tmp_path, "--protocols", "full")["results"]
    with open_split(room_shards, "test") as shards, open_split(room_shards, "train") as train:
        model = by_hand(shards, open_predictor(checkpoint, torch.device("cpu")))
        mean = train.info.depth["mean"]
        constant = by_hand(shards, lambda image: np.full(image.shape[:2], mean))
        mean_map = by_hand(shards, lambda image: train.mean_map() / np.float64(1000))
    for name, expected, tolerance in (
        ("model", model, 1e-5),
        ("training mean everywhere", constant, 1e-12),
        ("mean map of training", mean_map, 1e-12),
    ):
        got = found[name]["full"]
        assert got["images"] == 8
        assert (got["abs_rel"], got["delta1"]) == pytest.approx(expected, rel=tolerance, abs=tolerance), name


def test_results_are_written_before_they_are_printed(checkpoint, tmp_path, monkeypatch):
    def printed(*_):
        assert json.loads((tmp_path / "result.json").read_text()) and (tmp_path / "images.csv").read_text()
        raise UserError("no terminal")

    monkeypatch.setattr(results_module, "show", printed)
    with pytest.raises(UserError, match="no terminal"):
        results(checkpoint, tmp_path, "--csv", str(tmp_path / "images.csv"))


def test_the_batch_size_does_not_show_in_the_printed_digits(checkpoint, tmp_path):
    scores = [
        results(checkpoint, tmp_path, "--protocols", "eigen", "--batch-size", size)["results"]["model"]["eigen"]
        for size in ("1", "3", "8")
    ]
    for name in scores[0]:
        values = [score[name] for score in scores]
        assert f"{values[0]:.5f}" == f"{values[1]:.5f}" == f"{values[2]:.5f}", name


def test_a_checkpoint_far_from_its_shards_is_scored_on_others(checkpoint, room_shards, tmp_path):
    config = {"model.encoder": "resnet18", "data.shards": "/gone", "data.eval_shards": None}
    config |= {"data.train_split": "train", "data.eval_split": "test"}
    path = tmp_path / "model.safetensors"
    path.write_bytes(
        serialize_model(
            create_pretrained_model(ModelConfig(), seed=3).state_dict(), {"config": config, "size": [48, 64]}
        )
    )
    with pytest.raises(UserError, match="/gone holds no shards"):
        results(path, tmp_path)
    moved = results(path, tmp_path, "--shards", str(room_shards))
    assert moved["results"].keys() == {"model", "training mean everywhere", "mean map of training"}
    assert moved["results"] == results(checkpoint, tmp_path)["results"]


def test_a_damaged_image_ends_the_evaluation_with_its_key(checkpoint, room_shards, tmp_path):

    damaged = tmp_path / "shards"
    shutil.copytree(room_shards, damaged)
    tar = damaged / "test-000000.tar"
    data = bytearray(tar.read_bytes())
    data[5000] ^= 1
    tar.write_bytes(data)
    with pytest.raises(UserError, match=r"test-000000\.tar, key room-"):
        results(checkpoint, tmp_path, "--shards", str(damaged))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "name one thing to score"),
        (["--run", "/nowhere"], "no checkpoint"),
        (["--checkpoint", "/nowhere.safetensors"], "no such file"),
        (["--checkpoint", "CHECKPOINT", "--split", "val"], "no split 'val'"),
        (["--checkpoint", "CHECKPOINT", "--protocols", "eigne"], "eigne"),
        (["--checkpoint", "CHECKPOINT", "--batch-size", "0"], "at least 1"),
        (["--checkpoint", "CHECKPOINT", "--threads", str(2**31)], "at most 1024"),
        (["--checkpoint", "CHECKPOINT", "--cache-gb", "inf"], "inf"),
    ],
)
def test_mistakes_are_one_line(checkpoint, arguments, words):
    with pytest.raises(UserError) as error:
        evaluate.main([argument.replace("CHECKPOINT", str(checkpoint)) for argument in arguments])
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_weights_of_another_model_are_refused(checkpoint, tmp_path):
    path = tmp_path / "model.safetensors"
    metadata = (
        '{"config": {"model.encoder": "resnet18", "data.shards": "x", "data.eval_shards": null, '
        '"data.train_split": "train", "data.eval_split": "test"}, "size": [1, 1]}'
    )
    path.write_bytes(save({"w": torch.zeros(1)}, {"mde_dist": metadata}))
    with pytest.raises(UserError, match="do not fit"):
        open_predictor(path, torch.device("cpu"))
