"""What the decoder can be made of, beside the seed's."""

import dataclasses
import json

import pytest
import torch

from mde_dist.models.config import ModelConfig
from mde_dist.models.decoders import depth_activation
from mde_dist.models.depth_model import create_model, create_pretrained_model, load_model
from mde_dist.utils.errors import UserError

STRONG = ModelConfig(upsample="bilinear", skip_conv=True, head="full", output="log")
PARTS = {
    "bilinear": ModelConfig(upsample="bilinear"),
    "refined": ModelConfig(skip_conv=True),
    "full": ModelConfig(head="full"),
    "sigmoid": ModelConfig(output="sigmoid"),
    "all": STRONG,
    "all on resnet50": dataclasses.replace(STRONG, encoder="resnet50"),
    "all in groups": dataclasses.replace(STRONG, norm="group"),
}


def image(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("config", PARTS.values(), ids=PARTS)
def test_every_parameter_learns_and_depth_has_the_size_of_the_image(config):
    model = create_pretrained_model(config, seed=0).train()
    depth = model(image(2, 3, 45, 61))
    assert depth.shape == (2, 45, 61)
    assert depth.dtype == torch.float32
    depth.square().mean().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("config", PARTS.values(), ids=PARTS)
def test_each_part_makes_another_model_that_its_file_brings_back(config):
    model = create_pretrained_model(config, seed=3).eval()
    metadata = {"config": json.loads(json.dumps({f"model.{k}": v for k, v in dataclasses.asdict(config).items()}))}
    again, seed = load_model(metadata, model.state_dict()).eval(), create_pretrained_model(ModelConfig(), seed=3).eval()
    x = image(1, 3, 64, 96)
    with torch.inference_mode():
        assert torch.allclose(model(x), again(x), atol=1e-5)
        assert not torch.allclose(model(x), seed(x), atol=1e-3)


def test_the_encoder_starts_the_same_under_every_decoder():
    one, other = (
        create_pretrained_model(ModelConfig(), seed=3).encoder.state_dict(),
        create_pretrained_model(STRONG, seed=3).encoder.state_dict(),
    )
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_file_from_before_these_fields_is_a_seed():
    model = create_pretrained_model(ModelConfig(), seed=3).eval()
    again = load_model({"config": {"model.encoder": "resnet18", "model.norm": "batch"}}, model.state_dict()).eval()
    x = image(1, 3, 64, 64)
    with torch.inference_mode():
        assert torch.allclose(model(x), again(x), atol=1e-5)


@pytest.mark.parametrize("field", ["norm", "skip_conv", "head", "output", "max_depth"])
def test_a_file_that_names_what_there_is_not_is_refused(field):
    values = {f"model.{name}": value for name, value in dataclasses.asdict(ModelConfig()).items()}
    with pytest.raises(UserError, match=f"model.{field}: unknown"):
        load_model({"config": values | {f"model.{field}": ["no"]}}, {})


def test_bounds_by_hand():
    raw = torch.tensor([-1e4, 0.0, 1e4])
    assert depth_activation(raw, "sigmoid", 0.1, 10).tolist() == pytest.approx([0.1, 5.05, 10])
    assert depth_activation(raw, "log", 0.1, 10).tolist() == pytest.approx([0.1, 1, 10])
    # ln(1 + e^0)
    assert depth_activation(raw, "softplus", 0.1, 10).tolist() == pytest.approx([0, 0.693147, 1e4])


@pytest.mark.parametrize("output", ["sigmoid", "log"])
def test_a_bounded_output_stays_within_its_range(output):
    model = create_pretrained_model(ModelConfig(output=output, min_depth=1, max_depth=3), seed=0).eval()
    with torch.inference_mode():
        depth = model(1e3 * image(1, 3, 64, 64))
    assert 1 <= depth.min() < depth.max() <= 3


def test_a_decoder_has_no_statistics_to_freeze():
    model = create_model(dataclasses.replace(STRONG, norm="frozen"))
    decoder = [module for name, module in model.named_modules() if not name.startswith("encoder")]
    assert not any(isinstance(module, torch.nn.modules.batchnorm._BatchNorm) for module in decoder)
    assert any(isinstance(module, torch.nn.GroupNorm) for module in decoder)
