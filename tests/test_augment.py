"""Views of a sample: a function of seed, epoch and sample alone, and image and depth stay together."""

import numpy as np
import pytest
import torch

from mde_dist.data.augmentation import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    normalise,
    prepare,
    prepare_depth,
    prepare_images,
    resize_image,
)
from mde_dist.data.config import AugmentConfig
from mde_dist.data.loader import Batch
from mde_dist.data.sampler import hash_uniform

SIZE = (24, 37)  # odd, so that mirroring about the wrong axis shows
GOLDEN_DRAW = [0.49872227734849894, 0.9675840814111506, 0.8725891122126205, 0.9623779331966036]
GOLDEN_DRAW += [0.4556504782754831, 0.09601985390029699, 0.9782473342149756]
NEVER = AugmentConfig(flip=0.0, color=0.0)
FLIPPED = AugmentConfig(flip=1.0, color=0.0)
RECOLOURED = AugmentConfig(flip=0.0, color=1.0)


def stored(samples, size=SIZE):
    """Image and depth that are a function of the sample number, as in a shard."""
    images, depths = [], []
    for sample in samples:
        rng = np.random.default_rng(int(sample))
        images.append(rng.integers(0, 256, (*size, 3), dtype=np.uint8))
        depths.append((rng.integers(1, 10_000, size) * (rng.random(size) > 0.3)).astype(np.uint16))
    return torch.from_numpy(np.stack(images)), torch.from_numpy(np.stack(depths))


def make_batch(samples, epochs=0, size=SIZE):
    samples = np.asarray(samples, np.int64)
    return Batch(*stored(samples, size), np.broadcast_to(np.int64(epochs), samples.shape).copy(), samples)


def raw_image(batch):
    """0..1, channels first."""
    return batch.image.permute(0, 3, 1, 2).float() / 255


def undo_normalise(image):
    return image * torch.tensor(IMAGENET_STD).view(3, 1, 1) + torch.tensor(IMAGENET_MEAN).view(3, 1, 1)


def test_stored_values_become_floats():
    batch = make_batch([3, 4])
    image, depth = prepare_images(batch, SIZE), prepare_depth(batch)
    assert image.dtype == depth.dtype == torch.float32
    assert image.shape == (2, 3, *SIZE)
    assert depth.shape == (2, *SIZE)
    assert image[1, 2, 5, 7] == batch.image[1, 5, 7, 2].item() / np.float32(255)
    expected = batch.depth.numpy().astype(np.float64) / 1000
    assert np.abs(depth.numpy() - expected).max() < 1e-6
    assert ((depth == 0).numpy() == (expected == 0)).all()


def test_depth_above_32_metres_does_not_turn_negative():
    depth = torch.full((1, *SIZE), 65535, dtype=torch.uint16)
    batch = Batch(torch.zeros((1, *SIZE, 3), dtype=torch.uint8), depth, np.zeros(1, np.int64), np.zeros(1, np.int64))
    assert torch.allclose(prepare_depth(batch), torch.tensor(65.535))
    assert torch.allclose(prepare(batch, SIZE, FLIPPED, 0)[1], torch.tensor(65.535))


def test_normalise_golden_values():
    image = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1).repeat(1, 1, 2, 2)
    image[0, :, 0, 0] = 1.0
    image[0, :, 1, 1] = 0.0
    result = normalise(image)
    # (1 - 0.485) / 0.229, (1 - 0.456) / 0.224, (1 - 0.406) / 0.225; minus mean / std
    assert result[0, :, 0, 0].tolist() == pytest.approx([2.248908, 2.428571, 2.64], abs=1e-5)
    assert result[0, :, 1, 1].tolist() == pytest.approx([-2.117904, -2.035714, -1.804444], abs=1e-5)
    assert result[0, :, 0, 1].tolist() == pytest.approx([0, 0, 0], abs=1e-6)


def test_nothing_chosen_is_the_plain_image():
    batch = make_batch(range(6))
    image, depth = prepare(batch, SIZE, NEVER, seed=1)
    assert torch.equal(image, normalise(raw_image(batch)))
    assert torch.equal(depth, prepare_depth(batch))


