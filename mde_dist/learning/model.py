"""A ResNet encoder and a residual decoder with skip connections. Knows nothing of devices or ranks."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torchvision
from torch import nn
from torchvision.models.resnet import BasicBlock, conv1x1

from ..errors import UserError
from ..weights import read_tensors
from .decoder import ENCODER_NORMS, FullHead, Norm, QuarterHead, Upsample, bounded, refinement, resize

Backbone = Literal["resnet18", "resnet34", "resnet50", "tiny"]
Output = Literal["softplus", "sigmoid", "log"]


@dataclass(frozen=True)
class ModelConfig:
    """Encoder and its starting weights."""

    backbone: Backbone = "resnet18"
    """torchvision's encoder: resnet18, resnet34 or resnet50; tiny = a small one of their form, which starts at once and
    learns little: to try things out."""
    weights: str = "none"
    """Where the encoder starts: none (random), imagenet (torchvision's), or the path of a safetensors file with the
    tensors of a torchvision ResNet or of a whole model of ours."""
    norm: Norm = "batch"
    """Normalisation in the encoder: batch statistics; group = 32 groups of channels of one image, so that every number
    of ranks and accumulation steps learns the same to rounding; frozen = batch norm that stays as `weights` has it. In
    the decoder, which starts from nothing, frozen means group."""
    upsample: Upsample = "nearest"
    """How the decoder brings features to the next size: nearest or bilinear."""
    refine: bool = False
    """After each skip connection a 3x3 convolution with normalisation and ReLU."""
    head: Literal["quarter", "full"] = "quarter"
    """Depth is computed at a quarter of the image's size and enlarged, or at the full size, from finer features."""
    output: Output = "softplus"
    """What the head's number becomes: softplus = any positive depth; sigmoid = min_depth..max_depth, linear; log = the
    same range in logarithms."""
    min_depth: float = 0.1
    """Metres, of the bounded outputs."""
    max_depth: float = 10.0
    """Metres, of the bounded outputs; NYU Depth v2 ends at 10."""


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
            refinement(width, config.norm) if config.refine else nn.Identity() for width in channels[:-1]
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
        depth = bounded(self.head(self.to_stem(x) + feature, half, image), self._output, *self._range)
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
    if config.backbone == "tiny":
        return TinyEncoder(norm)
    encoder = torchvision.models.get_model(config.backbone, weights=None, norm_layer=norm)
    del encoder.fc  # what takes no part must not exist: DDP waits for the gradient of every parameter
    return encoder


def _out_channels(stage: nn.Module) -> int:
    """Channels of a ResNet stage: those of its last convolution, whether of the block or of its skip connection."""
    return [module for module in stage.modules() if isinstance(module, nn.Conv2d)][-1].out_channels


def skeleton(config: ModelConfig) -> DepthModel:
    """The model that a config names, with random weights."""
    return DepthModel(config)


def build(config: ModelConfig, seed: int) -> DepthModel:
    """A model with random weights drawn from `seed`, its encoder then initialised as `config.weights` says.

    Raises UserError where the weights cannot be had.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = skeleton(config)
    if config.weights == "imagenet" and config.backbone == "tiny":
        raise UserError("model.weights imagenet: tiny has none; give none, or --model.backbone resnet18")
    if config.weights == "imagenet":
        _load_encoder(model, _imagenet(config.backbone), "torchvision's ImageNet weights")
    elif config.weights != "none":
        _load_encoder(model, _from_file(Path(config.weights)), config.weights)
    return model


def restore(metadata: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> DepthModel:
    """The model that the metadata and tensors of a model.safetensors describe, channels last. Raises UserError."""
    try:
        model = skeleton(_architecture(metadata["config"]))
        model.load_state_dict(tensors)
        model.to(memory_format=torch.channels_last)
    except (AttributeError, KeyError, TypeError, RuntimeError, ValueError) as error:
        raise UserError(f"the weights do not fit the model they name: {str(error).splitlines()[-1]}") from None
    return model


def _architecture(config: Mapping[str, Any]) -> ModelConfig:
    """From the flat config of a model.safetensors, which may be older than some fields. Raises ValueError."""
    values = {item.name: config.get(f"model.{item.name}", item.default) for item in fields(ModelConfig)}
    values |= {"backbone": config["model.backbone"], "weights": "none"}
    for name in config:
        if name.startswith("model.") and name.removeprefix("model.") not in values:
            raise ValueError(f"{name:.60} = {config[name]!r:.40} is not known to this version of mde_dist")
    for item in fields(ModelConfig):
        value, known = values[item.name], get_args(item.type)
        if (value not in known) if known else not isinstance(value, item.type):  # type: ignore[arg-type]
            raise ValueError(f"model.{item.name}: unknown {value!r:.40}")
    return ModelConfig(**values)


def _imagenet(backbone: Backbone) -> dict[str, torch.Tensor]:
    """torchvision's published weights, downloaded once into torch's cache; unpickled as plain tensors only."""
    weights = torchvision.models.get_model_weights(backbone).IMAGENET1K_V1
    target = Path(torch.hub.get_dir(), "checkpoints", weights.url.rsplit("/", 1)[-1])
    try:
        state = weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
        if not (isinstance(state, Mapping) and all(isinstance(x, torch.Tensor) for x in state.values())):
            raise ValueError("it holds something else than named tensors")
        return {str(name): tensor for name, tensor in state.items()}
    except Exception as error:
        why = " ".join(str(error).split())[:200]
        raise UserError(
            f"model.weights imagenet: {target.name} cannot be had ({type(error).__name__}: {why}); without a "
            f"network, download {weights.url} elsewhere and put it at {target}, or start from "
            "scratch: --model.weights none"
        ) from None


def _from_file(path: Path) -> dict[str, torch.Tensor]:
    try:
        state = read_tensors(path)
    except UserError as error:
        raise UserError(f"model.weights: {error}; give none, imagenet, or the path of a safetensors file") from None
    ours = {name.removeprefix("encoder."): tensor for name, tensor in state.items() if name.startswith("encoder.")}
    return ours or state


def _load_encoder(model: DepthModel, state: dict[str, torch.Tensor], where: str) -> None:
    state = {name: tensor for name, tensor in state.items() if not name.startswith("fc.")}
    try:
        model.encoder.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(f"model.weights: {where} do not fit the backbone: {str(error).splitlines()[-1]}") from None
