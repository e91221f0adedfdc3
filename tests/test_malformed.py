"""Data sets that are damaged, hostile or half there: one line that names the file, and nothing half-written."""

from __future__ import annotations

import io
import struct
import sys
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from trees import (
    bts,
    contents,
    densedepth,
    h5,
    h5_bytes,
    h5_tars,
    labeled_mat,
    marigold,
    packed_yet,
    picture,
    write,
    write_tar,
    zipped,
)

from mde_dist.packing.sources import BadPair, Source, open_source
from mde_dist.packing.sources.tree import MAX_FILE
from mde_dist.shard import main
from mde_dist.utils.cli import run_command
from mde_dist.utils.errors import UserError


def said_of(root: Path, **options: object) -> str:
    """The one line with which a data set is refused, whether it is opened or a pair of it read."""
    with pytest.raises((UserError, BadPair)) as error:
        source = open_source(root, **options)
        read_all(source)
    said = str(error.value)
    assert "\n" not in said
    assert len(said) < 600
    return said


def read_all(source: Source) -> None:
    for split in source.splits.values():
        for pair in split.pairs:
            source.read(pair, split.scale)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_bomb(side: int, bits: int = 16, channels: int = 0) -> bytes:
    """A PNG of a few bytes that claims side x side pixels."""
    head = struct.pack(">IIBBBBB", side, side, bits, channels, 0, 0, 0)
    pixels = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


# --- pictures ---


@pytest.mark.filterwarnings("error:.*bomb")  # as on the command line
@pytest.mark.parametrize("side", [8193, 12_000, 30_000, 2**31 - 1])
def test_a_png_that_claims_huge_sides_is_refused_before_it_is_decoded(tmp_path: Path, side: int) -> None:
    for name, bits, channels in (("rgb_00000.jpg", 8, 2), ("sync_depth_00000.png", 16, 0)):
        root = bts(tmp_path / name, train=1, test=0)
        write(root / f"sync/basement_0001a/{name}", png_bomb(side, bits, channels))
        tracemalloc.start()
        said = said_of(root)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert name in said
        assert "claims" in said
        assert peak < 20e6


def test_a_jpeg_that_claims_huge_sides_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    root = bts(tmp_path, train=1, test=0)
    path = root / "sync/basement_0001a/rgb_00000.jpg"
    data = bytearray(path.read_bytes())
    place = data.index(b"\xff\xc0")
    data[place + 5 : place + 9] = struct.pack(">HH", 65_000, 65_000)
    path.write_bytes(data)
    assert "claims 65000x65000 pixels" in said_of(root)


def test_a_file_larger_than_any_picture_is_not_read(tmp_path: Path) -> None:
    root = bts(tmp_path, train=1, test=0)
    path = root / "sync/basement_0001a/rgb_00000.jpg"
    with path.open("r+b") as file:
        file.truncate(MAX_FILE + 1)  # sparse
    said = said_of(root)
    assert str(path) in said
    assert "more than the 67,108,864" in said


@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.8])
@pytest.mark.parametrize("make", [densedepth, bts, marigold, h5])
def test_cut_files_are_named_in_every_layout(tmp_path: Path, make: Callable[[Path], Path], keep: float) -> None:
    root = make(tmp_path)
    source = open_source(root)
    pair = source.splits["train"].pairs[0]
    for name in {pair.image, pair.depth}:
        whole = (root / name).read_bytes()
        (root / name).write_bytes(whole[: int(keep * len(whole)) if keep < 1 else int(keep)])
        with pytest.raises(BadPair) as error:
            source.read(pair, source.splits["train"].scale)
        assert str(root / name) in str(error.value)
        assert "\n" not in str(error.value)
        (root / name).write_bytes(whole)


# --- archives ---


def test_a_zip_bomb_is_refused_by_what_it_claims(tmp_path: Path) -> None:
    root = bts(tmp_path / "tree", train=1, test=0)
    name = "sync/basement_0001a/sync_depth_00000.png"
    (root / name).unlink()
    bomb = zipped(root, tmp_path / "nyu.zip")
    with zipfile.ZipFile(bomb, "a", zipfile.ZIP_DEFLATED) as archive, archive.open(name, "w") as member:
        for _ in range(80):
            member.write(bytes(2**20))
    tracemalloc.start()
    said = said_of(bomb)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert str(bomb / name) in said
    assert "83,886,080 bytes, more than" in said
    assert peak < 20e6


def test_a_zip_that_lies_about_a_size_is_named(tmp_path: Path) -> None:
    root = bts(tmp_path / "tree", train=1, test=0)
    liar = zipped(root, tmp_path / "nyu.zip")
    data = liar.read_bytes()
    directory = data.index(b"PK\x01\x02", data.index(b"PK\x05\x06") - 2000)
    place = data.index(b"sync_depth_00000.png", directory) - len("sync/basement_0001a/") - 46
    assert data[place : place + 4] == b"PK\x01\x02"
    liar.write_bytes(data[: place + 24] + struct.pack("<I", 100) + data[place + 28 :])
    assert "sync_depth_00000.png" in said_of(liar)


