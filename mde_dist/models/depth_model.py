"""A ResNet encoder and a residual decoder with skip connections. Knows nothing of devices or ranks."""

from collections.abc import Callable, Mapping
from dataclasses import fields
from itertools import pairwise
from typing import Any, get_args, get_type_hints

import torch
import torchvision
from torch import nn
from torchvision.models.resnet import BasicBlock, conv1x1

from mde_dist.data.augmentation import normalise
from mde_dist.models.config import ModelConfig
from mde_dist.models.decoders import (
    ENCODER_NORMS,
    FullHead,
    QuarterHead,
    depth_activation,
    refinement,
    resize,
)
from mde_dist.models.initial_weights import Start, initialise
from mde_dist.utils.errors import UserError


class DepthModel(nn.Module):
    """Image (batch, 3, height, width), normalised as for ImageNet -> depth (batch, height, width), metres, positive.

    Five encoder features: after the stem's pooling and after each of the four stages, at 1/4, 1/4, 1/8, 1/16, 1/32 of
    the image. From the top x = refine_i(resize(conv_i(x)) + feature_i) for i = 3, 2, 1; the head sees x + feature_0.
    Any image size from 32x32 on.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.encoder = _make_encoder(config)
        stages = (self.encoder.layer1, self.encoder.layer2, self.encoder.layer3, self.encoder.layer4)
        channels = [_out_channels(stage) for stage in stages]
        self.residual_convs = nn.ModuleList(
            nn.Conv2d(above, below, 3, padding=1) for below, above in pairwise(channels)
        )
        stem = self.encoder.conv1.out_channels
        self.to_stem = nn.Identity() if channels[0] == stem else nn.Conv2d(channels[0], stem, 3, padding=1)
        self.head = QuarterHead(stem) if config.head == "quarter" else FullHead(stem, config.norm)
        self.refinements = nn.ModuleList(
            refinement(width, config.norm) if config.skip_conv else nn.Identity() for width in channels[:-1]
        )
        self._upsample, self._output, self._range = config.upsample, config.output, (config.min_depth, config.max_depth)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        half = self.encoder.relu(self.encoder.bn1(self.encoder.conv1(image)))
        feature = self.encoder.maxpool(half)
        features = []
        x = feature
        for stage in (self.encoder.layer1, self.encoder.layer2, self.encoder.layer3, self.encoder.layer4):
            x = stage(x)
            features.append(x)
        steps = zip(self.residual_convs, self.refinements, features[:-1], strict=True)
        for conv, refine, skip in reversed(list(steps)):
            x = refine(resize(conv(x), skip, self._upsample) + skip)
        # from the head's last convolution on all is float32, which autocast leaves as it is
        depth = depth_activation(self.head(self.to_stem(x) + feature, half, image), self._output, *self._range)
        return resize(depth, image, "bilinear")[:, 0]


class TinyEncoder(nn.Module):
    """An encoder of the form of torchvision's ResNets with one block a stage: 300,000 parameters."""

    def __init__(self, norm: Callable[[int], nn.Module]):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 32, 7, stride=2, padding=3, bias=False)
        self.bn1, self.relu, self.maxpool = norm(32), nn.ReLU(inplace=True), nn.MaxPool2d(3, stride=2, padding=1)
        self.layer1 = BasicBlock(32, 32, norm_layer=norm)
        self.layer2, self.layer3, self.layer4 = (
            BasicBlock(above, below, 2, nn.Sequential(conv1x1(above, below, 2), norm(below)), norm_layer=norm)
            for above, below in pairwise((32, 32, 64, 64))
        )


def _make_encoder(config: ModelConfig) -> Any:
    """An encoder with random weights and the parts of torchvision's ResNets, but for the classifier."""
    norm = ENCODER_NORMS[config.norm]
    if config.encoder == "tiny":
        return TinyEncoder(norm)
    encoder = torchvision.models.get_model(config.encoder, weights=None, norm_layer=norm)
    del encoder.fc  # what takes no part must not exist: DDP waits for the gradient of every parameter
    return encoder


def _out_channels(stage: nn.Module) -> int:
    """Channels of a ResNet stage: those of its last convolution, whether of the block or of its skip connection."""
    return [module for module in stage.modules() if isinstance(module, nn.Conv2d)][-1].out_channels


def create_model(config: ModelConfig) -> DepthModel:
    """The model that a config names, with random weights."""
    return DepthModel(config)


def create_pretrained_model(config: ModelConfig, seed: int) -> DepthModel:
    """A model that starts as `config.weights` says. Raises UserError where they cannot be had."""
    return build_started(config, seed)[0]


def build_started(config: ModelConfig, seed: int) -> tuple[DepthModel, Start | None]:
    """Create the model as `create_pretrained_model` does, and say which weights were taken; the rest is random, drawn
    from `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = create_model(config)
    return model, initialise(model, config.weights, config.encoder, config.output)


def load_model(metadata: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> DepthModel:
    """The model that the metadata and tensors of a model.safetensors describe, channels last. Raises UserError."""
    try:
        model = create_model(_architecture(metadata["config"]))
        model.load_state_dict(tensors)
        model.to(memory_format=torch.channels_last)
    except (AttributeError, KeyError, TypeError, RuntimeError, ValueError) as error:
        raise UserError(f"the weights do not fit the model they name: {str(error).splitlines()[-1]}") from None
    return model


def _architecture(config: Mapping[str, Any]) -> ModelConfig:
    """Read the model's config from the flat one of a model.safetensors, which may be older than some fields. Raises
    ValueError."""
    values = {item.name: config.get(f"model.{item.name}", item.default) for item in fields(ModelConfig)}
    values |= {"encoder": config["model.encoder"], "weights": "none"}
    for name in config:
        if name.startswith("model.") and name.removeprefix("model.") not in values:
            raise ValueError(f"{name:.60} = {config[name]!r:.40} is not known to this version of mde_dist")
    for name, kind in get_type_hints(ModelConfig).items():
        value, known = values[name], get_args(kind)
        if (value not in known) if known else not isinstance(value, kind):
            raise ValueError(f"model.{name}: unknown {value!r:.40}")
    return ModelConfig(**values)


def estimate(model: Callable[[torch.Tensor], torch.Tensor], image: torch.Tensor, flip: bool = False) -> torch.Tensor:
    """RGB 0..1 (batch, 3, height, width) -> depth float32 (batch, height, width), metres.

    With `flip` the mean over the image and the mirrored image.
    """
    # as while training: it shows in the last digits
    image = normalise(image).contiguous(memory_format=torch.channels_last)
    depth = model(image).float()
    if flip:
        depth = (depth + model(image.flip(-1)).float().flip(-1)) / 2
    return depth