def test_flip_always_mirrors_left_and_right_of_both():
    batch = make_batch(range(6))
    image, depth = prepare(batch, SIZE, FLIPPED, seed=1)
    assert torch.equal(image, normalise(raw_image(batch)).flip(-1))
    assert torch.equal(depth, prepare_depth(batch).flip(-1))


def test_flip_moves_image_and_depth_together():
    samples = np.arange(64)
    image = torch.zeros((64, *SIZE, 3), dtype=torch.uint8)
    depth = torch.ones((64, *SIZE), dtype=torch.int32)
    places = [(int(k) % SIZE[0], int(k) % (SIZE[1] // 2)) for k in samples]  # in the left half
    for k, (row, column) in enumerate(places):
        image[k, row, column] = 255
        depth[k, row, column] = 5000
    batch = Batch(image, depth.to(torch.uint16), np.zeros(64, np.int64), samples)
    view, metres = prepare(batch, SIZE, AugmentConfig(flip=0.5, color=0.5), seed=2)
    flipped = 0
    for k, (row, column) in enumerate(places):
        brightest = np.unravel_index(int(view[k].sum(0).argmax()), SIZE)
        farthest = np.unravel_index(int(metres[k].argmax()), SIZE)
        assert brightest == farthest
        assert farthest in ((row, column), (row, SIZE[1] - 1 - column))
        flipped += farthest[1] != column
    assert 16 <= flipped <= 48  # 32 expected, 4 spreads of 4


def test_probability_is_kept():
    mirrored, recoloured = prepare_mask(np.arange(4000), AugmentConfig(flip=0.2, color=0.7))
    assert mirrored.mean() == pytest.approx(0.2, abs=0.03)  # spread 0.0063
    assert recoloured.mean() == pytest.approx(0.7, abs=0.03)  # spread 0.0072


def test_flip_and_colour_are_drawn_apart():
    samples = np.arange(2000)
    draw = prepare_mask(samples, AugmentConfig(flip=0.5, color=0.5))
    both = (draw[0] & draw[1]).mean()
    assert both == pytest.approx(draw[0].mean() * draw[1].mean(), abs=0.05)


def prepare_mask(samples, augment):
    """Which samples were mirrored, and which recoloured, as seen in the result."""
    image = torch.tensor([[40, 120]], dtype=torch.uint8).view(1, 1, 2, 1).repeat(len(samples), 1, 1, 3)
    depth = torch.tensor([[1000, 2000]], dtype=torch.int32).repeat(len(samples), 1, 1).to(torch.uint16)
    batch = Batch(image, depth, np.zeros(len(samples), np.int64), np.asarray(samples))
    view, metres = prepare(batch, (1, 2), augment, seed=4)
    plain = normalise(raw_image(batch))
    mirrored = (metres[:, 0, 0] == 2).numpy()
    expected = torch.where(torch.from_numpy(mirrored).view(-1, 1, 1, 1), plain.flip(-1), plain)
    return mirrored, ~torch.isclose(view, expected, atol=1e-4).all(3).all(2).all(1).numpy()


@pytest.mark.parametrize("which", [0, 1])
def test_probabilities_zero_and_one_are_never_and_always(which):
    samples = np.arange(500)
    for probability, expected in ((0.0, False), (1.0, True)):
        config = AugmentConfig(**{"flip": 0.5, "color": 0.5, ("flip", "color")[which]: probability})
        assert (prepare_mask(samples, config)[which] == expected).all()


@pytest.mark.parametrize(("which", "sample"), [(0, 42908989), (1, 24384991)])
def test_probability_one_is_always_also_for_the_largest_draw(which, sample):
    assert 1 - 2**-25 < hash_uniform(4, 0, sample, which) < 1  # as float32 it is 1
    assert prepare_mask(np.array([sample]), AugmentConfig(flip=1.0, color=1.0))[which].all()


def test_a_view_depends_on_seed_epoch_and_sample_only():
    config = AugmentConfig(flip=0.5, color=0.5)
    samples = [5, 17, 3, 99, 41, 8, 2]
    whole = prepare(make_batch(samples, epochs=2), SIZE, config, seed=7)
    backwards = prepare(make_batch(samples[::-1], epochs=2), SIZE, config, seed=7)
    for which in (0, 1):
        assert torch.equal(whole[which], backwards[which].flip(0))
    for k, sample in enumerate(samples):
        alone = prepare(make_batch([sample], epochs=2), SIZE, config, seed=7)
        assert torch.equal(alone[0][0], whole[0][k])
        assert torch.equal(alone[1][0], whole[1][k])
    torch.manual_seed(1)
    before = torch.get_rng_state()
    assert torch.equal(prepare(make_batch(samples, epochs=2), SIZE, config, seed=7)[0], whole[0])
    assert torch.equal(torch.get_rng_state(), before)


def test_a_batch_may_straddle_two_epochs():
    config = AugmentConfig(flip=0.5, color=1.0)
    epochs = np.array([0, 0, 1, 1], np.int64)
    mixed = prepare(make_batch([6, 7, 6, 7], epochs=epochs), SIZE, config, seed=3)
    for epoch, half in ((0, slice(0, 2)), (1, slice(2, 4))):
        alone = prepare(make_batch([6, 7], epochs=epoch), SIZE, config, seed=3)
        assert torch.equal(mixed[0][half], alone[0])
        assert torch.equal(mixed[1][half], alone[1])


@pytest.mark.parametrize("what", ["seed", "epoch", "sample"])
def test_views_differ_with_seed_epoch_and_sample(what):
    image = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(1, 16, 16, 1).repeat(1, 1, 1, 3)
    depth = torch.ones((1, 16, 16), dtype=torch.int32).to(torch.uint16)
    views = set()
    for k in range(20):
        key = {"seed": 0, "epoch": 0, "sample": 0, what: k}
        batch = Batch(image, depth, np.array([key["epoch"]]), np.array([key["sample"]]))
        views.add(prepare(batch, (16, 16), RECOLOURED, key["seed"])[0].numpy().tobytes())
    assert len(views) == 20


def test_colours_stay_in_range_and_depth_is_not_touched():
    batch = make_batch(range(40), epochs=5)
    image, depth = prepare(batch, SIZE, RECOLOURED, seed=1)
    colours = undo_normalise(image)
    assert colours.min() >= -1e-5
    assert colours.max() <= 1 + 1e-5
    assert torch.isfinite(image).all()
    assert torch.equal(depth, prepare_depth(batch))
    plain = raw_image(batch)
    assert ((colours - plain).abs().amax((1, 2, 3)) > 0.01).all()


def test_recolouring_is_gamma_then_brightness_and_gain_as_stated():
    batch = make_batch(range(30))
    colours = undo_normalise(prepare(batch, SIZE, RECOLOURED, seed=1)[0]).numpy().astype(np.float64)
    plain = raw_image(batch).numpy().astype(np.float64)
    gammas, brightnesses = [], []
    for k in range(30):
        gains = []
        for channel in range(3):
            before, after = plain[k, channel].ravel(), colours[k, channel].ravel()
            inside = (before > 0.05) & (after < 0.999)
            # log after = gamma log before + log gain: a straight line
            gamma, gain = np.polyfit(np.log(before[inside]), np.log(after[inside]), 1)
            residual = np.log(after[inside]) - gamma * np.log(before[inside]) - gain
            assert np.abs(residual).max() < 1e-3
            gammas.append(gamma)
            gains.append(np.exp(gain))
        # one gamma for all channels; gains of one brightness 0.75..1.25 times a channel's 0.9..1.1
        assert np.ptp(gammas[-3:]) < 1e-3
        assert max(gains) / min(gains) <= 1.1 / 0.9 + 1e-3
        assert max(gains) / min(gains) > 1.001
        brightnesses.append(np.mean(gains))
    assert min(gammas) >= 0.9 - 1e-3
    assert max(gammas) <= 1.1 + 1e-3
    assert np.ptp(gammas) > 0.15
    assert min(brightnesses) >= 0.75 * 0.9 - 1e-3
    assert max(brightnesses) <= 1.25 * 1.1 + 1e-3
    assert np.ptp(brightnesses) > 0.35


def test_golden_view():
    # the parameters are hash words 0..6 of (seed, epoch, sample): a run that is resumed must draw the same again
    draw = hash_uniform(7, 2, 5, np.arange(7))
    assert draw.tolist() == pytest.approx(GOLDEN_DRAW, abs=1e-12)
    image = torch.full((1, 1, 2, 3), 100, dtype=torch.uint8)
    depth = torch.tensor([[[1000, 2000]]], dtype=torch.int32).to(torch.uint16)
    batch = Batch(image, depth, np.array([2]), np.array([5]))
    view, metres = prepare(batch, (1, 2), AugmentConfig(flip=0.5, color=1.0), seed=7)
    gamma, brightness, gain = 0.9 + 0.2 * draw[2], 0.75 + 0.5 * draw[3], 0.9 + 0.2 * draw[4:]
    expected = (100 / 255) ** gamma * brightness * gain
    assert undo_normalise(view)[0, :, 0, 0].tolist() == pytest.approx(expected.tolist(), abs=1e-5)
    assert metres[0, 0].tolist() == ([2.0, 1.0] if draw[0] < 0.5 else [1.0, 2.0])


@pytest.mark.parametrize("size", [(12, 18), (48, 74), (17, 31)])
def test_resizing_gives_both_the_size_that_was_asked_for(size):
    batch = make_batch(range(3))
    image, depth = prepare(batch, size, AugmentConfig(), seed=0)
    assert image.shape == (3, 3, *size)
    assert depth.shape == (3, *size)
    values = {float(value) for value in prepare_depth(batch).unique()}
    assert {float(value) for value in depth.unique()} <= values  # never a mean of two depths
    colours = undo_normalise(image)
    assert colours.min() >= -1e-5
    assert colours.max() <= 1 + 1e-5


def test_resized_view_is_the_mirrored_resized_view():
    batch = make_batch(range(3), size=(24, 36))
    image, depth = prepare(batch, (12, 18), NEVER, seed=0)
    mirrored = prepare(batch, (12, 18), FLIPPED, seed=0)
    assert torch.equal(mirrored[0], image.flip(-1))
    assert torch.equal(mirrored[1], depth.flip(-1))


def test_shrinking_an_image_does_not_alias():
    stripes = torch.zeros((1, 3, 16, 64))
    stripes[..., 1::4] = stripes[..., 2::4] = 1.0  # two pixels of four: at a quarter of the width only grey is left,
    small = resize_image(stripes, (4, 16))[..., 1:-1]  # but the centre of each four is white
    assert (small - 0.5).abs().max() < 0.1


def test_same_size_is_not_resampled():
    image = torch.rand((2, 3, 5, 7), generator=torch.Generator().manual_seed(0))
    assert torch.equal(resize_image(image, (5, 7)), image)


def test_image_and_depth_stay_aligned_when_resized():
    size, target = (48, 64), (24, 32)
    image = torch.zeros((1, *size, 3), dtype=torch.uint8)
    depth = torch.full((1, *size), 1000, dtype=torch.int32)
    image[:, 20:28, 40:52], depth[:, 20:28, 40:52] = 255, 4000
    batch = Batch(image, depth.to(torch.uint16), np.zeros(1, np.int64), np.zeros(1, np.int64))
    view, metres = prepare(batch, target, FLIPPED, seed=0)
    inside = torch.zeros(target, dtype=torch.bool)
    inside[10:14, 6:12] = True  # columns 20..26 of 32, mirrored
    assert ((metres[0] == 4) == inside).all()
    assert ((undo_normalise(view)[0, 0] > 0.5) == inside).all()
