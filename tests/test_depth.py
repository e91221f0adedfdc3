"""Units, holes and codecs of depth: what is stored is what was measured."""

import contextlib
import io
import struct
import tracemalloc
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numcodecs import blosc
from PIL import Image

from mde_dist.data.depth import (
    CODECS,
    DENSEDEPTH_8BIT,
    MILLIMETRES,
    DepthScale,
    decode,
    encode,
    metres_to_millimetres,
    resize_depth,
    to_metres,
    to_millimetres,
)


def random_map(seed, size, holes=0.3):
    rng = np.random.default_rng(seed)
    return (rng.integers(1, 65536, size) * (rng.random(size) >= holes)).astype(np.uint16)


def decoded(data, codec, size):
    out = np.full(size, 12345, np.uint16)
    decode(data, codec, out)
    return out


# --- units ---


def test_8_bit_floor_quantiser_is_decoded_without_bias():
    metres = np.random.default_rng(0).uniform(10 / 255, 10, 400_000)
    stored = np.floor(metres / 10 * 255).astype(np.uint8)
    error = to_metres(to_millimetres(stored, DENSEDEPTH_8BIT)) - metres
    step = 10 / 255
    # standard error of the mean: step / sqrt(12 * 400,000) = 0.02 mm; without the half step it would be 19.6 mm
    assert abs(error.mean()) < 1e-4
    assert np.abs(error).max() <= step / 2 + 0.5e-3 + 1e-6  # half a step, and the rounding to millimetres
    assert np.abs(error).max() > step / 2 - 1e-3


def test_8_bit_golden_values():
    # 1.5 / 255 * 10 = 0.0588 m; 128.5 / 255 * 10 = 5.0392 m; 254.5 / 255 * 10 = 9.9804 m; 255 is the end of the range
    stored = np.array([0, 1, 128, 254, 255], np.uint8)
    assert to_millimetres(stored, DENSEDEPTH_8BIT).tolist() == [0, 59, 5039, 9980, 10000]


def test_16_bit_millimetres_are_taken_as_they_are():
    every = np.arange(65536, dtype=np.uint16)
    result = to_millimetres(every, MILLIMETRES)
    assert result.dtype == np.uint16
    assert (result == every).all()


def test_every_millimetre_survives_the_way_through_metres():
    every = np.arange(65536, dtype=np.uint16)
    metres = to_metres(every)
    assert metres.dtype == np.float32
    assert metres[[0, 1, 2500, 65535]].tolist() == np.array([0, 0.001, 2.5, 65.535], np.float32).tolist()
    assert (metres_to_millimetres(metres) == every).all()


@pytest.mark.parametrize(
    ("metres", "expected"),
    [
        (0.0, 0),
        (-0.0, 0),
        (-2.5, 0),
        (np.nan, 0),
        (np.inf, 0),
        (-np.inf, 0),
        (1e-5, 1),  # a measurement stays one
        (0.0004, 1),
        (0.0014, 1),
        (0.0016, 2),
        (2.8434, 2843),
        (65.535, 65535),
        (65.5354, 65535),
        (65.536, 0),  # does not fit, and must not wrap to 0.000 or be held at 65.535
        (131.072, 0),
        (1e30, 0),
    ],
)
def test_metres_at_the_edges(metres, expected):
    with np.errstate(all="raise"):
        assert metres_to_millimetres(np.array([metres], np.float64)).tolist() == [expected]
        assert metres_to_millimetres(np.array([[3.0, metres]])).tolist() == [[3000, expected]]


def test_holes_stay_holes_whatever_the_offset():
    scale = DepthScale(0.01, offset=0.5)
    assert to_millimetres(np.array([0, 1, 2]), scale).tolist() == [0, 15, 25]
    assert to_millimetres(np.array([-1.0, np.nan]), scale).tolist() == [0, 0]


def test_values_above_the_range_of_the_source_are_held_at_its_end():
    scale = DepthScale(1e-3, max_metres=10.0)
    assert to_millimetres(np.array([9999, 10000, 10001, 65535]), scale).tolist() == [9999, 10000, 10000, 10000]
    assert to_millimetres(np.array([np.inf, np.nan, -np.inf]), scale).tolist() == [0, 0, 0]  # no far end of anything


@settings(deadline=None, max_examples=60)
@given(st.lists(st.floats(0.0005, 65.5), min_size=1, max_size=20), st.sampled_from([1e-3, 1 / 256, 1 / 5000]))
def test_any_scale_is_decoded_to_within_half_a_millimetre(metres, unit):
    stored = np.array(metres) / unit
    back = to_millimetres(stored, DepthScale(unit)) / 1000
    assert np.abs(back - np.array(metres)).max() <= 0.5e-3 + 1e-9


