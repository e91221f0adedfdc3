"""Depth maps of anybody's model as files: found, matched, and read in metres; what does not fit is one line."""

import io
import math
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from trees import SIZE, write

from mde_dist.data.dataset import DepthDataset
from mde_dist.evaluation.predictions import _another_view, open_predictions
from mde_dist.packing.sources import open_source
from mde_dist.utils.errors import UserError
from mde_dist.utils.io import natural_order

NAMES = ("bathroom/rgb_00045.jpg", "bathroom/rgb_00046.jpg", "home_office/rgb_00670.jpg", "kitchen_0004/rgb_00011.jpg")


class Listed(DepthDataset):
    """Images that have names only."""

    place, advice = "here", ""

    def __init__(self, names=NAMES, size=SIZE):
        super().__init__()
        self.names, self.size = names, size

    def __len__(self):
        return len(self.names)

    def read_into(self, sample, image, target):
        raise NotImplementedError

    def meta(self, sample):
        return {"source": f"official_splits/test/{self.names[sample]}"}

    def key(self, sample):
        return self.names[sample].rsplit(".", 1)[0].replace("/", "-")

    def file_of(self, sample):
        return self.names[sample]

    def close(self):
        pass

    def prefetch(self, file):
        pass


def depth(number, size=SIZE):
    """float metres that tell their number."""
    return np.full(size, 1 + number / 4) + np.linspace(0, 0.2, size[1])


def opened(place, samples=None, **options):
    return open_predictions(place, samples or Listed(), **options)


def read_all(predictions):
    """Metres."""
    return np.stack([predictions.read(sample) for sample in range(len(predictions))]) / 1000


def truth():
    return np.stack([depth(number) for number in range(len(NAMES))])


def write_all(folder, names, encode):
    for number, name in enumerate(names):
        write(folder / name, encode(depth(number)))
    return folder


def png(metres, scale=1e-3):
    return np.rint(metres / scale).astype(np.uint16)


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def npz(**arrays):
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "names",
    [
        [name.replace(".jpg", ".png") for name in NAMES],
        [name.replace("/", "_").replace(".jpg", "_depth.png") for name in NAMES],
        [name.replace("rgb", "pred").replace(".jpg", ".png") for name in NAMES],
        ["00045.png", "46.png", "0670_pred.png", "11.png"],  # numbers that are in one image's name only
        [f"out/eigen/{name.replace('jpg', 'png')}" for name in NAMES],
        [f"official_splits/test/{name}.png" for name in NAMES],
    ],
)
def test_files_are_matched_by_what_their_names_share(tmp_path, names):
    predictions, notes = opened(write_all(tmp_path / "p", names, png))
    np.testing.assert_allclose(read_all(predictions), truth(), atol=5.1e-4)  # half a millimetre
    assert "4 predictions, matched by name" in notes[0]
    assert "metres = v * 0.001 (usual for 16-bit PNG" in notes[0]


@pytest.mark.parametrize(
    ("suffix", "encode", "scale", "within"),
    [
        ("png", png, None, 5.1e-4),
        ("png", lambda d: png(d, 1 / 256), 1 / 256, 2e-3),
        ("png", lambda d: np.rint(d / 10 * 255).astype(np.uint8), 10 / 255, 0.02),
        ("npy", npy, None, 0),
        ("npy", lambda d: npy(d.astype(np.float16)), None, 2e-3),
        ("npy", lambda d: npy(d[None].astype(np.float32)), None, 1e-6),
        ("npy", lambda d: npy(np.rint(d * 1000).astype(np.int32)), 1e-3, 5.1e-4),
        ("npz", lambda d: npz(depth=d), None, 0),
        ("npz", lambda d: npz(arr_0=d[..., None] * 100), 0.01, 1e-12),
    ],
)
def test_every_kind_of_file_gives_the_same_metres(tmp_path, suffix, encode, scale, within):
    folder = write_all(tmp_path / "p", [f"{name[:-4]}.{suffix}" for name in NAMES], encode)
    predictions, _ = opened(folder, scale=scale)
    np.testing.assert_allclose(read_all(predictions), truth(), atol=within, rtol=1e-15)


@pytest.mark.parametrize("encode", [npy, lambda d: npz(predictions=d)])
def test_one_file_with_all_maps_is_taken_in_order(tmp_path, encode):
    path = tmp_path / f"all.{'npy' if encode is npy else 'npz'}"
    path.write_bytes(encode(truth()))
    predictions, notes = opened(path)
    np.testing.assert_allclose(read_all(predictions), truth(), rtol=1e-15)
    assert "in the order of the split: map 0 to bathroom-rgb_00045, map 3 to kitchen_0004-rgb_00011" in notes[0]
    with pytest.raises(UserError, match=r"holds 4 predictions, the split has 3 images"):
        opened(path, Listed(NAMES[:3]))


