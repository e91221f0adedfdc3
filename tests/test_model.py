"""The seed model: its size, its shapes, its starting weights and what is said where they cannot be had."""

import os
import pickle
from dataclasses import replace

import pytest
import torch
import torchvision
from safetensors.torch import save_file

from mde_dist.models.config import ModelConfig
from mde_dist.models.decoders import depth_activation
from mde_dist.models.depth_model import DepthModel, build_started, create_model, create_pretrained_model, load_model
from mde_dist.models.weights import serialize_model
from mde_dist.utils.errors import UserError

BACKBONES = ("resnet18", "resnet34", "resnet50", "tiny")
URL = torchvision.models.ResNet18_Weights.IMAGENET1K_V1.url


def image(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def plain_resnet(encoder="resnet18", seed=5):
    """torchvision's own model with random weights, batch statistics included."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = torchvision.models.get_model(encoder, weights=None)
        for name, buffer in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.uniform_(0.5, 1.5)
    return model


def assert_one_line(error, *parts):
    message = str(error.value)
    assert len(message.splitlines()) == 1, message
    for part in parts:
        assert str(part) in message


def encoder_is(model, state):
    """True where every tensor of a torchvision state (less the classifier) is the encoder's."""
    ours = model.encoder.state_dict()
    return set(ours) == {name for name in state if not name.startswith("fc.")} and all(
        torch.equal(ours[name], state[name]) for name in ours
    )


# --- architecture ---


def test_number_of_parameters():
    model = create_pretrained_model(ModelConfig(), seed=0)
    # the original has 12,762,753; the 64 * 64 * 9 + 64 = 36,928 of its unused residual_convs[0] are not created
    assert sum(p.numel() for p in model.parameters()) == 12_725_825
    assert [tuple(conv.weight.shape) for conv in model.residual_convs] == [
        (64, 128, 3, 3),
        (128, 256, 3, 3),
        (256, 512, 3, 3),
    ]


@pytest.mark.parametrize("encoder", BACKBONES)
def test_every_parameter_gets_a_gradient(encoder):
    model = create_pretrained_model(ModelConfig(encoder), seed=0).train()
    model(image(2, 3, 64, 64)).square().mean().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


@pytest.mark.parametrize("norm", ["group", "frozen"])
def test_without_batch_statistics_an_image_does_not_depend_on_its_batch(norm):
    model = create_model(ModelConfig(norm=norm)).train()
    image = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    together, alone = model(image), torch.cat([model(part) for part in image.split(1)])
    assert torch.allclose(together, alone, rtol=1e-4, atol=1e-5)
    together.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    if norm == "frozen":
        names = [name for name, _ in model.named_parameters() if ".bn" in name]
        assert names == []  # statistics, scale and shift stay


@pytest.mark.parametrize("size", [(45, 61), (240, 320), (32, 32), (33, 64), (64, 65)])
def test_depth_has_the_size_of_the_image_and_is_positive(size):
    model = create_pretrained_model(ModelConfig(), seed=0).eval()
    with torch.inference_mode():
        depth = model(image(2, 3, *size))
    assert depth.shape == (2, *size)
    assert depth.dtype == torch.float32
    assert (depth > 0).all()
    assert torch.isfinite(depth).all()


@pytest.mark.parametrize("encoder", BACKBONES[1:])
def test_shapes_of_the_other_backbones(encoder):
    model = create_pretrained_model(ModelConfig(encoder), seed=0).eval()
    with torch.inference_mode():
        assert model(image(1, 3, 45, 61)).shape == (1, 45, 61)


def test_depth_is_positive_where_the_head_says_negative():
    model = create_pretrained_model(ModelConfig(), seed=0).eval()
    with torch.inference_mode():
        model.head.weight.zero_()
        model.head.bias.fill_(-3.0)
        # softplus(-3) = ln(1 + e^-3)
        assert torch.allclose(model(image(1, 3, 64, 64)), torch.tensor(0.0485874), atol=1e-6)


def reference(model, x):
    """The forward pass as FACTS describes it, step by step, for sides that are multiples of 32."""
    e = model.encoder
    features = [e.maxpool(torch.relu(e.bn1(e.conv1(x))))]
    for stage in (e.layer1, e.layer2, e.layer3, e.layer4):
        features.append(stage(features[-1]))
    y = features[4]
    for i in (3, 2, 1):
        y = torch.nn.functional.interpolate(model.residual_convs[i - 1](y), scale_factor=2) + features[i]
    raw = torch.nn.functional.conv2d(y + features[0], model.head.weight, model.head.bias, padding=1)
    quarter = torch.log1p(torch.exp(raw))
    return torch.nn.functional.interpolate(quarter, scale_factor=4, mode="bilinear")[:, 0]


def test_forward_is_that_of_the_seed():
    model = create_pretrained_model(ModelConfig(), seed=3).eval()
    x = image(2, 3, 64, 96)
    with torch.inference_mode():
        assert torch.allclose(model(x), reference(model, x), atol=1e-5)


def test_every_feature_matters():
    model = create_pretrained_model(ModelConfig(), seed=3).eval()
    x = image(1, 3, 64, 64)
    with torch.inference_mode():
        before = model(x)
        for layer in (model.encoder.conv1, *(block[-1].bn2 for block in list(model.encoder.children())[4:8])):
            kept = layer.weight.clone()
            layer.weight.mul_(-1)
            assert (model(x) - before).abs().max() > 1e-4
            layer.weight.copy_(kept)
        assert torch.equal(model(x), before)


@pytest.mark.parametrize(("head", "output"), [("quarter", "softplus"), ("full", "log")])
def test_the_last_convolution_and_all_after_it_are_float32_under_autocast(head, output):
    config = ModelConfig(head=head, output=output)
    model = create_pretrained_model(config, seed=0).eval()
    last = model.head if head == "quarter" else model.head.last
    seen = []
    last.register_forward_hook(lambda module, arguments, result: seen.append((arguments[0], result)))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        last.bias.fill_(6.5 if output == "softplus" else 0.5)
        depth = model(image(1, 3, 96, 128))
    features, raw = seen[0]
    exact = torch.nn.functional.conv2d(features.double(), last.weight.double(), last.bias.double(), padding=1)
    exact = depth_activation(exact, output, config.min_depth, config.max_depth)
    expected = torch.nn.functional.interpolate(exact, (96, 128), mode="bilinear")[:, 0]
    assert depth.dtype == torch.float32
    assert torch.allclose(depth.double(), expected, rtol=1e-5, atol=0)
    # hardly a number twice, where bfloat16 has 33 from 6 m to 7 m
    assert len(raw.unique()) > 0.9 * raw.numel() > 5 * len(raw.bfloat16().unique())


# --- random weights ---


def test_same_seed_same_weights():
    one, two, other = (create_pretrained_model(ModelConfig(), seed).state_dict() for seed in (7, 7, 8))
    assert all(torch.equal(one[name], two[name]) for name in one)
    for name in ("encoder.conv1.weight", "residual_convs.0.weight", "head.weight"):
        assert not torch.equal(one[name], other[name])


def test_global_random_state_neither_matters_nor_moves():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = create_pretrained_model(ModelConfig(), 7).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    two = create_pretrained_model(ModelConfig(), 7).state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)


