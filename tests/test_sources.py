"""Data sets as people have them on disk: recognised, read in the right unit, refused by name where they are broken."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from trees import SIZE, bts, densedepth, eight_bit, folder, jpeg_bytes, millimetres, picture, write

from mde_dist.data.depth import DepthScale
from mde_dist.packing.probe import probe
from mde_dist.packing.sources import EXPECTED, BadPair, RawPair, Source, open_source, rooms
from mde_dist.utils.errors import UserError


def read(source: Source, split: str, place: int = 0) -> RawPair:
    chosen = source.splits[split]
    return source.read(chosen.pairs[place], chosen.scale)


def one_line(error: pytest.ExceptionInfo[UserError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


# --- densedepth ---


def test_densedepth_training_is_8_bit_bin_centres_and_test_is_16_bit_millimetres(tmp_path: Path) -> None:
    source = open_source(densedepth(tmp_path))
    assert source.layout == "densedepth"
    assert [len(source.splits[split].pairs) for split in ("train", "test")] == [4, 3]
    for i in range(4):
        raw = read(source, "train", i)
        centre = (2 * eight_bit(i).astype(np.float64) + 1) / 2 * 10_000 / 255
        assert np.abs(raw.depth - centre).max() <= 0.5
        # a floor quantiser's bins are 39.2 mm wide: the truth lies within half of one, without bias
        error = raw.depth.astype(np.int64) - millimetres(i)
        assert np.abs(error).max() <= 20
        assert abs(error.mean()) < 2
    for i in range(3):
        raw = read(source, "test", i)
        assert np.array_equal(raw.depth, millimetres(100 + i))
        assert np.array_equal(raw.image, picture(100 + i))


def test_densedepth_values_at_the_ends_of_the_range(tmp_path: Path) -> None:
    root = densedepth(tmp_path, train=1, test=1)
    values = np.arange(256, dtype=np.uint8).reshape(16, 16)
    write(root / "data/nyu2_train/basement_0001a_out/1.jpg", jpeg_bytes(picture(0, (16, 16))))
    write(root / "data/nyu2_train/basement_0001a_out/1.png", values)
    write(root / "data/nyu2_test/00000_colors.png", picture(0, (1, 4)))
    write(root / "data/nyu2_test/00000_depth.png", np.array([[0, 1, 1000, 65535]], np.uint16))
    source = open_source(root)
    train = read(source, "train").depth.reshape(-1)
    assert train[0] == 0  # a hole, not 2 cm
    assert train[1] == round(1.5 * 10_000 / 255)
    assert train[254] == round(254.5 * 10_000 / 255)
    assert train[255] == 10_000  # not beyond the range
    assert read(source, "test").depth.tolist() == [[0, 1, 1000, 65535]]


@pytest.mark.parametrize("place", ["above", "data", "nyu_data"])
def test_densedepth_root_may_be_data_or_a_folder_above_it(tmp_path: Path, place: str) -> None:
    base = densedepth(tmp_path / "nyu_data")
    root = {"above": base, "data": base / "data", "nyu_data": tmp_path}[place]
    source = open_source(root)
    assert source.layout == "densedepth"
    for split in ("train", "test"):
        for i in range(3):
            read(source, split, i)
    assert source.splits["train"].pairs[0].key == "nyu2_train-basement_0001a_out-1"  # the same wherever one starts


def test_densedepth_list_with_bom_backslashes_blank_lines_and_windows_line_ends(tmp_path: Path) -> None:
    plain = open_source(densedepth(tmp_path))
    for split in ("train", "test"):
        table = tmp_path / f"data/nyu2_{split}.csv"
        text = "\ufeff" + table.read_text().replace("/", "\\").replace("\n", "\r\n\r\n").replace(",", ", ")
        table.write_bytes(text.encode("utf-8"))
    windows = open_source(tmp_path)
    assert windows.splits == plain.splits
    assert read(windows, "train").jpeg == read(plain, "train").jpeg is not None


def test_a_layout_may_have_one_split_only(tmp_path: Path) -> None:
    assert list(open_source(densedepth(tmp_path / "a", train=0)).splits) == ["test"]
    assert list(open_source(densedepth(tmp_path / "b", test=0)).splits) == ["train"]
    assert list(open_source(bts(tmp_path / "c", train=0)).splits) == ["test"]
    assert list(open_source(bts(tmp_path / "d", test=0)).splits) == ["train"]


# --- bts ---


@pytest.mark.parametrize("columns", [2, 3])
def test_bts_reads_millimetres_and_keeps_holes(tmp_path: Path, columns: int) -> None:
    source = open_source(bts(tmp_path, columns=columns))
    assert source.layout == "bts"
    assert [pair.image for pair in source.splits["train"].pairs][:2] == [
        "sync/basement_0001a/rgb_00000.jpg",
        "sync/kitchen_0028b/rgb_00001.jpg",
    ]
    assert source.splits["test"].pairs[0].depth == "official_splits/test/bathroom/sync_depth_00000.png"
    for i in range(4):
        raw = read(source, "train", i)
        expected = millimetres(i, holes=0.3)
        assert 0.2 < (expected == 0).mean() < 0.4
        assert np.array_equal(raw.depth, expected)
        assert raw.jpeg == jpeg_bytes(picture(i))
    for i in range(3):
        assert np.array_equal(read(source, "test", i).depth, millimetres(100 + i))


def test_bts_list_without_leading_slash_or_with_one_in_both_lists(tmp_path: Path) -> None:
    plain = open_source(bts(tmp_path))
    train, test = (tmp_path / f"nyudepthv2_{split}_files_with_gt.txt" for split in ("train", "test"))
    train.write_text(train.read_text().replace("\n/", "\n").replace(" /", " ").removeprefix("/"))  # as NeWCRFs has it
    test.write_text("".join(f"/{line.replace(' home', ' /home')}\n" for line in test.read_text().splitlines()))
    assert "/basement" not in train.read_text()
    assert open_source(tmp_path).splits == plain.splits


def test_scene_is_the_folder_of_the_image(tmp_path: Path) -> None:
    dense, sync = open_source(densedepth(tmp_path / "a")), open_source(bts(tmp_path / "b"))
    for source in (dense, sync):
        assert [pair.scene for pair in source.splits["train"].pairs] == ["basement_0001a", "kitchen_0028b"] * 2
    assert [pair.scene for pair in sync.splits["test"].pairs] == ["bathroom", "home_office", "bathroom"]


# --- folder ---


def test_folder_with_one_split_guesses_millimetres_and_says_so(tmp_path: Path) -> None:
    source = open_source(folder(tmp_path))
    assert source.layout == "folder"
    assert list(source.splits) == ["train"]
    assert [pair.key for pair in source.splits["train"].pairs] == ["0000", "0001", "0002", "0003"]
    said = str(source.splits["train"].scale)
    assert "guessed" in said
    assert "millimetres" in said
    assert "16-bit" in said
    for i in range(4):
        assert np.array_equal(read(source, "train", i).depth, millimetres(i))


def test_folder_with_several_splits(tmp_path: Path) -> None:
    for place, name in enumerate(("train", "test", "val")):
        folder(tmp_path / name, count=place + 1, first=10 * place)
    (tmp_path / "notes").mkdir()  # a folder that is no split
    source = open_source(tmp_path)
    assert {name: len(split.pairs) for name, split in source.splits.items()} == {"train": 1, "test": 2, "val": 3}
    for place, name in enumerate(("train", "test", "val")):
        assert np.array_equal(read(source, name).depth, millimetres(10 * place))


def test_folder_takes_any_image_type_and_skips_other_files(tmp_path: Path) -> None:
    suffixes = ("jpg", "JPEG", "png", "webp", "bmp", "tif")
    for i, suffix in enumerate(suffixes):
        path = tmp_path / f"images/{i}.{suffix}"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(picture(i)).save(path)
        write(tmp_path / f"depth/{i}.png", millimetres(i))
    (tmp_path / "images/Thumbs.db").write_bytes(b"no image")
    source = open_source(tmp_path)
    assert len(source.splits["train"].pairs) == len(suffixes)
    for i in range(len(suffixes)):
        assert np.abs(read(source, "train", i).image.astype(int) - picture(i)).mean() < 12
        assert np.array_equal(read(source, "train", i).depth, millimetres(i))


def test_folder_of_8_bit_depth_is_refused_without_a_scale_and_accepted_with_one(tmp_path: Path) -> None:
    write(tmp_path / "images/a.jpg", jpeg_bytes(picture(1)))
    write(tmp_path / "depth/a.png", eight_bit(1))
    with pytest.raises(UserError) as error:
        open_source(tmp_path)
    said = one_line(error)
    assert "8-bit" in said
    assert str(tmp_path / "depth/a.png") in said
    assert "--depth-scale train=" in said
    for scales in ({"train": DepthScale(0.04)}, {"": DepthScale(0.04)}):
        source = open_source(tmp_path, scales=scales)
        assert np.array_equal(read(source, "train").depth, eight_bit(1).astype(np.uint16) * 40)


@pytest.mark.parametrize("layout", ["folder", "bts"])
def test_a_scale_for_a_split_wins_over_the_scale_for_all(tmp_path: Path, layout: str) -> None:
    if layout == "bts":
        bts(tmp_path)
    else:
        folder(tmp_path / "train", count=1)
        folder(tmp_path / "test", count=1, first=100)
    source = open_source(tmp_path, scales={"": DepthScale(0.0005), "test": DepthScale(0.002)})
    assert source.splits["train"].scale.metres_per_unit == 0.0005
    assert np.array_equal(read(source, "test").depth, millimetres(100) * 2)


def test_folder_with_an_image_that_has_no_depth_file(tmp_path: Path) -> None:
    """The scale is guessed from the first map there is; the pair without one is named when it is packed."""
    folder(tmp_path, count=2)
    (tmp_path / "depth/0000.png").unlink()
    source = open_source(tmp_path)
    assert source.missing(source.splits["train"].pairs[0]) == [tmp_path / "depth/0000.png"]
    (tmp_path / "depth/0001.png").unlink()
    with pytest.raises(UserError, match=r"0000\.png"):
        open_source(tmp_path)


def test_folder_without_images_is_refused(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "depth").mkdir()
    with pytest.raises(UserError, match="holds no image"):
        open_source(tmp_path)


# --- rooms ---


def test_rooms_need_no_file_and_no_room_is_in_two_splits() -> None:
    source = open_source(Path("/nonexistent"), "rooms")
    seeds = {name: {pair.image for pair in split.pairs} for name, split in source.splits.items()}
    assert {name: len(found) for name, found in seeds.items()} == {"train": 320, "test": 48}
    assert not seeds["train"] & seeds["test"]
    assert source.missing(source.splits["train"].pairs[0]) == []
    raw = read(source, "test")
    assert raw.image.dtype == np.uint8
    assert raw.depth.dtype == np.uint16
    assert raw.image.shape == (*raw.depth.shape, 3)
    assert 500 < np.median(raw.depth[raw.depth > 0]) < 8000  # millimetres of a room
    assert np.array_equal(read(source, "test").depth, raw.depth)
    assert not np.array_equal(read(source, "test", 1).depth, raw.depth)


def test_rooms_counts_can_be_chosen() -> None:
    source = rooms({"train": 2})
    assert {name: len(split.pairs) for name, split in source.splits.items()} == {"train": 2, "test": 48}


# --- recognition ---


def test_every_layout_is_recognised_by_itself_and_by_name(tmp_path: Path) -> None:
    for name, make in (("densedepth", densedepth), ("bts", bts), ("folder", folder)):
        root = make(tmp_path / name)
        assert open_source(root).layout == name
        assert open_source(root, name).splits == open_source(root).splits
        for other in {"densedepth", "bts", "folder"} - {name}:
            with pytest.raises(UserError) as error:
                open_source(root, other)
            said = one_line(error)
            assert str(root) in said
            assert EXPECTED[other] in said
            assert EXPECTED[name] not in said  # only what was asked for


def test_layout_by_name_decides_where_a_folder_is_two_layouts(tmp_path: Path) -> None:
    bts(tmp_path)
    folder(tmp_path, count=2)
    assert open_source(tmp_path, "bts").layout == "bts"
    assert len(open_source(tmp_path, "folder").splits["train"].pairs) == 2


def test_a_folder_that_is_none_of_them_names_all_that_was_looked_for(tmp_path: Path) -> None:
    write(tmp_path / "holiday/beach.jpg", jpeg_bytes(picture(1)))
    with pytest.raises(UserError) as error:
        open_source(tmp_path)
    said = one_line(error)
    assert str(tmp_path) in said
    assert "data/nyu2_train.csv" in said
    assert "nyudepthv2_train_files_with_gt.txt" in said
    assert "images/" in said


def test_a_folder_that_is_not_there_or_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "nowhere", tmp_path / "file"):
        with pytest.raises(UserError, match="no such folder") as error:
            open_source(path)
        assert str(path) in str(error.value)


def test_a_scale_for_a_split_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'validation'") as error:
        open_source(bts(tmp_path), scales={"validation": DepthScale(0.001)})
    assert "train, test" in str(error.value)


# --- lists that cannot be right ---

ROW = "data/nyu2_train/a_out/1.jpg,data/nyu2_train/a_out/1.png\n"


@pytest.mark.parametrize(
    ("text", "row", "words"),
    [
        (ROW + ROW, "row 2", "twice"),
        (ROW + ROW.replace("1.jpg", "1.png"), "row 2", "collides"),
        (ROW + "data/../../etc/1.jpg,data/1.png\n", "row 2", "leaves"),
        (ROW + "data/2.jpg,../1.png\n", "row 2", "leaves"),
        ("C:/nyu/1.jpg,C:/nyu/1.png\n", "row 1", "leaves"),
        (ROW + "data/2.jpg\n", "row 2", "expected an image and a depth path"),
        (ROW + "data/2.jpg,\n", "row 2", ""),
        (ROW + ",data/2.png\n", "row 2", ""),
        ("", "", "no pairs"),
        ("\n\n", "", "no pairs"),
    ],
)
def test_a_csv_that_cannot_be_right_is_one_line_with_list_and_row(
    tmp_path: Path, text: str, row: str, words: str
) -> None:
    table = tmp_path / "data/nyu2_train.csv"
    table.parent.mkdir()
    table.write_text(text)
    with pytest.raises(UserError) as error:
        open_source(tmp_path)
    said = one_line(error)
    assert str(table) in said
    assert row in said
    assert words in said


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("/a/1.jpg /a/1.png 518.8\n/a/1.jpg /a/1.png 518.8\n", "twice"),
        ("/../../1.jpg /a/1.png\n", "leaves"),
        ("/a/1.jpg\n", "expected an image and a depth path"),
        ("", "no pairs"),
    ],
)
def test_a_bts_list_that_cannot_be_right(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "nyudepthv2_train_files_with_gt.txt").write_text(text)
    with pytest.raises(UserError, match=words) as error:
        open_source(tmp_path)
    assert "nyudepthv2_train_files_with_gt.txt" in one_line(error)


def test_an_absolute_path_in_a_list_stays_inside_the_data_set(tmp_path: Path) -> None:
    densedepth(tmp_path, train=1, test=0)
    (tmp_path / "data/nyu2_train.csv").write_text("/etc/passwd,/etc/passwd\n")
    source = open_source(tmp_path)
    assert source.missing(source.splits["train"].pairs[0]) == [tmp_path / "etc/passwd"] * 2


def test_a_list_that_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "nyudepthv2_train_files_with_gt.txt").write_bytes(jpeg_bytes(picture(1)))
    with pytest.raises(UserError, match="not a readable list"):
        open_source(tmp_path)


# --- files that cannot be right ---


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    source = open_source(bts(tmp_path))
    pair = source.splits["train"].pairs[0]
    for path in (tmp_path / pair.depth, tmp_path / pair.image):
        path.unlink()
        with pytest.raises(BadPair) as error:
            read(source, "train")
        assert str(path) in str(error.value)
    assert source.missing(pair) == [tmp_path / pair.image, tmp_path / pair.depth]


@pytest.mark.parametrize("keep", [0, 2, 20, 165, 0.5, 0.9])
@pytest.mark.parametrize(
    ("make", "split", "which"),
    [
        (densedepth, "train", "image"),  # JPEG
        (densedepth, "train", "depth"),  # 8-bit PNG
        (densedepth, "test", "image"),  # PNG
        (bts, "train", "depth"),  # 16-bit PNG
    ],
)
def test_a_truncated_file_is_named(
    tmp_path: Path, make: Callable[[Path], Path], split: str, which: str, keep: float
) -> None:
    source = open_source(make(tmp_path))
    path = tmp_path / getattr(source.splits[split].pairs[0], which)
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data)) if keep < 1 else int(keep)])
    with pytest.raises(BadPair) as error:
        read(source, split)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("kind", ["jpeg", "progressive", "png8", "png16", "png_rgb"])
def test_whatever_happens_to_the_bytes_reading_ends_in_a_pair_or_in_bad_pair(tmp_path: Path, kind: str) -> None:
    """Every prefix of a file's head, and some hundred random damages, on a real file."""
    split, which = {"png8": ("train", "depth"), "png16": ("test", "depth"), "png_rgb": ("test", "image")}.get(
        kind, ("train", "image")
    )
    source = open_source(densedepth(tmp_path, train=1, test=1))
    path = tmp_path / getattr(source.splits[split].pairs[0], which)
    if kind == "progressive":
        path.write_bytes(jpeg_bytes(picture(0), progressive=True))
    whole = path.read_bytes()
    draw = np.random.default_rng(5)
    head = min(len(whole), 450)
    damages = [whole[:length] for length in range(head)]
    for _ in range(150):
        damaged = bytearray(whole)
        for place in draw.integers(0, head, draw.integers(1, 4)):
            damaged[place] = draw.integers(256)
        damages.append(bytes(damaged))
    for damaged in damages:
        path.write_bytes(damaged)
        try:
            raw = read(source, split)
        except BadPair as bad:
            assert str(tmp_path) in str(bad)
        else:
            assert len(damaged) >= len(whole) - 24  # nothing but a PNG's checksum and end may be missing unnoticed
            assert raw.image.dtype == np.uint8
            assert raw.image.shape == (*raw.depth.shape, 3)


