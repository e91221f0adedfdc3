"""NVIDIA DALI on the CPU: its WebDataset reader and its decoder for both, conversion to metres in the pipeline."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import harness
import numpy as np
import tar_shards
from nvidia.dali import fn, pipeline_def, types


@pipeline_def(device_id=None, seed=0)
def pairs(urls: list[str]) -> Any:
    jpeg, png = fn.readers.webdataset(
        paths=urls, ext=["jpg", "depth.png"], missing_component_behavior="error", random_shuffle=True, name="pairs"
    )
    image = fn.decoders.image(jpeg, output_type=types.RGB)
    millimetres = fn.decoders.image(png, output_type=types.ANY_DATA, dtype=types.UINT16)
    return image, fn.cast(millimetres, dtype=types.FLOAT) / np.float32(1000)


def batches(out: Path, batch: int, workers: int) -> harness.Batches:
    pipeline = pairs(tar_shards.shards(out), batch_size=batch, num_threads=workers)
    pipeline.build()
    return stream(pipeline)


def stream(pipeline: Any) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    while True:
        image, depth = pipeline.run()
        yield np.asarray(image.as_tensor()), np.asarray(depth.as_tensor())[..., 0]


if __name__ == "__main__":
    harness.main(tar_shards.prepare, batches, ("nvidia-dali-cuda130",))
