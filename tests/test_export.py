"""Exported programs against the model, and what is in their files."""

import io
import json
import re
import sys
import zipfile
from dataclasses import asdict

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from commands import files_below
from PIL import Image
from safetensors.torch import load_file
from torch.torch_version import TorchVersion

from mde_dist import export
from mde_dist.inference import export_check
from mde_dist.inference.export_formats import OLDEST_TORCH
from mde_dist.models.config import ModelConfig
from mde_dist.models.depth_model import DepthModel
from mde_dist.models.weights import read_model, serialize_model
from mde_dist.packing.rooms import render_room
from mde_dist.utils.errors import UserError

pytestmark = pytest.mark.skipif(
    TorchVersion(torch.__version__) < OLDEST_TORCH, reason=f"torch is older than {OLDEST_TORCH}, which export needs"
)

SIZE = (50, 70)  # no multiple of 32
FILES = ("model.onnx", "model.pt2")
METRES = 1e-4  # far below the step in which depth is stored, far above the rounding of float32


def with_statistics(config):
    """A model with statistics in its normalisation that show where they are left out."""
    torch.manual_seed(3)
    model = DepthModel(config)
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(4, 3, 48, 64))
    return model.eval()


def saved(model, path, shards, **fields):
    config = {"model.encoder": "resnet18", "data.shards": str(shards), "data.eval_split": "test"} | fields
    path.write_bytes(serialize_model(model.state_dict(), {"config": config, "size": [48, 64]}))
    return path


@pytest.fixture(scope="module")
def model():
    return with_statistics(ModelConfig())


@pytest.fixture(scope="module")
def checkpoint(model, room_shards, scratch):
    return saved(model, scratch("model") / "model.safetensors", room_shards)


@pytest.fixture(scope="module")
def exported(checkpoint, scratch):
    output = scratch("exported") / "new" / "rooms"
    export.main(["--checkpoint", str(checkpoint), "--output", str(output), "--size", "50x70"])
    return output


def rooms(count):
    """uint8 (count, height, width, 3)"""
    return np.stack([render_room(seed, SIZE)[0] for seed in range(count)])


def expected(model, images):
    """Metres, by hand: ImageNet's normalisation, then the model, image by image."""
    mean, std = np.array([0.485, 0.456, 0.406], np.float32), np.array([0.229, 0.224, 0.225], np.float32)
    pixels = (images.astype(np.float32) / 255 - mean) / std
    with torch.inference_mode():
        return np.concatenate([model(torch.from_numpy(p.transpose(2, 0, 1)[None])).numpy() for p in pixels])


def as_input(images):
    return images.transpose(0, 3, 1, 2).astype(np.float32) / 255


def test_the_folder_holds_the_very_weights_and_nothing_else(exported, checkpoint):
    assert files_below(exported.parent) == {f"rooms/{name}" for name in (*FILES, "model.safetensors", "README.md")}
    assert (exported / "model.safetensors").read_bytes() == checkpoint.read_bytes()


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_onnx_gives_the_metres_of_the_model(exported, model, batch):
    session = onnxruntime.InferenceSession((exported / "model.onnx").read_bytes())  # from memory: it is one file
    images = rooms(batch)
    (depth,) = session.run(None, {"image": as_input(images)})
    assert depth.dtype == np.float32 and depth.shape == (batch, *SIZE)
    assert np.abs(depth - expected(model, images)).max() < METRES


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_torch_export_gives_the_metres_of_the_model_without_unpickling(exported, model, batch, monkeypatch):
    monkeypatch.setattr(torch, "load", None)
    monkeypatch.setattr("pickle.loads", None)
    program = torch.export.load(exported / "model.pt2")
    assert "autocast" not in str(program.graph)  # which other runtimes do not know
    images = rooms(batch)
    with torch.inference_mode():
        depth = program.module()(torch.from_numpy(as_input(images))).numpy()
    assert depth.dtype == np.float32 and depth.shape == (batch, *SIZE)
    assert np.abs(depth - expected(model, images)).max() < METRES


def test_every_part_of_the_decoder_is_exported(room_shards, scratch):
    config = ModelConfig(upsample="bilinear", skip_conv=True, head="full", output="log", norm="group")
    model, folder = with_statistics(config), scratch("decoder")
    fields = {f"model.{name}": value for name, value in asdict(config).items()}
    path = saved(model, folder / "model.safetensors", room_shards, **fields)
    export.main(["--checkpoint", str(path), "--output", str(folder / "out"), "--size", "50x70"])
    images = rooms(2)
    (depth,) = onnxruntime.InferenceSession((folder / "out/model.onnx").read_bytes()).run(
        None, {"image": as_input(images)}
    )
    assert np.abs(depth - expected(model, images)).max() < METRES
    with torch.inference_mode():
        depth = torch.export.load(folder / "out/model.pt2").module()(torch.from_numpy(as_input(images))).numpy()
    assert np.abs(depth - expected(model, images)).max() < METRES


def test_the_program_goes_to_another_device_as_a_whole(exported):
    program = torch.export.load(exported / "model.pt2").module().to("meta")
    assert program(torch.empty(3, 3, *SIZE, device="meta")).shape == (3, *SIZE)