def test_8_bit_depth_where_16_is_declared_and_the_other_way_round(tmp_path: Path) -> None:
    source = open_source(densedepth(tmp_path))
    test, train = source.splits["test"].pairs[0], source.splits["train"].pairs[0]
    write(tmp_path / test.depth, eight_bit(1))
    with pytest.raises(BadPair, match="is 8-bit, but the layout declares 16-bit") as error:
        read(source, "test")
    assert str(tmp_path / test.depth) in str(error.value)
    write(tmp_path / train.depth, millimetres(1))
    with pytest.raises(BadPair, match="is 16-bit, but the layout declares 8-bit"):
        read(source, "train")
    given = open_source(tmp_path, scales={"train": DepthScale(0.001)})  # the user knows better
    assert np.array_equal(read(given, "train").depth, millimetres(1))


@pytest.mark.parametrize("mode", ["RGB", "P", "LA", "1"])
def test_a_depth_map_of_another_kind_of_picture_is_refused(tmp_path: Path, mode: str) -> None:
    source = open_source(bts(tmp_path))
    path = tmp_path / source.splits["train"].pairs[0].depth
    Image.fromarray(picture(0)).convert(mode).save(path)
    with pytest.raises(BadPair) as error:
        read(source, "train")
    assert str(path) in str(error.value)
    assert "one channel" in str(error.value)


