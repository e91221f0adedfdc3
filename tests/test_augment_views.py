"""Windows, magnification and pasted depth: where each pixel of a view comes from, and what its depth is then."""

import numpy as np
import pytest
import torch
from commands import records, small
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from warm import warm_run, without_pictures

from mde_dist.data.augmentation import IMAGENET_MEAN, IMAGENET_STD, normalise, prepare, prepare_depth, prepare_images
from mde_dist.data.config import AugmentConfig, view_size
from mde_dist.data.crops import paste_depth, random_crop_zoom, rectangles
from mde_dist.data.loader import Batch
from mde_dist.data.sampler import hash_uniform
from mde_dist.models.weights import read_model
from mde_dist.training.config import read_config
from mde_dist.utils.errors import UserError

SIZE = (40, 52)
SEED = 4


def still(**changes):
    """Nothing but what is named."""
    return AugmentConfig(**{"flip": 0.0, "color": 0.0, **changes})


def numbered(samples, size=SIZE, epoch=0):
    """Each pixel of depth is its number from 1 on, in millimetres; each of the image is that too, in two bytes."""
    number = np.arange(1, size[0] * size[1] + 1).reshape(size)
    image = np.stack([number >> 8, number & 255, np.zeros(size)], axis=-1).astype(np.uint8)
    samples = np.asarray(samples, np.int64)
    images, depths = (
        torch.from_numpy(np.repeat(array[None], len(samples), 0)) for array in (image, number.astype(np.uint16))
    )
    return Batch(images, depths, np.full(len(samples), epoch, np.int64), samples)


def noisy(samples, size=SIZE):
    """Holes, and another picture for each sample."""
    images, depths = [], []
    for sample in samples:
        rng = np.random.default_rng(int(sample))
        images.append(rng.integers(0, 256, (*size, 3), dtype=np.uint8))
        depths.append((rng.integers(500, 10_000, size) * (rng.random(size) > 0.3)).astype(np.uint16))
    samples = np.asarray(samples, np.int64)
    return Batch(*(torch.from_numpy(np.stack(x)) for x in (images, depths)), np.zeros_like(samples), samples)


def places(depth, size=SIZE):
    """Row and column that each pixel of a numbered view came from."""
    return np.divmod(np.rint(depth.numpy() * 1000).astype(int) - 1, size[1])


def plain(image):
    """RGB 0..1 again."""
    return image * torch.tensor(IMAGENET_STD).view(3, 1, 1) + torch.tensor(IMAGENET_MEAN).view(3, 1, 1)


# --- windows ---


def test_a_window_of_everything_is_the_image():
    batch = noisy(range(5))
    for augment in (still(), still(crop=SIZE), still(border=0.0)):
        image, depth = prepare(batch, SIZE, augment, SEED)
        assert torch.equal(image, normalise(prepare_images(batch, SIZE)))
        assert torch.equal(depth, prepare_depth(batch))


def test_a_window_is_a_copy_from_inside_the_border_and_reaches_all_of_it():
    augment, samples = still(border=0.05, crop=(32, 44)), np.arange(300)
    batch = numbered(samples)
    image, depth = prepare(batch, SIZE, augment, SEED)
    row, column = places(depth)
    assert (row == row[:, :1, :1] + np.arange(32)[:, None]).all()
    assert (column == column[:, :1, :1] + np.arange(44)).all()
    # 0.05 of 40 and of 52, rounded, are 2 and 3 pixels
    tops, lefts = row[:, 0, 0], column[:, 0, 0]
    assert set(tops.tolist()) == set(range(2, 40 - 2 - 32 + 1))
    assert set(lefts.tolist()) == set(range(3, 52 - 3 - 44 + 1))
    assert abs(np.corrcoef(tops, lefts)[0, 1]) < 0.25  # spread 0.06
    stored = prepare_images(batch, SIZE).permute(0, 2, 3, 1)
    copied = stored[samples[:, None, None], torch.from_numpy(row), torch.from_numpy(column)].permute(0, 3, 1, 2)
    assert torch.equal(image, normalise(copied))


