"""A model that takes images as they come: sizes, several at once, mirrored, and too many for the memory."""

import numpy as np
import pytest
import torch
from torch import nn

from mde_dist.inference.predictor import Predictor, pick_device
from mde_dist.models.config import ModelConfig
from mde_dist.models.depth_model import create_pretrained_model
from mde_dist.packing.rooms import render_room
from mde_dist.utils.errors import UserError

METADATA = {"config": {"model.encoder": "resnet18"}, "size": [48, 64]}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model():
    return create_pretrained_model(ModelConfig(), seed=3)


class Crowded(nn.Module):
    """A model on a device whose memory holds a few images."""

    def __init__(self, model, most):
        super().__init__()
        self.model, self.most, self.tried = model, most, []

    def forward(self, image):
        self.tried.append(len(image))
        if len(image) > self.most:
            raise torch.OutOfMemoryError("out of memory")
        return self.model(image)


@pytest.mark.parametrize(
    ("size", "seen"),
    [
        ((48, 64), (48, 64)),
        ((480, 640), (48, 64)),
        ((96, 128), (48, 64)),
        ((128, 96), (64, 48)),
        ((60, 60), (55, 55)),
        ((20, 2000), (32, 554)),
    ],
)
def test_images_are_seen_at_the_area_of_training_with_their_aspect(model, size, seen):
    predictor = Predictor(model, METADATA, CPU)
    assert predictor.input_size(*size) == seen
    assert predictor(render_room(1, size)[0]).shape == size


def test_several_at_once_are_as_one_by_one_whatever_their_sizes(model):
    predictor = Predictor(model, METADATA, CPU)
    images = [render_room(seed, size)[0] for seed, size in enumerate(((48, 64), (96, 128), (30, 40), (48, 64)))]
    together, alone = predictor.predict_batch(images), [predictor(image) for image in images]
    for one, other, image in zip(together, alone, images, strict=True):
        assert one.shape == other.shape == image.shape[:2]
        assert one.dtype == np.float32
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_with_flip_the_depth_of_a_mirrored_image_is_mirrored(model):
    image = render_room(4, (96, 128))[0]
    plain, flip = Predictor(model, METADATA, CPU), Predictor(model, METADATA, CPU, flip=True)
    np.testing.assert_allclose(flip(image[:, ::-1]), flip(image)[:, ::-1], atol=1e-5)
    mirrored = plain(image[:, ::-1])[:, ::-1]
    assert np.abs(mirrored - plain(image)).max() > 0.01  # which it is not by itself
    np.testing.assert_allclose(flip(image), (plain(image) + mirrored) / 2, atol=1e-5)


def test_bf16_is_near_fp32(model):
    image = render_room(4, (96, 128))[0]
    plain, short = Predictor(model, METADATA, CPU), Predictor(model, METADATA, CPU, precision="bf16")
    assert (plain.precision, short.precision) == ("fp32", "bf16")
    error = np.abs(short(image) - plain(image)) / plain(image)
    assert 0 < error.max() < 0.1


def test_where_memory_runs_out_batches_are_halved(model):
    crowded = Crowded(model, 2)
    predictor = Predictor(crowded, METADATA, CPU)
    predictor.batch_size = 7
    images = [render_room(seed, (48, 64))[0] for seed in range(7)]
    depths = predictor.predict_batch(images)
    assert predictor.batch_size == 2
    assert crowded.tried == [7, 3, 1, 2, 4, 2, 2]
    plain = Predictor(model, METADATA, CPU)
    for depth, image in zip(depths, images, strict=True):
        np.testing.assert_allclose(depth, plain(image), rtol=1e-5, atol=1e-5)


def test_an_image_that_never_fits_is_one_line(model):
    predictor = Predictor(Crowded(model, 0), METADATA, CPU)
    with pytest.raises(UserError, match="cpu: an image of 48x64 does not fit into its memory"):
        predictor.predict_batch([render_room(seed, (48, 64))[0] for seed in range(3)])


def test_the_device_is_chosen_by_itself():
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert pick_device("cpu") == CPU