def test_encrypted_members_are_one_line(tmp_path: Path) -> None:
    archive = zipped(bts(tmp_path / "tree", train=1, test=0), tmp_path / "nyu.zip")
    data = bytearray(archive.read_bytes())
    for mark, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        place = data.find(mark)
        while place >= 0:
            data[place + flags] |= 1
            place = data.find(mark, place + 4)
    archive.write_bytes(data)
    said = said_of(archive)
    assert "encrypted; unpack the ZIP first" in said
    assert "nyudepthv2_train_files_with_gt.txt" in said


@pytest.mark.parametrize("keep", [0, 3, 100, 0.5, 0.98])
def test_a_cut_zip_is_one_line(tmp_path: Path, keep: float) -> None:
    archive = zipped(densedepth(tmp_path / "tree"), tmp_path / "nyu_data.zip")
    whole = archive.read_bytes()
    archive.write_bytes(whole[: int(keep * len(whole)) if keep < 1 else int(keep)])
    said = said_of(archive)
    assert f"--source {archive}" in said
    assert "not a whole ZIP" in said


def test_damage_in_a_zips_members_is_named(tmp_path: Path) -> None:
    archive = zipped(densedepth(tmp_path / "tree"), tmp_path / "nyu_data.zip")
    data = bytearray(archive.read_bytes())
    with zipfile.ZipFile(archive) as found:
        offsets = [info.header_offset for info in found.infolist() if info.filename.endswith("1.png")]
    for offset in offsets:
        data[offset + 100 : offset + 110] = bytes(10)
    archive.write_bytes(data)
    assert str(archive / "data/nyu2_train/basement_0001a_out/1.png") in said_of(archive)


def test_a_file_that_is_no_zip(tmp_path: Path) -> None:
    write(tmp_path / "nyu.rar", b"Rar!" + bytes(1000))
    assert "not a whole ZIP" in said_of(tmp_path / "nyu.rar")


@pytest.mark.parametrize("keep", [0, 600, 0.5, 0.7])
def test_cut_tars_are_one_line(tmp_path: Path, keep: float) -> None:
    tar = h5_tars(tmp_path) / "data/train-000001.tar"
    whole = tar.read_bytes()
    tar.write_bytes(whole[: int(keep * len(whole)) if keep < 1 else int(keep)])
    assert str(tar) in said_of(tmp_path)


def test_a_tar_with_a_bad_header_does_not_lose_what_follows_in_silence(tmp_path: Path) -> None:
    content = [(f"train/a/{i:05d}.h5", h5_bytes(i)) for i in range(3)]
    write_tar(tmp_path / "train-000000.tar", content)
    data = bytearray((tmp_path / "train-000000.tar").read_bytes())
    place = data.index(b"train/a/00001.h5")
    data[place : place + 512] = b"x" * 512
    (tmp_path / "train-000000.tar").write_bytes(data)
    assert "bad header" in said_of(tmp_path)


def test_a_tar_with_a_pair_twice(tmp_path: Path) -> None:
    write_tar(tmp_path / "train-000000.tar", [("a/00001.h5", h5_bytes(1)), ("a/00001.h5", h5_bytes(1))])
    assert "twice" in said_of(tmp_path)


# --- HDF5 ---


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"rgb": np.zeros((24, 32, 3), np.uint8)}, "the image is uint8 24x32x3, expected uint8 (3, height, width)"),
        ({"rgb": np.zeros((3, 24, 32), np.float32)}, "the image is float32"),
        ({"rgb": np.zeros((3, 20, 32), np.uint8)}, "is 24x32, but its image"),
        ({"depth": np.zeros((1, 24, 32), np.float32)}, "the depth is float32 1x24x32"),
        ({"depth": np.full((24, 32), 2500, np.uint16)}, "is 16-bit, but the layout declares 32-bit"),
        ({"depth": np.full((24, 32), b"2.5")}, "the depth is |S3"),
    ],
)
def test_arrays_of_other_shapes_and_types_are_named(tmp_path: Path, arrays: dict, words: str) -> None:
    write(tmp_path / "train/a/00001.h5", h5_bytes(0, **arrays))
    said = said_of(tmp_path)
    assert words in said
    assert str(tmp_path / "train/a/00001.h5") in said


