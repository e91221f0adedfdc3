"""Pairs with the depth of a real sensor: harder to code than maps that were filled, or made from eight bits.

    python benchmarks/sensor_pairs.py BTS OUTPUT [PAIRS]

BTS holds raw training pairs of NYU Depth v2 in the layout of the bts repository (SCENE/rgb_*.jpg and
SCENE/sync_depth_*.png), of which three are enough. Out of them come PAIRS = 240 different ones, OUTPUT/train, for
`mde_dist.shard --layout folder`; the originals are OUTPUT/test. Each is an original, every second one mirrored, rolled
by whole blocks of its JPEG, with what leaves on one side coming in on the other: depth values and holes stay what the
sensor gave, and the picture, encoded with the original's quantisation, has about the original's bytes. Nothing is
random.
"""

import shutil
import sys
from pathlib import Path

import numpy as np
from PIL import Image

BLOCK = 16  # pixels that a JPEG with halved chroma codes together
COLUMNS = 10  # different rolls to the side; as many rows as are needed


def originals(folder: Path) -> list[tuple[Path, Path]]:
    images = sorted(folder.glob("*/rgb_*.jpg"))
    return [(path, path.with_name(f"sync_depth_{path.stem.removeprefix('rgb_')}.png")) for path in images]


def change(array: np.ndarray, number: int) -> np.ndarray:
    """(height, width, …) -> the same, mirrored or not, rolled down and to the side."""
    step, mirrored = divmod(number, 2)
    rows, columns = divmod(step, COLUMNS)
    height, width = (side // BLOCK for side in array.shape[:2])
    down, aside = rows * 7 % height * BLOCK, columns * (width // COLUMNS) * BLOCK
    return np.roll(array[:, ::-1] if mirrored else array, (down, aside), (0, 1))


def make(sources: list[tuple[Path, Path]], output: Path, pairs: int) -> None:
    for split in ("train", "test"):
        for kind in ("images", "depth"):
            (output / split / kind).mkdir(parents=True)
    for number in range(pairs):
        step, source = divmod(number, len(sources))
        image, depth = map(Image.open, sources[source])
        tables, sampling = image.quantization, image.info.get("subsampling", "4:2:0")
        changed = Image.fromarray(np.ascontiguousarray(change(np.asarray(image.convert("RGB")), step)))
        changed.save(output / f"train/images/{number:04}.jpg", qtables=tables, subsampling=sampling)
        changed = Image.fromarray(np.ascontiguousarray(change(np.asarray(depth), step)))
        changed.save(output / f"train/depth/{number:04}.png")
    for number, (image, depth) in enumerate(sources):
        shutil.copy(image, output / f"test/images/{number:04}.jpg")
        shutil.copy(depth, output / f"test/depth/{number:04}.png")


if __name__ == "__main__":
    make(originals(Path(sys.argv[1])), Path(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 240)
