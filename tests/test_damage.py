"""The damage table: whatever happens to the bytes of a directory of shards, a run meets it in words and goes on with
right pairs, `--verify` finds and names it, and `--repair` leaves exactly what is whole.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import functools
import hashlib
import io
import json
import os
import re
import shutil
import struct
import tracemalloc
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from trees import (
    SIZE,
    bts,
    contents,
    depth_bytes,
    jpeg_bytes,
    members,
    millimetres,
    packed,
    picture,
    sample_members,
    silent,
    vouch,
    write_tar,
)

from mde_dist.data import depth as depth_module
from mde_dist.data import shards as shards_module
from mde_dist.data.dataset import DamagedSample
from mde_dist.data.loader import DataLoader
from mde_dist.data.shards import ShardDataset, open_split
from mde_dist.packing.index_tars import index_tars
from mde_dist.packing.pack import PackConfig
from mde_dist.packing.repair import repair
from mde_dist.packing.validate import verify
from mde_dist.training.config import Config
from mde_dist.training.data_stream import check_bad_sample_quota
from mde_dist.utils.errors import RankError, UserError

CPU = torch.device("cpu")
SAMPLES, PER_SHARD = 13, 5
SHARD = "train-000001.tar"
IN_SHARD = range(5, 10)
"""The samples of SHARD."""
VICTIM = 6
Pair = tuple[bytes, bytes]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`shards`: 13 training pairs (5, 5, 3 in a shard) and 3 of test; `other`: as many of another data set."""
    root = tmp_path_factory.mktemp("damage")
    packed(bts(root / "tree", SAMPLES, 3), root / "shards", PackConfig(samples_per_shard=PER_SHARD))
    other = bts(root / "other tree", SAMPLES, 3)
    for number, path in enumerate(sorted(other.glob("sync/*/*.jpg"))):
        path.write_bytes(jpeg_bytes(picture(50 + number)))
    packed(other, root / "other", PackConfig(samples_per_shard=PER_SHARD))
    return root


@pytest.fixture(scope="module")
def truth(base: Path) -> list[tuple[str, Pair]]:
    """Key, and what a whole sample decodes to; all are different."""
    with open_split(base / "shards", "train") as shards:
        found = [(shards.key(sample), read(shards, sample)) for sample in range(SAMPLES)]
    assert len({key for key, _ in found}) == len({image for _, (image, _) in found}) == SAMPLES
    assert len({depth for _, (_, depth) in found}) == SAMPLES
    return found


def fresh(base: Path) -> Path:
    """A whole copy, beside `other`, to damage."""
    shutil.rmtree(base / "copy", ignore_errors=True)
    return Path(shutil.copytree(base / "shards", base / "copy"))


def read(shards: ShardDataset, sample: int) -> Pair:
    image, depth = np.full((*shards.size, 3), 77, np.uint8), np.full(shards.size, 77, np.uint16)
    shards.read_into(sample, image, depth)
    return image.tobytes(), depth.tobytes()


# --- doing damage ---


def row(directory: Path, sample: int) -> dict[str, int]:
    rows = np.load(directory / "train.index.npy")
    return {name: int(rows[sample][name]) for name in rows.dtype.names}


def flip(path: Path, place: int, bit: int = 1) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= bit
    path.write_bytes(data)


def flip_in(member: str, place: int, bit: int = 1) -> Callable[[Path], None]:
    """Flip a bit of the victim's member; negative places are in the header before it."""
    return lambda directory: flip(directory / SHARD, row(directory, VICTIM)[f"{member}_offset"] + place, bit)


def cut_at(sample: int, member: str, behind: int = -512) -> Callable[[Path], None]:
    """Cut the shard so many bytes behind the beginning of a member's payload."""
    return lambda directory: os.truncate(directory / SHARD, row(directory, sample)[f"{member}_offset"] + behind)