def test_image_and_depth_of_different_size(tmp_path: Path) -> None:
    source = open_source(bts(tmp_path))
    pair = source.splits["train"].pairs[0]
    write(tmp_path / pair.depth, millimetres(0, (32, 24)))
    with pytest.raises(BadPair) as error:
        read(source, "train")
    said = str(error.value)
    assert f"{tmp_path / pair.depth} is 32x24" in said
    assert f"{tmp_path / pair.image} is 24x32" in said


def test_depth_without_a_valid_pixel(tmp_path: Path) -> None:
    source = open_source(bts(tmp_path))
    for pair in source.splits["train"].pairs:
        write(tmp_path / pair.depth, np.zeros(SIZE, np.uint16))
    assert not read(source, "train").depth.any()  # evaluation names it; packing and looking refuse it
    with pytest.raises(UserError, match="no valid pixel") as error:
        probe(source)
    assert str(tmp_path / pair.depth) in str(error.value)


# --- images ---


def jpegs() -> dict[str, bytes]:
    rgb = Image.fromarray(picture(7))
    kinds: dict[str, bytes] = {}
    exif = Image.Exif()
    exif[0x010E] = "a comment"
    for name, image, options in (
        ("baseline 4:2:0", rgb, {"subsampling": 2}),
        ("baseline 4:4:4", rgb, {"subsampling": 0, "optimize": True}),
        ("baseline exif", rgb, {"exif": exif.tobytes(), "comment": b"hello"}),
        ("progressive", rgb, {"progressive": True}),
        ("grey", rgb.convert("L"), {}),
        ("cmyk", rgb.convert("CMYK"), {}),
        ("components are RGB", rgb, {"keep_rgb": True}),
    ):
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=92, **options)
        kinds[name] = buffer.getvalue()
    return kinds


@pytest.mark.parametrize("kind", list(jpegs()))
def test_only_a_baseline_rgb_jpeg_keeps_its_own_bytes(tmp_path: Path, kind: str) -> None:
    data = jpegs()[kind]
    source = open_source(bts(tmp_path))
    write(tmp_path / source.splits["train"].pairs[0].image, data)
    raw = read(source, "train")
    assert (raw.jpeg == data) == kind.startswith("baseline")
    assert (raw.jpeg is None) == (not kind.startswith("baseline"))
    with Image.open(io.BytesIO(data)) as judge:
        expected = np.asarray(judge.convert("RGB")).astype(int)
    assert raw.image.shape == (*SIZE, 3)
    assert np.abs(raw.image.astype(int) - expected).max() <= 3  # decoders differ in the last digit


def test_png_image_with_palette_or_alpha_is_read_as_rgb(tmp_path: Path) -> None:
    source = open_source(densedepth(tmp_path))
    path = tmp_path / source.splits["test"].pairs[0].image
    Image.fromarray(picture(3)).convert("RGBA").save(path)
    assert np.array_equal(read(source, "test").image, picture(3))
    Image.fromarray(picture(3)).convert("P").save(path)
    assert read(source, "test").image.shape == (*SIZE, 3)
