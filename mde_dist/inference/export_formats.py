"""A model as a program that does without mde_dist, in a file that does without pickle: ONNX, and torch.export's."""

import io
import json
import warnings
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mde_dist import __version__
from mde_dist.data.augmentation import IMAGENET_MEAN, IMAGENET_STD
from mde_dist.models.depth_model import load_model
from mde_dist.utils.errors import UserError
from mde_dist.utils.io import write_atomic

OLDEST_TORCH = "2.9"
"""Oldest torch whose exporters do everything asked of them here; 2.5 writes its programs as pickle, and no ONNX of this
model."""
OPSET = 18
"""Operator set of ONNX; runtimes know it since 2023."""
Run = Callable[[torch.Tensor], torch.Tensor]
"""RGB 0..1 float32 (batch, 3, height, width) -> depth float32 (batch, height, width), metres."""


class DepthProgram(nn.Module):
    """RGB 0..1 float32 (batch, 3, height, width) -> depth float32 (batch, height, width), metres."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        # buffers, where `augment.normalise` has constants: they go to another device with the weights
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(3, 1, 1))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.model((image - self.mean) / self.std)


def about(size: tuple[int, int]) -> dict[str, str]:
    """Description of a program, which its file carries."""
    height, width = size
    return {
        "input": f"image: float32 (batch, 3, {height}, {width}), RGB, 0 to 1; the normalisation is inside",
        "output": f"depth: float32 (batch, {height}, {width}), metres",
        "made_by": f"mde_dist {__version__}, torch {torch.__version__}",
    }


def trace(
    metadata: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], size: tuple[int, int]
) -> torch.export.ExportedProgram:
    """The model of a model.safetensors as a graph for images of `size`, any batch. Raises UserError."""
    program = DepthProgram(load_model(metadata, tensors)).eval()  # channels last, as the model itself runs
    shapes = {"image": {0: torch.export.Dim("batch", min=1)}}
    with torch.no_grad():
        exported = torch.export.export(program, (torch.zeros(2, 3, *size),), dynamic_shapes=shapes)
    exported.example_inputs = None  # saved, they would be a pickle
    for node in exported.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of this machine
    return exported


def write_torch(exported: torch.export.ExportedProgram, path: Path, metadata: Mapping[str, str]) -> None:
    """Write a program as torch.export.load reads it: a ZIP of JSON and of the bytes of the weights, with `metadata`
    inside.

    Raises UserError where this torch would write a pickle.
    """
    archive = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "No complete tensor")  # of weights that are channels last; all are written
        torch.export.save(exported, archive, extra_files={"mde_dist.json": json.dumps(metadata, indent=1)})
    pickles = _pickles(archive)
    if pickles:
        raise UserError(
            f"torch {torch.__version__} writes pickle into {path.name} ({pickles[0]}); leave this program out: "
            "--formats onnx"
        )
    write_atomic(path, archive.getvalue())


def _pickles(archive: io.BytesIO) -> list[str]:
    """Files in a ZIP that torch.save wrote, which are ZIPs themselves."""
    with zipfile.ZipFile(archive) as files:
        return [info.filename for info in files.infolist() if files.open(info).read(4) == b"PK\x03\x04"]


def open_torch(path: Path) -> Run:
    program = torch.export.load(path).module()

    def run(image: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return program(image)

    return run


def write_onnx(exported: torch.export.ExportedProgram, path: Path, metadata: Mapping[str, str]) -> None:
    """Write a program as ONNX, one file with the weights inside. `metadata` becomes that of the file."""
    (image,) = (node.meta["val"] for node in exported.graph.nodes if node.name == "image")
    program = torch.onnx.export(
        exported,
        (torch.zeros(2, *image.shape[1:]),),
        dynamo=True,
        verbose=False,
        opset_version=OPSET,
        input_names=["image"],
        output_names=["depth"],
        dynamic_shapes={"image": {0: torch.export.Dim("batch")}},
    )
    assert program is not None
    program.model.metadata_props.update(metadata)
    write_atomic(path, program.model_proto.SerializeToString())


def open_onnx(path: Path) -> Run:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda image: torch.from_numpy(session.run(["depth"], {"image": image.numpy()})[0])


@dataclass(frozen=True)
class Format:
    """A kind of program, and what a model card says of it."""

    file: str
    write: Callable[[torch.export.ExportedProgram, Path, Mapping[str, str]], None]
    open: Callable[[Path], Run]
    about: str
    """Description of the format and its needs, in a sentence that ends in a colon."""
    usage: str
    """Python that runs it on `image`, RGB uint8 (height, width, 3) of its size."""


FORMATS = {
    "onnx": Format(
        "model.onnx",
        write_onnx,
        open_onnx,
        f"is ONNX, opset {OPSET}, with the weights inside:",
        "import onnxruntime\n"
        'session = onnxruntime.InferenceSession("model.onnx")\n'
        'depth = session.run(["depth"], {"image": image.transpose(2, 0, 1)[None].astype("float32") / 255})[0][0]\n',
    ),
    "torch": Format(
        "model.pt2",
        write_torch,
        open_torch,
        f"is of torch.export, written by torch {torch.__version__.split('+')[0]}. It holds JSON and the bytes of the "
        "weights, no pickle:",
        "import torch\n"
        'program = torch.export.load("model.pt2").module()\n'
        "depth = program(torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255)[0]\n",
    ),
}