# --- codecs ---


@pytest.mark.parametrize("codec", CODECS)
@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**32 - 1), height=st.integers(1, 40), width=st.integers(1, 40), holes=st.floats(0, 1))
@example(seed=0, height=1, width=1, holes=1.0)
def test_codecs_lose_nothing(codec, seed, height, width, holes):
    stored = random_map(seed, (height, width), holes)
    assert (decoded(encode(stored, codec), codec, stored.shape) == stored).all()
    assert (decoded(memoryview(encode(stored, codec)), codec, stored.shape) == stored).all()


@pytest.mark.parametrize("codec", CODECS)
def test_codecs_take_every_value_and_any_memory_layout(codec):
    every = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    for view in (every, every.T, every[::-1, ::2], every.astype(">u2").astype(np.uint16)):
        assert (decoded(encode(view, codec), codec, view.shape) == view).all()


@pytest.mark.parametrize("codec", CODECS)
def test_encoding_is_deterministic(codec):
    stored = random_map(5, (60, 80))
    assert encode(stored, codec) == encode(stored.copy(), codec)


def test_what_the_bytes_are():
    stored = np.array([[1, 2, 3], [256, 513, 65535]], np.uint16)
    plain = struct.pack("<6H", 1, 2, 3, 256, 513, 65535)  # little-endian, row by row
    assert zstandard.ZstdDecompressor().decompress(encode(stored, "zst")) == plain
    assert blosc.decompress(encode(stored, "blosc")) == plain
    with Image.open(io.BytesIO(encode(stored, "png"))) as picture:
        assert (picture.format, picture.mode, picture.size) == ("PNG", "I;16", (3, 2))
        assert np.asarray(picture).tolist() == stored.tolist()


@pytest.mark.parametrize(
    "wrong",
    [
        np.zeros((4, 4), np.float32),
        np.zeros((4, 4), np.int32),
        np.zeros((4, 4), np.uint8),
        np.zeros((1, 4, 4), np.uint16),
        np.zeros(4, np.uint16),
    ],
)
@pytest.mark.parametrize("codec", CODECS)
def test_only_uint16_maps_are_encoded(codec, wrong):
    with pytest.raises(ValueError, match="uint16"):
        encode(wrong, codec)


def test_unknown_codec_is_named():
    with pytest.raises(ValueError, match="'tiff'"):
        encode(np.zeros((2, 2), np.uint16), "tiff")


@pytest.mark.parametrize("keep", [0, 1, 8, 60, 0.5, 0.99])
@pytest.mark.parametrize("codec", CODECS)
def test_truncated_bytes_are_refused(codec, keep):
    data = encode(random_map(1, (40, 60)), codec)
    cut = data[: keep if isinstance(keep, int) else int(keep * len(data))]
    with pytest.raises(ValueError):
        decoded(cut, codec, (40, 60))


@pytest.mark.parametrize(
    "garbage",
    [b"garbage, not depth", b"\x89PNG\r\n\x1a\n", b"\x28\xb5\x2f\xfd", bytes(200)],
    ids=["text", "png-mark", "zstd-mark", "zeros"],
)
@pytest.mark.parametrize("codec", CODECS)
def test_garbage_is_refused(codec, garbage):
    with pytest.raises(ValueError):
        decoded(garbage, codec, (40, 60))


@pytest.mark.parametrize("shape", [(39, 60), (41, 60), (80, 60), (1, 1)])
@pytest.mark.parametrize("codec", CODECS)
def test_a_map_of_another_size_is_refused(codec, shape):
    with pytest.raises(ValueError):
        decoded(encode(random_map(1, (40, 60)), codec), codec, shape)


@pytest.mark.parametrize("shape", [(1, 1), (1, 60), (40, 1)])
@pytest.mark.parametrize("codec", CODECS)
def test_a_map_is_never_spread_over_a_larger_one(codec, shape):
    with pytest.raises(ValueError):
        decoded(encode(random_map(1, shape), codec), codec, (40, 60))


def test_png_of_the_same_number_of_pixels_but_another_shape_is_refused():
    with pytest.raises(ValueError):
        decoded(encode(random_map(1, (40, 60)), "png"), "png", (60, 40))


def picture_bytes(picture, kind="PNG"):
    buffer = io.BytesIO()
    picture.save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGB", "RGBA", "LA"])
def test_png_that_is_no_16_bit_grey_is_refused(mode):
    with pytest.raises(ValueError, match="16-bit"):
        decoded(picture_bytes(Image.new(mode, (6, 4))), "png", (4, 6))


