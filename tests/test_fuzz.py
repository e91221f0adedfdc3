"""Random damage, for MDE_DIST_FUZZ_SECONDS (20): whatever the bytes, a right pair or an error in words, and no hang.

A failing case says its number; MDE_DIST_FUZZ_CASE=NUMBER runs that one alone, MDE_DIST_FUZZ_SEED gives other cases.
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import io
import itertools
import json
import os
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from trees import SIZE, bts, members, packed, silent, vouch, write_tar

from mde_dist.data.config import CacheOptions
from mde_dist.data.dataset import DamagedSample
from mde_dist.data.depth import CODECS
from mde_dist.data.loader import DataLoader
from mde_dist.data.shards import ShardDataset, open_split
from mde_dist.data.store import open_store
from mde_dist.data.tar import scan
from mde_dist.packing.examine import validate_shard
from mde_dist.packing.index_tars import index_tars
from mde_dist.packing.pack import PackConfig
from mde_dist.packing.repair import repair
from mde_dist.packing.validate import verify
from mde_dist.utils.errors import RankError, UserError

SECONDS = float(os.environ.get("MDE_DIST_FUZZ_SECONDS", "20"))
SEED = int(os.environ.get("MDE_DIST_FUZZ_SEED", "1"))
ONLY = os.environ.get("MDE_DIST_FUZZ_CASE")
A_CASE = 20.0
"""Seconds that a case may take."""
POOLED = 20
"""Every so many cases go through the commands that start processes."""
CPU = torch.device("cpu")
Sample = tuple[str, bytes, bytes, dict[str, str]]
"""Key, image, depth, record."""


class Hang(Exception):
    """A case took too long."""


@dataclass
class Whole:
    """A directory as it was packed."""

    files: dict[str, bytes]
    codec: str
    samples: dict[str, list[Sample]]
    """By the sha256 of the split's index, which no damage of names can hide."""


@pytest.fixture(scope="module")
def wholes(tmp_path_factory: pytest.TempPathFactory) -> list[Whole]:
    found = []
    for codec in CODECS:
        base = tmp_path_factory.mktemp("fuzz")
        packed(bts(base / "tree", 7, 5), base / "shards", PackConfig(samples_per_shard=3, codec=codec))
        files = {path.name: path.read_bytes() for path in sorted((base / "shards").iterdir())}
        samples = {}
        for split in ("train", "test"):
            with open_split(base / "shards", split) as shards:
                samples[shards.info.index.sha256] = [whole_sample(shards, s) for s in range(len(shards))]
        found.append(Whole(files, codec, samples))
    return found


def whole_sample(shards: ShardDataset, sample: int) -> Sample:
    image, depth = np.full((*shards.size, 3), 77, np.uint8), np.full(shards.size, 77, np.uint16)
    shards.read_into(sample, image, depth)
    return shards.key(sample), image.tobytes(), depth.tobytes(), shards.meta(sample)


# --- doing damage ---


