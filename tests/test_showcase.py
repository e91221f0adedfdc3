"""The held-out images that a run keeps of itself: the right ones, at the right place, whole or not at all."""

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from mde_dist.data.depth import COUNTS_PER_METRE
from mde_dist.data.loader import Batch
from mde_dist.training.snapshots import COUNT, PredictionRecorder, make_image_strips, read_snapshots, write_snapshots
from mde_dist.utils.errors import UserError


def batch(first: int, count: int, size: tuple[int, int]) -> Batch:
    """Images and depth maps whose values tell which sample they are."""
    sample = np.arange(first, first + count)
    image = torch.zeros(count, *size, 3, dtype=torch.uint8)
    depth = torch.zeros(count, *size, dtype=torch.int32)
    for place, number in enumerate(sample):
        image[place], depth[place] = int(number), 1000 + int(number)
        depth[place, 0] = 0
    return Batch(image, depth.to(torch.uint16), np.zeros_like(sample), sample, 0)


def watched(images: int, size: tuple[int, int]) -> tuple[PredictionRecorder, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """What is remembered of a model that predicts, at half the size, the number of the sample in metres."""

    def predict(given: Batch) -> torch.Tensor:
        counts = torch.from_numpy(given.sample).double() * COUNTS_PER_METRE
        return counts[:, None, None].expand(-1, size[0] // 2, size[1] // 2)

    recorder = PredictionRecorder(images, size)
    watching = recorder.wrap(predict)
    for first in range(0, images, 4):
        given = batch(first, min(4, images - first), size)
        assert watching(given).equal(predict(given)), "looking on changed the prediction"
    return recorder, recorder.all_gather(Accelerator(cpu=True))


@pytest.mark.parametrize(("images", "size", "kept"), [(30, (24, 32), (24, 32)), (3, (480, 640), (240, 320))])
def test_chosen_images_are_kept_with_what_was_predicted_for_them(images, size, kept):
    recorder, (image, truth, prediction) = watched(images, size)
    assert len(recorder.chosen) == min(images, COUNT)
    assert recorder.chosen[0] == 0 and recorder.chosen[-1] == images - 1
    assert image.shape == (len(recorder.chosen), *kept, 3)
    for place, sample in enumerate(recorder.chosen):
        assert (image[place] == sample).all()
        assert (truth[place, 1:] == 1000 + sample).all() and (truth[place, 0] == 0).all()
        assert (prediction[place] == 1000 * sample).all()


def test_what_is_written_is_read_again(tmp_path):
    draw = np.random.default_rng(0)
    image = draw.integers(0, 256, (2, 12, 16, 3), dtype=np.uint8)
    truth, first, second = (draw.integers(0, 65536, (2, 12, 16), dtype=np.uint16) for _ in range(3))
    assert read_snapshots(tmp_path) is None
    write_snapshots(tmp_path, 800, ["a", "b"], image, truth, first)
    write_snapshots(tmp_path, 1600, ["a", "b"], image, truth, second)
    found = read_snapshots(tmp_path)
    assert found.keys == ["a", "b"]
    assert (found.image == image).all()
    assert np.allclose(found.target * 1000, truth, atol=1e-2)
    assert list(found.predictions) == [800, 1600]
    assert np.allclose(found.predictions[1600] * 1000, second, atol=1e-2)
    assert make_image_strips(image, truth, first).shape == (2, 12, 48, 3)


@pytest.mark.parametrize("name", ["keys.json", "image.png", "truth.png", "samples-00000800.png"])
def test_a_broken_file_is_named_by_its_folder(tmp_path, name):
    write_snapshots(
        tmp_path, 800, ["a" * 60], np.zeros((1, 4, 4, 3), np.uint8), *(np.ones((1, 4, 4), np.uint16) for _ in range(2))
    )
    path = tmp_path / "panels" / name
    path.write_bytes(path.read_bytes()[:45])
    with pytest.raises(UserError, match="panels"):
        read_snapshots(tmp_path)


def test_other_images_take_the_place_of_those_that_a_run_given_up_left(tmp_path):
    ones, image = np.ones((1, 4, 4), np.uint16), np.zeros((1, 4, 4, 3), np.uint8)
    write_snapshots(tmp_path, 800, ["a"], image, ones, ones)
    write_snapshots(tmp_path, 400, ["b"], image + 7, 2 * ones, ones)
    found = read_snapshots(tmp_path)
    assert (found.keys, list(found.predictions)) == (["b"], [400])
    assert (found.image == 7).all() and np.allclose(found.target, 2e-3)


def test_pictures_of_other_sizes_are_refused(tmp_path):
    ones = np.ones((1, 4, 4), np.uint16)
    write_snapshots(tmp_path, 800, ["a"], np.zeros((1, 4, 4, 3), np.uint8), ones, ones)
    write_snapshots(tmp_path, 900, ["a"], np.zeros((1, 4, 4, 3), np.uint8), ones, np.ones((1, 5, 4), np.uint16))
    with pytest.raises(UserError, match="do not fit"):
        read_snapshots(tmp_path)
