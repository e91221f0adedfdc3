"""The embedded sample: a pure function of its seed, with metric z-depth that belongs to its image."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import pytest

from mde_dist.packing.rooms import Camera, build_scene, cast, intrinsics, render_room
from mde_dist.packing.rooms.geometry import BOX, CYLINDER, ELLIPSOID
from mde_dist.packing.rooms.scene import interval

SIZE = (120, 160)
SEEDS = range(16)


@lru_cache(maxsize=64)
def rendered(seed: int, size: tuple[int, int] = SIZE) -> tuple[np.ndarray, np.ndarray]:
    return render_room(seed, size)


def back_project(seed: int, depth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Points (3, n) in room coordinates and their noise's sigma (n,) in metres, of the measured pixels."""
    scene = build_scene(seed)
    fx, fy, cx, cy = intrinsics((depth.shape[0], depth.shape[1]))
    row, column = np.nonzero(depth)
    z = depth[row, column].astype(np.float64)
    camera = np.stack([(column - cx) / fx * z, (row - cy) / fy * z, z])
    sigma = 1.4e-3 * z * np.linalg.norm(camera, axis=0)
    return scene.axes.T @ camera + scene.position[:, None], sigma


def outside(seed: int, depth: np.ndarray) -> float:
    """Share of the measured points that lie beyond the room's walls, floor or ceiling by more than the noise."""
    point, sigma = back_project(seed, depth)
    beyond = np.maximum(-point, point - build_scene(seed).extent[:, None]).max(0)
    return float((beyond > 6 * sigma + 0.005).mean())


def test_same_seed_gives_same_bits_whatever_the_global_state() -> None:
    np.random.seed(1)  # noqa: NPY002 - the global generator is what must not matter
    first = render_room(3, SIZE)
    assert np.random.random_sample() == np.random.RandomState(1).random_sample()  # noqa: NPY002 - and is untouched
    np.random.seed(2)  # noqa: NPY002
    second = render_room(3, SIZE)
    assert first[0].tobytes() == second[0].tobytes()
    assert first[1].tobytes() == second[1].tobytes()


def test_seeds_differ() -> None:
    images = {rendered(seed)[0].tobytes() for seed in SEEDS}
    depths = {rendered(seed)[1].tobytes() for seed in SEEDS}
    assert len(images) == len(depths) == len(SEEDS)
    medians = [np.median(depth[depth > 0]) for _, depth in map(rendered, SEEDS)]
    assert np.std(medians) > 0.2
    colours = np.stack([rendered(seed)[0].mean((0, 1)) for seed in SEEDS])
    assert colours.std(0).min() > 4


@pytest.mark.parametrize("size", [(240, 320), (48, 64), (90, 160)])
def test_shapes_types_and_ranges(size: tuple[int, int]) -> None:
    image, depth = render_room(5, size)
    assert image.shape == (*size, 3)
    assert image.dtype == np.uint8
    assert image.flags.c_contiguous
    assert depth.shape == size
    assert depth.dtype == np.float32
    measured = depth[depth > 0]
    assert np.isfinite(depth).all()
    assert measured.min() > 0.4
    assert depth.max() < 10.5
    assert 60 < image.mean() < 200
    assert image.std() > 15


def test_holes_are_few_but_there() -> None:
    shares = np.array([(rendered(seed)[1] == 0).mean() for seed in SEEDS])
    assert shares.min() > 0.02
    assert shares.max() < 0.25
    assert 0.03 < np.median(shares) < 0.15


def test_depth_is_that_of_rooms() -> None:
    for seed in SEEDS:
        depth = rendered(seed)[1]
        measured = depth[depth > 0]
        assert 1 < np.median(measured) < 5
        assert (measured < 0.7).mean() < 0.25


def test_intrinsics_are_those_of_nyu() -> None:
    assert intrinsics((480, 640)) == pytest.approx((519, 519, 319.5, 239.5))


def test_camera_stands_in_the_room_and_outside_of_furniture() -> None:
    for seed in range(60):
        scene = build_scene(seed)
        assert 1.2 <= scene.position[2] <= 1.8
        assert (scene.position > 0.3).all()
        assert (scene.position < scene.extent).all()
        assert np.allclose(scene.axes @ scene.axes.T, np.eye(3), atol=1e-5)
        depth, _ = cast(scene, Camera(scene.position, scene.axes, (24, 32), intrinsics((24, 32))[0]))
        assert depth.min() > 0.1
        c, s = scene.turn.T
        x, y, z = (scene.position - scene.centre).T
        local = np.stack([c * x + s * y, c * y - s * x, z], 1)
        assert not (np.abs(local) < scene.half)[1:].all(1).any()


