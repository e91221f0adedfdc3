"""Depth and a camera -> a coloured point cloud as PLY."""

from dataclasses import dataclass

import numpy as np

_POINT = np.dtype([(name, "<f4") for name in ("x", "y", "z")] + [(name, "u1") for name in ("red", "green", "blue")])
_PLY_TYPES = {"<f4": "float", "|u1": "uchar"}


@dataclass(frozen=True)
class Intrinsics:
    """A pinhole camera, in pixels of its image; the centre of the first pixel is (0, 0)."""

    fx: float
    """Focal length, along the width."""
    fy: float
    """Focal length, along the height."""
    cx: float
    """Position at which the axis meets the image, along the width."""
    cy: float
    """Position at which the axis meets the image, along the height."""

    def __str__(self) -> str:
        return f"fx {self.fx:g}, fy {self.fy:g}, cx {self.cx:g}, cy {self.cy:g}"


KINECT = Intrinsics(518.86, 519.47, 325.58, 253.74)
"""The colour camera of NYU Depth v2 at 480x640, from the toolbox of the data set."""


def default_intrinsics(height: int, width: int) -> tuple[Intrinsics, str]:
    """A camera for an image that nothing is known of, and what it is in words.

    At 4:3 that of NYU Depth v2, scaled. Else one of square pixels that sees as much along the longer side, with its
    centre in the middle.
    """
    if width * 3 == height * 4:
        scale = width / 640
        # half a pixel more and less: scaling leaves the corner of the image where it is, not the centre of a pixel
        cx, cy = ((centre + 0.5) * scale - 0.5 for centre in (KINECT.cx, KINECT.cy))
        camera = Intrinsics(KINECT.fx * scale, KINECT.fy * scale, cx, cy)
        return camera, f"that of NYU Depth v2's Kinect ({KINECT} at 480x640) for images of 4:3, scaled to their size"
    part = KINECT.fx / 640
    focal = part * max(height, width)
    camera = Intrinsics(focal, focal, (width - 1) / 2, (height - 1) / 2)
    return camera, f"a typical one (fx = fy = {part:.3f} of the longer side, cx and cy in the middle) for other images"


def ply_bytes(image: np.ndarray, depth: np.ndarray, camera: Intrinsics) -> bytes:
    """RGB uint8 (height, width, 3), depth float metres (height, width) -> a binary PLY with a vertex per pixel.

    Metres in the camera's frame: x to the right, y down, z forward. Pixels whose depth is not positive, or no finite
    number, have none.
    """
    rows, columns = np.nonzero((depth > 0) & np.isfinite(depth))
    z = depth[rows, columns].astype(np.float32)
    points = np.empty(len(z), _POINT)
    points["x"] = (columns - camera.cx) / camera.fx * z
    points["y"] = (rows - camera.cy) / camera.fy * z
    points["z"] = z
    colours = image[rows, columns]
    for channel, name in enumerate(("red", "green", "blue")):
        points[name] = colours[:, channel]
    properties = [f"property {_PLY_TYPES[_POINT[name].str]} {name}" for name in _POINT.names or ()]
    head = ["ply", "format binary_little_endian 1.0", f"element vertex {len(points)}", *properties, "end_header", ""]
    return "\n".join(head).encode() + points.tobytes()
