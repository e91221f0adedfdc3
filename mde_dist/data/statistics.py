"""Depth statistics of a split: exact integer sums, so that they do not depend on how the work was shared out."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np


@dataclass
class Statistics:
    """Sums over depth maps; those of two shards merge by addition."""

    histogram: np.ndarray
    """int64 (65536,): pixels with each millimetre value; the first counts the holes."""
    total: np.ndarray
    """int64 (height, width): sum of millimetres per pixel."""
    valid: np.ndarray
    """int64 (height, width): maps with a measurement at the pixel."""
    reencoded: np.ndarray
    """int64 (1,): images that were resized, turned, or were no baseline JPEG."""
    turned: np.ndarray
    """int64 (1,): images whose file has an EXIF orientation that is not upright."""
    stray: np.ndarray
    """int64 (1,): JPEGs with stray bytes, see `images.decode_jpeg`."""

    @classmethod
    def empty(cls, size: tuple[int, int]) -> "Statistics":
        return cls(*(np.zeros(shape, np.int64) for shape in ((65536,), size, size, (1,), (1,), (1,))))

    def add(self, millimetres: np.ndarray, reencoded: bool, turned: bool = False, stray: bool = False) -> None:
        self.histogram += np.bincount(millimetres.reshape(-1), minlength=65536)
        self.total += millimetres
        self.valid += millimetres > 0
        self.reencoded += reencoded
        self.turned += turned
        self.stray += stray

    def merge(self, other: Mapping[str, np.ndarray]) -> None:
        for name, array in vars(self).items():
            array += other[name]

    def mean_map(self) -> np.ndarray:
        """uint16 millimetres (height, width): mean depth per pixel; the overall mean where none was measured."""
        overall = round(self.summary()["mean"] * 1000)
        mean = np.rint(self.total / np.maximum(self.valid, 1))
        return np.where(self.valid > 0, mean, overall).astype(np.uint16)

    def summary(self) -> dict[str, float]:
        """Metres over valid pixels, and the share of holes."""
        values, pixels = np.arange(1, 65536), self.histogram[1:]
        present = values[pixels > 0]
        count = int(pixels.sum())
        median = values[np.searchsorted(np.cumsum(pixels), (count + 1) // 2)]
        return {
            "min": int(present[0]) / 1000,
            "median": int(median) / 1000,
            "mean": int((values * pixels).sum()) / count / 1000,
            "max": int(present[-1]) / 1000,
            "holes": int(self.histogram[0]) / int(self.histogram.sum()),
        }
