"""WebDataset over tar shards with JPEG and 16-bit PNG, decoded by PIL, batched in the workers as its authors advise.

`.decode("pil")` would turn 16-bit depth into 8-bit RGB, so the usual recipe decodes in a `map`.
"""

import io
from pathlib import Path

import harness
import numpy as np
import tar_shards
import webdataset
from PIL import Image


def decode(sample: dict) -> tuple[np.ndarray, np.ndarray]:
    image = Image.open(io.BytesIO(sample["jpg"])).convert("RGB")
    millimetres = np.array(Image.open(io.BytesIO(sample["depth.png"])))
    return np.array(image), millimetres.astype(np.float32) / np.float32(1000)


def batches(out: Path, batch: int, workers: int) -> harness.Batches:
    urls = tar_shards.shards(out)
    data = webdataset.WebDataset(urls, shardshuffle=len(urls), seed=0).repeat().shuffle(1000, initial=100)
    return iter(webdataset.WebLoader(data.map(decode).batched(batch), batch_size=None, num_workers=workers))


if __name__ == "__main__":
    harness.main(tar_shards.prepare, batches, ("webdataset", "pillow"))