def test_png_codec_reads_png_only():
    values = np.full((4, 6), 3 * 65536 + 7, np.int32)  # 32-bit: cut to 16 bits it would read 7 mm
    with pytest.raises(ValueError):
        decoded(picture_bytes(Image.fromarray(values), "TIFF"), "png", (4, 6))


def test_png_that_claims_a_huge_size_is_refused():
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 16, 0, 0, 0, 0))
    data = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    with pytest.raises(ValueError):
        decoded(data, "png", (40, 60))


@pytest.mark.parametrize("states_size", [True, False])
def test_zstd_bomb_is_refused_before_it_is_unpacked(states_size):
    bomb = zstandard.ZstdCompressor(write_content_size=states_size).compress(bytes(64 << 20))
    assert len(bomb) < 10_000
    out = np.zeros((40, 60), np.uint16)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError):
            decode(bomb, "zst", out)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_zstd_that_claims_a_petabyte_is_a_damaged_map():
    # a frame header with a content size of 2**50 bytes, then one empty last block
    data = b"\x28\xb5\x2f\xfd\xe0" + (2**50).to_bytes(8, "little") + b"\x01\x00\x00"
    with pytest.raises(ValueError):
        decoded(data, "zst", (40, 60))


@pytest.mark.parametrize("states_size", [True, False])
@pytest.mark.parametrize("size", [0, 4798, 4799])
def test_zstd_of_fewer_bytes_leaves_no_old_ones_behind(size, states_size):
    data = zstandard.ZstdCompressor(write_content_size=states_size).compress(
        bytes(size)
    )  # of zeros: a very short frame
    with pytest.raises(ValueError):
        decoded(data, "zst", (40, 60))


def test_blosc_that_lies_about_its_lengths_is_refused_before_it_is_looked_at():
    data = encode(random_map(1, (40, 60)), "blosc")
    for place, value in (
        (4, 4802),
        (4, 4798),
        (4, 2**31),
        (12, len(data) + 1),
        (12, 2**31),
        (12, 16),
        (8, 0),
        (8, 2**31),
    ):
        with pytest.raises(ValueError):
            decoded(data[:place] + value.to_bytes(4, "little") + data[place + 4 :], "blosc", (40, 60))
    with pytest.raises(ValueError):
        decoded(data + b"x", "blosc", (40, 60))


def test_damaged_blosc_is_refused_or_read_but_never_kills_the_process():
    draw = np.random.default_rng(0)
    data = encode(random_map(1, (40, 60)), "blosc")
    for _ in range(3000):
        damaged = bytearray(data)
        for place in draw.integers(len(data) if draw.random() < 0.5 else 64, size=draw.integers(1, 8)):
            damaged[place] = draw.integers(256)
        with contextlib.suppress(ValueError):
            decoded(bytes(damaged), "blosc", (40, 60))


def test_zstd_without_a_stated_size_is_read():
    stored = random_map(2, (40, 60))
    data = zstandard.ZstdCompressor(write_content_size=False).compress(stored.tobytes())
    assert (decoded(data, "zst", stored.shape) == stored).all()


@pytest.mark.parametrize("codec", CODECS)
def test_decoding_in_several_threads(codec):
    maps = [random_map(seed, (120, 160)) for seed in range(8)]
    encoded = [encode(stored, codec) for stored in maps]
    with ThreadPoolExecutor(6) as pool:
        results = list(pool.map(lambda k: decoded(encoded[k % 8], codec, (120, 160)), range(96)))
    assert all((result == maps[k % 8]).all() for k, result in enumerate(results))


def test_a_refused_map_does_not_disturb_the_next_one():
    stored = random_map(3, (40, 60))
    data = encode(stored, "zst")
    for _ in range(3):
        with pytest.raises(ValueError):
            decoded(data[:-5], "zst", stored.shape)
        assert (decoded(data, "zst", stored.shape) == stored).all()


# --- resizing ---


def test_halving_takes_the_value_under_the_centre_or_another_of_the_same_cell():
    depth = np.array(
        [
            [1, 2, 0, 0],
            [3, 4, 0, 0],
            [5, 6, 0, 9],
            [7, 0, 0, 0],
        ],
        np.uint16,
    )
    # the centre of a 2x2 cell is a corner; the lower right is asked first, then left and above of it, then the diagonal
    result = resize_depth(depth, (2, 2))
    assert result[0].tolist() == [4, 0]
    assert result[1, 0] in (6, 7)  # both are beside the hole
    assert result[1, 1] == 9


def test_thirding_takes_the_centre_then_its_neighbours_then_the_corners():
    cells = np.zeros((3, 12), np.uint16)
    cells[:, 0:3] = [[1, 2, 3], [4, 5, 6], [7, 8, 9]]  # centre 5
    cells[:, 3:6] = [[1, 0, 3], [0, 0, 6], [7, 0, 9]]  # hole in the centre: the only direct neighbour is 6
    cells[:, 6:9] = [[0, 0, 0], [0, 0, 0], [0, 0, 9]]  # one corner is all there is
    assert resize_depth(cells, (1, 4)).tolist() == [[5, 6, 9, 0]]