def test_onnx_says_what_it_takes_and_gives(exported):
    session = onnxruntime.InferenceSession(exported / "model.onnx")
    (image,), (depth,) = session.get_inputs(), session.get_outputs()
    assert (image.name, image.type, image.shape) == ("image", "tensor(float)", ["batch", 3, *SIZE])
    assert (depth.name, depth.type, depth.shape) == ("depth", "tensor(float)", ["batch", *SIZE])
    about = session.get_modelmeta().custom_metadata_map
    assert "float32 (batch, 3, 50, 70), RGB, 0 to 1" in about["input"]
    assert "float32 (batch, 50, 70), metres" in about["output"]
    onnx.checker.check_model(exported / "model.onnx", full_check=True)
    assert [opset.version for opset in onnx.load(exported / "model.onnx").opset_import] == [18]


def test_the_torch_archive_is_json_and_the_bytes_of_the_weights(exported):
    """No member is anything that could be a pickle: each is accounted for."""
    extra = {"mde_dist.json": ""}
    torch.export.load(exported / "model.pt2", extra_files=extra)
    assert "RGB, 0 to 1" in json.loads(extra["mde_dist.json"])["input"]
    tensors = load_file(exported / "model.safetensors")
    with zipfile.ZipFile(exported / "model.pt2") as archive:
        members = {info.filename.partition("/")[2]: archive.read(info) for info in archive.infolist()}
    config = json.loads(members["data/weights/model_weights_config.json"])["config"]
    for name, payload in config.items():
        if name.startswith("model."):  # others: the normalisation of the image
            tensor = tensors.pop(name[6:]).numpy()
            tensor = np.moveaxis(tensor, 1, -1) if tensor.ndim == 4 else tensor  # channels last
            assert members["data/weights/" + payload["path_name"]] == tensor.tobytes(), name
    assert not tensors
    for name, data in members.items():
        if name.endswith(".json"):
            json.loads(data)
        elif not name.startswith(("data/weights/weight_", "data/constants/tensor_")):
            assert re.fullmatch(rb"pt2|\d*\n?|little", data), name


@pytest.mark.parametrize("file", FILES)
def test_no_path_of_this_machine_is_handed_on(exported, file):
    data = (exported / file).read_bytes()
    assert str(export.Path.cwd()).encode() not in data
    assert export.__file__.removesuffix("export.py").encode() not in data


@pytest.mark.parametrize("file", FILES)
def test_three_lines_of_the_card_run_each_program(exported, model, file, monkeypatch):
    card = (exported / "README.md").read_text()
    (usage,) = re.findall(rf"^`{re.escape(file)}` .*?```python\n(.*?)```", card, re.DOTALL | re.MULTILINE)
    assert len(usage.splitlines()) == 3
    monkeypatch.chdir(exported)
    (image,) = rooms(1)
    names = {"image": image}
    exec(usage, names)
    depth = np.asarray(names["depth"].detach() if file == "model.pt2" else names["depth"])
    assert np.abs(depth - expected(model, image[None])[0]).max() < METRES
    assert re.search(rf"5 images of {re.escape('/')}.*in batches of 1, 3, 5`: .*`{file}` 0\.0\d+ mm", card)


@pytest.fixture
def output(tmp_path):
    return tmp_path / "out"


def test_one_image_is_enough_and_the_training_size_is_the_default(checkpoint, output, tmp_path, capsys):
    Image.fromarray(render_room(1, (97, 61))[0]).save(tmp_path / "a.jpg")
    images = ["--images", str(tmp_path / "a.jpg")]
    export.main(["--checkpoint", str(checkpoint), "--output", str(output), "--formats", "torch", *images])
    assert files_below(output) == {"README.md", "model.pt2", "model.safetensors"}
    said = capsys.readouterr().out
    assert "checked on 1 image" in said and "in batches of 1, 3" in said
    assert torch.export.load(output / "model.pt2").module()(torch.rand(2, 3, 48, 64)).shape == (2, 48, 64)


def test_a_program_that_differs_from_the_model_is_not_handed_on(checkpoint, output, monkeypatch):
    trace = torch.export.export

    def faulty(*args, **options):
        program = trace(*args, **options)
        program.state_dict["model.head.bias"] = torch.nn.Parameter(program.state_dict["model.head.bias"] + 0.005)
        return program

    monkeypatch.setattr(torch.export, "export", faulty)
    with pytest.raises(
        UserError, match=r"model\.pt2 differs from the model by up to 0\.00\d+ m in a batch of 1"
    ) as error:
        export.main(["--checkpoint", str(checkpoint), "--output", str(output), "--formats", "torch"])
    assert "\n" not in str(error.value)
    assert list(output.parent.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("head.bias", torch.nan, "that are not finite"),
        ("head.bias", 1e30, r"from 1e\+30 m to 1e\+30 m"),
        ("head.bias", 1200.0, r"from 1\.\d+e\+03 m"),
        ("head.bias", -1e30, "from 0 m to 0 m"),
        ("encoder.layer4.1.conv2.weight", 3e37, ""),
    ],
)
def test_a_model_that_is_broken_is_not_handed_on(checkpoint, output, tmp_path, name, value, words):
    metadata, tensors = read_model(checkpoint)
    tensors[name].view(-1)[0] = value
    (tmp_path / "broken.safetensors").write_bytes(serialize_model(tensors, metadata))
    with pytest.raises(UserError, match=rf"broken\.safetensors on 5 images of .*: gives depths .*{words}") as error:
        export.main(["--checkpoint", str(tmp_path / "broken.safetensors"), "--output", str(output)])
    assert "\n" not in str(error.value)
    assert files_below(tmp_path) == {"broken.safetensors"}