def test_a_huge_array_is_refused_before_it_is_read(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        file["rgb"] = picture(0).transpose(2, 0, 1)
        file.create_dataset("depth", (100_000, 100_000), "f4", chunks=(100, 100), compression="gzip")
    write(tmp_path / "train/a/00001.h5", buffer.getvalue())
    assert "the depth is float32 100000x100000" in said_of(tmp_path)


def test_links_that_lead_to_other_files_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "secret.h5", h5_bytes(0))
    for number, kind in enumerate(("external", "soft", "virtual", "missing", "group")):
        path = tmp_path / f"{number}/train/a/00001.h5"
        path.parent.mkdir(parents=True)
        with h5py.File(path, "w") as file:
            file["rgb"] = picture(0).transpose(2, 0, 1)
            if kind == "external":
                file["depth"] = h5py.ExternalLink(str(tmp_path / "secret.h5"), "depth")
            elif kind == "soft":
                file["depth"] = h5py.SoftLink("/nowhere")
            elif kind == "virtual":
                layout = h5py.VirtualLayout((24, 32), "f4")
                layout[:] = h5py.VirtualSource(str(tmp_path / "secret.h5"), "depth", (24, 32))
                file.create_virtual_dataset("depth", layout)
            elif kind == "group":
                file.create_group("depth")
        assert str(path) in said_of(tmp_path / f"{number}")


def test_a_labelled_file_whose_arrays_lie_in_other_files_is_refused(tmp_path: Path) -> None:
    other = labeled_mat(tmp_path / "other.mat")
    with h5py.File(tmp_path / "nyu_depth_v2_labeled.mat", "w") as file:
        file["images"], file["depths"] = (h5py.ExternalLink(str(other), name) for name in ("images", "depths"))
        assert file["depths"].shape[0] == 1449  # h5py itself follows it
    assert "has no array 'images'" in said_of(tmp_path)


def test_a_tar_that_is_cut_after_it_was_indexed_is_named(tmp_path: Path) -> None:
    source = open_source(h5_tars(tmp_path))
    (tmp_path / "data/train-000000.tar").write_bytes((tmp_path / "data/train-000000.tar").read_bytes()[:3000])
    with pytest.raises(BadPair, match=r"data/train-000000\.tar/train/basement_0001a/00001\.h5"):
        read_all(source)


def test_whatever_happens_to_an_h5_file_reading_ends_in_a_pair_or_in_bad_pair(tmp_path: Path) -> None:
    root = h5(tmp_path, train=1, test=0)
    path = root / "train/basement_0001a/00001.h5"
    source, whole, draw = open_source(root), path.read_bytes(), np.random.default_rng(3)
    for _ in range(200):
        damaged = bytearray(whole)
        for place in draw.integers(0, 2500, draw.integers(1, 6)):
            damaged[place] = draw.integers(256)
        path.write_bytes(damaged)
        try:
            read_all(source)
        except BadPair as error:
            assert str(path) in str(error)


@pytest.mark.parametrize("count", [795, 1450])
def test_a_labelled_file_of_another_count_is_refused(tmp_path: Path, count: int) -> None:
    path = labeled_mat(tmp_path / "nyu_depth_v2_labeled.mat", count)
    for root in (path, tmp_path):
        said = said_of(root)
        assert f"'images' is {count}x3x8x6; the official split is of 1449" in said


def test_other_mat_files_are_one_line(tmp_path: Path) -> None:
    write(tmp_path / "splits.mat", b"MATLAB 5.0 MAT-file".ljust(700))
    assert "expected MATLAB v7.3" in said_of(tmp_path / "splits.mat")
    path = labeled_mat(tmp_path / "nyu_depth_v2_labeled.mat")
    path.write_bytes(path.read_bytes()[:5000])
    assert str(path) in said_of(tmp_path)


def test_without_h5py_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    roots = [h5(tmp_path / "h5"), h5_tars(tmp_path / "tars"), labeled_mat(tmp_path / "mat/nyu_depth_v2_labeled.mat")]
    monkeypatch.setitem(sys.modules, "h5py", None)
    for root in roots:
        assert "pip install 'mde_dist[h5]'" in said_of(root)
    read_all(open_source(bts(tmp_path / "bts")))  # which does not need it


# --- while packing ---


def test_nothing_is_written_where_a_zip_breaks_while_it_is_packed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    tree = bts(tmp_path / "tree", train=40, test=1)
    bad = tree / "sync/kitchen_0028b/sync_depth_00003.png"
    bad.write_bytes(bad.read_bytes()[:200])
    archive = zipped(tree, tmp_path / "nyu.zip")
    before = contents(tree)
    monkeypatch.setattr(sys, "argv", ["shard", "--source", str(archive), "--output", str(tmp_path / "shards")])
    with pytest.raises(SystemExit):
        run_command(main)
    said = capfd.readouterr().err
    assert said.count("\n") == 1
    assert str(archive / "sync/kitchen_0028b/sync_depth_00003.png") in said
    assert not packed_yet(tmp_path / "shards")
    assert contents(tree) == before
