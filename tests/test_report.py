"""Pictures of a run: they are made, and they show what is in the data."""

import json

import numpy as np
import pytest
from PIL import Image

from mde_dist import report
from mde_dist.errors import UserError
from mde_dist.learning.model import ModelConfig, build
from mde_dist.pictures import Panel, colorize, draw_panels
from mde_dist.run.checkpoint import MODEL, OPTIMIZER, model_bytes, save_checkpoint
from mde_dist.run.scores import show_scores


@pytest.fixture
def run(room_shards, tmp_path):
    """A run directory with an untrained model and a made-up history."""
    config = {
        **{"model.backbone": "resnet18", "data.shards": str(room_shards), "data.eval_shards": None},
        **{"data.train_split": "train", "data.eval_split": "test"},
    }
    weights = model_bytes(build(ModelConfig(), seed=3).state_dict(), {"config": config, "size": [32, 32]})
    save_checkpoint(tmp_path / "checkpoints", {MODEL: weights, OPTIMIZER: b""}, {"step": 1}, 1, None)
    scores = {"evaluation": "eigen", "images": 8}
    records = [{"samples": 0, "baseline": "training mean everywhere", "abs_rel": 0.5, "delta1": 0.3, **scores}]
    for samples, abs_rel in ((10, 0.4), (20, 0.25), (30, 0.3)):
        records.append({"samples": samples, "loss": abs_rel})
        records.append({"samples": samples, "abs_rel": abs_rel, "delta1": 1 - abs_rel, **scores})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return tmp_path


def test_curves_and_panels_are_pictures_with_content(run, capsys):
    report.main(["--run", str(run), "--images", "3"])
    for name in ("curves.png", "panels.png"):
        with Image.open(run / name) as picture:
            pixels = np.asarray(picture.convert("RGB"))
        assert min(pixels.shape[:2]) > 200
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 100
        assert f"made: {run / name}" in capsys.readouterr().out or name == "panels.png"


def test_the_table_shows_the_last_and_the_best_evaluation(run, capsys):
    show_scores(run, report.load_records(run))
    said = capsys.readouterr().out
    assert "model at sample 30" in said and "0.3000" in said
    assert "best, at sample 20" in said and "0.2500" in said
    assert "training mean everywhere" in said and "0.5000" in said


def test_a_run_that_has_not_been_evaluated_yet_is_drawn(run):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text(lines[1] + "\n")
    report.main(["--run", str(run), "--images", "1"])
    assert (run / "curves.png").is_file()


def test_panels_of_a_perfect_prediction_have_no_error_and_holes_are_not_scored(tmp_path):
    truth = np.linspace(1, 4, 48 * 64, dtype=np.float32).reshape(48, 64)
    prediction = truth.copy()
    truth[:10, :10] = 0
    panel = Panel("one", np.zeros((48, 64, 3), np.uint8), truth, prediction)
    draw_panels(tmp_path / "panels.png", [panel], "title")
    assert (tmp_path / "panels.png").stat().st_size > 1000
    assert report.abs_rel(prediction, truth) == 0
    assert report.abs_rel(prediction * 1.1, truth) == pytest.approx(0.1, rel=1e-5)


def test_colours_follow_depth_and_holes_are_grey():
    depth = np.array([[1.0, 2.0, 3.0, 0.0, 9.0, 0.5]])
    colors = colorize(depth, 1.0, 3.0)[0].astype(int)
    assert (colors[3] == 128).all()
    assert (colors[4] == colors[2]).all() and (colors[5] == colors[0]).all()  # beyond the range: its ends
    brightness = colors[:3].sum(-1)
    assert brightness[0] > brightness[1] > brightness[2]  # near is bright


@pytest.mark.parametrize("arguments", [["--run", "/nowhere"], ["--run", "EMPTY"], ["--run", "EMPTY", "--images", "0"]])
def test_mistakes_are_one_line(tmp_path, arguments):
    with pytest.raises(UserError) as error:
        report.main([argument.replace("EMPTY", str(tmp_path)) for argument in arguments])
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())
