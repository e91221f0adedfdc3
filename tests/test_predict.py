"""Images in, depth maps, pictures and point clouds out: the command."""

import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import files_below, wait_for
from PIL import Image
from test_point_cloud import read_ply
from warm import warm_start

from mde_dist import evaluate, predict
from mde_dist.inference import pipeline
from mde_dist.inference.inputs import Frame
from mde_dist.inference.predictor import open_predictor
from mde_dist.inference.prefetch import threads
from mde_dist.inference.preview import round_numbers, side_by_side
from mde_dist.models.config import ModelConfig
from mde_dist.models.depth_model import DepthModel, create_pretrained_model
from mde_dist.models.weights import serialize_model
from mde_dist.packing.rooms import render_room
from mde_dist.utils.errors import UserError

LATIN = os.fsdecode(b"caf\xe9")  # on the disk it is no UTF-8


def save_model(folder, size):
    """An untrained model that says depths of one to some metres, alone in a folder: predict needs nothing else."""
    tensors = create_pretrained_model(ModelConfig(), seed=3).state_dict()
    tensors["head.bias"] += 2.5
    path = folder / "model.safetensors"
    path.write_bytes(serialize_model(tensors, {"config": {"model.encoder": "resnet18"}, "size": list(size)}))
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"), (48, 64))


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    (folder / "inner").mkdir(parents=True)
    for name, size in (("a.jpg", (60, 80)), ("b.png", (97, 61)), ("inner/a.jpg", (240, 320))):
        Image.fromarray(render_room(1, size)[0]).save(folder / name)
    Image.fromarray(np.full((50, 70), 90, np.uint8)).save(folder / "grey.png")
    return folder


def run(images, checkpoint, output, *arguments):
    predict.main([str(images), "--checkpoint", str(checkpoint), "--output", str(output), *arguments])


def test_a_folder_gives_a_map_and_a_picture_per_image(checkpoint, images, tmp_path, capsys):
    output = tmp_path / "depth"
    for name in ("客厅", LATIN):
        shutil.copy(images / "a.jpg", images / f"{name}.jpg")
    run(images, checkpoint.parent, output)
    names = ("a", "b", "grey", "inner/a", "客厅", LATIN)
    assert files_below(output) == {f"{name}_{kind}.png" for name in names for kind in ("depth", "color")}
    with Image.open(output / "b_depth.png") as depth, Image.open(output / "b_color.png") as color:
        assert depth.mode.startswith("I;16")
        assert depth.size == (61, 97)
        assert color.mode == "RGB"
    said = capsys.readouterr().out
    assert f"made: 6 depth maps in {output} (" in said
    assert f"next: python -m mde_dist.evaluate --predictions {output} --source DATA" in said


def test_all_kinds_are_the_same_prediction_at_the_size_of_the_image(checkpoint, images, tmp_path, capsys):
    run(images / "b.png", checkpoint, tmp_path, "--npy", "--ply", "--no-pictures")
    assert {name for name in files_below(tmp_path) if "b_" in name} == {"b_depth.png", "b_depth.npy", "b_points.ply"}
    image = np.asarray(Image.open(images / "b.png"))
    metres = open_predictor(checkpoint, torch.device("cpu"))(image)
    assert 0.5 < metres.min() < metres.max() < 10
    stored = np.asarray(Image.open(tmp_path / "b_depth.png"))
    assert stored.dtype == np.uint16
    assert np.abs(stored / 1000 - metres).max() <= 0.0005001
    array = np.load(tmp_path / "b_depth.npy")
    assert array.dtype == np.float32
    np.testing.assert_allclose(array, metres, rtol=1e-6)
    points = read_ply((tmp_path / "b_points.ply").read_bytes())
    np.testing.assert_array_equal(points["z"].reshape(97, 61), array)
    assert (np.stack([points[c] for c in ("red", "green", "blue")], 1).reshape(97, 61, 3) == image).all()
    assert "the camera taken is a typical one" in capsys.readouterr().out


def test_given_intrinsics_are_used_and_said_to_hold_for_one_size(checkpoint, images, tmp_path, capsys):
    run(images, checkpoint, tmp_path / "out", "--ply", "--npy", "--intrinsics", "50", "40", "30.5", "20")
    points = read_ply((tmp_path / "out/a_points.ply").read_bytes()).reshape(60, 80)
    depth = np.load(tmp_path / "out/a_depth.npy")
    np.testing.assert_allclose(points["x"][7, 50], (50 - 30.5) / 50 * depth[7, 50], rtol=1e-6)
    np.testing.assert_allclose(points["y"][7, 50], (7 - 20) / 40 * depth[7, 50], rtol=1e-6)
    said = capsys.readouterr().out
    assert (
        "(fx 50, fy 40, cx 30.5, cy 20), for images of 50x70 and 60x80 and 97x61 and 240x320: it can hold for o" in said
    )