def rewrite(change: Callable[[dict[str, bytes], str], dict[str, bytes] | None]) -> Callable[[Path], None]:
    """Replace the victim's members (name -> payload, and its key) by others; the manifest is made to agree."""

    def do(directory: Path) -> None:
        content = members(directory / SHARD)
        start = 3 * IN_SHARD.index(VICTIM)
        mine = dict(content[start : start + 3])
        key = next(iter(mine)).split(".")[0]
        new = change(mine, key)
        assert new is not None
        write_tar(directory / SHARD, content[:start] + list(new.items()) + content[start + 3 :])
        vouch(directory)

    return do


def with_member(extension: str, payload: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return rewrite(lambda mine, key: mine | {f"{key}.{extension}": payload(mine[f"{key}.{extension}"])})


def without(extension: str) -> Callable[[Path], None]:
    return rewrite(lambda mine, key: {name: data for name, data in mine.items() if name != f"{key}.{extension}"})


def doubled(into: str) -> Callable[[Path], None]:
    """Append a whole sample of another content under the victim's key."""

    def do(directory: Path) -> None:
        key = members(directory / SHARD)[3 * IN_SHARD.index(VICTIM)][0].split(".")[0]
        write_tar(directory / into, members(directory / into) + sample_members(key, 90))
        vouch(directory)

    return do


def edit(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((directory / "manifest.json").read_text())
    change(manifest["splits"]["train"])
    (directory / "manifest.json").write_text(json.dumps(manifest))


def vouch_for_index(directory: Path) -> None:
    """Make the manifest name the index as it is now."""
    data = (directory / "train.index.npy").read_bytes()
    edit(directory, lambda split: split["index"].update(bytes=len(data), sha256=hashlib.sha256(data).hexdigest()))


def swap_rows(directory: Path) -> None:
    """An index that pairs the image of one sample with the depth of another, checksums and hash to match."""
    rows = np.load(directory / "train.index.npy")
    for what in ("offset", "bytes", "crc"):
        rows[f"image_{what}"][[VICTIM, VICTIM + 1]] = rows[f"image_{what}"][[VICTIM + 1, VICTIM]]
    np.save(directory / "train.index.npy", rows)
    vouch_for_index(directory)


def of_other(name: str) -> Callable[[Path], None]:
    return lambda directory: shutil.copy(directory.parent / "other" / name, directory / name) and None


def exchange_same_size(directory: Path) -> None:
    size = (directory / SHARD).stat().st_size
    of_other(SHARD)(directory)
    assert (directory / SHARD).stat().st_size <= size
    os.truncate(directory / SHARD, size)  # with zeros, as tar pads


def swap_shards(directory: Path) -> None:
    one, two = directory / "train-000000.tar", directory / SHARD
    data = one.read_bytes(), two.read_bytes()
    assert len(data[0]) == len(data[1])  # which is what makes it hard
    one.write_bytes(data[1])
    two.write_bytes(data[0])


def grey(jpeg: bytes) -> bytes:
    with Image.open(io.BytesIO(jpeg)) as picture:
        return jpeg_bytes(np.asarray(picture.convert("L")))


@functools.cache
def huge(_: bytes) -> bytes:
    """A real JPEG of 100 megapixels."""
    buffer = io.BytesIO()
    Image.new("RGB", (10_000, 10_000), (90, 120, 60)).save(buffer, "JPEG", quality=5)
    return buffer.getvalue()


def lying(payload: Callable[[], np.ndarray]) -> Callable[[bytes], bytes]:
    """A depth map whose header says that it is of the right size."""

    def encoded(_: bytes) -> bytes:
        data = bytearray(depth_bytes(payload()))
        data[4:8] = (2 * SIZE[0] * SIZE[1]).to_bytes(4, "little")
        return bytes(data)

    return encoded


# --- the table ---


@dataclass(frozen=True)
class Damage:
    do: Callable[[Path], None]
    found: str
    """What verify says of it; {key} is the victim's."""
    refused: str = ""
    """With what words opening is refused."""
    bad: tuple[int, ...] = ()
    """Samples that are damaged when they are read."""
    says: str = ""
    """What the DamagedSample says."""
    lost: tuple[int, ...] = ()
    """Samples that are gone once it is repaired."""
    while_open: str = ""
    """The damage comes when the split is open and "read" from, or "not read" yet."""
    keyless: bool = False
    """No header is left to tell the key."""
    training_only: bool = False
    """A direct read does not mind."""
    unindexed: bool = False
    """The manifest that agrees knows nothing of the lost."""
    index: str = "same"
    """What --index says of it, without a manifest: "same" as verify, "" where all is well then."""


WHOLE_SHARD = tuple(IN_SHARD)
VICTIM_ONLY = (VICTIM,)
IMAGE_CHECKSUM, DEPTH_CHECKSUM = "image fails its checksum", "depth fails its checksum"
SIZES = r"\d+ bytes, the manifest says \d+"
NAMED = f"{SHARD}, key {{key}}: "

TABLE = {
    "header in mid-shard is bad": Damage(
        flip_in("image", -512), f"{SHARD}: bad header at byte", bad=VICTIM_ONLY, says=IMAGE_CHECKSUM, lost=VICTIM_ONLY
    ),
    "headers of a whole sample are bad": Damage(
        lambda d: [flip_in(member, -500, 4)(d) for member in ("depth", "image", "meta")] and None,
        f"{SHARD}: bad header at byte",
        bad=VICTIM_ONLY,
        says=DEPTH_CHECKSUM,
        lost=VICTIM_ONLY,
        keyless=True,
    ),
    "bit in the header that tar itself does not check": Damage(
        flip_in("depth", -512 + 155, 4),
        NAMED + DEPTH_CHECKSUM,
        bad=VICTIM_ONLY,
        says=DEPTH_CHECKSUM,
        lost=VICTIM_ONLY,
        index="",
    ),
    "bit in the image": Damage(
        flip_in("image", 400), NAMED + IMAGE_CHECKSUM, bad=VICTIM_ONLY, says=IMAGE_CHECKSUM, lost=VICTIM_ONLY, index="?"
    ),
    "bit in the depth": Damage(
        flip_in("depth", 300), NAMED + DEPTH_CHECKSUM, bad=VICTIM_ONLY, says=DEPTH_CHECKSUM, lost=VICTIM_ONLY, index="?"
    ),
    "bit in the index": Damage(
        lambda d: flip(d / "train.index.npy", 300),
        r"train\.index\.npy: not the index",
        refused="not the index",
        index="",
    ),
    "bit in the padding": Damage(
        lambda d: flip(d / SHARD, (d / SHARD).stat().st_size - 1), f"{SHARD}: bad header at byte|{SHARD}: sha256"
    ),
    "cut at a member's boundary": Damage(
        cut_at(8, "depth"), f"{SHARD}: ends without the mark", refused=SIZES, lost=(8, 9)
    ),
    "cut between the members of a sample": Damage(
        cut_at(8, "image"), f"{SHARD}: .*has no image", refused=SIZES, lost=(8, 9)
    ),
    "cut in mid-payload": Damage(
        cut_at(7, "image", 100), f"{SHARD}: cut off in mid-member", refused=SIZES, lost=(7, 8, 9)
    ),
    "cut in a header": Damage(
        cut_at(7, "image", -200), f"{SHARD}: .*key .* has no image", refused=SIZES, lost=(7, 8, 9)
    ),
    "cut in mid-payload while it is read": Damage(
        cut_at(7, "image", 100),
        f"{SHARD}: cut off in mid-member",
        bad=(7, 8, 9),
        says="fails its checksum",
        lost=(7, 8, 9),
        while_open="read",
    ),
    "cut in mid-payload before it is read": Damage(
        cut_at(7, "image", 100),
        f"{SHARD}: cut off in mid-member",
        bad=WHOLE_SHARD,
        says="the shard's size is not",
        lost=(7, 8, 9),
        while_open="not read",
    ),
    "gone before it is read": Damage(
        lambda d: (d / SHARD).unlink(),
        f"{SHARD}: No such file",
        bad=WHOLE_SHARD,
        says="No such file",
        lost=WHOLE_SHARD,
        while_open="not read",
        index="",
    ),
    "cut at a member's boundary, manifest to match": Damage(
        lambda d: cut_at(8, "depth")(d) or (vouch(d) and None),
        f"{SHARD}: ends without the mark",
        lost=(8, 9),
        unindexed=True,
    ),
    "two samples with one key in one tar": Damage(doubled(SHARD), f"{SHARD}: key {{key}}: two samples with this key"),
    "two samples with one key in two tars": Damage(
        doubled("train-000002.tar"), r"train-000002\.tar, key {key}: in an earlier shard"
    ),
    "image missing": Damage(without("jpg"), f"{SHARD}: key {{key}}: has no image", lost=VICTIM_ONLY, unindexed=True),
    "depth missing": Damage(
        without("depth.blosc"), f"{SHARD}: key {{key}}: has no depth", lost=VICTIM_ONLY, unindexed=True
    ),
    "depth of another size": Damage(
        with_member("depth.blosc", lambda _: depth_bytes(millimetres(1, (12, 16)))),
        NAMED + "depth holds 384 bytes, expected 1536",
        bad=VICTIM_ONLY,
        says="depth holds 384 bytes",
        lost=VICTIM_ONLY,
    ),
    "depth of another size whose header tells another": Damage(
        with_member("depth.blosc", lying(lambda: millimetres(1, (12, 16)))), NAMED, bad=VICTIM_ONLY, lost=VICTIM_ONLY
    ),
    "depth of one pixel whose header tells more": Damage(
        with_member("depth.blosc", lying(lambda: np.full((1, 1), 2500, np.uint16))),
        NAMED,
        bad=VICTIM_ONLY,
        lost=VICTIM_ONLY,
    ),
    "depth of a larger size whose header tells less": Damage(
        with_member("depth.blosc", lying(lambda: millimetres(1, (400, 400)))), NAMED, bad=VICTIM_ONLY, lost=VICTIM_ONLY
    ),
    "depth without a measurement": Damage(
        with_member("depth.blosc", lambda _: depth_bytes(np.zeros(SIZE, np.uint16))),
        NAMED + "depth has no valid pixel",
        bad=VICTIM_ONLY,
        says="depth has no valid pixel",
        lost=VICTIM_ONLY,
        training_only=True,
    ),
    "image of another size": Damage(
        with_member("jpg", lambda _: jpeg_bytes(picture(1, (32, 24)))),
        NAMED + "image is 32x24",
        bad=VICTIM_ONLY,
        says="image is 32x24",
        lost=VICTIM_ONLY,
    ),
    "grey image": Damage(
        with_member("jpg", grey), NAMED + "image is grey", bad=VICTIM_ONLY, says="image is grey", lost=VICTIM_ONLY
    ),
    "image whose data end early": Damage(
        with_member("jpg", lambda jpeg: jpeg[: len(jpeg) * 3 // 4]), NAMED, bad=VICTIM_ONLY, lost=VICTIM_ONLY
    ),
    "image whose data end early, with the mark of the end": Damage(
        with_member("jpg", lambda jpeg: jpeg[: len(jpeg) * 3 // 4] + b"\xff\xd9"),
        NAMED,
        bad=VICTIM_ONLY,
        lost=VICTIM_ONLY,
    ),
    "image that is none": Damage(
        with_member("jpg", lambda jpeg: b"<html>404</html>"), NAMED, bad=VICTIM_ONLY, lost=VICTIM_ONLY
    ),
    "image of 100 megapixels": Damage(
        with_member("jpg", huge),
        NAMED + "image is 10000x10000",
        bad=VICTIM_ONLY,
        says="image is 10000x10000",
        lost=VICTIM_ONLY,
    ),
    "shard of 0 bytes": Damage(
        lambda d: (d / SHARD).write_bytes(b"") and None, f"{SHARD}: empty file", refused=SIZES, lost=WHOLE_SHARD
    ),
    "tar with only the end marks": Damage(
        lambda d: (d / SHARD).write_bytes(bytes(10240)) and None,
        f"{SHARD}: 5 samples of the index are not in the tar",
        refused=SIZES,
        lost=WHOLE_SHARD,
        index="",
    ),
    "tar that has become zeros": Damage(
        lambda d: (d / SHARD).write_bytes(bytes((d / SHARD).stat().st_size)) and None,
        f"{SHARD}: 5 samples of the index are not in the tar",
        bad=WHOLE_SHARD,
        says="fails its checksum",
        lost=WHOLE_SHARD,
        index="",
    ),
    "shard that is missing": Damage(
        lambda d: (d / SHARD).unlink(), f"{SHARD}: No such file", refused="No such file", lost=WHOLE_SHARD, index=""
    ),
    "shard of another pack and size": Damage(
        lambda d: write_tar(d / SHARD, [m for i in range(13) for m in sample_members(f"x{i}", i)]),
        f"{SHARD}: .*samples of the index are not in the tar",
        refused=SIZES,
        lost=WHOLE_SHARD,
        index="",
    ),
    "shard of another pack of the same size": Damage(
        exchange_same_size,
        f"{SHARD}(, key .*: (no|depth|image)|: .*samples of the index)",
        bad=WHOLE_SHARD,
        says="fails its checksum",
        lost=WHOLE_SHARD,
        index="?",
    ),
    "two shards swapped": Damage(
        swap_shards,
        f"{SHARD}(, key .*: (no|depth|image)|: .*samples of the index)",
        bad=tuple(range(10)),
        says="fails its checksum",
        lost=tuple(range(10)),
        index="",
    ),
    "index of another pack": Damage(
        of_other("train.index.npy"), r"train\.index\.npy: not the index", refused="not the index", index=""
    ),
    "index that pairs two samples": Damage(
        swap_rows,
        f"{SHARD}, key {{key}}: no image where the index says",
        bad=(VICTIM, VICTIM + 1),
        says="the index pairs the depth of",
        lost=(VICTIM, VICTIM + 1),
        index="",
    ),
    "mean map of another pack": Damage(
        lambda d: flip(d / "train.mean.blosc", 20),
        r"train\.mean\.blosc: not the mean map that the manifest names",
        index="",
    ),
}


def substitute(sample: int, bad: tuple[int, ...], total: int, block: int) -> int | None:
    """What the loader promises to give in place of a damaged sample; None where it gives up."""
    return next((it for it in ((sample + k * (block + 1)) % total for k in range(8)) if it not in bad), None)


def check_run(shards: ShardDataset, damage: Damage, keys: list[str], pairs: dict[str, list[Pair]]) -> None:
    """Direct reads and the loader: every pair is right, what is damaged is named, replaced and counted."""
    for sample, key in enumerate(keys):
        if sample in damage.bad and not damage.training_only:
            with pytest.raises(DamagedSample) as error:
                read(shards, sample)
            said = str(error.value)
            assert shards.file_of(sample) in said
            assert re.search(damage.says, said)
            assert "\n" not in said
            if damage.keyless:
                assert f"key of sample {sample}: " in said
            elif damage.bad == VICTIM_ONLY:
                assert f"key {key}: " in said
        elif sample not in damage.bad:
            assert read(shards, sample) in pairs[key]
    instead = {sample: substitute(sample, damage.bad, len(keys), shards.block) for sample in range(len(keys))}
    order = [sample for sample, other in instead.items() if other is not None]
    assert len(order) > len(keys) // 2
    for threads in (0, 2):
        said_aloud: list[str] = []
        draws = ((np.zeros(2, np.int64), np.array([s, order[-1 - i]])) for i, s in enumerate(order))
        with DataLoader(shards, draws, 2, CPU, threads, replace=True, say=said_aloud.append) as loader:
            for batch in loader:
                images, depths = batch.image.numpy(), batch.depth.numpy()
                for place, sample in enumerate(batch.sample.tolist()):
                    assert (images[place].tobytes(), depths[place].tobytes()) in pairs[keys[instead[sample]]]
                assert batch.replaced == np.isin(batch.sample, damage.bad).sum()
        assert set(damage.bad) & set(order) <= set(loader.damaged) <= set(damage.bad)
        assert len(said_aloud) == len(loader.damaged)
    if damage.bad and not damage.training_only:
        draws = ((np.zeros(1, np.int64), np.array([s])) for s in damage.bad)
        with (
            DataLoader(shards, draws, 1, CPU, 1) as loader,
            pytest.raises(RankError, match=SHARD.replace("00001", "0000.")),
        ):
            next(loader)


@contextlib.contextmanager
def damaged(directory: Path, damage: Damage) -> Iterator[ShardDataset | None]:
    """Damage it -> the open split, or None where opening is refused in one line that says what and how to go on."""
    if damage.while_open:
        with open_split(directory, "train") as shards:
            if damage.while_open == "read":
                read(shards, VICTIM)
            damage.do(directory)
            yield shards
        return
    damage.do(directory)
    if not damage.refused:
        with open_split(directory, "train") as shards:
            yield shards
        return
    with pytest.raises(UserError) as error:
        open_split(directory, "train")
    said = str(error.value)
    assert re.search(damage.refused, said)
    assert "train.index.npy" in said or SHARD in said
    assert f"mde_dist.shard --{'repair' if 'index' in said else 'verify'} {directory}" in said
    assert "\n" not in said
    yield None


@pytest.mark.parametrize("name", TABLE)
def test_damage(name: str, base: Path, truth: list[tuple[str, Pair]], monkeypatch: pytest.MonkeyPatch) -> None:
    damage = TABLE[name]
    directory = fresh(base)
    all_keys = [key for key, _ in truth]
    pairs = {key: [pair] for key, pair in truth}
    victim = all_keys[VICTIM]
    if "one key" in name:
        pairs[victim].append(decoded(90))
    if "megapixels" in name:
        monkeypatch.setattr(shards_module.simplejpeg, "decode_jpeg", small_only(shards_module.simplejpeg.decode_jpeg))
    with damaged(directory, damage) as shards:
        if shards is not None:
            keys = [shards.key(sample) for sample in range(len(shards))]
            expected = [key for s, key in enumerate(all_keys) if not (damage.unindexed and s in damage.lost)]
            if "one key" in name:
                assert sorted(set(keys)) == sorted(all_keys)
                expected = keys
            sound = set(range(len(keys))) - set(damage.bad)  # a damaged header may have lost the key
            assert [keys[sample] for sample in sound] == [expected[sample] for sample in sound]
            check_run(shards, damage, expected, pairs)

    # what verify finds
    before = contents(directory)
    verdict = verify(directory, 1, silent)
    assert contents(directory) == before
    wanted = damage.found.format(key=re.escape(victim))
    assert any(re.search(wanted, problem) for problem in verdict.problems), verdict.problems
    assert all(problem.startswith(str(directory)) and "\n" not in problem for problem in verdict.problems)
    assert verdict.broken == {"train"}

    # what repair leaves
    repair(directory, verdict)
    assert verify(directory, 1, silent).problems == []
    with open_split(directory, "train") as shards:
        left = {shards.key(sample): read(shards, sample) for sample in range(len(shards))}
        assert len(left) == len(shards)
        assert left == {key: pair for sample, (key, pair) in enumerate(truth) if sample not in damage.lost}
        assert all(shards.meta(sample)["split"] == "train" for sample in range(len(shards)))
        assert shards.mean_map().shape == SIZE
    with open_split(directory, "test") as shards:
        assert len(shards) == 3


def decoded(seed: int) -> Pair:
    """What a sample of `sample_members` is."""
    (_, depth_payload), (_, jpeg) = sample_members("x", seed)
    image, depth = np.empty((*SIZE, 3), np.uint8), np.empty(SIZE, np.uint16)
    shards_module.decode_pair(jpeg, depth_payload, "blosc", image, depth)
    return image.tobytes(), depth.tobytes()


def small_only(decode: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    def guarded(jpeg: bytes, **options: Any) -> np.ndarray:
        assert len(jpeg) < 100_000, "it is decoded although its header says how large it is"
        return decode(jpeg, **options)

    return guarded


@pytest.mark.parametrize("name", [name for name, damage in TABLE.items() if damage.index != "?"])
def test_damage_without_a_manifest(name: str, base: Path, truth: list[tuple[str, Pair]]) -> None:
    """`--index` has nothing but the tars: what they alone can tell it refuses, or leaves out with --skip-bad."""
    damage = TABLE[name]
    directory = fresh(base)
    damage.do(directory)
    for path in [*directory.glob("*.npy"), *directory.glob("*.blosc"), directory / "manifest.json"]:
        path.unlink()
    before = contents(directory)
    pairs = {key: pair for key, pair in truth}
    if damage.index:
        with pytest.raises(UserError, match="--skip-bad") as error:
            index_tars(directory, 1, silent, False, lambda split, median: None)
        said = str(error.value)
        assert str(directory) in said
        assert "\n" not in said
        assert not (directory / "manifest.json").exists()
    index_tars(directory, 1, silent, True, lambda split, median: None)
    after = contents(directory)
    assert {name: after[name] for name in before} == before  # tars are never touched
    with open_split(directory, "train") as shards:
        found = {shards.key(sample): read(shards, sample) for sample in range(len(shards))}
        assert len(found) == len(shards)
        for key, pair in found.items():
            assert pair == pairs.get(key, pair)
        if damage.index:
            assert set(found) == {key for sample, (key, _) in enumerate(truth) if sample not in damage.lost}


def test_a_sample_that_lost_a_member_never_gets_that_of_its_namesake(tmp_path: Path) -> None:
    """Two samples of one key, one behind the other, the first without its image: which image belongs to which depth?"""
    first, second = sample_members("0001", 1), sample_members("0001", 2)
    for order in ([first[0], *second], [first[1], *reversed(second)], [*first[:1], second[1], second[0]]):
        directory = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        content = [*sample_members("0000", 0), *order, *sample_members("0003", 3)]
        write_tar(directory / "train-000000.tar", content)
        index_tars(directory, 1, silent, True, lambda split, median: None)
        right = [decoded(seed) for seed in range(4)]
        with open_split(directory, "train") as shards:
            assert all(read(shards, sample) in right for sample in range(len(shards)))


def test_manifest_and_index_of_another_pack_give_no_sample_at_all(base: Path) -> None:
    """Nothing is whole then, so nothing is repaired: the tars have to be indexed anew, as the message says."""
    directory = fresh(base)
    for name in ("manifest.json", "train.index.npy", "train.mean.blosc"):
        shutil.copy(base / "other" / name, directory / name)
    with open_split(directory, "train") as shards:
        for sample in range(SAMPLES):
            with pytest.raises(DamagedSample, match="fails its checksum"):
                read(shards, sample)
        draws = ((np.zeros(1, np.int64), np.array([s])) for s in range(SAMPLES))
        with (
            DataLoader(shards, draws, 1, CPU, 2, replace=True, say=lambda line: None) as loader,
            pytest.raises(RankError, match="damaged, and so are the 7 to replace it"),
        ):
            next(loader)
    before = contents(directory)
    verdict = verify(directory, 1, silent)
    assert len(verdict.problems) >= 3
    with pytest.raises(UserError, match="no sample of split train is whole"):
        repair(directory, verdict)
    assert contents(directory) == before


@pytest.mark.parametrize("side", [10_000, 60_000])
def test_a_depth_map_of_too_many_pixels_is_refused_from_its_header(side: int) -> None:
    """16-bit PNG of 0.1 and 3.6 gigapixels."""
    ihdr = b"IHDR" + struct.pack(">IIBBBBB", side, side, 16, 0, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + ihdr + struct.pack(">I", zlib.crc32(ihdr))
    data = b"IDAT" + zlib.compress(bytes(10**6))
    png += struct.pack(">I", len(data) - 4) + data + struct.pack(">I", zlib.crc32(data))
    tracemalloc.start()
    try:
        with warnings.catch_warnings(), pytest.raises(ValueError, match=r"depth (is|does not decode)"):
            warnings.simplefilter("ignore")
            depth_module.decode(png, "png", np.empty(SIZE, np.uint16))
        assert tracemalloc.get_traced_memory()[1] < 10**7
    finally:
        tracemalloc.stop()


def test_an_index_that_is_cut_while_it_is_open_does_not_end_the_process(base: Path) -> None:
    """Memory that is mapped from a file would: cut under it, or gone with its file system, it is a bus error."""
    directory = fresh(base)
    child = os.fork()
    if not child:
        faulthandler.disable()  # its traceback of a bus error is that of the whole test run
        with open_split(directory, "train") as shards:
            os.truncate(directory / "train.index.npy", 0)
            with contextlib.suppress(DamagedSample):
                read(shards, 3)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_other_damage_at_once_is_all_found_and_all_repaired(base: Path, truth: list[tuple[str, Pair]]) -> None:
    directory = fresh(base)
    flip(directory / "train-000000.tar", row(directory, 1)["image_offset"] + 300)
    flip_in("depth", 200)(directory)
    (directory / "train-000002.tar").unlink()
    (directory / "test.mean.blosc").write_bytes(b"")
    verdict = verify(directory, 1, silent)
    assert len(verdict.problems) == 4
    assert verdict.broken == {"train", "test"}
    repair(directory, verdict)
    assert verify(directory, 1, silent).problems == []
    with open_split(directory, "train") as shards:
        found = {shards.key(sample): read(shards, sample) for sample in range(len(shards))}
    assert found == {key: pair for sample, (key, pair) in enumerate(truth) if sample not in (1, VICTIM, 10, 11, 12)}


def test_without_its_index_a_damaged_shard_keeps_no_sample_that_may_be_another(
    base: Path, truth: list[tuple[str, Pair]]
) -> None:
    """A bit of a depth map has flipped so that it still decodes, and the checksums that would tell it are gone."""
    directory = fresh(base)
    flip_in("depth", 700)(directory)
    flip(directory / "train.index.npy", 300)
    verdict = verify(directory, 1, silent)
    assert any(SHARD in problem for problem in verdict.problems)
    with contextlib.suppress(UserError):  # refusing it would do as well
        repair(directory, verdict)
        with open_split(directory, "train") as shards:
            pairs = dict(truth)
            assert all(read(shards, sample) == pairs[shards.key(sample)] for sample in range(len(shards)))
            assert len(shards) >= SAMPLES - PER_SHARD


# --- the quota ---


@pytest.mark.parametrize(
    ("fraction", "replaced", "seen", "ends"),
    [
        (0.0, 0, 0, False),
        (0.0, 1, 1000, True),
        (0.1, 1, 1, False),  # of the 13 of the split, not of the one that came
        (0.1, 2, 14, True),
        (0.1, 2, 20, False),
        (0.1, 3, 29, True),
        (0.1, 100, 1000, False),
        (0.1, 101, 1000, True),
        (1.0, 13, 3, False),
        (1.0, 10_000, 10_000, False),
    ],
)
def test_too_many_replaced_samples_end_a_run(base: Path, fraction: float, replaced: int, seen: int, ends: bool) -> None:
    config = Config()
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, max_bad_fraction=fraction))
    with open_split(base / "shards", "train") as shards:
        error = check_bad_sample_quota(config, replaced, seen, shards)
        if not ends:
            assert error is None
            return
        said = str(error)
        assert f"{replaced} of {seen} samples were damaged and replaced" in said
        assert f"data.max_bad_fraction = {fraction:g}" in said
        assert f"--verify {base / 'shards'}" in said
        assert "\n" not in said
    assert isinstance(error, UserError)
