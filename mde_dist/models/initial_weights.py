"""Starting weights: torchvision's for the encoder, or all that fits of a safetensors file."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn

from mde_dist.models.weights import MODEL, read_tensors
from mde_dist.utils.errors import UserError
from mde_dist.utils.io import sha256_of

PARTS = ("encoder", "decoder", "head")


@dataclass(frozen=True)
class Start:
    """Origin of the weights that a model starts from, and their part in it."""

    source: str
    """The path of a file, or torchvision's weights in words."""
    sha256: str
    """Hash of the file; empty for torchvision's, which has it in its name."""
    taken: Mapping[str, tuple[int, int]]
    """Part of the model -> tensors and parameters that were taken."""
    random: Mapping[tuple[str, str], int]
    """Part, and why it was left random -> tensors."""
    unused: int
    """Tensors of the file that the model has no place for."""

    def record(self) -> dict[str, Any]:
        """Record for metrics.jsonl: the file, and how many tensors of each part come from it."""
        return {"source": self.source, "sha256": self.sha256, "tensors": {p: n for p, (n, _) in self.taken.items()}}

    def describe(self) -> str:
        taken = (f"{part} ({count} tensors, {size:,} parameters)" for part, (count, size) in self.taken.items())
        line = f"model.weights {self.source}: took {', '.join(taken)}"
        left = [f"{part} ({count} tensors: {why})" for (part, why), count in self.random.items()]
        line += f"; left random: {', '.join(left)}" if left else ""
        return line + (f"; {self.unused} tensors of the file have no place in the model" if self.unused else "")


def initialise(model: nn.Module, weights: str, backbone: str, output: str) -> Start | None:
    """Give a model with an `encoder` and a `head` the weights that are named -> what was taken; None for `none`.

    The encoder has to fit as a whole. Of a model of ours the rest is taken too, layer by layer, where names and shapes
    are the same; its head only where its number becomes metres in the same way, `output`. Raises UserError.
    """
    if weights == "none":
        return None
    if weights == "imagenet":
        source, sha256, theirs, state = "torchvision's ImageNet weights", "", "", _imagenet(backbone)
    else:
        path = Path(weights, MODEL) if Path(weights).is_dir() else Path(weights)
        (theirs, state), source = _read(path), str(path)
        sha256 = sha256_of(path)
    if not any(name.startswith("encoder.") for name in state):  # torchvision's names
        state = {f"encoder.{name}": tensor for name, tensor in state.items() if not name.startswith("fc.")}
    encoder = {n.removeprefix("encoder."): tensor for n, tensor in state.items() if _part(n) == "encoder"}
    try:
        model.get_submodule("encoder").load_state_dict(encoder)
    except RuntimeError as error:
        raise UserError(f"model.weights: {source} do not fit the backbone: {str(error).splitlines()[-1]}") from None
    own = model.state_dict()
    reasons = _reasons(own, state, theirs not in ("", output) and f"its output is {theirs}, here {output}")
    fits = {name: state[name] for name in own if name not in reasons and name in state}
    model.load_state_dict(fits, strict=False)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    taken = {part: [name for name in fits if _part(name) == part] for part in PARTS}
    return Start(
        source,
        sha256,
        {part: (len(names), sum(sizes.get(n, 0) for n in names)) for part, names in taken.items() if names},
        Counter((_part(name), why) for name, why in reasons.items()),
        sum(not name.endswith("num_batches_tracked") for name in state.keys() - own.keys()),
    )


def _part(name: str) -> str:
    first = name.split(".")[0]
    return first if first in PARTS else "decoder"


def _reasons(own: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor], other_head: object) -> dict[str, str]:
    """The reason for each tensor of a model that is not taken from a file. A layer is taken whole or not at all."""
    why: dict[str, str] = {}
    for name, tensor in own.items():
        layer = name.rpartition(".")[0]
        if _part(name) == "encoder":
            continue
        if other_head and _part(name) == "head":
            why[layer] = str(other_head)
        elif name not in state:
            why[layer] = "not in the file"
        elif state[name].shape != tensor.shape:
            why[layer] = "another shape in the file"
    return {name: why[name.rpartition(".")[0]] for name in own if name.rpartition(".")[0] in why}


def _imagenet(backbone: str) -> dict[str, torch.Tensor]:
    """torchvision's published weights, downloaded once into torch's cache; unpickled as plain tensors only."""
    if backbone == "tiny":
        raise UserError("model.weights imagenet: tiny has none; give none, or --model.encoder resnet18")
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


def _read(path: Path) -> tuple[str, dict[str, torch.Tensor]]:
    """The output of the model of ours that a file holds, empty where it is none, and its tensors. Raises UserError."""
    try:
        config, tensors = read_tensors(path)
    except UserError as error:
        raise UserError(f"model.weights: {error}; give none, imagenet, or the path of a safetensors file") from None
    return str(config.get("model.output", "softplus")) if config else "", tensors