def test_the_picture_shows_image_and_depth_on_one_scale_for_all(checkpoint, images, tmp_path):
    run(images, checkpoint, tmp_path / "own")
    run(images, checkpoint, tmp_path / "same", "--range", "1", "4")
    own, same = (np.asarray(Image.open(tmp_path / kind / "inner/a_color.png")) for kind in ("own", "same"))
    image = np.asarray(Image.open(images / "inner/a.jpg"))
    np.testing.assert_array_equal(own[:, :320], image)
    np.testing.assert_array_equal(same[:, :320], image)
    depth = np.asarray(Image.open(tmp_path / "same/inner/a_depth.png")) / np.float32(1000)
    assert own.shape == same.shape == side_by_side(image, depth).shape
    expected = side_by_side(image, depth, (1, 4)).astype(int)
    assert (np.abs(same - expected) <= 3).mean() > 0.99  # of float32 there, of millimetres here
    assert (np.abs(own[:, 328:648] - expected[:, 328:648]) > 10).mean() > 0.5


def test_a_picture_has_a_bar_from_near_to_far():
    depth = np.linspace(1, 5, 320, dtype=np.float32)[None].repeat(240, axis=0)
    picture = side_by_side(np.zeros((240, 320, 3), np.uint8), depth, (1, 5)).astype(int)
    bar = picture[:, 320 + 8 + 320 + 8 + 4]
    inside = bar[bar.sum(1) < 3 * 255]
    across = picture[120, 328:648]
    assert 200 < len(inside) < 240
    assert np.abs(inside[-1] - across[0]).max() < 12  # near is at the bottom of the bar, and left in this map
    assert np.abs(inside[0] - across[-1]).max() < 12
    assert np.abs(inside[len(inside) // 2] - across[160]).max() < 12


@pytest.mark.parametrize(
    ("low", "high", "most", "expected"),
    [
        (0.9, 5.2, 6, [1, 2, 3, 4, 5]),
        (0.38, 0.87, 6, [0.4, 0.5, 0.6, 0.7, 0.8]),
        (1.5, 9.5, 3, [5]),
        (2, 2, 5, [2, 2]),
    ],
    ids=["metres", "near", "two", "flat"],
)
def test_the_bar_has_round_numbers(low, high, most, expected):
    found = round_numbers(low, high, most)
    assert found == (expected if len(expected) > 1 else [low, high])


def test_an_image_of_training_size_is_seen_as_it_is(checkpoint):
    image = render_room(5, (48, 64))[0]
    predictor = open_predictor(checkpoint, torch.device("cpu"))
    model = create_pretrained_model(ModelConfig(), seed=3).eval()
    model.head.bias.data += 2.5
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.inference_mode():
        expected = model((pixels - mean.view(3, 1, 1)) / std.view(3, 1, 1))[0].numpy()
    assert np.allclose(predictor(image), expected, atol=1e-5)


def test_neither_batches_nor_full_memory_show_in_the_maps(checkpoint, images, tmp_path, monkeypatch, capsys):
    for number in range(5):
        Image.fromarray(render_room(number, (60, 80))[0]).save(images / f"more{number}.png")
    run(images, checkpoint, tmp_path / "one", "--batch-size", "1")
    run(images, checkpoint, tmp_path / "many", "--batch-size", "6")
    assert "too little memory" not in capsys.readouterr().out
    forward = DepthModel.forward

    def crowded(model, image):
        if len(image) > 2:
            raise torch.OutOfMemoryError("out of memory")
        return forward(model, image)

    monkeypatch.setattr(DepthModel, "forward", crowded)
    run(images, checkpoint, tmp_path / "crowded", "--batch-size", "6")
    assert "cpu: too little memory for 6 images at once; on with 1" in capsys.readouterr().out
    assert len(files_below(tmp_path / "one")) == 18
    for kind in ("many", "crowded"):
        assert files_below(tmp_path / kind) == files_below(tmp_path / "one")
        for name in files_below(tmp_path / "one"):
            stored = [np.asarray(Image.open(tmp_path / one / name)).astype(int) for one in ("one", kind)]
            assert np.abs(stored[0] - stored[1]).max() <= (1 if "_depth" in name else 3), name


def test_of_many_sizes_few_images_wait_for_others_of_theirs(checkpoint):
    predictor = open_predictor(checkpoint, torch.device("cpu"))
    predictor.batch_size, pulled, given = 2, [], []
    widths = [40, *range(40, 120, 4), 60, 60, 40, 120]

    def frames():
        for number, width in enumerate(widths):
            pulled.append(number)
            yield Frame(Path(str(number)), np.zeros((60, width, 3), np.uint8))

    for batch in pipeline.batches(predictor, frames()):
        assert len({predictor.input_size(*frame.image.shape[:2]) for frame in batch}) == 1
        assert len(pulled) - len(given) <= 6
        given += [int(str(frame.name)) for frame in batch]
    assert given[:2] == [0, 1]  # of one size
    assert sorted(given) == list(range(len(widths)))


def test_with_flip_a_mirrored_image_has_the_mirrored_map(checkpoint, images, tmp_path):
    image = np.asarray(Image.open(images / "b.png"))
    Image.fromarray(image[:, ::-1]).save(images / "mirrored.png")
    run(images, checkpoint, tmp_path / "flip", "--flip", "--npy", "--no-pictures")
    run(images, checkpoint, tmp_path / "plain", "--npy", "--no-pictures")
    for kind, least, most in (("flip", 0, 1e-4), ("plain", 1e-2, 10)):
        here, there = (np.load(tmp_path / kind / f"{name}_depth.npy") for name in ("b", "mirrored"))
        assert least <= np.abs(here - there[:, ::-1]).max() <= most


def test_unreadable_images_are_named_and_the_others_are_done(checkpoint, images, tmp_path, capsys):
    whole = (images / "a.jpg").read_bytes()
    (images / "stray.jpg").write_bytes(whole[:-2] + bytes(range(1, 13)) + whole[-2:])
    (images / "a.jpg").write_bytes(whole[:500])
    (images / "notes.png").write_text("not a picture")
    for name in ("gone.jpg", "moved", ".moved"):
        (images / name).symlink_to("/nowhere/at/all")
    (images / "README").symlink_to("/x/.git/annex/objects/MD5-s9--0")  # stands for a file, and for no image
    output = tmp_path / "depth"
    with pytest.raises(UserError, match="4 of 8 images could not be read"):
        run(images, checkpoint, output)
    said = capsys.readouterr().out
    assert f"skipped {images / 'a.jpg'} is not a readable image (" in said
    assert f"skipped {images / 'notes.png'} is not a readable image (of no known format" in said
    for name in ("gone.jpg", "moved"):
        assert f"skipped {images / name} cannot be read (a link that leads nowhere)" in said
    assert "made: 4 depth maps" in said
    assert "1 image had stray bytes" in said
    assert len(list(output.rglob("*_depth.png"))) == 4


def test_of_many_unreadable_images_some_are_named(checkpoint, tmp_path, capsys):
    (tmp_path / "images").mkdir()
    for number in range(25):
        (tmp_path / f"images/{number:02d}.png").write_text("not a picture")
    with pytest.raises(UserError, match="25 of 25 images could not be read"):
        run(tmp_path / "images", checkpoint, tmp_path / "depth")
    said = capsys.readouterr().out
    assert "images/19.png" in said
    assert "images/20.png" not in said
    assert "skipped 5 more" in said
    assert "made" not in said


def test_earlier_results_are_replaced_and_not_predicted(checkpoint, images, tmp_path):
    for _ in range(2):
        run(images, checkpoint, images / "depth")
    assert len(files_below(images / "depth")) == 8


def test_results_that_cannot_be_written_are_one_line(checkpoint, images, tmp_path):
    (tmp_path / "depth").write_text("a file")
    with pytest.raises(UserError, match="depth: cannot be written"):
        run(images, checkpoint, tmp_path / "depth")
    assert (tmp_path / "depth").read_text() == "a file"


def test_what_waits_for_a_thread_is_not_begun_when_it_is_left():
    at_work, begun = threading.Event(), []
    with pytest.raises(KeyboardInterrupt), threads(1) as pool:
        pool.submit(lambda: (at_work.set(), time.sleep(0.5), begun.append("first")))
        pool.submit(begun.append, "second")
        at_work.wait()
        raise KeyboardInterrupt
    assert begun == ["first"]


def test_ctrl_c_leaves_whole_files_only(checkpoint, tmp_path):
    (tmp_path / "images").mkdir()
    Image.fromarray(render_room(1, (96, 128))[0]).save(tmp_path / "images/000.jpg")
    for number in range(1, 400):
        shutil.copy(tmp_path / "images/000.jpg", tmp_path / f"images/{number:03d}.jpg")
    output = tmp_path / "depth"
    options = {"checkpoint": checkpoint, "output": output}
    with warm_start("predict", tmp_path / "images", "--npy", "--ply", **options) as process:
        wait_for(lambda: list(output.glob("*_points.ply")), process)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        assert process.read("err") == "interrupted\n"
    made = [output / name for name in files_below(output)]
    assert 4 <= len(made) < 1600
    assert {path.suffix for path in made} == {".png", ".npy", ".ply"}  # no temporary name
    for path in made:
        if path.suffix == ".png":
            Image.open(path).load()
        elif path.suffix == ".npy":
            assert np.load(path).shape == (96, 128)
        else:
            assert len(read_ply(path.read_bytes())) == 96 * 128


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["/nowhere.jpg"], "/nowhere.jpg"),
        ([], "name what is to be predicted"),
        (["IMAGES/a.jpg", "IMAGES/inner/a.jpg"], "both be written as a"),
        (["EMPTY"], "no image"),
        (["IMAGES", "--device", "cuda:7"], "cuda:7"),
        (["IMAGES", "--device", "toaster"], "toaster"),
        (["IMAGES", "--batch-size", "0"], "--batch-size 0: must be at least 1"),
        (["IMAGES", "--every", "0"], "--every 0: must be at least 1"),
        (["IMAGES", "--batch-size", str(2**70)], "must be at most"),
        (["IMAGES", "--ply", "--intrinsics", "inf", "1", "0", "0"], "inf"),
        (["IMAGES", "--every", "2"], "for videos, and none is named"),
        (["IMAGES", "--range", "3", "3"], "--range 3 3"),
        (["IMAGES", "--range", "-1", "3"], "--range -1 3"),
        (["IMAGES", "--range", "1", "3", "--no-pictures"], "--no-pictures makes none"),
        (["IMAGES", "--intrinsics", "1", "1", "0", "0"], "with --ply they are made"),
        (["IMAGES", "--ply", "--intrinsics", "0", "1", "0", "0"], "focal lengths are above 0"),
        (["IMAGES", "--ply", "--intrinsics", "1", "1", "0"], "intrinsics"),
        (["IMAGES", "--checkpoint", "EMPTY"], "EMPTY/model.safetensors: no such file"),
        (["IMAGES/a.jpg", "OUT/a_color.png"], "would replace"),
        (["OUT"], "is the folder of the images"),
    ],
    ids=lambda value: " ".join(value) or "nothing" if isinstance(value, list) else "",
)
def test_mistakes_are_one_line_and_nothing_is_written(checkpoint, images, tmp_path, arguments, words):
    (tmp_path / "empty").mkdir()
    (tmp_path / "depth").mkdir()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "depth/a_color.png")
    places = {"IMAGES": images, "EMPTY": tmp_path / "empty", "OUT": tmp_path / "depth"}
    for name, place in places.items():
        arguments, words = [a.replace(name, str(place)) for a in arguments], words.replace(name, str(place))
    if "--checkpoint" not in arguments:
        arguments = [*arguments, "--checkpoint", str(checkpoint)]
    with pytest.raises(UserError) as error:
        predict.main([*arguments, "--output", str(tmp_path / "depth")])
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert files_below(tmp_path / "depth") == {"a_color.png"}


