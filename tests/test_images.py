"""One image, whoever reads it: what is packed, scored and previewed is what predict sees, and no program is started."""

from __future__ import annotations

import contextlib
import io
import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image, ImageOps
from trees import SIZE, jpeg_bytes, members, millimetres, packed, picture, sample_members, silent, write, write_tar

from mde_dist import shard
from mde_dist.data.images import UnreadableImage, decode_image, decode_jpeg
from mde_dist.data.manifest import NAME
from mde_dist.data.shards import open_split
from mde_dist.evaluation.predictions import open_predictions
from mde_dist.inference.export_check import from_files
from mde_dist.inference.images import Unreadable, read_image
from mde_dist.packing.inspect import open_checked
from mde_dist.packing.pack import PackConfig, pack
from mde_dist.packing.raw_dataset import RawDataset
from mde_dist.packing.sources import BadPair, RawPair, open_source
from mde_dist.utils.errors import UserError

SEED = 7
GREY = picture(SEED)[..., 0]
CLEAR = np.s_[:, : SIZE[1] // 2]
"""Mask of the transparent pixels."""


def saved(image: np.ndarray | Image.Image, form: str, orientation: int = 1, **options: object) -> bytes:
    image, buffer = image if isinstance(image, Image.Image) else Image.fromarray(image), io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(buffer, form, exif=exif, **options)
    return buffer.getvalue()


def rgb(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey[..., None], 3, axis=2)


def on_white(pixels: np.ndarray) -> np.ndarray:
    pixels = pixels.copy()
    pixels[CLEAR] = 255
    return pixels


def with_alpha(pixels: np.ndarray) -> np.ndarray:
    alpha = np.full(SIZE, 255, np.uint8)
    alpha[CLEAR] = 0
    return np.dstack([pixels, alpha])


def big_endian() -> Image.Image:
    return Image.frombytes("I;16B", SIZE[::-1], (GREY.astype(np.uint16) * 257).astype(">u2").tobytes())


def palette() -> bytes:
    image, buffer = Image.fromarray((np.arange(SIZE[0] * SIZE[1]) % 2).reshape(SIZE).astype(np.uint8)), io.BytesIO()
    image.putpalette([9, 9, 9, 50, 60, 70])
    image.save(buffer, "PNG", transparency=0)
    return buffer.getvalue()


def several(form: str) -> bytes:
    first, second = Image.fromarray(picture(SEED)), Image.fromarray(picture(SEED + 1))
    buffer = io.BytesIO()
    first.save(buffer, form, save_all=True, append_images=[second], quality=90)
    return buffer.getvalue()


CASES: dict[str, tuple[str, bytes, np.ndarray, int]] = {
    # suffix, file, RGB as a viewer shows it, by how much the mean of a lossy format may differ
    "16-bit grey PNG": ("png", saved(GREY.astype(np.uint16) * 257, "PNG"), rgb(GREY), 0),
    "16-bit grey TIFF": ("tif", saved(GREY.astype(np.uint16) * 257, "TIFF"), rgb(GREY), 0),
    "big-endian TIFF": ("tif", saved(big_endian(), "TIFF"), rgb(GREY), 0),
    "RGBA": ("png", saved(with_alpha(picture(SEED)), "PNG"), on_white(picture(SEED)), 0),
    "LA": ("png", saved(with_alpha(GREY), "PNG"), on_white(rgb(GREY)), 0),
    "RGBA WEBP": ("webp", saved(with_alpha(picture(SEED)), "WEBP", lossless=True), on_white(picture(SEED)), 0),
    "palette": ("png", palette(), np.resize(np.array([[255, 255, 255], [50, 60, 70]], np.uint8), (*SIZE, 3)), 0),
    "BMP": ("bmp", saved(picture(SEED), "BMP"), picture(SEED), 0),
    "MPO": ("jpg", several("MPO"), picture(SEED), 6),
    "APNG": ("png", several("PNG"), picture(SEED), 0),
    "TIFF of two pages": ("tif", several("TIFF"), picture(SEED), 0),
    "CMYK JPEG": ("jpg", saved(Image.fromarray(picture(SEED)).convert("CMYK"), "JPEG"), picture(SEED), 6),
    "JPEG named PNG": ("png", jpeg_bytes(picture(SEED)), picture(SEED), 6),
}


def data_set(root: Path, suffix: str, data: bytes, depth: np.ndarray | None = None) -> Path:
    write(root / f"images/a.{suffix}", data)
    write(root / "depth/a.png", millimetres(SEED) if depth is None else depth)
    return root


def read(root: Path) -> RawPair:
    """The only pair, as it is packed."""
    source = open_source(root)
    return source.read(source.splits["train"].pairs[0], source.splits["train"].scale)


@pytest.mark.parametrize("case", CASES)
def test_what_is_packed_is_what_a_viewer_shows_and_predict_sees(tmp_path: Path, case: str) -> None:
    suffix, data, expected, off = CASES[case]
    raw = read(data_set(tmp_path, suffix, data))
    assert np.abs(raw.image.astype(int) - expected).mean() <= off
    np.testing.assert_array_equal(raw.image, read_image(tmp_path / f"images/a.{suffix}"))


def test_what_nothing_says_the_white_of_is_refused(tmp_path: Path) -> None:
    for values in (np.full(SIZE, 0.5, np.float32), np.full(SIZE, 65536, np.int32), np.full(SIZE, -1, np.int32)):
        with pytest.raises(BadPair, match="nothing says which of them is white"):
            read(data_set(tmp_path, "tif", saved(values, "TIFF")))


# --- orientation ---


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_an_image_is_packed_upright_over_upright_depth(tmp_path: Path, orientation: int, form: str) -> None:
    data = saved(picture(SEED), form, orientation=orientation, lossless=True)
    with Image.open(io.BytesIO(data)) as judge:
        upright = np.asarray(ImageOps.exif_transpose(judge).convert("RGB"))
    data_set(tmp_path, "jpg" if form == "JPEG" else form.lower(), data, millimetres(SEED, upright.shape[:2]))
    raw = read(tmp_path)
    assert np.abs(raw.image.astype(int) - upright).max() <= (3 if form == "JPEG" else 0)  # two decoders
    assert raw.orientation == orientation
    assert (raw.jpeg is not None) == (form == "JPEG" and orientation == 1)


def test_shards_show_it_upright_to_every_reader(tmp_path: Path) -> None:
    upright = picture(SEED)
    data_set(tmp_path / "tree", "jpg", saved(upright[::-1, ::-1], "JPEG", orientation=3, quality=95))
    write(tmp_path / "tree/images/b.jpg", jpeg_bytes(picture(SEED)))
    write(tmp_path / "tree/depth/b.png", millimetres(SEED))
    packed(tmp_path / "tree", tmp_path / "shards")
    assert json.loads((tmp_path / "shards" / NAME).read_text())["splits"]["train"]["turned_images"] == 1
    with open_split(tmp_path / "shards", "train") as shards:
        for sample in range(2):
            image, depth = np.empty((*SIZE, 3), np.uint8), np.empty(SIZE, np.uint16)
            shards.read_into(sample, image, depth)
            assert np.abs(image.astype(int) - upright).mean() < 6
            np.testing.assert_array_equal(depth, millimetres(SEED))
    source = open_source(tmp_path / "tree")
    with RawDataset(source, "train", SIZE) as samples:  # evaluate --source
        samples.read_into(0, image, depth)
        assert np.abs(image.astype(int) - upright).mean() < 6


def test_an_orientation_within_shards_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Packed by 0.1, or elsewhere: the loader shows what is stored, as plain WebDataset does."""
    turned = saved(picture(1), "JPEG", orientation=3)
    members = [*sample_members("a", 0), ("b.depth.blosc", sample_members("b", 1)[0][1]), ("b.jpg", turned)]
    write_tar(tmp_path / "train-000000.tar", members)
    for arguments in (["--index", str(tmp_path)], ["--verify", str(tmp_path)]):
        with contextlib.suppress(SystemExit):
            shard.main([*arguments, "--workers", "1"])
        (line,) = (line for line in capsys.readouterr().out.splitlines() if "EXIF orientation" in line)
        assert line.startswith("train: 1 images")
    with open_split(tmp_path, "train") as shards:
        image, depth = np.empty((*SIZE, 3), np.uint8), np.empty(SIZE, np.uint16)
        shards.read_into(1, image, depth)
    assert np.abs(image.astype(int) - picture(1)).mean() < 6


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_depth_of_the_stored_size_cannot_be_told_to_match(tmp_path: Path, orientation: int) -> None:
    root = data_set(tmp_path / "tree", "jpg", saved(picture(SEED), "JPEG", orientation=orientation))
    with pytest.raises(BadPair) as error:
        read(root)
    said = str(error.value)
    assert "24x32" in said
    assert "32x24" in said
    assert f"orientation {orientation}" in said
    assert "\n" not in said
    write(root / "images/b.jpg", jpeg_bytes(picture(0)))
    write(root / "depth/b.png", millimetres(0))
    manifest = pack(open_source(root), tmp_path / "out", PackConfig(skip_bad=True), 1, silent)
    assert manifest.splits["train"].samples == 1
    assert manifest.raw["splits"]["train"]["skipped"] == [said]


def test_turned_images_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = data_set(tmp_path, "jpg", saved(picture(SEED), "JPEG", orientation=3))
    open_checked(root, None, ())
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "orientation" in line)
    assert "1 of the 1 images" in line
    assert "orientation 3" in line
    assert "depth is taken as upright" in line


@pytest.mark.parametrize("damage", ["no byte order", "no entries", "strange type", "orientation 77"])
def test_damaged_exif_data_are_no_damage_to_the_pixels(tmp_path: Path, damage: str) -> None:
    data = saved(picture(SEED), "JPEG", orientation=6)
    start = data.index(b"Exif\0\0") + 6
    entry = data.index(struct.pack(">H", 0x0112), start)
    place, change = {
        "no byte order": (start, b"XX"),
        "no entries": (start, bytes(12)),
        "strange type": (entry + 2, b"\xff\xff"),
        "orientation 77": (entry + 8, b"\0M"),
    }[damage]
    raw = read(data_set(tmp_path, "jpg", data[:place] + change + data[place + len(change) :]))
    assert raw.image.shape == (*SIZE, 3)
    assert raw.orientation == 1


# --- JPEGs with bytes that belong to nothing ---

END = b"\xff\xd9"
WHOLE = jpeg_bytes(picture(SEED))
NO_MARKER = st.binary(min_size=1, max_size=16).filter(lambda stray: 0xFF not in stray)


@given(NO_MARKER)
def test_stray_bytes_before_the_end_change_no_pixel(stray: bytes) -> None:
    pixels, _ = decode_jpeg(WHOLE[:-2] + stray + END)
    np.testing.assert_array_equal(pixels, decode_jpeg(WHOLE)[0])


@pytest.mark.parametrize("kind", ["RGB", "progressive", "L", "CMYK"])
def test_a_jpeg_of_any_kind_that_is_cut_off_is_refused_and_one_with_stray_bytes_read(kind: str) -> None:
    image = Image.fromarray(picture(SEED)).convert("RGB" if kind == "progressive" else kind)
    data = saved(image, "JPEG", progressive=kind == "progressive")
    with Image.open(io.BytesIO(data)) as judge:
        expected = np.asarray(judge.convert("RGB"))
    stray = decode_image(data[:-2] + bytes(range(1, 13)) + END)
    np.testing.assert_array_equal(stray.pixels, expected)
    assert (stray.stray_bytes, decode_image(data).stray_bytes) == (True, False)
    for cut in (data[: len(data) // 2], data[: len(data) // 2] + END, data[:-20] + END):
        with pytest.raises(UnreadableImage):
            decode_image(cut)


@given(st.integers(WHOLE.rindex(b"\xff\xda") + 14, len(WHOLE) - 3), st.sampled_from([b"", END, END + bytes(16)]))
@example(len(WHOLE) // 2, END)
def test_a_jpeg_that_is_cut_off_is_refused_wherever_it_ends(place: int, end: bytes) -> None:
    """Its rest would be grey; a cut within what fills up the last byte takes no pixel."""
    try:
        pixels, _ = decode_jpeg(WHOLE[:place] + end)
    except ValueError:
        return
    np.testing.assert_array_equal(pixels, decode_jpeg(WHOLE)[0])


def test_a_long_tail_is_damage(tmp_path: Path) -> None:
    """It is what is left over where libjpeg has lost its place in the middle."""
    with pytest.raises(BadPair, match="extraneous bytes"):
        read(data_set(tmp_path, "jpg", WHOLE[:-2] + bytes(range(40)) + END))


def test_images_with_stray_bytes_are_read_by_all_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stray = WHOLE[:-2] + bytes(range(1, 13)) + END
    data_set(tmp_path / "tree", "jpg", stray)
    write(tmp_path / "tree/images/b.jpg", WHOLE)
    write(tmp_path / "tree/depth/b.png", millimetres(SEED))
    shard.main(["--source", str(tmp_path / "tree"), "--output", str(tmp_path / "shards"), "--workers", "1"])
    assert len([line for line in capsys.readouterr().out.splitlines() if line.startswith("1 image had stray")]) == 1
    assert json.loads((tmp_path / "shards" / NAME).read_text())["splits"]["train"]["stray_bytes"] == 1
    assert sorted(data for name, data in members(tmp_path / "shards/train-000000.tar") if name.endswith(".jpg")) == (
        sorted([stray, WHOLE])  # the source's own bytes
    )
    source = open_source(tmp_path / "tree")
    expected = decode_jpeg(WHOLE)[0]
    with open_split(tmp_path / "shards", "train") as shards, RawDataset(source, "train", SIZE) as samples:
        for where in (shards, samples):  # the loader, evaluate
            for sample in range(2):
                image, depth = np.empty((*SIZE, 3), np.uint8), np.empty(SIZE, np.uint16)
                where.read_into(sample, image, depth)
                np.testing.assert_array_equal(image, expected)
            assert len(where.stray) == 1
    np.testing.assert_array_equal(read_image(tmp_path / "tree/images/a.jpg"), expected)  # predict
    with pytest.raises(SystemExit):
        shard.main(["--verify", str(tmp_path / "shards"), "--workers", "1"])
    said = capsys.readouterr().out
    assert "all whole" in said
    assert "1 image had stray" in said


# --- formats ---

POSTSCRIPT = b"""%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 32 24
%%EndComments
1 0 0 setrgbcolor 0 0 32 24 rectfill showpage
"""


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that is there once somebody has started Ghostscript."""
    marker, program = tmp_path / "started", tmp_path / "bin/gs"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$@" >> {marker}\necho 10.0\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    with pytest.raises(Exception), Image.open(io.BytesIO(POSTSCRIPT)) as trap:  # noqa: B017  it answers with no picture
        trap.load()
    assert marker.exists(), "PIL starts no Ghostscript any more: the trap is not set"
    marker.unlink()
    return marker


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_postscript_is_no_image_and_starts_no_program(tmp_path: Path, started: Path, suffix: str) -> None:
    root = data_set(tmp_path / "tree", suffix, POSTSCRIPT)
    file = root / f"images/a.{suffix}"
    with pytest.raises(UserError, match="not a readable image") as error:
        open_checked(root, None, ())  # shard, its dry run, evaluate --source
    assert str(file) in str(error.value)
    with pytest.raises(Unreadable, match="not a readable image"):
        read_image(file)  # predict
    with pytest.raises(UserError, match="not a readable image"):
        from_files([root / "images"])  # export
    write(file, picture(0))
    samples = RawDataset(open_source(root), "train", SIZE)
    write(root / "depth/a.png", POSTSCRIPT)
    with pytest.raises(UserError, match=r"depth/a\.png"):
        open_checked(root, None, ())
    with pytest.raises(UserError, match="not a readable depth map"):
        open_checked(root, None, ("0.001",))
    with pytest.raises(UserError, match="not a readable depth map"):
        open_predictions(root / "depth", samples)
    assert not started.exists()