def test_the_border_alone_is_cut_off():
    batch = noisy(range(3))
    image, depth = prepare(batch, SIZE, still(border=0.25), SEED)
    assert torch.equal(depth, prepare_depth(batch)[:, 10:30, 13:39])
    assert torch.equal(image, normalise(prepare_images(batch, SIZE)[..., 10:30, 13:39]))


def test_a_window_is_mirrored_after_it_is_cut():
    batch = noisy(range(8))
    for changes in ({"crop": (32, 40)}, {"border": 0.1}, {"zoom": 2.0, "crop": (32, 40)}):
        image, depth = prepare(batch, SIZE, still(**changes), SEED)
        mirrored = prepare(batch, SIZE, still(flip=1.0, **changes), SEED)
        assert torch.equal(mirrored[0], image.flip(-1))
        assert torch.equal(mirrored[1], depth.flip(-1))


def test_resized_images_are_cut_at_the_size_they_are_resized_to():
    batch = noisy(range(3), (80, 104))
    whole = prepare(batch, SIZE, still(), SEED)
    image, depth = prepare(batch, SIZE, still(border=0.1), SEED)
    assert torch.equal(image, whole[0][..., 4:36, 5:47])
    assert torch.equal(depth, whole[1][..., 4:36, 5:47])


@settings(deadline=None, max_examples=60)
@given(
    size=st.tuples(st.integers(32, 70), st.integers(32, 70)),
    border=st.floats(0, 0.25),
    crop=st.none() | st.tuples(st.integers(32, 70), st.integers(32, 70)),
    zoom=st.sampled_from([1.0, 1.3, 4.0]),
    sample=st.integers(0, 2**40),
)
def test_a_view_has_the_stated_size_and_stays_inside(size, border, crop, zoom, sample):
    augment = still(border=border, crop=crop, zoom=zoom, cut_depth=0.5)
    try:
        height, width = view_size(size, augment)
    except UserError:
        assume(False)
    image, depth = prepare(numbered([sample], size), size, augment, SEED)
    assert image.shape == (1, 3, height, width)
    assert depth.shape == (1, height, width)
    z = 1 + (zoom - 1) * hash_uniform(SEED, 0, sample, 9)
    row, column = places(depth * z, size)
    for place, side in ((row, size[0]), (column, size[1])):
        frame = int(border * side + 0.5)
        assert frame <= place.min() <= place.max() < side - frame


# --- magnification ---


def test_golden_magnification():
    # 2 of 4 columns, twice as large: from 1 to 3, centres at 1.25, 1.75, 2.25, 2.75; pixel k's own centre is k + 0.5
    image = torch.tensor([10.0, 20.0, 30.0, 40.0]).expand(1, 3, 4, 4)
    depth = torch.tensor([1.0, 2.0, 0.0, 4.0]).expand(1, 4, 4)
    middle, metres = random_crop_zoom(image, depth, np.array([[0.5, 0.5, 0.5]]), still(zoom=3.0))
    assert middle[0, 1, 2].tolist() == pytest.approx([17.5, 22.5, 27.5, 32.5], abs=1e-5)
    assert metres[0, 3].tolist() == [1.0, 1.0, 0.0, 0.0]  # 2 m and the hole, which is not halved into something else
    # at the left end the first centre lies outside that of the first pixel
    left, metres = random_crop_zoom(image, depth, np.array([[0.5, 0.0, 0.5]]), still(zoom=3.0))
    assert left[0, 1, 2].tolist() == pytest.approx([10.0, 12.5, 17.5, 22.5], abs=1e-5)
    assert metres[0, 3].tolist() == [0.5, 0.5, 1.0, 1.0]
    top, _ = random_crop_zoom(image.mT, depth, np.array([[0.0, 0.9, 0.5]]), still(zoom=3.0))
    assert top[0, 1, :, 2].tolist() == pytest.approx([10.0, 12.5, 17.5, 22.5], abs=1e-5)