def test_by_order_files_are_sorted_as_people_count(tmp_path):
    names = [f"pred_{number}.npy" for number in (1, 2, 10, 11)]
    predictions, _ = opened(write_all(tmp_path / "p", names, npy), match="order")
    np.testing.assert_allclose(read_all(predictions), truth(), rtol=1e-15)


def test_files_and_images_have_one_order_and_a_line_names_both_ends(tmp_path):
    """A plain folder of images 1, 2, 10 has them as predictions are sorted that are called so."""
    names = ["1", "2", "10", "11"]
    for number, name in enumerate(names):
        write(tmp_path / f"source/test/images/{name}.png", np.full((*SIZE, 3), number * 40, np.uint8))
        write(tmp_path / f"source/test/depth/{name}.png", png(depth(number)))
    split = open_source(tmp_path / "source", None).splits["test"]
    assert [pair.key for pair in split.pairs] == names
    folder = write_all(tmp_path / "p", [f"{name}_out.npy" for name in names], npy)
    (line,) = opened(folder, Listed([f"{name}.jpg" for name in names]), match="order")[1]
    assert "1_out.npy to 1, 11_out.npy to 11" in line
    assert "natural order" in line


def test_an_order_against_the_names_is_said(tmp_path):
    """As of shards that were packed in the order 1, 10, 2."""
    folder = write_all(tmp_path / "p", ["1.npy", "2.npy", "10.npy"], npy)
    _, notes = opened(folder, Listed(("1.jpg", "10.jpg", "2.jpg")), match="order")
    assert "warning: by their names they belong to other images, such as 10.npy to 10, for which 2.npy" in notes[1]


@given(st.lists(st.integers(0, 10**6), unique=True, min_size=1, max_size=20), st.sampled_from(["", "0", "000"]))
def test_natural_order_is_that_of_the_numbers(numbers, zeros):
    names = sorted((f"a{zeros}{number}.png" for number in numbers), key=natural_order)
    assert [int(name[1:-4]) for name in names] == sorted(numbers)


@settings(max_examples=40, deadline=None)
@given(st.permutations(range(30)), st.integers(0, 2**20))
def test_names_find_their_images_whatever_the_order(tmp_path_factory, order, seed):
    rng = np.random.default_rng(seed)
    rooms = [f"room_{number % 3}/rgb_{rng.integers(10**5):05d}_{number}.jpg" for number in range(30)]
    folder = tmp_path_factory.mktemp("p")
    for place in order:
        target = folder / rooms[place].replace("rgb", "depth").replace("jpg", "npy")
        write(target, npy(np.full((2, 2), float(place))))
    predictions, _ = opened(folder, Listed(rooms, (2, 2)))
    assert read_all(predictions)[:, 0, 0].tolist() == list(range(30))


def test_predictions_of_more_images_are_left_out_and_said(tmp_path):
    folder = write_all(tmp_path / "p", [f"{name[:-4]}.png" for name in NAMES], png)
    _, notes = opened(folder, Listed(NAMES[:2]))
    assert notes[1:] == ["2 files have the name of none of the images and were left out"]


def test_a_longer_match_beats_a_shorter_one(tmp_path):
    samples = Listed(("a_1/rgb_5.jpg",))
    write(tmp_path / "p/b_1/5.npy", npy(depth(1)))
    write(tmp_path / "p/a_1/5.npy", npy(depth(0)))
    predictions, notes = opened(tmp_path / "p", samples)
    np.testing.assert_array_equal(predictions.read(0), depth(0) * 1000)
    assert "1 files have the name of none" in notes[1]


def test_pictures_for_the_eye_are_left_out(tmp_path):
    folder = write_all(tmp_path / "p", [f"{name[:-4]}_depth.png" for name in NAMES], png)
    for name in NAMES:
        write(folder / f"{name[:-4]}_color.png", np.zeros((*SIZE, 3), np.uint8))
    _, notes = opened(folder)
    assert notes[1:] == ["4 coloured pictures beside them were left out"]
    write_all(folder, [f"{name[:-4]}.npy" for name in NAMES], npy)
    predictions, _ = opened(folder)  # arrays say more than pictures
    np.testing.assert_allclose(read_all(predictions), truth(), rtol=1e-15)


@pytest.mark.parametrize("match", ["name", "order"])
def test_an_array_beside_pictures_does_not_stand_for_them(tmp_path, match):
    folder = write_all(tmp_path / "p", [f"{name[:-4]}.png" for name in NAMES], png)
    write(folder / "intrinsics.npy", npy(np.eye(3)))
    predictions, notes = opened(folder, match=match)
    np.testing.assert_allclose(read_all(predictions), truth(), atol=5.1e-4)
    assert notes[1:] == ["1 arrays beside them, such as intrinsics.npy, were left out"]