def test_back_projected_points_lie_in_and_on_the_room() -> None:
    on_floor = on_wall = 0
    for seed in SEEDS:
        depth = rendered(seed)[1]
        assert outside(seed, depth) < 1e-3
        point, sigma = back_project(seed, depth)
        extent = build_scene(seed).extent[:, None]
        gap = np.minimum(np.abs(point), np.abs(point - extent))
        on_floor += int((np.abs(point[2]) < 3 * sigma).sum())
        on_wall += int((gap[:2].min(0) < 3 * sigma).sum())
    pixels = len(SEEDS) * SIZE[0] * SIZE[1]
    assert on_floor > 0.08 * pixels
    assert on_wall > 0.25 * pixels


def test_plane_check_would_catch_ray_lengths_and_other_units() -> None:
    height, width = SIZE
    fx, fy, cx, cy = intrinsics(SIZE)
    x, y = (np.arange(width) - cx) / fx, (np.arange(height)[:, None] - cy) / fy
    length_per_depth = np.sqrt(1 + x * x + y * y)
    as_ray_length = [outside(seed, rendered(seed)[1] * length_per_depth) for seed in SEEDS]
    as_feet = [outside(seed, rendered(seed)[1] / 0.3048) for seed in SEEDS]
    assert np.median(as_ray_length) > 0.1
    assert np.median(as_feet) > 0.5


def test_noise_grows_with_the_square_of_depth() -> None:
    scaled = []
    for seed in SEEDS:
        scene, depth = build_scene(seed), rendered(seed)[1]
        exact, _ = cast(scene, Camera(scene.position, scene.axes, SIZE, intrinsics(SIZE)[0]))
        error = (depth - exact)[depth > 0]
        scaled.append(error / exact[depth > 0] ** 2)
    assert np.concatenate(scaled).std() == pytest.approx(1.4e-3, rel=0.05)
    near, far = np.split(np.argsort([np.median(rendered(seed)[1]) for seed in SEEDS]), 2)
    ratio = np.concatenate([scaled[k] for k in far]).std() / np.concatenate([scaled[k] for k in near]).std()
    assert ratio == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("seed", [0, 4, 11])
def test_size_only_changes_the_sampling(seed: int) -> None:
    large, small = rendered(seed, (240, 320)), rendered(seed)
    blocks = large[1].reshape(120, 2, 160, 2).transpose(0, 2, 1, 3).reshape(120, 160, 4)
    both = (blocks > 0).all(-1) & (small[1] > 0)
    assert both.mean() > 0.75
    relative = np.abs(blocks.mean(-1) - small[1])[both] / small[1][both]
    assert np.median(relative) < 0.01
    assert (relative < 0.04).mean() > 0.96
    brightness = [a.astype(float).mean(-1) for a in (large[0].reshape(120, 2, 160, 2, 3).mean((1, 3)), small[0])]
    assert np.corrcoef(brightness[0].ravel(), brightness[1].ravel())[0, 1] > 0.95


def test_image_shows_the_depth_edges() -> None:
    at_edges, elsewhere = [], []
    for seed in SEEDS:
        image, depth = rendered(seed)
        step = np.abs(np.diff(image.astype(float), axis=0)).mean(-1)
        above, below = depth[:-1], depth[1:]
        measured = (above > 0) & (below > 0)
        jump = np.abs(above - below) > 0.08 * np.minimum(above, below)
        at_edges.append(step[measured & jump])
        elsewhere.append(step[measured & ~jump])
    edges = np.concatenate(at_edges)
    assert len(edges) > 500
    assert edges.mean() > 2.5 * np.concatenate(elsewhere).mean()


def test_ray_meets_solids_where_geometry_says() -> None:
    half = np.array([0.5, 0.5, 0.5], np.float32)
    origin = np.array([-3, 0, 0], np.float32)
    offset = np.array([0.1, 0.8], np.float32)
    rays = np.stack([np.ones(2, np.float32), offset / 3, np.full(2, 1e-6, np.float32)])[:, None, :]
    with np.errstate(invalid="ignore"):
        for shape in (BOX, CYLINDER, ELLIPSOID):
            entry, leave = interval(shape, half, origin, rays)
            for t, side in ((entry[0, 0], -1), (leave[0, 0], 1)):
                x, y = -3 + t, 0.1 / 3 * t
                radius = abs(x) if shape == BOX else np.hypot(x, y)
                assert np.sign(x) == side
                assert radius == pytest.approx(0.5, abs=1e-4)
            assert not entry[0, 1] < leave[0, 1]  # the second ray passes beside it