def test_a_wall_comes_nearer_by_as_much_as_it_is_magnified():
    samples = np.arange(200)
    wall = Batch(
        torch.zeros((200, *SIZE, 3), dtype=torch.uint8),
        torch.full((200, *SIZE), 3000, dtype=torch.int32).to(torch.uint16),
        np.zeros(200, np.int64),
        samples,
    )
    _, depth = prepare(wall, SIZE, still(zoom=1.5), SEED)
    z = 1 + 0.5 * hash_uniform(SEED, 0, samples, np.full(200, 9))
    assert np.abs(depth.numpy() - (3 / z)[:, None, None]).max() < 1e-6
    assert z.min() < 1.02
    assert z.max() > 1.48
    # and the view is as much narrower: its outermost centres lie 51 / z columns apart
    _, depth = prepare(numbered(samples), SIZE, still(zoom=1.5), SEED)
    _, column = places(depth * torch.from_numpy(z)[:, None, None])
    assert np.abs(np.ptp(column[:, 0], axis=1) - 51 / z).max() < 1


def test_image_and_depth_are_magnified_about_the_same_place():
    for bar in ((slice(15, 25), slice(None)), (slice(None), slice(20, 30))):
        image = torch.zeros((30, *SIZE, 3), dtype=torch.uint8)
        depth = torch.full((30, *SIZE), 1000, dtype=torch.int32)
        image[(slice(None), *bar)], depth[(slice(None), *bar)] = 255, 8000
        batch = Batch(image, depth.to(torch.uint16), np.zeros(30, np.int64), np.arange(30))
        view, metres = prepare(batch, SIZE, still(zoom=2.0, flip=0.5), SEED)
        there = metres > 3
        assert 15 < there.any(2).any(1).sum() <= 30
        assert torch.equal(plain(view)[:, 0] > 0.5, there)  # half of the way to a neighbour's centre is its edge


# --- pasted depth ---


def test_golden_rectangles():
    draw = np.array([[0.4, 0.5, 0.25, 0.5, 0.9], [0.6, 0.5, 0.25, 0.5, 0.9], [0.0, 0.99, 0.99, 0.0, 0.0]])
    # top 0.5 * 40 = 20, left 0.25 * 52 = 13; height 20 * 0.5 * 0.75 = 7.5, width 39 * 0.9 * 0.75 = 26.3
    expected = [[20, 27, 13, 39], [20, 20, 13, 13], [39, 40, 51, 52]]
    assert rectangles(draw, SIZE, still(cut_depth=0.5)).tolist() == expected


def test_depth_is_pasted_as_grey_inside_its_rectangle_only():
    image = torch.full((1, 3, 3, 4), 0.9)
    depth = torch.tensor([[[1.0, 2, 3, 4], [5, 6, 0, 8], [9, 10, 20, 12]]])
    pasted = paste_depth(image, depth, torch.tensor([[1.0, 3.0, 1.0, 3.0]]))
    expected = torch.tensor([[0.9, 0.9, 0.9, 0.9], [0.9, 0.6, 0.9, 0.9], [0.9, 1.0, 1.0, 0.9]])
    assert torch.allclose(pasted, expected.expand(1, 3, 3, 4))


def test_pasting_follows_its_probability_and_shows_the_depth_of_the_view():
    batch = noisy(range(400))
    augment = still(zoom=1.4, flip=0.5)
    image, depth = prepare(batch, SIZE, augment, SEED)
    pasted, same = prepare(batch, SIZE, AugmentConfig(**{**vars(augment), "cut_depth": 0.25}), SEED)
    assert torch.equal(depth, same)
    changed = (pasted != image).any(1)
    grey = (depth / 10).clamp(0, 1)[:, None].expand(-1, 3, -1, -1)
    assert torch.allclose(
        plain(pasted)[changed[:, None].expand_as(grey)], grey[changed[:, None].expand_as(grey)], atol=1e-6
    )
    assert not changed[depth == 0].any()
    chosen = changed.any(2).any(1).numpy()
    drawn = hash_uniform(SEED, 0, np.arange(400), np.full(400, 10)) < 0.25
    assert (chosen <= drawn).all()
    assert (chosen != drawn).mean() < 0.02  # a small rectangle may hold holes only
    assert 60 < chosen.sum() < 140  # 100 expected, spread 9
    for which in np.flatnonzero(chosen):  # it fills its rectangle, but for the holes
        rows, columns = np.nonzero(changed[which].numpy())
        box = (slice(rows.min(), rows.max() + 1), slice(columns.min(), columns.max() + 1))
        assert torch.equal(changed[which][box], depth[which][box] > 0)