@pytest.mark.parametrize(
    "ending",
    ["_raw_depth_meter.npy", "_depth_fp32.npy", "_pred.npy", "_depth_16bit.png", "_metric_depth.png", "/depth.npy"],
)
def test_names_that_other_tools_give_are_known(tmp_path, ending):
    encode = png if ending.endswith("png") else npy
    folder = write_all(tmp_path / "p", [f"{name[:-4]}{ending}" for name in NAMES], encode)
    np.testing.assert_allclose(read_all(opened(folder)[0]), truth(), atol=5.1e-4)


def test_of_several_arrays_the_one_called_depth_is_taken(tmp_path):
    folder = write_all(tmp_path / "p", [f"{n[:-4]}.npz" for n in NAMES], lambda d: npz(focal=np.ones(1), depth=d))
    np.testing.assert_allclose(read_all(opened(folder)[0]), truth(), rtol=1e-15)


# --- what does not fit is one line ---


def broken(tmp_path, content, name="bathroom/rgb_00045.png"):
    suffix = name.rsplit(".", 1)[1]
    encode = {"png": png, "npy": npy, "npz": lambda d: npz(d=d)}[suffix]
    folder = write_all(tmp_path / "p", [f"{n[:-4]}.{suffix}" for n in NAMES], encode)
    write(folder / name, content)
    return folder


def bomb():
    """A .npz whose array claims to be 80 GB."""
    header, target = io.BytesIO(), io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (100_000, 100_000)})
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("d.npy", header.getvalue() + bytes(1 << 20))
    return target.getvalue()


def large_png():
    """A picture of 9000x9000 that is a few kB long."""
    buffer = io.BytesIO()
    Image.new("1", (9_000, 9_000)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("bathroom/rgb_00045.png", b"", "not a readable depth map"),
        ("bathroom/rgb_00045.png", b"\x89PNG\r\n\x1a\n" + bytes(40), "not a readable depth map"),
        ("bathroom/rgb_00045.png", png(np.ones(SIZE))[:12], "not the same view"),
        ("bathroom/rgb_00045.png", np.ones(SIZE, np.uint8), "uint8"),
        ("bathroom/rgb_00045.png", large_png(), "claims 9000x9000"),
        ("bathroom/rgb_00045.npy", b"\x93NUMPY\x01\x00\x10", "not a readable array"),
        ("bathroom/rgb_00045.npy", npy(np.ones(SIZE))[:-8], "not a readable array"),
        ("bathroom/rgb_00045.npy", npy(np.array([{"a": 1}], dtype=object)), "not a readable array"),
        ("bathroom/rgb_00045.npy", npy(np.ones((3, *SIZE))), "is no depth map"),
        ("bathroom/rgb_00045.npy", npy(np.array(["x"])), "is no depth map"),
        ("bathroom/rgb_00045.npy", npy(np.ones((0, 7))), "is no depth map"),
        ("bathroom/rgb_00045.npy", npy(np.ones(SIZE, np.int64)), "holds int64 values"),
        ("bathroom/rgb_00045.npz", b"PK", "not a readable array"),
        ("bathroom/rgb_00045.npz", npz(a=np.ones(SIZE), b=np.ones(SIZE)), "holds 2 arrays"),
        ("bathroom/rgb_00045.npz", npz(a=np.array([None], dtype=object)), "not a readable array"),
        ("bathroom/rgb_00045.npz", bomb(), "not those of an array of shape"),
    ],
    ids=lambda value: value if isinstance(value, str) else "content",
)
@pytest.mark.parametrize("place", [0, 2])
def test_a_file_that_is_broken_is_named(tmp_path, name, content, words, place):
    name = name.replace("bathroom/rgb_00045", NAMES[place][:-4])
    with pytest.raises(UserError) as error:
        read_all(opened(broken(tmp_path, content, name))[0])
    assert words in str(error.value)
    assert NAMES[place][:-4] in str(error.value)
    assert "\n" not in str(error.value)