# --- weights from a file ---


@pytest.mark.parametrize("encoder", BACKBONES[:3])
def test_file_with_torchvision_names(tmp_path, encoder):
    state = plain_resnet(encoder).state_dict()
    path = tmp_path / "resnet.safetensors"
    save_file(state, path)
    model = create_pretrained_model(ModelConfig(encoder, str(path)), seed=0)
    assert encoder_is(model, state)
    scratch = create_pretrained_model(ModelConfig(encoder), seed=0)
    assert torch.equal(model.head.weight, scratch.head.weight)  # what is not in the file is as without it
    start = build_started(ModelConfig(encoder, str(path)), seed=0)[1]
    assert start.taken.keys() == {"encoder"}
    assert start.random.keys() == {("decoder", "not in the file"), ("head", "not in the file")}


def test_file_without_classifier(tmp_path):
    state = {name: value for name, value in plain_resnet().state_dict().items() if not name.startswith("fc.")}
    save_file(state, tmp_path / "encoder.safetensors")
    assert encoder_is(
        create_pretrained_model(ModelConfig(weights=str(tmp_path / "encoder.safetensors")), seed=0), state
    )


def start_from(path, trained, config, **metadata):
    """A model of `config` that starts from the file of a trained one -> itself and what was taken."""
    about = {f"model.{name}": value for name, value in vars(trained).items()} | metadata
    model = create_pretrained_model(trained, seed=9)
    path.write_bytes(serialize_model(model.state_dict(), {"config": about, "size": (32, 32)}))
    return model.state_dict(), *build_started(replace(config, weights=str(path)), seed=0)


@pytest.mark.parametrize(
    "config",
    [ModelConfig("tiny"), ModelConfig("tiny", norm="group", skip_conv=True, head="full", output="log", max_depth=80)],
)
def test_a_trained_model_is_taken_whole(tmp_path, config):
    trained, model, start = start_from(tmp_path / "model.safetensors", config, config)
    own = model.state_dict()
    assert own.keys() == trained.keys()
    assert all(own[name].equal(trained[name]) for name in own)
    assert sum(count for count, _ in start.taken.values()) == len(own)
    assert sum(size for _, size in start.taken.values()) == sum(p.numel() for p in model.parameters())
    assert (dict(start.random), start.unused) == ({}, 0)
    assert "random" not in start.describe()
    from_folder = create_pretrained_model(replace(config, weights=str(tmp_path)), seed=0)
    assert all(value.equal(trained[name]) for name, value in from_folder.state_dict().items())