def mutate(data: bytes, draw: np.random.Generator, others: list[bytes]) -> tuple[bytes, str]:
    """Damage some bytes -> the new ones, and what was done."""
    kind = str(
        draw.choice(["flip", "flips", "overwrite", "zero", "insert", "delete", "cut", "grow", "splice", "block"])
    )
    size = len(data)
    place = int(draw.integers(0, size + 1))
    length = int(2 ** draw.uniform(0, 12))
    if draw.random() < 0.3:  # where tars have their seams
        place, length = place // 512 * 512, max(1, length // 512) * 512
    out = bytearray(data)
    if kind in ("flip", "flips"):
        for _ in range(1 if kind == "flip" else int(draw.integers(2, 30))):
            if size:
                out[int(draw.integers(0, size))] ^= 1 << int(draw.integers(0, 8))
    elif kind == "overwrite":
        out[place : place + length] = draw.bytes(min(length, size - place))
    elif kind == "zero":
        out[place : place + length] = bytes(min(length, size - place))
    elif kind == "insert":
        out[place:place] = draw.bytes(length)
    elif kind == "delete":
        del out[place : place + length]
    elif kind == "cut":
        del out[place:]
    elif kind == "grow":
        out += bytes(length) if draw.random() < 0.5 else draw.bytes(length)
    else:  # a piece of another place or file; "block" keeps the size
        other = others[int(draw.integers(0, len(others)))]
        start = int(draw.integers(0, len(other) + 1)) // 512 * 512
        piece = other[start : start + max(512, length // 512 * 512)]
        place = place // 512 * 512
        out[place : place + (len(piece) if kind == "block" else 0)] = piece
        if kind == "block":
            del out[max(size, 0) :]
    return bytes(out), f"{kind} at {place}, {length}"


def change_number(data: bytes, draw: np.random.Generator) -> tuple[bytes, str]:
    """Another number in the manifest, which stays JSON."""
    found = list(re.finditer(rb"(?<=[ \[])-?\d+(\.\d+)?", data))
    if not found:
        return data, "no number to change"
    spot = found[int(draw.integers(0, len(found)))]
    values = [
        0,
        -1,
        1,
        2,
        3,
        7,
        24,
        32,
        33,
        255,
        10**6,
        2**31,
        2**63,
        2**64,
        10**30,
        1e308,
        0.5,
        int(spot[0][:1] == b"1"),
    ]
    value = values[int(draw.integers(0, len(values)))]
    return data[: spot.start()] + json.dumps(value).encode() + data[spot.end() :], f"{spot[0]!r} -> {value}"


def move_pieces(data: bytes, draw: np.random.Generator) -> tuple[bytes, str]:
    """Two strings of the manifest change places: names, hashes, splits."""
    found = list(re.finditer(rb'"[^"\n]+"', data))
    if len(found) < 2:
        return data, "nothing to exchange"
    one, two = sorted(draw.choice(len(found), 2, replace=False).tolist())
    a, b = found[one], found[two]
    parts = [data[: a.start()], b[0], data[a.end() : b.start()], a[0], data[b.end() :]]
    return b"".join(parts), f"{a[0]!r} <-> {b[0]!r}"


def damaged(whole: Whole, draw: np.random.Generator) -> tuple[dict[str, bytes | None], list[str]]:
    """The files of a damaged directory, and what was done to it."""
    files: dict[str, bytes | None] = dict(whole.files)
    names, said = list(files), []
    weights = np.array([8.0 if n.endswith(".tar") else 12.0 if n.endswith("json") else 4.0 for n in names])
    for _ in range(int(draw.choice([1, 1, 1, 2, 3, 5]))):
        name = names[int(draw.choice(len(names), p=weights / weights.sum()))]
        data = files[name]
        if data is None:
            continue
        roll = draw.random()
        if roll < 0.04:
            files[name], what = None, "removed"
        elif roll < 0.12:
            other = names[int(draw.integers(0, len(names)))]
            files[name], files[other], what = files[other], data, f"swapped with {other}"
        elif name == "manifest.json" and roll < 0.6:
            files[name], what = (change_number if roll < 0.4 else move_pieces)(data, draw)
        else:
            files[name], what = mutate(data, draw, list(whole.files.values()))
        said.append(f"{name}: {what}")
    return files, said


def lay_tars(directory: Path, files: dict[str, bytes | None], in_place: bool) -> None:
    """Exchange the tars, in place or by others of the same name."""
    for name, data in files.items():
        path = directory / name
        if path.suffix == ".tar" and (not path.exists() or path.read_bytes() != data):
            if data is None or not in_place:
                path.unlink(missing_ok=True)
            if data is not None:
                path.write_bytes(data)


def lay(directory: Path, files: dict[str, bytes | None]) -> None:
    """Write a directory afresh."""
    for path in sorted(directory.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    for name, data in files.items():
        if data is not None:
            (directory / name).write_bytes(data)


# --- using it ---


def attempt(function: Callable[..., Any], *arguments: Any) -> Any:
    """What it gives, or None where it fails in words."""
    try:
        return function(*arguments)
    except (UserError, DamagedSample) as error:
        assert "\n" not in str(error)
        assert len(str(error)) > 10
        return None


def use(
    directory: Path, whole: Whole, draw: np.random.Generator, exact: bool, meanwhile: Callable[[], None]
) -> Counter[str]:
    """Open all splits, read all samples, iterate the loader. With `exact`, what is delivered is the very sample.

    `meanwhile` is what happens once a split is open.
    """
    seen: Counter[str] = Counter()
    opened = attempt(open_store, directory, CacheOptions())
    if opened is None:
        return Counter(refused=1)
    manifest, store = opened
    for split in manifest.splits:
        shards = attempt(ShardDataset, manifest, store, split)
        if shards is None:
            seen["refused"] += 1
            continue
        with shards:
            truth = whole.samples.get(shards.info.index.sha256) if exact else None
            right: dict[int, tuple[bytes, bytes]] = {}
            for sample in draw.choice(len(shards), 2).tolist() if draw.random() < 0.5 else []:  # opens their shards
                attempt(whole_sample, shards, sample)
            meanwhile()
            for sample in range(len(shards)):
                shards.key(sample)
                shards.file_of(sample)
                record = attempt(shards.meta, sample)
                found = attempt(whole_sample, shards, sample)
                seen["read" if found else "damaged"] += 1
                if exact:
                    assert truth is not None, "an index that nobody has made"
                    assert found is None or found == truth[sample], f"sample {sample} is another one"
                    assert record is None or record == truth[sample][3]
                    assert found is None or shards.size == SIZE
                image, depth = np.empty((*shards.size, 3), np.uint8), np.empty(shards.size, np.uint16)
                with contextlib.suppress(DamagedSample):
                    shards.read_into(sample, image, depth)
                    if depth.any():
                        right[sample] = image.tobytes(), depth.tobytes()
            attempt(shards.mean_map)
            load(shards, right, draw)
            seen["opened"] += 1
    return seen


def load(shards: ShardDataset, right: dict[int, tuple[bytes, bytes]], draw: np.random.Generator) -> None:
    """An epoch of the loader: every row is its sample, or the first whole one of those that may stand for it."""
    total, threads, size = len(shards), int(draw.choice([0, 2])), int(draw.integers(1, 4))
    order = draw.permutation(total)
    draws = ((np.zeros(len(part), np.int64), part) for part in np.split(order, range(size, total, size)))
    stands = {s: [c for k in range(8) if (c := (s + k * (shards.block + 1)) % total) in right] for s in range(total)}
    with DataLoader(shards, draws, size, CPU, threads, replace=True, timeout=10.0, say=lambda line: None) as loader:
        try:
            for batch in loader:
                replaced = 0
                for row, sample in enumerate(batch.sample.tolist()):
                    pair = batch.image[row].numpy().tobytes(), batch.depth[row].numpy().tobytes()
                    assert pair == right[stands[sample][0]], f"a wrong pair for sample {sample}"
                    replaced += sample not in right
                assert batch.replaced == replaced
        except RankError:
            assert not all(stands.values()), "it gives up although there is a whole one"


def look(directory: Path, whole: Whole, draw: np.random.Generator) -> None:
    """What verify, repair and index do with a single shard, in this process."""
    rows = np.load(io.BytesIO(whole.files["train.index.npy"]))
    for path in sorted(directory.glob("*.tar")):
        scanned = scan(path)
        assert all("\n" not in problem for problem in scanned.problems)
        number = int(draw.integers(0, 3))
        for expected in (None, rows[rows["shard"] == number]):
            report = validate_shard(path, whole.codec, SIZE, expected)
            assert len(report.keys) == len(report.rows)
            assert report.problems or report.sha256


def go_through_the_commands(directory: Path, whole: Whole, exact: bool) -> None:
    """verify, repair, and index without a manifest: each ends well or in words, and leaves only right pairs."""
    verdict = attempt(verify, directory, 1, silent)
    if verdict is not None and verdict.problems and attempt(repair, directory, verdict) is not None:
        left = verify(directory, 1, silent).problems
        assert left == [], f"not whole after its repair: {left}"
        vouched_for = exact and not any("index" in problem for problem in verdict.problems)
        check_left(directory, whole, vouched_for)
    elif verdict is not None and not verdict.problems:
        check_left(directory, whole, exact)
    (directory / "manifest.json").unlink(missing_ok=True)
    if attempt(index_tars, directory, 1, silent, True, lambda split, median: None) is not None:
        check_left(directory, whole, False)


def check_left(directory: Path, whole: Whole, exact: bool) -> None:
    """Every sample can be read; with `exact` it is one that was packed."""
    every = [sample for samples in whole.samples.values() for sample in samples]
    for split in open_store(directory, CacheOptions())[0].splits:
        with open_split(directory, split) as shards:
            for sample in range(len(shards)):
                if exact:
                    assert whole_sample(shards, sample) in every, f"{shards.key(sample)} is not what was packed"
                shards.read_into(sample, np.empty((*SIZE, 3), np.uint8), np.empty(SIZE, np.uint16))


@contextlib.contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raises Hang in the block after so many seconds; where even that does not help, all stacks are shown."""

    def ring(*_: object) -> None:
        raise Hang(f"more than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    faulthandler.dump_traceback_later(3 * seconds, exit=True, file=sys.__stderr__)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def forged_headers(directory: Path, draw: np.random.Generator) -> str:
    """Damage tar headers, and make their own checksums agree: kinds, sizes and names that tar itself believes."""
    tars, said = sorted(directory.glob("*.tar")), []
    for _ in range(int(draw.integers(1, 4))):
        path = tars[int(draw.integers(0, len(tars)))]
        data = bytearray(path.read_bytes())
        headers = [start for start in range(0, len(data), 512) if data[start + 257 : start + 262] == b"ustar"]
        if not headers:
            continue
        start = headers[int(draw.integers(0, len(headers)))]
        header = data[start : start + 512]
        field = str(draw.choice(["kind", "size", "name", "prefix", "bytes"]))
        if field == "kind":
            header[156] = int(draw.choice(list(b"0\0 1234567LKxgXSDNVM7Z")))
        elif field == "size":
            sizes = [
                b"00000000000\0",
                b"77777777777\0",
                b"-0000000001\0",
                b"\x80" + bytes(7) + b"\0\0\2\0",
                b"\xff" * 12,
            ]
            header[124:136] = (
                sizes[int(draw.integers(0, 5))] if draw.random() < 0.7 else b"%011o\0" % draw.integers(0, 9000)
            )
        elif field == "name":
            header[0:100] = draw.choice(
                [b"\0" * 100, b"/" * 100, b"a.jpg".ljust(100, b"\0"), draw.bytes(100).replace(b"\n", b"_")]
            )
        elif field == "prefix":
            header[345:500] = b"some/folder".ljust(155, b"\0")
        else:
            place = int(draw.integers(0, 500))
            header[place : place + 12] = draw.bytes(12).replace(b"\n", b"_")
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        data[start : start + 512] = header
        path.write_bytes(data)
        said.append(f"{path.name}: {field} at {start}")
    return "; ".join(said)


def no_more() -> None:
    """Nothing happens."""


def rewritten_payload(directory: Path, whole: Whole, draw: np.random.Generator) -> str:
    """Damage payloads, and make all checksums agree: what the decoders get from other people's tars."""
    tars = sorted(directory.glob("*.tar"))
    said = []
    for _ in range(int(draw.integers(1, 4))):
        path = tars[int(draw.integers(0, len(tars)))]
        content = members(path)
        place = int(draw.integers(0, len(content)))
        name, data = content[place]
        content[place], what = (name, (changed := mutate(data, draw, [data]))[0]), changed[1]
        write_tar(path, content)
        said.append(f"{path.name}, {name}: {what}")
    vouch(directory, whole.codec)
    return "; ".join(said)


def run_case(case: int, seed: int, whole: Whole, directory: Path) -> Counter[str]:
    """One case -> what was seen. Whatever goes wrong raises an AssertionError that says how to run it again."""
    draw, said = np.random.default_rng([seed, case]), "nothing yet"
    how = str(draw.choice(["before", "while open", "foreign", "headers"], p=[0.4, 0.2, 0.25, 0.15]))
    exact, meanwhile = how != "foreign", no_more
    try:
        with limited(A_CASE):
            lay(directory, dict(whole.files))
            if how == "foreign":
                said = rewritten_payload(directory, whole, draw)
            elif how == "headers":
                said = forged_headers(directory, draw)
            else:
                files, done = damaged(whole, draw)
                said = "; ".join(done)
                if how == "before":
                    lay(directory, files)
                else:
                    meanwhile = functools.partial(lay_tars, directory, files, bool(draw.random() < 0.5))
            seen = use(directory, whole, draw, exact, meanwhile)
            look(directory, whole, draw)
            if case % POOLED < 2:  # one of each codec
                go_through_the_commands(directory, whole, exact)
    except BaseException as error:
        raise AssertionError(
            f"MDE_DIST_FUZZ_SEED={seed} MDE_DIST_FUZZ_CASE={case} ({how}: {said}): {error!r}"
        ) from error
    return seen


def test_random_damage_is_met_in_words_and_never_gives_a_wrong_pair(wholes: list[Whole], tmp_path: Path) -> None:
    end, total, cases = time.monotonic() + SECONDS, Counter[str](), 0
    for case in itertools.count() if ONLY is None else [int(ONLY)]:
        if time.monotonic() > end:
            break
        total += run_case(case, SEED, wholes[case % 2], tmp_path)
        cases += 1
    print(f"{cases} cases in {SECONDS:g} s: {dict(total)}")
    if ONLY is None:
        assert cases > SECONDS  # else it tests nothing
        assert min(total[what] for what in ("refused", "opened", "read", "damaged")) > 0
