"""Pairs taken out of the user's shards, and the check that a loader delivers them."""

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from mde_dist.data import depth
from mde_dist.data.shards import ShardDataset
from mde_dist.tools.benchmarking.reading import read_pair
from mde_dist.utils.errors import UserError
from mde_dist.utils.io import write_atomic, writing

_CLOSE = 2.0  # levels of 255 that images may differ by on average: a fast DCT is about 1 from the exact one


def take_pairs(shards: ShardDataset, place: str, split: str, pairs: int, work: Path) -> Path:
    """Write WORK/pairs/images/*.jpg, the shards' own bytes, and WORK/pairs/depth/*.png, 16 bits in mm.

    Pairs of the same shards that an earlier call left in WORK are used again. Raises UserError where others lie there.
    """
    identity = {"index": shards.info.index.sha256, "pairs": pairs}
    folder, note = work / "pairs", work / "pairs.json"
    if note.is_file():
        known = json.loads(note.read_text("utf-8"))
        if {name: known[name] for name in identity} != identity:
            raise UserError(f"{work} holds other pairs, or another number of them; name another place with --work")
        return folder
    size = 0
    with writing(folder):
        for kind in ("images", "depth"):
            (folder / kind).mkdir(parents=True, exist_ok=True)
        millimetres = np.empty(shards.size, np.uint16)
        for sample in range(pairs):
            encoded, jpeg = read_pair(shards, sample)
            size += len(encoded) + len(jpeg)
            depth.decode(encoded, shards.manifest.codec, millimetres)
            (folder / f"images/{sample:06}.jpg").write_bytes(jpeg)
            (folder / f"depth/{sample:06}.png").write_bytes(depth.png_bytes(millimetres))
        write_atomic(note, json.dumps(identity | {"shards": place, "split": split, "bytes": size}))
    return folder


class Truth:
    """The first pairs of the shards, to compare a loader's with."""

    def __init__(self, shards: ShardDataset, pairs: int):
        self._shards = shards
        self._samples: dict[int, list[int]] = {}  # by the checksum of their depth; most often one
        for sample in range(pairs):
            metres = depth.to_metres(self._read(sample)[1])
            self._samples.setdefault(zlib.crc32(metres.tobytes()), []).append(sample)

    def complaint(self, proof: Path) -> tuple[str, dict[str, Any]]:
        """-> (a sentence on the first difference, empty where there is none; figures on the images)."""
        with np.load(proof) as found:
            images, metres, sums = found["image"], found["depth"], found["sums"].tolist()
        layout = "channels first" if images.ndim == 4 and images.shape[1] == 3 else ""
        if layout:
            images = images.transpose(0, 2, 3, 1)
        height, width = self._shards.size
        if images.dtype != np.uint8 or images.shape[1:] != (height, width, 3):
            return f"images are {images.dtype} {images.shape[1:]}, not uint8 {(height, width, 3)}", {}
        if metres.dtype != np.float32 or metres.shape[1:] != (height, width):
            return f"depth is {metres.dtype} {metres.shape[1:]}, not float32 {(height, width)}", {}
        strange = sum(number not in self._samples for number in sums)
        if strange:
            return f"depth is not that of the shards in metres in {strange} of {len(sums)} samples", {}
        if len(set(sums)) < len(self._samples) / 2:
            return f"{len(set(sums))} different samples come in an epoch of {len(self._samples)}", {}
        if len(sums) > 2 and (np.diff([self._samples[number][0] for number in sums]) == 1).all():
            return "samples come in the order in which they lie, not shuffled", {}
        apart = [self._apart(number, image) for number, image in zip(sums[: len(images)], images, strict=True)]
        mean, most = float(np.mean(apart)), int(np.max(apart))
        if mean > _CLOSE:
            return f"images differ by {mean:.1f} levels of 255 on average", {}
        return "", {"layout": layout, "image_mean_difference": mean, "image_max_difference": most}

    def _apart(self, number: int, image: np.ndarray) -> np.ndarray:
        """Levels by which an image differs from the one beside its depth."""
        apart = [np.abs(self._read(sample)[0].astype(int) - image) for sample in self._samples[number]]
        return min(apart, key=np.mean)

    def _read(self, sample: int) -> tuple[np.ndarray, np.ndarray]:
        image, millimetres = np.empty((*self._shards.size, 3), np.uint8), np.empty(self._shards.size, np.uint16)
        self._shards.read_into(sample, image, millimetres)
        return image, millimetres