def test_a_map_that_runs_code_when_it_is_unpickled_is_not_unpickled(tmp_path):
    class Trap:
        def __reduce__(self):
            return (tmp_path / "ran").touch, ()

    folder = broken(tmp_path, npy(np.array([Trap()], dtype=object)), "bathroom/rgb_00045.npy")
    with pytest.raises(UserError):
        opened(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("names", "match", "words"),
    [
        ([], "name", "no depth map in it"),
        (["bathroom_00045.png", "bathroom_00046.png", "x_00670.png"], "name", "1 of 4 images have no prediction"),
        (["1.png", "2.png", "3.png", "4.png"], "name", "say --match order"),
        (["1.png", "2.png", "3.png"], "order", "holds 3 predictions, the split has 4 images"),
        (
            ["45.png", "045.png", "46.png", "670.png", "11.png"],
            "name",
            "both have the name of image bathroom-rgb_00045",
        ),
    ],
)
def test_files_that_do_not_match_are_one_line(tmp_path, names, match, words):
    (tmp_path / "p").mkdir()
    with pytest.raises(UserError) as error:
        opened(write_all(tmp_path / "p", names, png), match=match)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_a_name_that_fits_two_images_is_refused(tmp_path):
    samples = Listed(("a/rgb_1.jpg", "b/rgb_1.jpg"))
    with pytest.raises(UserError, match=r"1\.png: its name fits 2 images, such as a-rgb_1 and b-rgb_1"):
        opened(write_all(tmp_path / "p", ["1.png", "a_1.png"], png), samples)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_unit_that_nothing_tells_is_asked_for(tmp_path, dtype):
    suffix = "png" if dtype == np.uint8 else "npy"
    encode = (lambda d: (d * 20).astype(dtype)) if suffix == "png" else (lambda d: npy((d * 1000).astype(dtype)))
    with pytest.raises(UserError, match=r"nothing says what a step of them means.*--prediction-scale"):
        opened(write_all(tmp_path / "p", [f"{name[:-4]}.{suffix}" for name in NAMES], encode))


@pytest.mark.parametrize("size", [(12, 16), (48, 64), (7, 9), (240, 320)])
def test_any_size_of_the_same_view_will_do(tmp_path, size):
    ok = abs(size[0] * SIZE[1] / (size[1] * SIZE[0]) - 1) < 0.01
    folder = tmp_path / "p"
    for number, name in enumerate(NAMES):
        write(folder / f"{name[:-4]}.npy", npy(depth(number, size)))
    if ok:
        assert read_all(opened(folder)[0]).shape == (4, *size)
    else:
        with pytest.raises(UserError, match="is 7x9, its image 24x32: not the same view"):
            read_all(opened(folder)[0])


@pytest.mark.parametrize("name", ["bathroom/rgb_00046.png", "stray.npy", "more"])
@pytest.mark.parametrize("match", ["name", "order"])
def test_a_link_that_leads_nowhere_is_named_before_anything_is_scored(tmp_path, name, match):
    write_all(tmp_path, [name.replace(".jpg", ".png") for name in NAMES], png)
    (tmp_path / name).unlink(missing_ok=True)
    (tmp_path / name).symlink_to("/nowhere/at/all")
    (tmp_path / "README.md").symlink_to("/nowhere/else")  # it is no prediction
    with pytest.raises(UserError, match="leads nowhere") as error:
        opened(tmp_path, match=match)
    assert str(tmp_path / name) in str(error.value)
    (tmp_path / name).unlink()
    if "png" not in name:
        assert len(opened(tmp_path, match=match)[0]) == len(NAMES)


def taken(tmp_path, size, whole=(480, 640)):
    np.save(tmp_path / "all.npy", np.ones((1, *size), np.float16))
    return opened(tmp_path / "all.npy", Listed(("a.jpg",), whole))[1][0]


@pytest.mark.parametrize(
    "size",
    [(480, 640), (228, 304), (240, 320), (518, 686), (384, 512), (336, 448), (252, 336), (768, 1024)],
)
def test_sizes_that_networks_predict_at_are_taken_and_said(tmp_path, size):
    assert ("brought to 480x640" in taken(tmp_path, size)) == (size != (480, 640))


@pytest.mark.parametrize(
    ("size", "words"),
    [
        ((440, 592), "DenseDepth's crop"),
        ((426, 560), "Eigen's crop"),
        ((427, 561), "NYU's crop"),
        ((427, 565), "a part of the view"),
        ((470, 630), "a part of the view"),
        ((416, 544), "not the same view"),
        ((640, 480), "not the same view"),
    ],
)
def test_a_crop_is_refused_and_named(tmp_path, size, words):
    with pytest.raises(UserError, match=words):
        taken(tmp_path, size)


@given(st.integers(64, 2000), st.integers(64, 2000), st.floats(0.2, 3), st.sampled_from([1, 14, 16, 32]))
def test_the_whole_image_is_taken_at_any_scale_or_its_aspect_is_lost(rows, columns, scale, stride):
    """Sides rounded to the stride, either way; what is refused is off by more than a hundredth."""
    for rounded in (math.floor, round, math.ceil):
        height, width = (max(1, rounded(scale * side / stride)) * stride for side in (rows, columns))
        assert _another_view((height, width), (rows, columns)) in ("", "not the same view")


def test_a_place_that_is_not_there_is_said(tmp_path):
    with pytest.raises(UserError, match="no such folder or file"):
        opened(tmp_path / "nothing")
    (tmp_path / "maps.txt").write_text("x")
    with pytest.raises(UserError, match=r"not one of \.npy, \.npz, \.png"):
        opened(tmp_path / "maps.txt")
