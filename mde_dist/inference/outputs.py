"""A depth map -> its files: for programs, for the eye, and as points in space."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from mde_dist.data.depth import metres_to_millimetres, png_bytes
from mde_dist.inference.inputs import Frame
from mde_dist.inference.point_cloud import Intrinsics, default_intrinsics, ply_bytes
from mde_dist.inference.preview import side_by_side
from mde_dist.utils.io import atomic_file, write_atomic, writing

_FARTHEST = 65.535  # metres that 16 bits of millimetres hold
_KINDS = {
    "_depth.png": "16-bit, millimetres",
    "_color.png": "to look at",
    "_depth.npy": "float32, metres",
    "_points.ply": "coloured point cloud",
}
_LEVEL = 1  # of compression: higher ones cost a multiple of the time for a tenth of the size


@dataclass(frozen=True)
class Results:
    """Folder and formats of the predictions. Serves several threads at once."""

    folder: Path
    pictures: bool = True
    """NAME_color.png: image and coloured depth beside each other."""
    metres: tuple[float, float] | None = None
    """Nearest and farthest of the colours; None = each image's own."""
    npy: bool = False
    """NAME_depth.npy: float32 metres."""
    ply: bool = False
    """NAME_points.ply: a coloured point cloud."""
    camera: Intrinsics | None = None
    """Camera of every image; None = a usual one."""

    def kinds(self) -> dict[str, str]:
        """Formats that are written of each image: the ends of the names, and their descriptions."""
        chosen = {"_depth.png": True, "_color.png": self.pictures, "_depth.npy": self.npy, "_points.ply": self.ply}
        return {kind: words for kind, words in _KINDS.items() if chosen[kind]}

    def targets(self, name: Path) -> list[Path]:
        """The files that an image of this name becomes."""
        base = self.folder / name
        return [base.with_name(base.name + kind) for kind in self.kinds()]

    def save(self, frame: Frame, depth: np.ndarray) -> tuple[int, int]:
        """Write what `frame` with `depth`, float32 metres (height, width), is to become -> its size. Raises UserError.

        In the PNG depth is held at what it can hold, 65.535 m; 0 is no prediction (not positive, or no number).
        """
        height, width = depth.shape
        with writing(self.folder):
            (self.folder / frame.name).parent.mkdir(parents=True, exist_ok=True)
            for path in self.targets(frame.name):
                if path.suffix == ".npy":
                    with atomic_file(path) as file:
                        np.save(file, depth, allow_pickle=False)
                elif path.suffix == ".ply":
                    write_atomic(
                        path, ply_bytes(frame.image, depth, self.camera or default_intrinsics(height, width)[0])
                    )
                elif path.name.endswith("_color.png"):
                    with atomic_file(path) as file:
                        picture = Image.fromarray(side_by_side(frame.image, depth, self.metres))
                        picture.save(file, format="PNG", compress_level=_LEVEL)
                else:
                    write_atomic(path, png_bytes(metres_to_millimetres(np.minimum(depth, _FARTHEST)), _LEVEL))
        return height, width

    def cameras(self, sizes: Iterable[tuple[int, int]]) -> list[str]:
        """Text that says with which cameras point clouds of images of these sizes were made."""
        if self.camera is None:
            return sorted({f"the camera taken is {default_intrinsics(*size)[1]}" for size in sizes})
        shown = [f"{height}x{width}" for height, width in sorted(sizes)]
        words = f"the camera is the given one ({self.camera})"
        return [f"{words}, for images of {' and '.join(shown)}: it can hold for one size only" if shown[1:] else words]
