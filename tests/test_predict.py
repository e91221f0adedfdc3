"""Images in, depth maps and pictures out."""

import numpy as np
import pytest
import torch
from PIL import Image

from mde_dist import predict
from mde_dist.data.rooms import render_room
from mde_dist.errors import UserError
from mde_dist.learning.model import ModelConfig, build
from mde_dist.run.checkpoint import model_bytes


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """model.safetensors alone, in a folder of its own: predict needs nothing else."""
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    config = {"model.backbone": "resnet18"}
    path.write_bytes(model_bytes(build(ModelConfig(), seed=3).state_dict(), {"config": config, "size": [48, 64]}))
    return path


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    (folder / "inner").mkdir(parents=True)
    for name, size in (("a.jpg", (60, 80)), ("b.png", (97, 61)), ("inner/a.jpg", (240, 320))):
        Image.fromarray(render_room(1, size)[0]).save(folder / name)
    Image.fromarray(np.full((50, 70), 90, np.uint8)).save(folder / "grey.png")
    return folder


def test_a_folder_gives_a_map_and_a_picture_per_image_at_its_size(checkpoint, images, tmp_path):
    output = tmp_path / "depth"
    predict.main([str(images), "--checkpoint", str(checkpoint), "--output", str(output)])
    made = {path.relative_to(output).as_posix() for path in output.rglob("*") if path.is_file()}
    names = ("a", "b", "grey", "inner/a")
    assert made == {f"{name}_{kind}.png" for name in names for kind in ("depth", "color")}
    with Image.open(output / "b_depth.png") as depth, Image.open(output / "b_color.png") as color:
        assert depth.mode.startswith("I;16")
        assert depth.size == color.size == (61, 97)
        assert color.mode == "RGB"


def test_the_png_is_the_prediction_in_millimetres(checkpoint, images, tmp_path):
    predict.main([str(images / "b.png"), "--checkpoint", str(checkpoint), "--output", str(tmp_path)])
    predictor = predict.open_predictor(checkpoint, torch.device("cpu"))
    metres = predictor(np.asarray(Image.open(images / "b.png")))
    stored = np.asarray(Image.open(tmp_path / "b_depth.png"))
    assert stored.dtype == np.uint16
    assert np.abs(stored / 1000 - metres).max() <= 0.0005001
    assert 0.1 < metres.min() < metres.max() < 60


def test_an_image_of_training_size_is_seen_as_it_is(checkpoint):
    image = render_room(5, (48, 64))[0]
    predictor = predict.open_predictor(checkpoint, torch.device("cpu"))
    model = build(ModelConfig(), seed=3).eval()
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.inference_mode():
        expected = model((pixels - mean.view(3, 1, 1)) / std.view(3, 1, 1))[0].numpy()
    assert np.allclose(predictor(image), expected, atol=1e-5)


def test_an_unreadable_image_is_named_and_the_others_are_done(checkpoint, images, tmp_path, capsys):
    (images / "a.jpg").write_bytes((images / "a.jpg").read_bytes()[:500])
    (images / "notes.png").write_text("not a picture")
    output = tmp_path / "depth"
    with pytest.raises(UserError, match="2 of 5 images could not be read"):
        predict.main([str(images), "--checkpoint", str(checkpoint), "--output", str(output)])
    said = capsys.readouterr().out
    assert str(images / "a.jpg") in said
    assert str(images / "notes.png") in said
    assert len(list(output.rglob("*_depth.png"))) == 3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["/nowhere.jpg"], "/nowhere.jpg"),
        (["IMAGES/a.jpg", "IMAGES/inner/a.jpg"], "both be written as a"),
        (["EMPTY"], "no image"),
        (["IMAGES", "--device", "cuda:7"], "cuda:7"),
        (["IMAGES", "--device", "toaster"], "toaster"),
    ],
)
def test_mistakes_are_one_line_and_nothing_is_written(checkpoint, images, tmp_path, arguments, words):
    (tmp_path / "empty").mkdir()
    given = [a.replace("IMAGES", str(images)).replace("EMPTY", str(tmp_path / "empty")) for a in arguments]
    with pytest.raises(UserError) as error:
        predict.main([*given, "--checkpoint", str(checkpoint), "--output", str(tmp_path / "depth")])
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "depth").exists()
