"""Images of every kind as a viewer shows them, and what of a folder is taken."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from mde_dist.data.images import decode_image
from mde_dist.inference.images import Unreadable, read_image
from mde_dist.inference.inputs import find_inputs
from mde_dist.packing.rooms import render_room
from mde_dist.utils.errors import UserError

ORIENTATION = 0x0112


@pytest.fixture(scope="module")
def room():
    return render_room(1, (24, 40))[0]


def saved(path, picture, **options):
    picture.save(path, **options)
    return path


def test_a_jpeg_has_the_pixels_of_training(room, tmp_path):
    path = saved(tmp_path / "a.jpg", Image.fromarray(room), quality=90)
    np.testing.assert_array_equal(read_image(path), decode_image(path.read_bytes()).pixels)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp"])
def test_images_are_turned_as_the_camera_was_held(room, tmp_path, orientation, suffix):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    path = saved(tmp_path / f"a.{suffix}", Image.fromarray(room), exif=exif, lossless=True)
    with Image.open(path) as picture:
        upright = np.asarray(ImageOps.exif_transpose(picture))
    found = read_image(path)
    assert found.shape == upright.shape == ((24, 40, 3) if orientation < 5 else (40, 24, 3))
    np.testing.assert_allclose(found.astype(int), upright.astype(int), atol=3 if suffix == "jpg" else 0)
    assert found.flags.writeable
    assert found.flags.c_contiguous


def see_through(room):
    """Black where it cannot be seen."""
    alpha = np.full(room.shape[:2], 255, np.uint8)
    alpha[:, :20] = 0
    return Image.fromarray(np.dstack([np.where(alpha[..., None] > 0, room, 0).astype(np.uint8), alpha]))


def test_transparent_pixels_are_white(room, tmp_path):
    expected = room.copy()
    expected[:, :20] = 255
    picture = see_through(room)
    np.testing.assert_array_equal(read_image(saved(tmp_path / "rgba.png", picture)), expected)
    grey = read_image(saved(tmp_path / "la.png", picture.convert("LA")))
    assert (grey[:, :20] == 255).all()
    assert (grey[:, 20:] == np.asarray(picture.convert("L"))[:, 20:, None]).all()
    palette = Image.fromarray(np.repeat([[0, 1]], 4, axis=0).astype(np.uint8), "P")
    palette.putpalette([9, 9, 9, 50, 60, 70])
    found = read_image(saved(tmp_path / "p.png", palette, transparency=0))
    assert found[0].tolist() == [[255, 255, 255], [50, 60, 70]]


def test_16_bits_become_8(tmp_path):
    values = np.array([[0, 257, 128 * 257, 65535]], np.uint16)
    for name in ("a.png", "a.tif"):
        found = read_image(saved(tmp_path / name, Image.fromarray(values)))
        assert found.tolist() == [[[0] * 3, [1] * 3, [128] * 3, [255] * 3]]


@pytest.mark.parametrize(
    ("mode", "name"),
    [("L", "a.png"), ("1", "a.png"), ("P", "a.png"), ("CMYK", "a.jpg"), ("L", "a.jpg"), ("RGB", "a.webp")],
)
def test_pictures_of_any_mode_are_rgb(room, tmp_path, mode, name):
    path = saved(tmp_path / name, Image.fromarray(room).convert(mode))
    with Image.open(path) as picture:
        expected = np.asarray(picture.convert("RGB"))
    np.testing.assert_allclose(read_image(path).astype(int), expected.astype(int), atol=3)


def test_of_a_moving_picture_the_first_is_taken(room, tmp_path):
    frames = [Image.fromarray(np.full((8, 8, 3), value, np.uint8)) for value in (40, 200)]
    path = saved(tmp_path / "a.gif", frames[0], save_all=True, append_images=frames[1:])
    assert (read_image(path) == 40).all()


def claims(side):
    """A PNG of side x side pixels that holds none."""
    chunks = (b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0), b"IDAT")
    whole = (struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(whole)


@pytest.mark.parametrize(
    ("name", "damage", "words"),
    [
        ("a.png", lambda data: data[: len(data) // 2], ""),
        ("a.jpg", lambda data: data[: len(data) * 9 // 10], ""),
        ("a.webp", lambda data: data[: len(data) // 2], ""),
        ("a.png", lambda data: b"", "of no known format"),
        ("a.jpg", lambda data: b"a picture", "of no known format"),
        ("a.png", lambda data: claims(8193), "claims"),
        ("a.png", lambda data: claims(200_000), "claims"),
    ],
    ids=["cut png", "cut jpg", "cut webp", "empty", "text", "large", "huge"],
)
def test_damaged_images_are_named(room, tmp_path, name, damage, words):
    path = saved(tmp_path / name, Image.fromarray(room))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(Unreadable) as error:
        read_image(path)
    assert str(error.value).startswith(f"{path} is not a readable image (")
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_floats_are_refused(tmp_path):
    path = saved(tmp_path / "a.tif", Image.fromarray(np.ones((4, 4), np.float32)))
    with pytest.raises(Unreadable, match="nothing says which of them is white"):
        read_image(path)


def names(inputs):
    return [str(name) for _, name in inputs.entries]


def test_of_a_folder_its_images_are_taken_by_name(room, tmp_path):
    folder = tmp_path / "photos"
    for name in ("b.jpg", "a/c.PNG", ".thumbnails/b.jpg", "._b.jpg", "depth/b_color.png", "notes.txt", "walk.mp4"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")
    saved(folder / "b_depth.png", Image.fromarray(np.ones((4, 4), np.uint16)))
    inputs = find_inputs([folder], folder / "depth")
    assert names(inputs) == ["a/c", "b"]
    assert list(inputs.notes) == [
        f"left out in {folder}: 1 depth maps (16-bit grey PNG); name them one by one so that they are read as images",
        f"left out in {folder}: 1 videos; name them one by one so that their frames are predicted",
    ]
    assert names(find_inputs([folder], tmp_path / "elsewhere")) == ["a/c", "b", "depth/b_color"]
    assert names(find_inputs([folder / "b_depth.png", folder / "notes.txt"], tmp_path)) == ["b_depth", "notes"]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([], "name what is to be predicted"),
        (["nowhere"], "nowhere: no such file or folder"),
        (["x/a.jpg", "y/a.jpg"], "y/a.jpg and .*x/a.jpg would both be written as a;"),
        (["x/a.jpg", "x"], "x/a.jpg and .*x/a.jpg would both"),
        (["empty"], "no image in .*empty"),
        (["out"], "--output .*out is the folder of the images"),
        (["walk.mp4", "frames"], "walk/1.jpg would be written among the frames of .*walk.mp4"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value) or "nothing",
)
def test_names_that_do_not_go_together_are_one_line(tmp_path, given, words):
    for name in ("x/a.jpg", "y/a.jpg", "empty/a.txt", "out/a.jpg", "walk.mp4", "frames/walk/1.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(UserError, match=words):
        find_inputs([tmp_path / name for name in given], tmp_path / "out")