def test_a_torch_that_writes_pickle_is_refused(model, checkpoint, output, monkeypatch):
    def older(program, file, **options):
        with zipfile.ZipFile(file, "w") as archive:
            pickled = io.BytesIO()
            torch.save(program.state_dict, pickled)
            archive.writestr("serialized_state_dict.pt", pickled.getvalue())

    monkeypatch.setattr(torch.export, "save", older)
    with pytest.raises(UserError, match=r"writes pickle into model\.pt2 \(serialized_state_dict\.pt\)"):
        export.main(["--checkpoint", str(checkpoint), "--output", str(output), "--formats", "torch"])
    assert list(output.parent.iterdir()) == []


def test_a_torch_that_cannot_export_is_refused(checkpoint, output, monkeypatch):
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.8.0+cu128"))
    with pytest.raises(UserError, match=r"torch 2\.8\.0\+cu128 is too old to export; this needs 2\.9 or newer"):
        export.main(["--checkpoint", str(checkpoint), "--output", str(output)])


def test_without_the_extra_it_says_what_to_install(checkpoint, output, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UserError, match=r"--formats onnx needs onnxscript: pip install -e '\.\[export\]'"):
        export.main(["--checkpoint", str(checkpoint), "--output", str(output)])


TRUTH = torch.full((5, 4, 4), 2.0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda depth: depth + 0.0011, None),
        (lambda depth: depth - 0.0013, "differs from the model by up to 0.0013 m in a batch of 1"),
        (lambda depth: depth * torch.nan, "differs"),
        (lambda depth: depth[:, :2], r"gives \(1, 2, 4\), the model \(1, 4, 4\)"),
        (lambda depth: depth[:3] if len(depth) > 3 else depth, r"gives \(3, 4, 4\), the model \(5, 4, 4\)"),
        (lambda depth: depth + (0.01 if len(depth) == 3 else 0), "in a batch of 3"),
    ],
    ids=["allowed", "too far", "nan", "shape", "largest batch", "one batch size"],
)
def test_the_tolerance_is_a_millimetre_and_a_ten_thousandth(change, words):
    images = torch.zeros(5, 3, 4, 4)
    if words is None:
        assert export_check.compare(lambda batch: change(TRUTH[: len(batch)]), images, TRUTH, "f") == pytest.approx(
            0.0011, 1e-3
        )
        return
    with pytest.raises(UserError, match=words):
        export_check.compare(lambda batch: change(TRUTH[: len(batch)]), images, TRUTH, "f")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--output", "OUT"], "either --run DIR or --checkpoint FILE"),
        (["--checkpoint", "/nowhere.safetensors", "--output", "OUT"], "no such file"),
        (["--checkpoint", "MODEL", "--output", "HERE"], "is there already"),
        (["--checkpoint", "MODEL", "--output", "MODEL/out", "--formats", "torch"], "cannot be written"),
        (["--checkpoint", "MODEL", "--output", "OUT", "--formats", "tflite"], "tflite"),
        (["--checkpoint", "MODEL", "--output", "OUT", "--formats", "onnx", "onnx"], "each format once"),
        (["--checkpoint", "MODEL", "--output", "OUT", "--size", "31x64"], "at least 32x32"),
        (["--checkpoint", "MODEL", "--output", "OUT", "--shards", "/gone"], "--images FILE_OR_FOLDER"),
        (["--checkpoint", "MODEL", "--output", "OUT", "--images", "/gone.jpg"], "/gone.jpg"),
        (["--checkpoint", "MODEL", "--output", "OUT", "--images", "EMPTY"], "no image in"),
        (["--checkpoint", "MODEL", "--output", "OUT", "--images", "MODEL"], "not a readable image"),
        (["--checkpoint", "MODEL", "--output", "OUT", "--shards", "x", "--images", "y"], "check on once"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_mistakes_are_one_line_and_nothing_is_written(checkpoint, tmp_path, arguments, words):
    (tmp_path / "empty").mkdir()
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "file").touch()
    places = {"OUT": tmp_path / "out", "HERE": tmp_path / "here", "EMPTY": tmp_path / "empty", "MODEL": checkpoint}
    given = [re.sub("^[A-Z]+", lambda name: str(places[name[0]]), argument) for argument in arguments]
    with pytest.raises(UserError) as error:
        export.main(given)
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert {path.name for path in tmp_path.iterdir()} == {"empty", "here"}
