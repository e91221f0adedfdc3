"""Lists of files: found or named, from whatever folder their paths start, and one line where they cannot be right."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from trees import bts, densedepth, h5, jpeg_bytes, labeled_mat, marigold, millimetres, newcrfs, picture, write

from mde_dist.packing.inspect import open_checked
from mde_dist.packing.sources import open_source
from mde_dist.packing.sources.official import official_split
from mde_dist.packing.sources.rows import read_rows
from mde_dist.shard import main
from mde_dist.utils.errors import UserError

NYUV2 = Path(os.environ.get("MDE_DIST_NYUV2", "/nonexistent"))
real = pytest.mark.skipif(not NYUV2.is_dir(), reason="MDE_DIST_NYUV2 names no folder")


def said_of(root: Path, **options: object) -> str:
    """The one line with which a list is refused."""
    with pytest.raises(UserError) as error:
        open_source(root, **options)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600
    return str(error.value)


def test_lists_may_be_named_anything_and_be_packed(tmp_path: Path) -> None:
    root = bts(tmp_path / "tree")
    plain = open_source(root)
    lists = {}
    for split in ("train", "test"):
        found = root / f"nyudepthv2_{split}_files_with_gt.txt"
        lists[split] = tmp_path / f"my {split}.txt.gz"
        lists[split].write_bytes(gzip.compress(found.read_bytes(), mtime=0))
        found.unlink()
    with pytest.raises(UserError, match="is not a data set"):
        open_source(root)
    assert open_source(root, lists=lists).splits == plain.splits
    arguments = [f"{split}={path}" for split, path in lists.items()]
    main(["--source", str(root), "--output", str(tmp_path / "o"), "--workers", "1", "--list", *arguments])
    assert json.loads((tmp_path / "o/manifest.json").read_text())["splits"]["train"]["samples"] == 4


@pytest.mark.parametrize("base", ["", "sync", "nyu/sync", "nyu_depth_v2/sync", "any"])
def test_the_folder_that_a_list_starts_from_is_found_by_trying(tmp_path: Path, base: str) -> None:
    for i in range(2):
        write(tmp_path / base / f"a_0001/rgb_{i}.jpg", jpeg_bytes(picture(i)))
        write(tmp_path / base / f"a_0001/sync_depth_{i}.png", millimetres(i))
    rows = [f"/a_0001/rgb_{i}.jpg /a_0001/sync_depth_{i}.png 518.8579\n" for i in range(2)]
    (tmp_path / "nyudepthv2_train_files_with_gt.txt").write_text("".join(rows))
    source = open_source(tmp_path)
    assert [pair.key for pair in source.splits["train"].pairs] == ["a_0001-rgb_0", "a_0001-rgb_1"]
    assert [pair.scene for pair in source.splits["train"].pairs] == ["a_0001"] * 2
    for i, pair in enumerate(source.splits["train"].pairs):
        assert np.array_equal(source.read(pair, source.splits["train"].scale).depth, millimetres(i))


@real
@pytest.mark.parametrize(
    ("split", "name", "layout", "pairs"),
    [
        ("train", "bts_train_24231.txt.gz", "bts", 24_231),
        ("train", "newcrfs_train_36253.txt.gz", "bts", 36_253),
        ("train", "nyudepth_hdf5_train.csv.gz", "h5", 47_584),
        ("test", "nyudepth_hdf5_val.csv", "h5", 654),
    ],
)
def test_published_lists_are_read_whole(tmp_path: Path, split: str, name: str, layout: str, pairs: int) -> None:
    source = open_source(tmp_path, lists={split: NYUV2 / "lists" / name})
    found = source.splits[split].pairs
    assert source.layout == layout
    assert len({pair.key for pair in found}) == len(found) == pairs
    if layout == "h5":
        assert found[0].image == {"train": "train/kitchen_0006/00081.h5", "test": "val/official/00001.h5"}[split]
    else:
        filled = name.startswith("newcrfs")
        assert source.splits[split].depth_map == ("raw" if filled else "as given")


def test_a_given_list_is_of_the_files_below_an_only_folder(tmp_path: Path) -> None:
    marigold(tmp_path / "source/nyu", lists=True)
    for split in ("train", "test"):
        (tmp_path / f"source/nyu/filename_list_{split}.txt").rename(tmp_path / f"{split}.txt")
    source = open_source(tmp_path / "source", lists={split: tmp_path / f"{split}.txt" for split in ("train", "test")})
    assert source.layout == "marigold"
    assert [pair.key for pair in source.splits["train"].pairs][:1] == ["basement_0001a-rgb_0001"]
    for split in source.splits.values():
        assert [source.missing(pair) for pair in split.pairs] == [[]] * len(split.pairs)


@real
def test_the_head_of_marigolds_list(tmp_path: Path) -> None:
    source = open_source(tmp_path, lists={"train": NYUV2 / "lists/marigold_train_head.txt"}, depth_map="filled")
    first = source.splits["train"].pairs[0]
    assert (source.layout, first.key, first.scene) == ("marigold", "office_0003-rgb_0003", "office_0003")
    assert first.depth == "train/office_0003/filled_0003.png"
    assert official_split()[3 - 1] == ("train", "office_0003")  # its numbers count from 1


# --- lists that cannot be right ---


def test_a_gz_bomb_is_refused_at_the_limit(tmp_path: Path) -> None:
    bomb = tmp_path / "list.txt.gz"
    with gzip.open(bomb, "wb") as file:
        for _ in range(80):
            file.write(bytes(2**20))
    said = said_of(bts(tmp_path / "tree"), lists={"train": bomb})
    assert f"{bomb}: more than 67,108,864 bytes when unpacked" in said


@pytest.mark.parametrize("data", [b"", b"not gzip", gzip.compress(b"a.jpg b.png\n", mtime=0)[:-12]])
def test_a_gz_that_is_none_or_cut(tmp_path: Path, data: bytes) -> None:
    write(tmp_path / "list.txt.gz", data)
    assert f"{tmp_path / 'list.txt.gz'}: not a readable list" in said_of(
        bts(tmp_path / "tree"), lists={"train": tmp_path / "list.txt.gz"}
    )


NEWCRFS = "nyudepthv2_train_files_with_gt_dense.txt"
LINE = "a/1.jpg a/1.png a/dense/1.png\n"
H5_LINE = "data/nyudepth_hdf5/train/a/00001.h5\n"


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        (NEWCRFS, "rgb depth filled\n", "lists no pairs"),
        (NEWCRFS, LINE + LINE, "row 2: sync/a/1.jpg is listed twice"),
        (NEWCRFS, "C:\\nyu\\1.jpg C:\\nyu\\1.png\n", "row 1: 'C:/nyu/1.jpg' leaves"),
        (NEWCRFS, "/../1.jpg 1.png\n", "leaves"),
        (NEWCRFS, LINE + "a/2.jpg\0 a/2.png b.png\n", "row 2: 'a/2.jpg\\x00"),
        (NEWCRFS, "", "lists no pairs"),
        (NEWCRFS, "# of the kitchen\n\nonly-an-image.jpg\n", "row 3: expected an image and a depth path"),
        ("data/nyu2_train.csv", "a" * 200_000 + ",b\n", "not a readable list"),
        ("filename_list_train.txt", LINE + "\\\\server\\..\\x.png b.png c.png\n", "row 2"),
        ("nyudepth_hdf5_train.csv", "Name\n", "lists no pairs"),
        ("nyudepth_hdf5_train.csv", "Name\n" + H5_LINE + H5_LINE, "row 3: train/a/00001.h5 is listed twice"),
        ("nyudepth_hdf5_train.csv", "Name\ndata/nyudepth_hdf5/../../a.h5\n", "row 2: '../../a.h5' leaves"),
        ("nyudepth_hdf5_train.csv", H5_LINE + "a/2.jpg\n", "row 2: expected the path of an .h5 file"),
    ],
)  # fmt: skip
def test_lists_that_cannot_be_right_are_one_line_with_their_row(
    tmp_path: Path, name: str, text: str, words: str
) -> None:
    write(tmp_path / name, text.encode())
    said = said_of(tmp_path)
    assert str(tmp_path / name) in said
    assert words in said


def test_a_list_in_another_encoding_is_refused_with_what_to_do(tmp_path: Path) -> None:
    write(tmp_path / NEWCRFS, "büro/1.jpg büro/1.png\n".encode("latin-1"))
    said = said_of(tmp_path)
    assert str(tmp_path / NEWCRFS) in said
    assert "UTF-8" in said


def test_paths_that_lead_nowhere_are_one_line_that_says_which_folder_is_wanted(tmp_path: Path) -> None:
    write(tmp_path / "train.csv", "".join(f"/mnt/{i}/a/{i}.jpg,/mnt/{i}/a/{i}.png\n" for i in range(3)).encode())
    with pytest.raises(UserError, match="--source has to be the folder") as error:
        open_checked(tmp_path, None, (), (f"train={tmp_path / 'train.csv'}",))
    assert "\n" not in str(error.value)


# --- the same pairs, however their list is written ---

NAMES = [
    ("living room/rgb 1.jpg", "living room/depth 1.png"),
    ("客厅 一/一.jpg", "客厅 一/二.png"),
    ("b/3.jpg", "b/3.png"),
]


def spelled(separator: str = ",", quoting: int = csv.QUOTE_MINIMAL, start: str = "", heading: str = "") -> str:
    text = io.StringIO()
    rows = [[start + image, start + depth] for image, depth in NAMES]
    csv.writer(text, delimiter=separator, quoting=quoting, lineterminator="\n").writerows(rows)
    return heading + text.getvalue()


PLAIN = spelled()
WRITTEN: dict[str, str | bytes] = {
    "commas": PLAIN,
    "commas and blanks": PLAIN.replace(",", ", "),
    "tabs": spelled("\t"),
    "semicolons": spelled(";", heading="rgb;depth\n"),
    "quotes": spelled(quoting=csv.QUOTE_ALL),
    "blanks, quotes": spelled(" "),
    "blanks": PLAIN.replace(",", "  "),
    "blanks, focal length": PLAIN.replace(",", " ").replace("\n", " 518.8579\n"),
    "a mark": "\ufeff".encode() + PLAIN.encode(),
    "UTF-16": PLAIN.encode("utf-16"),
    "UTF-16, big-endian, a mark": "\ufeff".encode("utf-16-be") + PLAIN.encode("utf-16-be"),
    "UTF-16 without a mark": PLAIN.encode("utf-16-le"),
    "UTF-16, big-endian, without a mark": PLAIN.encode("utf-16-be"),
    "lines of Windows": PLAIN.replace("\n", "\r\n\r\n"),
    "lines of old Macs": PLAIN.replace("\n", "\r"),
    "pandas": ",image,depth\n" + "".join(f"{i},{row}\n" for i, row in enumerate(PLAIN.splitlines())),
    "an index": "".join(f"{i}\t{row}\n" for i, row in enumerate(spelled("\t").splitlines())),
    "comments": "# of my flat; 2, 3 or 4 rooms\n" * 12 + PLAIN.replace("\n", "\n# more, and more\n"),
    "the folder itself": spelled(start="./"),
    "Windows": spelled(start="./").replace("/", "\\"),
    "another Linux": spelled(start="/home/alice/my data/nyu/"),
    "another Windows": spelled(start="C:/Users/Alice/nyu/").replace("/", "\\"),
    "a share": spelled(start="//nas/nyu/").replace("/", "\\"),
    "the folder above": spelled(start="../nyu/"),
    "blanks, another Linux": spelled(start="/home/alice/my data/").replace(",", " "),
}


@pytest.mark.parametrize("form", WRITTEN)
def test_a_list_is_read_however_it_is_written(tmp_path: Path, form: str) -> None:
    for name in (name for row in NAMES for name in row):
        write(tmp_path / "tree" / name, b"")
    text = WRITTEN[form]
    write(tmp_path / "list.txt", text if isinstance(text, bytes) else text.encode())
    source = open_source(tmp_path / "tree", lists={"train": tmp_path / "list.txt"})
    assert [(pair.image, pair.depth) for pair in source.splits["train"].pairs] == NAMES
    cut = [note for note in source.notes if "taken without" in note]
    assert len(cut) == (
        form in ("another Linux", "another Windows", "a share", "the folder above", "blanks, another Linux")
    )


def test_what_is_left_out_of_paths_is_the_least_with_which_they_are_there(tmp_path: Path) -> None:
    """And the same for all, though a shorter end of the first one is there, too."""
    rows = [[f"/mnt/a/train/{i}.jpg", f"/mnt/b/a/train/{i}.png"] for i in range(12)]
    for name in ("train/0.jpg", "0.jpg", *(f"a/train/{i}.{suffix}" for i in range(3, 12) for suffix in ("jpg", "png"))):
        write(tmp_path / name, b"")
    write(tmp_path / "train.csv", "".join(f"{image},{depth}\n" for image, depth in rows).encode())
    source = open_source(tmp_path, lists={"train": tmp_path / "train.csv"})
    pairs = source.splits["train"].pairs
    assert [(pair.image, pair.depth) for pair in pairs] == [(f"a/train/{i}.jpg", f"a/train/{i}.png") for i in range(12)]
    (note,) = (note for note in source.notes if "taken without" in note)
    assert note.endswith("without mnt and mnt/b in front")


def test_paths_of_a_layout_with_lists_of_its_own_are_cut_as_well(tmp_path: Path) -> None:
    for make in (densedepth, lambda root: h5(root, lists=True)):
        root = make(tmp_path / make.__name__)
        plain = open_source(root).splits
        for path in root.rglob("*.csv"):
            lines = path.read_text().splitlines()
            text = "".join(",".join(f"/scratch/bob/{name}" for name in line.split(",")) + "\n" for line in lines)
            path.write_text(text.replace("/scratch/bob/Name", "Name"))
        assert open_source(root).splits == plain


NAME = st.text(st.sampled_from("ab1 ,;#'é一.-"), min_size=1, max_size=9).map(lambda text: f"{text}x".strip())


@given(
    st.lists(st.tuples(NAME, NAME), min_size=1, max_size=5),
    st.sampled_from("\t;,"),
    st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
)
def test_what_is_written_as_a_table_comes_back(names: list[tuple[str, str]], separator: str, encoding: str) -> None:
    rows = [[f"{image}.jpg", f"{depth}.png"] for image, depth in names]
    text = io.StringIO()
    csv.writer(text, delimiter=separator).writerows(rows)
    there = {column for row in rows for column in row}.__contains__
    assert [row for _, row in read_rows(text.getvalue().encode(encoding), there)] == rows


@pytest.mark.parametrize("make", [newcrfs, marigold, lambda root: h5(root, lists=True)])
def test_lists_with_a_mark_backslashes_and_windows_line_ends_are_read(tmp_path: Path, make) -> None:
    plain = open_source(make(tmp_path)).splits
    for path in [*tmp_path.glob("*.txt"), *tmp_path.glob("*.csv")]:
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"/", b"\\").replace(b"\n", b"\r\n\r\n"))
    assert open_source(tmp_path).splits == plain


def test_a_list_that_is_missing_or_of_another_layout(tmp_path: Path) -> None:
    root = bts(tmp_path / "tree")
    assert "nowhere.txt: not a readable list" in said_of(root, lists={"train": tmp_path / "nowhere.txt"})
    write(tmp_path / "names.csv", b"Name\ntrain/a/00001.h5\n")
    assert "--list train=" in said_of(labeled_mat(tmp_path / "a.mat"), lists={"train": tmp_path / "names.csv"})