# --- all of it ---

ALL = AugmentConfig(flip=0.5, color=0.5, border=0.05, crop=(32, 40), zoom=1.5, cut_depth=0.75)


@pytest.mark.parametrize("augment", [ALL, AugmentConfig(flip=0.5, color=0.5, crop=(32, 40))])
def test_a_view_is_the_same_in_any_company(augment):
    samples = [5, 17, 3, 99, 41, 8, 2]
    whole = prepare(noisy(samples), SIZE, augment, SEED)
    backwards = prepare(noisy(samples[::-1]), SIZE, augment, SEED)
    for k, sample in enumerate(samples):
        alone = prepare(noisy([sample]), SIZE, augment, SEED)
        for which in (0, 1):
            assert torch.equal(alone[which][0], whole[which][k])
            assert torch.equal(backwards[which][len(samples) - 1 - k], whole[which][k])
    assert len({view.numpy().tobytes() for view in prepare(numbered(samples), SIZE, augment, SEED)[1]}) == len(samples)


def test_colours_and_mirroring_are_drawn_as_without_windows():
    batch = numbered(range(60))
    before = prepare(batch, SIZE, AugmentConfig(flip=0.5, color=0.5), SEED)
    image, depth = prepare(batch, SIZE, AugmentConfig(flip=0.5, color=0.5, border=0.05), SEED)
    assert torch.allclose(image, before[0][..., 2:38, 3:49], atol=1e-6)
    assert torch.equal(depth, before[1][..., 2:38, 3:49])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--augment.border", "0.3"], ["augment.border = 0.3", "0 to 0.25"]),
        (["--augment.zoom", "0.9"], ["augment.zoom = 0.9", "1 to 4"]),
        (["--augment.cut-depth", "1.1"], ["augment.cut_depth = 1.1", "0 to 1"]),
        (["--augment.crop", "31x64"], ["augment.crop = 31x64", "32x32"]),
        (["--augment.crop", "121x160"], ["121x160", "fit into 120x160"]),
        (["--augment.crop", "120x160", "--augment.border", "0.0625"], ["fit into 104x140", "augment.border = 0.0625"]),
    ],
)
def test_impossible_views_are_refused_in_one_line(flags, words):
    with pytest.raises(UserError) as refused:
        read_config(flags)
    assert all(word in str(refused.value) for word in words)
    assert "\n" not in str(refused.value)


@pytest.mark.slow
def test_training_on_windows_publishes_the_size_of_whole_images(room_shards, tmp_path):
    options = {**small(data_shards=room_shards), "data.size": None, "train.total-samples": 12, "evaluate.limit": 2}
    views = ["--augment.border", 0.05, "--augment.crop", "32x40", "--augment.zoom", 1.3, "--augment.cut-depth", 0.5]
    done = warm_run("train", *views, run=tmp_path / "run", before=without_pictures, **options)
    assert done.returncode == 0, done.stderr
    assert "at 32x40" in done.stdout
    assert read_model(tmp_path / "run" / "model.safetensors")[0]["size"] == [48, 64]
    assert np.isfinite([line["loss"] for line in records(tmp_path / "run") if "loss" in line]).all()
    done = warm_run("train", "--augment.crop", "49x64", run=tmp_path / "larger", **options)
    assert done.returncode == 2
    assert "augment.crop = 49x64: must fit into 48x64" in done.stderr
    assert not (tmp_path / "larger").exists()
