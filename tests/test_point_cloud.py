"""Depth and a camera -> points, read back from the PLY by hand."""

import numpy as np
import pytest

from mde_dist.inference.point_cloud import Intrinsics, default_intrinsics, ply_bytes

TYPES = {"float": "<f4", "uchar": "u1"}


def read_ply(data):
    """The vertices of a binary little-endian PLY, as any reader takes them."""
    head, _, body = data.partition(b"end_header\n")
    lines = head.decode("ascii").splitlines()
    assert lines[:2] == ["ply", "format binary_little_endian 1.0"]
    assert lines[2].startswith("element vertex ")
    assert all(line.startswith("property ") for line in lines[3:])
    fields = [(name, TYPES[kind]) for _, kind, name in map(str.split, lines[3:])]
    points = np.frombuffer(body, np.dtype(fields))
    assert len(points) == int(lines[2].split()[-1])
    return points


def test_points_lie_where_the_pinhole_camera_puts_them():
    depth = np.ones((3, 4), np.float32)
    depth[2, 3], depth[0, 1] = 2, 4
    image = np.arange(36, dtype=np.uint8).reshape(3, 4, 3)
    points = read_ply(ply_bytes(image, depth, Intrinsics(fx=2, fy=4, cx=1, cy=0.5)))
    assert len(points) == 12
    found = {tuple(point.tolist()[3:]): point.tolist()[:3] for point in points}
    # by hand: x = (column - cx) / fx * z, y = (row - cy) / fy * z
    assert found[33, 34, 35] == (2.0, 0.75, 2.0)  # right, below, 2 m ahead
    assert found[3, 4, 5] == (0.0, -0.5, 4.0)
    assert found[0, 1, 2] == (-0.5, -0.125, 1.0)


def test_pixels_without_depth_have_no_point():
    depth = np.array([[0, -1, np.nan], [np.inf, 1, 2]], np.float32)
    points = read_ply(ply_bytes(np.zeros((2, 3, 3), np.uint8), depth, Intrinsics(1, 1, 0, 0)))
    assert points["z"].tolist() == [1, 2]


@pytest.mark.parametrize("scale", [1, 0.5, 2, 0.1])
def test_an_image_of_4_to_3_is_taken_by_the_kinect(scale):
    """Where a point lies in space does not depend on the size at which the image was stored."""
    camera, words = default_intrinsics(round(480 * scale), round(640 * scale))
    assert "Kinect" in words
    corner = [(-0.5 - c) / f for c, f in ((camera.cx, camera.fx), (camera.cy, camera.fy))]  # the image's edge
    assert corner == pytest.approx([-326.08 / 518.86, -254.24 / 519.47], rel=1e-6)
    if scale == 1:
        assert (camera.fx, camera.fy, camera.cx, camera.cy) == pytest.approx((518.86, 519.47, 325.58, 253.74))


@pytest.mark.parametrize("size", [(1080, 1920), (1920, 1080), (640, 480)])
def test_other_images_have_a_camera_that_sees_as_much_with_its_centre_in_the_middle(size):
    camera, words = default_intrinsics(*size)
    height, width = size
    assert "typical" in words
    assert camera.fx == camera.fy == pytest.approx(518.86 / 640 * max(size))
    assert (camera.cx, camera.cy) == ((width - 1) / 2, (height - 1) / 2)