@pytest.mark.parametrize(
    ("trained", "config", "random", "unused"),
    [
        # weight and bias against those of four convolutions, and two refinements of six tensors each
        (ModelConfig("tiny"), ModelConfig("tiny", head="full"), {("head", "not in the file"): 20}, 2),
        (ModelConfig("tiny"), ModelConfig("tiny", output="log"), {("head", "its output is softplus, here log"): 2}, 0),
        (ModelConfig("tiny"), ModelConfig("tiny", skip_conv=True), {("decoder", "not in the file"): 18}, 0),
        (ModelConfig("tiny", skip_conv=True), ModelConfig("tiny"), {}, 15),  # of batch norm without its counters
        (ModelConfig("tiny"), ModelConfig("tiny", norm="frozen"), {}, 0),
    ],
)
def test_of_a_trained_model_of_other_parts_the_rest_is_taken_and_said(tmp_path, trained, config, random, unused):
    before, model, start = start_from(tmp_path / "model.safetensors", trained, config)
    scratch = create_pretrained_model(config, seed=0).state_dict()
    taken = {name for name, value in model.state_dict().items() if name in before and value.equal(before[name])}
    assert sum(count for count, _ in start.taken.values()) + sum(random.values()) == len(scratch)
    for name, value in model.state_dict().items():
        head_is_random = any(part == "head" for part, _ in random) and name.startswith("head.")
        assert (name in taken) == (name in before and not head_is_random), name
        assert name in taken or value.equal(scratch[name])  # as without the file
    assert (dict(start.random), start.unused) == (random, unused)
    assert all(f"{part} ({count} tensors: {why})" in start.describe() for (part, why), count in random.items())


