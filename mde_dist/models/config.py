"""Options of the model. Imports no torch, so that `--help` is quick."""

from dataclasses import dataclass
from typing import Literal

from mde_dist.utils.cli import Weights

Encoder = Literal["resnet18", "resnet34", "resnet50", "tiny"]
Output = Literal["softplus", "sigmoid", "log"]
Norm = Literal["batch", "group", "frozen"]
Upsample = Literal["nearest", "bilinear"]


@dataclass(frozen=True)
class ModelConfig:
    """Encoder and its starting weights."""

    encoder: Encoder = "resnet18"
    """torchvision's encoder: resnet18, resnet34 or resnet50; tiny = a small one of their form, which starts at once and
    learns little: to try things out."""
    weights: Weights = "none"
    """Where the model starts: none (random), imagenet (torchvision's encoder), or the path of a safetensors file of a
    torchvision ResNet or of a trained model, such as RUN/model.safetensors. Of a trained model all is taken that fits;
    the start of a run says what that is."""
    norm: Norm = "batch"
    """Normalisation in the encoder: batch statistics; group = 32 groups of channels of one image, so that every number
    of ranks and accumulation steps learns the same to rounding; frozen = batch norm that stays as `weights` has it. In
    the decoder, frozen means group."""
    upsample: Upsample = "nearest"
    """How the decoder brings features to the next size: nearest or bilinear."""
    skip_conv: bool = False
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
