"""FFCV: JPEGs with the files' own bytes, depth raw as uint16; its threads decode and turn millimetres into metres."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import ffcv.fields.rgb_image
import harness
import numpy as np
from ffcv.fields import NDArrayField, RGBImageField
from ffcv.fields.decoders import NDArrayDecoder, SimpleRGBImageDecoder
from ffcv.loader import Loader, OrderOption
from ffcv.pipeline.allocation_query import AllocationQuery
from ffcv.pipeline.compiler import Compiler
from ffcv.pipeline.operation import Operation
from ffcv.pipeline.state import State
from ffcv.writer import DatasetWriter
from PIL import Image

_EPOCHS = 100  # in one of its own


class Pairs:
    def __init__(self, pairs: Path):
        self._files = harness.files(pairs)

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        image, depth = self._files[number]
        # FFCV encodes pixels anew; the same bytes for everybody keep the work of decoding equal
        ffcv.fields.rgb_image.encode_jpeg = lambda pixels, quality: np.frombuffer(image.read_bytes(), np.uint8)
        return np.array(Image.open(image)), np.array(Image.open(depth))


class ToMetres(Operation):
    """uint16 millimetres -> float32 metres."""

    def generate_code(self) -> Callable:
        each = Compiler.get_iterator()

        def convert(millimetres: np.ndarray, metres: np.ndarray) -> np.ndarray:
            for number in each(millimetres.shape[0]):
                metres[number] = millimetres[number] / np.float32(1000)
            return metres[: millimetres.shape[0]]

        convert.is_parallel = True  # type: ignore[attr-defined]
        return convert

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, AllocationQuery]:
        metres = np.dtype("float32")
        return replace(previous_state, dtype=metres), AllocationQuery(previous_state.shape, metres)


def prepare(pairs: Path, out: Path) -> None:
    out.mkdir(parents=True)
    data = Pairs(pairs)
    shape = data[0][1].shape
    fields = {"image": RGBImageField(write_mode="jpg"), "depth": NDArrayField(np.dtype("uint16"), shape)}
    DatasetWriter(str(out / "pairs.beton"), fields, num_workers=1).from_indexed_dataset(data)


def batches(out: Path, batch: int, workers: int) -> harness.Batches:
    file = str(out / "pairs.beton")
    stages = {"image": [SimpleRGBImageDecoder()], "depth": [NDArrayDecoder(), ToMetres()]}
    once = Loader(file, batch, num_workers=workers, order=OrderOption.RANDOM, seed=0, pipelines=stages)
    indices = np.tile(once.indices, _EPOCHS)
    return iter(Loader(file, batch, workers, True, OrderOption.RANDOM, seed=0, indices=indices, pipelines=stages))


if __name__ == "__main__":
    harness.main(prepare, batches, ("ffcv",))