def test_enlarging_repeats():
    depth = np.array([[1, 0], [3, 4]], np.uint16)
    assert resize_depth(depth, (4, 6)).tolist() == [
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [3, 3, 3, 4, 4, 4],
        [3, 3, 3, 4, 4, 4],
    ]


def test_same_size_changes_nothing():
    depth = random_map(4, (17, 23))
    assert (resize_depth(depth, (17, 23)) == depth).all()


def test_leading_dimensions_are_kept():
    depth = np.stack([random_map(seed, (12, 15)) for seed in range(3)])
    whole = resize_depth(depth, (5, 7))
    assert whole.shape == (3, 5, 7)
    assert all((whole[k] == resize_depth(depth[k], (5, 7))).all() for k in range(3))


def footprint(source, target):
    """Per target cell the source cells whose centres lie in it."""
    # times 2 * target, to stay whole: target cell k is [2k, 2k + 2) * source, the centre of c (2c + 1) * target
    return [
        [c for c in range(source) if 2 * k * source <= (2 * c + 1) * target < 2 * (k + 1) * source]
        for k in range(target)
    ]


@settings(deadline=None, max_examples=150)
@given(
    st.integers(0, 2**32 - 1),
    st.tuples(st.integers(1, 24), st.integers(1, 24)),
    st.tuples(st.integers(1, 24), st.integers(1, 24)),
    st.floats(0, 1),
)
@example(0, (1, 16), (1, 10), 0.5)
@example(0, (24, 24), (12, 8), 0.9)
def test_resized_values_are_of_the_source_and_near(seed, size, target, holes):
    # all values differ, so that each tells where it came from
    rng = np.random.default_rng(seed)
    depth = (rng.permutation(np.prod(size)) + 1).reshape(size).astype(np.uint16)
    depth[rng.random(size) < holes] = 0
    result = resize_depth(depth, target)
    assert result.shape == target
    assert result.dtype == depth.dtype
    for row, column in zip(*np.nonzero(result), strict=True):
        (y,), (x,) = np.nonzero(depth == result[row, column])
        # never further from the centre of the target than its footprint and one cell beside it
        assert abs((y + 0.5) - (row + 0.5) * size[0] / target[0]) <= max(size[0] / target[0], 1) / 2 + 1
        assert abs((x + 0.5) - (column + 0.5) * size[1] / target[1]) <= max(size[1] / target[1], 1) / 2 + 1
    assert set(result[result > 0].tolist()) <= set(depth.ravel().tolist())


@settings(deadline=None, max_examples=150)
@given(
    st.integers(0, 2**32 - 1),
    st.tuples(st.integers(1, 24), st.integers(1, 24)),
    st.tuples(st.integers(1, 24), st.integers(1, 24)),
    st.floats(0.3, 1),
)
@example(1, (2, 2), (1, 1), 0.5)
def test_a_target_is_a_hole_only_where_its_whole_footprint_is(seed, size, target, holes):
    depth = random_map(seed, size, holes)
    result = resize_depth(depth, target)
    rows, columns = footprint(size[0], target[0]), footprint(size[1], target[1])
    for row in range(target[0]):
        for column in range(target[1]):
            if depth[np.ix_(rows[row], columns[column])].any():
                assert result[row, column] > 0


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32 - 1), st.integers(1, 8), st.integers(1, 8), st.integers(1, 5), st.integers(1, 5))
def test_whole_ratios_are_exact(seed, height, width, down, across):
    depth = random_map(seed, (height * down, width * across), 0.8)
    result = resize_depth(depth, (height, width))
    cells = depth.reshape(height, down, width, across).transpose(0, 2, 1, 3).reshape(height, width, -1)
    assert ((result == 0) == (cells == 0).all(-1)).all()
    assert ((result[..., None] == cells).any(-1)).all()


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 2**32 - 1),
    st.tuples(st.integers(1, 30), st.integers(1, 30)),
    st.tuples(st.integers(1, 30), st.integers(1, 30)),
)
def test_numpy_and_torch_resize_alike(seed, size, target):
    stored = random_map(seed, size, 0.6)
    metres = to_metres(stored)
    expected = resize_depth(stored, target)
    assert (resize_depth(metres, target) == to_metres(expected)).all()
    assert (resize_depth(torch.from_numpy(metres), target).numpy() == to_metres(expected)).all()
    assert (resize_depth(torch.from_numpy(stored).int(), target).numpy() == expected).all()