def test_a_layer_of_another_shape_is_left_random_as_a_whole(tmp_path):
    state = create_pretrained_model(ModelConfig("tiny"), seed=9).state_dict()
    save_file(state | {"residual_convs.0.weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    config = ModelConfig("tiny", str(tmp_path / "model.safetensors"))
    model, start = build_started(config, seed=0)
    scratch = create_pretrained_model(ModelConfig("tiny"), seed=0)
    assert model.residual_convs[0].bias.equal(scratch.residual_convs[0].bias)
    assert model.residual_convs[1].bias.equal(state["residual_convs.1.bias"])
    assert dict(start.random) == {("decoder", "another shape in the file"): 2}


def test_file_of_another_backbone_is_refused(tmp_path):
    for encoder, other in (("resnet18", "resnet50"), ("resnet34", "resnet18"), ("resnet18", "resnet34")):
        path = tmp_path / f"{other}.safetensors"
        save_file(plain_resnet(other).state_dict(), path)
        with pytest.raises(UserError) as error:
            create_pretrained_model(ModelConfig(encoder, str(path)), seed=0)
        assert_one_line(error, path, "do not fit")


def test_file_of_something_else_is_refused(tmp_path):
    path = tmp_path / "other.safetensors"
    save_file({"a": torch.zeros(2)}, path)
    with pytest.raises(UserError) as error:
        create_pretrained_model(ModelConfig(weights=str(path)), seed=0)
    assert_one_line(error, path, "do not fit")


class Touch:
    """Unpickling this makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("content", ["missing", "directory", "empty", "garbage", "truncated", "pickle"])
def test_file_that_is_no_safetensors_is_refused(tmp_path, content):
    path, marker = tmp_path / "weights.safetensors", tmp_path / "marker"
    if content == "directory":
        path.mkdir()
    elif content == "truncated":
        save_file(plain_resnet().state_dict(), path)
        path.write_bytes(path.read_bytes()[:-1000])
    elif content == "pickle":
        torch.save({"conv1.weight": Touch(marker)}, path)
    elif content != "missing":
        path.write_bytes(b"" if content == "empty" else b"garbage" * 100)
    with pytest.raises(UserError) as error:
        create_pretrained_model(ModelConfig(weights=str(path)), seed=0)
    assert_one_line(error, path, "safetensors")
    assert not marker.exists()


# --- torchvision's ImageNet weights ---


@pytest.fixture
def imagenet_file(tmp_path, monkeypatch):
    """Where torchvision looks for its weights; whatever it tries to download is refused at once."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    for name in ("https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nothing listens there
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    path = tmp_path / "hub" / "checkpoints" / URL.rsplit("/", 1)[-1]
    path.parent.mkdir(parents=True)
    return path


def test_imagenet_weights_are_loaded_from_torchs_cache(imagenet_file):
    state = plain_resnet(seed=11).state_dict()
    torch.save(state, imagenet_file)
    model = create_pretrained_model(ModelConfig(weights="imagenet"), seed=0)
    assert encoder_is(model, state)
    assert torch.equal(model.head.weight, create_pretrained_model(ModelConfig(), seed=0).head.weight)


def test_imagenet_weights_that_cannot_be_had(imagenet_file):
    with pytest.raises(UserError) as error:
        create_pretrained_model(ModelConfig(weights="imagenet"), seed=0)
    assert_one_line(error, imagenet_file, URL, "--model.weights none")
    assert list(imagenet_file.parent.iterdir()) == []


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("form", ["zip", "legacy", "plain pickle", "extra object"])
def test_a_pickled_object_in_the_cache_is_not_run(imagenet_file, form):
    marker = imagenet_file.parent / "marker"
    state = {**plain_resnet().state_dict(), "conv1.weight": Touch(marker)}
    if form == "plain pickle":
        imagenet_file.write_bytes(pickle.dumps(Touch(marker)))
    elif form == "extra object":
        torch.save({"state_dict": plain_resnet().state_dict(), "hook": Touch(marker)}, imagenet_file)
    else:
        torch.save(state, imagenet_file, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(UserError) as error:
        create_pretrained_model(ModelConfig(weights="imagenet"), seed=0)
    assert not marker.exists()
    assert_one_line(error, imagenet_file)


def test_the_pickled_object_would_have_run(imagenet_file):
    # else the test above would hold for any reader
    marker = imagenet_file.parent / "marker"
    torch.save({"conv1.weight": Touch(marker)}, imagenet_file)
    torch.load(imagenet_file, weights_only=False)
    assert marker.exists()


@pytest.mark.parametrize(
    "content",
    [
        {"conv1.weight": 3},
        {3: torch.zeros(2)},
        [torch.zeros(2)],
        torch.zeros(2),
        {"conv1.weight": torch.zeros(2)},
        None,
    ],
)
def test_cached_file_with_something_else_is_refused(imagenet_file, content):
    torch.save(content, imagenet_file)
    with pytest.raises(UserError) as error:
        create_pretrained_model(ModelConfig(weights="imagenet"), seed=0)
    assert_one_line(error, "model.weights")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("content", [b"", b"garbage" * 50])
def test_damaged_cached_file_is_refused(imagenet_file, content):
    imagenet_file.write_bytes(content)
    with pytest.raises(UserError) as error:
        create_pretrained_model(ModelConfig(weights="imagenet"), seed=0)
    assert_one_line(error, imagenet_file)


# --- restoring ---


@pytest.mark.parametrize("encoder", BACKBONES)
def test_restore_gives_the_model_back(encoder):
    model = create_pretrained_model(ModelConfig(encoder), seed=4).train()
    model(image(2, 3, 64, 64))  # moves the batch statistics
    model.to(memory_format=torch.channels_last)  # as what is restored
    metadata = {"config": {"model.encoder": encoder}}
    restored = load_model(metadata, model.state_dict())
    assert type(restored) is DepthModel
    x = image(1, 3, 45, 61, seed=1)
    with torch.inference_mode():
        assert torch.equal(restored.eval()(x), model.eval()(x))


@pytest.mark.parametrize(
    "metadata",
    [
        {},
        {"config": {}},
        {"config": None},
        {"config": {"model.encoder": "resnet7"}},
        {"config": {"model.encoder": "vgg11"}},
        {"config": {"model.encoder": 18}},
        {"config": {"model.encoder": "resnet34"}},
        {"config": {"model.encoder": "resnet18", "model.of_a_newer_version": "x"}},
    ],
)
def test_restore_refuses_metadata_that_do_not_fit(metadata):
    with pytest.raises(UserError) as error:
        load_model(metadata, create_pretrained_model(ModelConfig(), seed=0).state_dict())
    assert_one_line(error, "do not fit")


def test_restore_refuses_missing_extra_and_wrong_tensors():
    state = create_pretrained_model(ModelConfig(), seed=0).state_dict()
    metadata = {"config": {"model.encoder": "resnet18"}}
    without = {name: value for name, value in state.items() if name != "head.bias"}
    for wrong in (without, state | {"extra": torch.zeros(1)}, state | {"head.bias": torch.zeros(2)}, {}):
        with pytest.raises(UserError) as error:
            load_model(metadata, wrong)
        assert_one_line(error, "do not fit")
