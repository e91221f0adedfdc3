"""One split of a source as it lies on disk, for the loader: what is scored without packing it first."""

import numpy as np

from mde_dist.data.dataset import DepthDataset
from mde_dist.packing.sources import BadPair, Source


class RawDataset(DepthDataset):
    """The pairs of one split of a recognised data set, in the order of its list."""

    advice = "mend or remove it, or look at the data set with: python -m mde_dist.shard --source DIR --dry-run"

    def __init__(self, source: Source, split: str, size: tuple[int, int]):
        """`size`: height and width that every pair must have, pixels."""
        super().__init__()
        self.size, self.location = size, str(source.root)
        self._source, self._split, self._name = source, source.splits[split], split

    def __len__(self) -> int:
        return len(self._split.pairs)

    def read_into(self, sample: int, image: np.ndarray, target: np.ndarray) -> None:
        try:
            raw = self._source.read(self._split.pairs[sample], self._split.scale)
        except BadPair as error:
            raise self.damaged(sample, error) from None
        if raw.image.shape[:2] != self.size:
            height, width = raw.image.shape[:2]
            what = f"is {height}x{width}, but the others are {self.size[0]}x{self.size[1]}"
            raise self.damaged(sample, f"{what}; pack the split at one size with: python -m mde_dist.shard --size")
        image[...], target[...] = raw.image, raw.depth
        if raw.stray_bytes:
            self.stray.add(sample)

    def meta(self, sample: int) -> dict[str, str]:
        pair = self._split.pairs[sample]
        return {"scene": pair.scene, "source": pair.image, "split": self._name}

    def key(self, sample: int) -> str:
        return self._split.pairs[sample].key

    def file_of(self, sample: int) -> str:
        return f"{self.location}/{self._split.pairs[sample].image}"

    def close(self) -> None:
        """Nothing is held open between reads."""

    def prefetch(self, file: int) -> None:
        """Do nothing: all files are on this machine."""
