"""Tiny data set trees with the encodings that people really have on disk, and packed shards made of them."""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import re
import tarfile
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path

import h5py
import numpy as np
from PIL import Image

from mde_dist.data.depth import encode
from mde_dist.data.manifest import INDEX, Manifest, ShardInfo, file_info, write_manifest, write_split
from mde_dist.data.shards import decode_pair
from mde_dist.data.statistics import Statistics
from mde_dist.packing.pack import PackConfig, pack
from mde_dist.packing.sources import Source, open_source

SIZE = (24, 32)
TRAIN_SCENES = ("basement_0001a", "kitchen_0028b")
TEST_ROOMS = ("bathroom", "home_office")


def picture(seed: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    """uint8 (height, width, 3): soft colours that differ from seed to seed and survive JPEG."""
    y, x = np.mgrid[: size[0], : size[1]]
    waves = [128 + 90 * np.sin(0.17 * (channel + 1) * x + 0.11 * y + seed + channel) for channel in range(3)]
    return np.stack(waves, axis=-1).astype(np.uint8)


def millimetres(seed: int, size: tuple[int, int] = SIZE, holes: float = 0.0) -> np.ndarray:
    """uint16 (height, width): a slanted wall at 1.5 to 4 m with noise, and a share of holes (0)."""
    draw = np.random.default_rng(seed)
    y, x = np.mgrid[: size[0], : size[1]]
    depth = 1500 + 37 * (seed % 11) + 1500 * x / size[1] + 500 * y / size[0] + draw.integers(0, 90, size)
    depth[draw.random(size) < holes] = 0
    return depth.astype(np.uint16)


def jpeg_bytes(image: np.ndarray, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", **{"quality": 90, **options})
    return buffer.getvalue()


def write(path: Path, content: bytes | np.ndarray) -> None:
    """Bytes as they are; an array as PNG: uint8 of one or three channels, or uint16 of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        Image.fromarray(content).save(path, "PNG")


def densedepth(root: Path, train: int = 4, test: int = 3, prefix: str = "") -> Path:
    """data/nyu2_{train,test}.csv: JPEG with 8-bit depth for training, PNG with 16-bit depth for test."""
    rows = []
    for i in range(train):
        name = f"data/nyu2_train/{TRAIN_SCENES[i % 2]}_out/{i + 1}"
        write(root / f"{name}.jpg", jpeg_bytes(picture(i)))
        write(root / f"{name}.png", eight_bit(i))
        rows.append(f"{name}.jpg,{name}.png")
    if train:
        (root / "data/nyu2_train.csv").write_text(prefix + "\n".join(rows) + "\n", encoding="utf-8")
    rows = []
    for i in range(test):
        name = f"data/nyu2_test/{i:05d}"
        write(root / f"{name}_colors.png", picture(100 + i))
        write(root / f"{name}_depth.png", millimetres(100 + i))
        rows.append(f"{name}_colors.png,{name}_depth.png")
    if test:
        (root / "data/nyu2_test.csv").write_text(prefix + "\n".join(rows) + "\n", encoding="utf-8")
    return root


def eight_bit(seed: int) -> np.ndarray:
    """uint8 depth as densedepth stores it: floor(metres / 10 * 255)."""
    return (millimetres(seed).astype(np.int64) * 255 // 10_000).astype(np.uint8)


def bts(root: Path, train: int = 4, test: int = 3, columns: int = 3) -> Path:
    """sync/ and official_splits/test/ with their lists: 16-bit millimetres, 30 % holes in training."""
    rest = " 518.8579" if columns == 3 else ""
    rows = []
    for i in range(train):
        scene = TRAIN_SCENES[i % 2]
        write(root / f"sync/{scene}/rgb_{i:05d}.jpg", jpeg_bytes(picture(i)))
        write(root / f"sync/{scene}/sync_depth_{i:05d}.png", millimetres(i, holes=0.3))
        rows.append(f"/{scene}/rgb_{i:05d}.jpg /{scene}/sync_depth_{i:05d}.png{rest}")
    if train:
        (root / "nyudepthv2_train_files_with_gt.txt").write_text("\n".join(rows) + "\n")
    rows = []
    for i in range(test):
        room = TEST_ROOMS[i % 2]
        write(root / f"official_splits/test/{room}/rgb_{i:05d}.jpg", jpeg_bytes(picture(100 + i)))
        write(root / f"official_splits/test/{room}/sync_depth_{i:05d}.png", millimetres(100 + i))
        rows.append(f"{room}/rgb_{i:05d}.jpg {room}/sync_depth_{i:05d}.png{rest}")
    if test:
        (root / "nyudepthv2_test_files_with_gt.txt").write_text("\n".join(rows) + "\n")
    return root


def folder(root: Path, count: int = 4, first: int = 0, size: tuple[int, int] = SIZE) -> Path:
    """images/NAME.jpg with depth/NAME.png, 16-bit millimetres."""
    for i in range(first, first + count):
        write(root / f"images/{i:04d}.jpg", jpeg_bytes(picture(i, size)))
        write(root / f"depth/{i:04d}.png", millimetres(i, size))
    return root


def newcrfs(root: Path, train: int = 4) -> Path:
    """sync/ with the list that has the filled map in a third column, and no leading slash."""
    rows = []
    for i in range(train):
        scene = TRAIN_SCENES[i % 2]
        names = [f"{scene}/rgb_{i:05d}.jpg", f"{scene}/sync_depth_{i:05d}.png"]
        names.append(f"{scene}/dense/sync_depth_dense_{i:05d}.png")
        write(root / "sync" / names[0], jpeg_bytes(picture(i)))
        write(root / "sync" / names[1], millimetres(i, holes=0.3))
        write(root / "sync" / names[2], millimetres(i))
        rows.append(" ".join(names))
    (root / "nyudepthv2_train_files_with_gt_dense.txt").write_text("\n".join(rows) + "\n")
    return root


def marigold(root: Path, train: int = 4, test: int = 3, lists: bool = True) -> Path:
    """{train,test}/SCENE/{rgb,depth,filled}_0003.png, numbered from 1, with their lists: 16-bit millimetres."""
    for split, count, first, scenes in (("train", train, 0, TRAIN_SCENES), ("test", test, 100, TEST_ROOMS)):
        rows = []
        for i in range(count):
            names = [f"{split}/{scenes[i % 2]}/{what}_{i + 1:04d}.png" for what in ("rgb", "depth", "filled")]
            write(root / names[0], picture(first + i))
            write(root / names[1], millimetres(first + i, holes=0.3))
            write(root / names[2], millimetres(first + i))
            rows.append(" ".join(names))
        if lists and rows:
            (root / f"filename_list_{split}.txt").write_text("\n".join(rows) + "\n")
    return root


def h5_bytes(seed: int, **arrays: np.ndarray) -> bytes:
    """One pair as an .h5 file has it: rgb uint8 (3, height, width), depth float32 metres (height, width)."""
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        file["rgb"] = picture(seed).transpose(2, 0, 1)
        file["depth"] = (millimetres(seed, holes=0.1) / 1000).astype(np.float32)
        for name, values in arrays.items():
            del file[name]
            file[name] = values
    return buffer.getvalue()


def h5_members(train: int = 4, test: int = 3) -> dict[str, list[Member]]:
    """`train` and `val`: SCENE/00001.h5 and official/00001.h5 with their bytes."""
    return {
        "train": [(f"{TRAIN_SCENES[i % 2]}/{i + 1:05d}.h5", h5_bytes(i)) for i in range(train)],
        "val": [(f"official/{i + 1:05d}.h5", h5_bytes(100 + i)) for i in range(test)],
    }


def h5(root: Path, train: int = 4, test: int = 3, lists: bool = False) -> Path:
    """{train,val}/SCENE/00001.h5, and lists with a heading whose rows start with data/nyudepth_hdf5/."""
    for split, content in h5_members(train, test).items():
        for name, data in content:
            write(root / split / name, data)
        if lists:
            rows = ["Name", *(f"data/nyudepth_hdf5/{split}/{name}" for name, _ in content)]
            (root / f"nyudepth_hdf5_{split}.csv").write_text("\n".join(rows) + "\n")
    return root


def h5_tars(root: Path, train: int = 4, test: int = 3) -> Path:
    """data/train-000000.tar, data/train-000001.tar and data/val-000000.tar of the same files."""
    content = h5_members(train, test)
    half = train // 2
    write_tar(root / "data/train-000000.tar", [(f"train/{name}", data) for name, data in content["train"][:half]])
    write_tar(root / "data/train-000001.tar", [(f"train/{name}", data) for name, data in content["train"][half:]])
    write_tar(root / "data/val-000000.tar", [(f"val/{name}", data) for name, data in content["val"]])
    return root


MAT_SIZE = (6, 8)


def labeled_mat(path: Path, count: int = 1449) -> Path:
    """nyu_depth_v2_labeled.mat: MATLAB v7.3 with its head of 512 bytes, arrays transposed; tiny pictures."""
    height, width = MAT_SIZE
    images = np.stack([picture(i % 97, MAT_SIZE).transpose(2, 1, 0) for i in range(count)])
    raw, filled = (np.stack([millimetres(i % 97, MAT_SIZE, holes).T for i in range(count)]) for holes in (0.3, 0.0))
    assert images.shape[1:] == (3, width, height)
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w", userblock_size=512) as file:
        file["images"] = images
        file["depths"], file["rawDepths"] = ((maps / 1000).astype(np.float32) for maps in (filled, raw))
    with path.open("r+b") as file:
        file.write(b"MATLAB 7.3 MAT-file".ljust(512))
    return path


def zipped(root: Path, path: Path, prefix: str = "", method: int = zipfile.ZIP_DEFLATED) -> Path:
    """A folder as a ZIP, its files below `prefix`."""
    with zipfile.ZipFile(path, "w", method) as archive:
        for file in sorted(root.rglob("*")):
            if file.is_file():
                archive.write(file, prefix + file.relative_to(root).as_posix())
    return path


def open_files(directory: Path) -> list[str]:
    """The files below a directory that this process holds open or has mapped with a descriptor."""
    found = []
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the listing's own descriptor
            found.append(str(link.readlink()))
    return sorted(name for name in found if name.startswith(f"{directory}/"))


def silent(done: int, total: int) -> None:
    """Progress that nobody looks at."""


def packed(root: Path, output: Path, options: PackConfig | None = None, workers: int = 1) -> Source:
    """Recognise `root` and pack it into `output`; returns the source."""
    source = open_source(root)
    pack(source, output, options or PackConfig(samples_per_shard=3), workers, silent)
    return source


def packed_yet(output: Path) -> list[str]:
    """What is to be seen in an output: nothing, until all is published."""
    return sorted(path.name for path in output.glob("[!.]*"))


def contents(directory: Path) -> dict[str, str]:
    """Every file below a directory, hidden ones too, with the sha256 of its bytes."""
    files = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(files)}


# --- tars by hand ---

Member = tuple[str, bytes]
"""Name and payload of a tar's member."""


def depth_bytes(millimetres: np.ndarray, codec: str = "blosc") -> bytes:
    return encode(millimetres, codec)


def members(tar: Path) -> list[Member]:
    """What a tar holds, by tarfile."""
    with tarfile.open(tar) as archive:
        return [(member.name, archive.extractfile(member).read()) for member in archive if member.isfile()]


def write_tar(path: Path, content: Iterable[Member], form: int = tarfile.PAX_FORMAT) -> None:
    """An ordinary tar, as somebody else's tool writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as archive:
        for name, data in content:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def sample_members(key: str, seed: int, codec: str = "blosc", size: tuple[int, int] = SIZE) -> list[Member]:
    """The members of a whole sample whose picture and depth both tell its seed."""
    depth = depth_bytes(millimetres(seed, size), codec)
    return [(f"{key}.depth.{codec}", depth), (f"{key}.jpg", jpeg_bytes(picture(seed, size)))]


def vouch(directory: Path, codec: str = "blosc", size: tuple[int, int] = SIZE) -> Manifest:
    """Index and manifest for the tars of a directory as they are: all checksums agree, whatever they hold.

    Samples are taken as they follow one another in the tar; those that miss a member are left out.
    """
    splits: dict[str, list[Path]] = {}
    for tar in sorted(directory.glob("*.tar")):
        splits.setdefault(re.sub(r"-\d+$", "", tar.stem), []).append(tar)
    records = {}
    for name, tars in splits.items():
        statistics, shards = Statistics.empty(size), []
        for tar in tars:
            rows = _rows(tar, statistics, codec, size)
            info = file_info(tar)
            shards.append((ShardInfo(info.name, info.bytes, info.sha256, len(rows)), rows))
        records[name] = write_split(directory, name, shards, statistics, codec)
    return write_manifest(directory, codec, size, "tars", records)


def _rows(tar: Path, statistics: Statistics, codec: str, size: tuple[int, int]) -> np.ndarray:
    data, rows = tar.read_bytes(), []
    kinds = {f"depth.{codec}": "depth", "jpg": "image", "jpeg": "image", "json": "meta"}
    with tarfile.open(tar) as archive:
        found = [(*info.name.rsplit("/", 1)[-1].partition(".")[::2], info) for info in archive]
    found = [(key, kinds[extension], info) for key, extension, info in found if extension in kinds]
    numbers = itertools.count()
    number, last, seen = 0, None, set()
    groups: dict[int, dict[str, tarfile.TarInfo]] = {}
    for key, kind, info in found:
        if key != last or kind in seen:
            number, last, seen = next(numbers), key, set()
        seen.add(kind)
        groups.setdefault(number, {})[kind] = info
    for group in groups.values():
        if not {"depth", "image"} <= set(group):
            continue
        row = np.zeros(1, INDEX)
        for kind, info in group.items():
            end = info.offset_data + info.size
            row[f"{kind}_offset"], row[f"{kind}_bytes"] = info.offset_data, info.size
            row[f"{kind}_crc"] = zlib.crc32(data[info.offset_data - 512 : end])
        rows.append(row)
        payload = {kind: data[info.offset_data : info.offset_data + info.size] for kind, info in group.items()}
        image, depth = np.empty((*size, 3), np.uint8), np.zeros(size, np.uint16)
        with contextlib.suppress(ValueError):
            decode_pair(payload["image"], payload["depth"], codec, image, depth)
            statistics.add(depth, reencoded=False)
    return np.concatenate(rows) if rows else np.empty(0, INDEX)