# --- on real pairs ---


def linked_pairs(nyuv2, folder, number):
    """A data set in the bts layout of some of the official test pairs, evenly spaced, as links."""
    name = "nyudepthv2_test_files_with_gt.txt"
    lines = (nyuv2 / "bts" / name).read_text().splitlines()
    lines = lines[:: len(lines) // number][:number]
    for file in (file for line in lines for file in line.split()[:2]):
        link = folder / "official_splits/test" / file
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(nyuv2 / "bts/official_splits/test" / file)
    (folder / name).write_text("\n".join(lines) + "\n")
    return folder


def scored(target, *arguments):
    evaluate.main([*map(str, arguments), "--protocols", "eigen", "--json", str(target)])
    return json.loads(target.read_text())


def nearest(folder):
    """Metres to the nearest pixel of the truth of any image."""
    maps = (np.asarray(Image.open(path)) for path in folder.rglob("*depth*.png"))
    return min(depth[depth > 0].min() for depth in maps) / 1000


def test_what_is_written_scores_as_the_model_does(nyuv2, tmp_path):
    """Millimetres are rounded by half of one: abs_rel by half of one over the nearest depth, at most."""
    source = linked_pairs(nyuv2, tmp_path / "source", 12)
    checkpoint = save_model(tmp_path, (120, 160))
    run(source / "official_splits", checkpoint, tmp_path / "depth", "--no-pictures", "--batch-size", "2")
    model = scored(tmp_path / "a.json", "--checkpoint", checkpoint, "--source", source)
    files = scored(tmp_path / "b.json", "--predictions", tmp_path / "depth", "--source", source)
    assert model["fingerprints"] == files["fingerprints"]
    assert model["images"]["keys"] == files["images"]["keys"]
    rows = [np.array(record["images"]["terms"]["eigen"]["abs_rel"]) for record in (model, files)]
    assert len(rows[0]) == 12
    assert rows[0].std() > 0.01  # twelve images, not one
    bound = 0.0005 / nearest(source)
    assert np.abs(rows[0] - rows[1]).max() <= bound + 1e-5
    means = [record["results"]["model"]["eigen"] for record in (model, files)]
    for name, value in means[0].items():
        assert value == pytest.approx(means[1][name], abs=2e-4, rel=2e-4), name
