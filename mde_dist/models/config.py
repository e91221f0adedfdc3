"""Options of the model. Imports no torch, so that `--help` is quick."""

from dataclasses import dataclass
from typing import Literal

from mde_dist.utils.cli import Weights, option

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
    """Starting weights: none (random), imagenet (torchvision's encoder), or the path of a safetensors file of a
    torchvision ResNet or of a trained model, such as RUN/model.safetensors. Of a trained model all is taken that fits;
    the start of a run says what that is."""
    norm: Norm = "batch"
    """Normalisation in the encoder: batch statistics; group = 32 groups of channels of one image, so that every number
    of ranks and accumulation steps learns the same to rounding; frozen = batch norm that stays as `weights` has it. In
    the decoder, frozen means group."""
    upsample: Upsample = "nearest"
    """Interpolation by which the decoder enlarges features: nearest or bilinear."""
    skip_conv: bool = False
    """After each skip connection a 3x3 convolution with normalisation and ReLU."""
    head: Literal["quarter", "full"] = "quarter"
    """Depth is computed at a quarter of the image's size and enlarged, or at the full size, from finer features."""
    output: Output = "softplus"
    """Function from the head's number to depth: softplus = any positive depth; sigmoid = min_depth..max_depth, linear;
    log = the same range in logarithms."""
    min_depth: float = option(0.1, low=1e-3)
    """Metres, of the bounded outputs."""
    max_depth: float = 10.0
    """Metres, of the bounded outputs; NYU Depth v2 ends at 10."""
