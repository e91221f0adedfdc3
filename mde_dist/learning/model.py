"""The seed model: a ResNet encoder and a residual decoder with skip connections. Knows nothing of devices or ranks."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
import torchvision
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from ..errors import UserError

Backbone = Literal["resnet18", "resnet34", "resnet50"]
Norm = Literal["batch", "group", "frozen"]

_NORMS: dict[str, Callable[[int], nn.Module]] = {
    "batch": nn.BatchNorm2d,
    "group": partial(nn.GroupNorm, 32),
    "frozen": torchvision.ops.FrozenBatchNorm2d,
}


@dataclass(frozen=True)
class ModelConfig:
    """Encoder and its starting weights."""

    backbone: Backbone = "resnet18"
    """torchvision's encoder: resnet18, resnet34 or resnet50."""
    weights: str = "none"
    """Where the encoder starts: none (random), imagenet (torchvision's), or the path of a safetensors file with the
    tensors of a torchvision ResNet or of a whole model of ours."""
    norm: Norm = "batch"
    """Normalisation in the encoder: batch statistics; group = 32 groups of channels of one image, so that every number
    of ranks and accumulation steps learns the same to rounding; frozen = batch norm that stays as `weights` has it."""


class DepthModel(nn.Module):
    """Image (batch, 3, height, width), normalised as for ImageNet -> depth (batch, height, width), metres, positive.

    Five encoder features: after the stem's pooling and after each of the four stages, at 1/4, 1/4, 1/8, 1/16, 1/32 of
    the image. From the top, x = resize(conv_i(x)) + feature_i for i = 3, 2, 1; depth = softplus(conv(x + feature_0)) at
    1/4, brought bilinearly to the image's size. Any image size from 32x32 on.
    """

    def __init__(self, backbone: Backbone = "resnet18", norm: Norm = "batch"):
        super().__init__()
        self.encoder = torchvision.models.get_model(backbone, weights=None, norm_layer=_NORMS[norm])
        del self.encoder.fc  # what takes no part must not exist: DDP waits for the gradient of every parameter
        stages = (self.encoder.layer1, self.encoder.layer2, self.encoder.layer3, self.encoder.layer4)
        channels = [_out_channels(stage) for stage in stages]
        self.residual_convs = nn.ModuleList(
            nn.Conv2d(above, below, 3, padding=1) for below, above in pairwise(channels)
        )
        stem = self.encoder.conv1.out_channels
        self.to_stem = nn.Identity() if channels[0] == stem else nn.Conv2d(channels[0], stem, 3, padding=1)
        self.head = nn.Conv2d(stem, 1, 3, padding=1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        feature = self.encoder.maxpool(self.encoder.relu(self.encoder.bn1(self.encoder.conv1(image))))
        features = []
        x = feature
        for stage in (self.encoder.layer1, self.encoder.layer2, self.encoder.layer3, self.encoder.layer4):
            x = stage(x)
            features.append(x)
        for conv, skip in zip(reversed(self.residual_convs), reversed(features[:-1]), strict=True):
            # to the size of the skip, not by 2: sides that are no multiple of 32 are rounded up on the way down
            x = F.interpolate(conv(x), skip.shape[-2:]) + skip
        # float32 from here on: bfloat16 resolves 5 m to 3 cm only
        quarter = F.softplus(self.head(self.to_stem(x) + feature).float())
        return F.interpolate(quarter, image.shape[-2:], mode="bilinear", align_corners=False)[:, 0]


def _out_channels(stage: nn.Module) -> int:
    """Channels of a ResNet stage: those of its last convolution, which is none of a skip connection."""
    return [module for module in stage.modules() if isinstance(module, nn.Conv2d)][-1].out_channels


def skeleton(config: ModelConfig) -> DepthModel:
    """The model that a config names, with random weights."""
    return DepthModel(config.backbone, config.norm)


def build(config: ModelConfig, seed: int) -> DepthModel:
    """A model with random weights drawn from `seed`, its encoder then initialised as `config.weights` says.

    Raises UserError where the weights cannot be had.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = skeleton(config)
    if config.weights == "imagenet":
        _load_encoder(model, _imagenet(config.backbone), "torchvision's ImageNet weights")
    elif config.weights != "none":
        _load_encoder(model, _from_file(Path(config.weights)), config.weights)
    return model


def restore(metadata: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> DepthModel:
    """The model that the metadata and tensors of a model.safetensors describe, channels last. Raises UserError."""
    try:
        backbone, norm = metadata["config"]["model.backbone"], metadata["config"].get("model.norm", "batch")
        if backbone not in get_args(Backbone) or norm not in get_args(Norm):
            raise ValueError(f"unknown backbone or norm: {backbone!r:.40}, {norm!r:.40}")
        model = DepthModel(backbone, norm)
        model.load_state_dict(tensors)
        model.to(memory_format=torch.channels_last)
    except (AttributeError, KeyError, TypeError, RuntimeError, ValueError) as error:
        raise UserError(f"the weights do not fit the model they name: {str(error).splitlines()[-1]}") from None
    return model


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
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"model.weights {path}: not a safetensors file ({error}); give none, imagenet, or the path of one"
        ) from None
    ours = {name.removeprefix("encoder."): tensor for name, tensor in state.items() if name.startswith("encoder.")}
    return ours or state


def _load_encoder(model: DepthModel, state: dict[str, torch.Tensor], where: str) -> None:
    state = {name: tensor for name, tensor in state.items() if not name.startswith("fc.")}
    try:
        model.encoder.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(f"model.weights: {where} do not fit the backbone: {str(error).splitlines()[-1]}") from None
