"""A trained model that takes images as they come: any size, several at once, on the device there is."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from mde_dist.data.augmentation import resize_image
from mde_dist.distributed.config import Precision
from mde_dist.distributed.process_group import mixed_precision
from mde_dist.models.depth_model import DepthModel, estimate, load_model
from mde_dist.models.weights import MODEL, read_model
from mde_dist.utils.errors import UserError

SMALLEST = 32  # pixels; the encoder halves five times
CPU_BATCH, GPU_BATCH = 4, 32  # one by one the threads of a CPU wait for each other too often, more bring nothing


class Predictor:
    """A model that is shown each image with as many pixels as it was trained at, aspect kept.

    So an image of the aspect of training is seen at the very size of training, as `evaluate` shows it. One of another
    aspect is not squeezed into it, but seen at a size of its own: a model that was trained on squeezed images (`--size
    224x224` of 480x640 ones) meets undistorted ones here, and squeezed ones in `evaluate`, and answers a little
    differently.
    """

    def __init__(
        self,
        model: DepthModel,
        metadata: dict[str, Any],
        device: torch.device,
        flip: bool = False,
        precision: Precision = "auto",
    ):
        """`metadata`: of its model.safetensors. `flip`: average with the prediction of the mirrored image.
        `precision`: auto = bf16 on GPUs that have it, else fp32."""
        self.config: dict[str, Any] = metadata["config"]
        """The config that it was trained with, by `section.field`."""
        self.device = device
        self.batch_size = CPU_BATCH if device.type == "cpu" else GPU_BATCH
        """Images at once: may be set, and is lowered when the device's memory runs out."""
        self.precision = mixed_precision(precision, device.type == "cuda").replace("no", "fp32")
        self._model, self._flip = model.to(device).eval(), flip
        self._area = metadata["size"][0] * metadata["size"][1]

    def input_size(self, height: int, width: int) -> tuple[int, int]:
        """The size at which the model is shown an image of height x width, pixels."""
        scale = (self._area / (height * width)) ** 0.5
        return max(SMALLEST, round(height * scale)), max(SMALLEST, round(width * scale))

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """RGB uint8 (height, width, 3) -> depth float32 (height, width), metres."""
        return self.predict_batch([image])[0]

    def predict_batch(self, images: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Predict several images that the model is shown at one size (`input_size`), whatever sizes they have.

        Where the device's memory runs out, `batch_size` becomes half of their number, and they are done in halves.
        Raises UserError where not even one image fits.
        """
        try:
            return self._at_once(images)
        except torch.OutOfMemoryError:
            pass  # what it holds is freed when this block is left
        if len(images) == 1:
            height, width = images[0].shape[:2]
            raise UserError(f"{self.device}: an image of {height}x{width} does not fit into its memory; --device cpu")
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.batch_size = half = len(images) // 2
        return [*self.predict_batch(images[:half]), *self.predict_batch(images[half:])]

    @torch.inference_mode()
    def _at_once(self, images: Sequence[np.ndarray]) -> list[np.ndarray]:
        size = self.input_size(*images[0].shape[:2])
        # one by one down to what the model sees: a few photographs at their own size would be gigabytes of floats
        shown = torch.cat([resize_image(self._upload(image), size) for image in images])
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            depths = estimate(self._model, shown, self._flip)
        return [self._download(depth, image.shape[:2]) for depth, image in zip(depths, images, strict=True)]

    def _upload(self, image: np.ndarray) -> torch.Tensor:
        """-> RGB float32 (1, 3, height, width), 0..1."""
        pixels = torch.from_numpy(np.require(image, requirements=("C", "W"))).to(self.device)
        return pixels.permute(2, 0, 1)[None].float() / 255

    def _download(self, depth: torch.Tensor, size: tuple[int, int]) -> np.ndarray:
        """(h, w) -> (height, width), brought to it as the protocols of `evaluate` do."""
        if depth.shape != size:
            depth = F.interpolate(depth[None, None], size, mode="bilinear", align_corners=False)[0, 0]
        return depth.cpu().numpy()


def open_predictor(
    path: str | Path, device: torch.device | None = None, flip: bool = False, precision: Precision = "auto"
) -> Predictor:
    """The model of a model.safetensors, or of a folder that has one, ready for images. Raises UserError.

    `device`: by default a GPU where there is one; the other options as of Predictor.
    """
    path = Path(path)
    metadata, tensors = read_model(path / MODEL if path.is_dir() else path)
    return Predictor(load_model(metadata, tensors), metadata, device or pick_device("auto"), flip, precision)


def pick_device(name: str) -> torch.device:
    """cpu, cuda, cuda:1, mps, …; auto is a GPU where there is one. Raises UserError where it is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: not there ({str(error).splitlines()[0]})") from None
    return device
