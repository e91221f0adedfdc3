"""What scale.py models of the data, measured on this machine with the package's own code; the commands are there."""

import argparse
import itertools
import os
import resource
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from turns import in_ranks

ROUNDS = 5
BLOCK = 256


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def said(times: list[float], unit: float, name: str) -> str:
    """Median (least to most)."""
    low, mid, high = (f"{value / unit:.3g}" for value in np.percentile(times, [0, 50, 100]))
    return f"{mid} {name} ({low} to {high})"


# --- order ---


def order(folder: str, samples: int, window: int, batch: int = 16) -> dict[str, Any]:
    """Layout of windows and batches of an order, in a fresh process: seconds of each, and bytes of Python at most."""
    from mde_dist.data import sampler as module

    its = module.GlobalSampler(samples, BLOCK, window, seed=0)
    count = -(-its.samples // (BLOCK * window))
    numbers = np.random.default_rng(0).integers(0, max(1, count - 1), 40).tolist()
    layout = [seconds(lambda k=k: module._window.__wrapped__(its, 0, k)) for k in numbers]
    first = numbers[0] * BLOCK * window
    places = [
        np.arange(first + k, first + k + batch) for k in range(0, min(its.samples, BLOCK * window) - batch, batch)
    ]
    its.at(places[0])
    inside = [seconds(lambda p=p: its.at(p)) for p in places[:400]]
    module._window.cache_clear()
    tracemalloc.start()
    its.at(np.array([first]))
    return {"layout": layout, "batch": inside, "peak": tracemalloc.get_traced_memory()[1]}


def show_order(_: argparse.Namespace) -> None:
    cases = [*((n, 4) for n in (48_000, 10**6, 50 * 10**6, 10**9)), *((10**9, w) for w in (64, 256, 1024))]
    found: dict[tuple[int, int], list[dict]] = {case: [] for case in cases}
    for _round, case in itertools.product(range(ROUNDS), cases):
        found[case].append(in_ranks(1, order, samples=case[0], window=case[1]))
    print(f"order, {ROUNDS} processes each in turn, median of their medians (least to most)")
    for (samples, window), rounds in found.items():
        layout, batch = ([float(np.median(one[what])) for one in rounds] for what in ("layout", "batch"))
        each = np.median(layout) / min(samples, window * BLOCK)
        print(
            f"  {samples:,} samples, window {window}: layout {said(layout, 1e-3, 'ms')}, {1e9 * each:.0f} ns a sample"
        )
        print(
            f"    a batch of 16 in it {said(batch, 1e-6, 'µs')}; {rounds[0]['peak'] / 1e3:,.0f} KB at most", flush=True
        )


# --- index ---


def made_index(folder: Path, samples: int) -> Any:
    """An index of so many samples as a pack writes it -> its record as the manifest has it."""
    from mde_dist.data.manifest import INDEX, ShardInfo, write_split
    from mde_dist.data.statistics import Statistics

    rows, sizes = np.zeros(BLOCK, INDEX), {"depth": 184_000, "image": 38_000, "meta": 100}
    at = np.arange(BLOCK, dtype=np.uint64) * 225_000
    for member, size in sizes.items():
        rows[f"{member}_offset"], rows[f"{member}_bytes"] = at + 512, size
        at = at + np.uint64(size + 1024)
    statistics = Statistics.empty((4, 4))
    statistics.add(np.full((4, 4), 1000, np.uint16), False)
    counts = [min(BLOCK, samples - first) for first in range(0, samples, BLOCK)]
    shards = (
        (ShardInfo(f"train-{k:06d}.tar", 225_000 * BLOCK + 1024, "0" * 64, c), rows[:c].copy())
        for k, c in enumerate(counts)
    )
    return write_split(folder, "train", shards, statistics, "blosc")


def index(folder: str, samples: int) -> dict[str, Any]:
    """Open an index cold and warm, its hash alone, and read rows at random."""
    from mde_dist.data.index import Index
    from mde_dist.data.manifest import FileInfo, ShardInfo
    from mde_dist.utils.io import sha256_of

    record = made_index(Path(folder), samples)
    shards, info = [ShardInfo(**shard) for shard in record["shards"]], FileInfo(**record["index"])
    path = Path(folder, info.name)
    del record
    found: dict[str, Any] = {"bytes": info.bytes, "cold": [], "warm": [], "hash": [], "rows": [], "threads": []}
    rows = np.random.default_rng(0).integers(0, samples, 20_000).tolist()
    for _ in range(ROUNDS):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        for name in ("cold", "warm"):
            found[name].append(seconds(lambda: Index(path, info, shards).close()))
        found["hash"].append(seconds(lambda: sha256_of(path)))
        its = Index(path, info, shards)
        found["rows"].append(seconds(lambda its=its: [its[row] for row in rows]) / len(rows))
        its.close()
    tracemalloc.start()
    Index(path, info, shards).close()
    return found | {"peak": tracemalloc.get_traced_memory()[1]}


def show_index(_: argparse.Namespace) -> None:
    print(f"index, {ROUNDS} rounds each, median (least to most)")
    for samples in (48_000, 10**6, 20 * 10**6):
        found = in_ranks(1, index, samples=samples)
        check = [(warm - hashed) / samples for warm, hashed in zip(found["warm"], found["hash"], strict=True)]
        rate = found["bytes"] / np.median(found["hash"]) / 1e9
        print(
            f"  {samples:,} samples, {found['bytes'] / 1e6:.1f} MB: a row at random {said(found['rows'], 1e-6, 'µs')}"
        )
        print(f"    open {said(found['cold'], 1, 's')}; from the page cache {said(found['warm'], 1, 's')}")
        print(f"    of which sha256 at {rate:.2f} GB/s, rest {1e9 * np.median(check):.0f} ns a row; ", end="")
        print(f"{found['peak'] / 1e6:.1f} MB at most", flush=True)


# --- manifest ---


def made_manifest(folder: str, place: str, shards: int, files: bool) -> dict[str, Any]:
    """A manifest of so many shards in `place`, and sparse files for them."""
    from mde_dist.data.manifest import write_manifest

    record, hashes = made_index(Path(place), BLOCK), np.random.default_rng(0).bytes(32 * shards).hex()
    record["samples"] = shards * BLOCK
    record["shards"] = [
        {"name": f"train-{k:06d}.tar", "bytes": 2**20, "sha256": hashes[64 * k : 64 * k + 64], "samples": BLOCK}
        for k in range(shards)
    ]
    write_manifest(Path(place), "blosc", (480, 640), "bts", {"train": record})
    for shard in record["shards"] if files else ():
        with Path(place, shard["name"]).open("wb") as file:
            file.truncate(shard["bytes"])
    return {}


def manifest(folder: str, place: str, files: bool) -> dict[str, Any]:
    """Parse a manifest, and look for its files as opening a split does; bytes that the process grows by."""
    from mde_dist.data.config import CacheOptions
    from mde_dist.data.manifest import NAME, parse_manifest
    from mde_dist.data.store import open_store

    before = psutil.Process().memory_info().rss
    its, store = open_store(place, CacheOptions())
    found: dict[str, Any] = {"memory": psutil.Process().memory_info().rss - before, "parse": [], "stat": []}
    for _ in range(3 if files else 0):
        found["stat"].append(seconds(lambda: [store.check(shard) for shard in its.splits["train"].shards]))
    data = Path(place, NAME).read_bytes()
    for _ in range(3):
        found["parse"].append(seconds(lambda: parse_manifest(data, place)))
    return found | {"bytes": len(data)}


def show_manifest(_: argparse.Namespace) -> None:
    for shards in (1000, 10_000, 100_000, 1_000_000):
        files = shards <= 100_000
        with tempfile.TemporaryDirectory() as place:
            in_ranks(1, made_manifest, place=place, shards=shards, files=files)
            found = in_ranks(1, manifest, place=place, files=files)
        looked = said([s / shards for s in found["stat"]], 1e-6, "µs each") if files else "not looked for"
        print(f"  {shards:,} shards: {found['bytes'] / shards:.0f} bytes each, {found['bytes'] / 1e6:.1f} MB")
        print(f"    parsed in {said(found['parse'], 1, 's')}, {1e6 * np.median(found['parse']) / shards:.1f} µs each")
        print(f"    keeps {found['memory'] / shards:.0f} bytes each; files: {looked}", flush=True)


# --- waiting for data ---


def decode_times(shards: str, threads: int) -> list[float]:
    """Seconds of each sample of real pairs while so many threads read and decode."""
    from concurrent.futures import ThreadPoolExecutor

    from mde_dist.data.shards import open_split

    with open_split(shards, "train") as split:

        def read(samples: range) -> list[float]:
            # into as much memory as a loader has, which no cache of a core holds
            images, depths = np.empty((64, *split.size, 3), np.uint8), np.empty((64, *split.size), np.uint16)
            return [seconds(lambda s=s: split.read_into(s, images[s % 64], depths[s % 64])) for s in samples]

        with ThreadPoolExecutor(threads) as pool:
            parts = [range(k, len(split), threads) for k in range(threads)]
            list(pool.map(read, parts))  # warms the page cache
            return [time for part in pool.map(read, parts) for time in part]


def wait(folder: str, shards: str, threads: int, ahead: int, step: float, batch: int, batches: int) -> dict[str, float]:
    """Share of its time that a consumer which sleeps `step` seconds a batch waits for the real loader."""
    import torch

    from mde_dist.data.loader import DataLoader
    from mde_dist.data.sampler import GlobalSampler
    from mde_dist.data.shards import open_split

    torch.set_num_threads(1)
    with open_split(shards, "train") as split:
        its = GlobalSampler(len(split), split.block, 4, seed=0)
        draws = (its.at(np.arange(first, first + batch)) for first in range(0, batch * batches, batch))
        waited, start = 0.0, 0.0
        with DataLoader(split, draws, batch, torch.device("cpu"), threads, ahead) as loader:
            for number in range(batches - ahead - 1):  # at the end no batch is fetched any more
                if number == ahead + 1:
                    waited, start = 0.0, time.perf_counter()
                waited += seconds(lambda: next(loader))
                time.sleep(step)
        return {"share": waited / (time.perf_counter() - start)}


def show_wait(given: argparse.Namespace) -> None:
    from scale_formulas import waiting

    batch, batches = 16, 120
    for threads in (1, 2):
        times = np.array(decode_times(given.shards, threads))
        balance = batch * times.mean() / threads
        spread = f"mean {1e3 * times.mean():.2f}, one in a hundred {1e3 * np.percentile(times, 99):.2f}"
        print(f"  {threads} thread(s): a sample takes {1e3 * np.median(times):.2f} ms ({spread}), ", end="")
        print(f"a batch of {batch} {1e3 * balance:.1f} ms", flush=True)
        for ahead, ratio in itertools.product((1, 3), (0.7, 1.0, 1.3)):
            step = ratio * balance
            real = [
                in_ranks(
                    1, wait, shards=given.shards, threads=threads, ahead=ahead, step=step, batch=batch, batches=batches
                )["share"]
                for _ in range(3)
            ]
            modelled = waiting(times, threads, batch, ahead, step, 4000)
            print(
                f"    ahead {ahead}, a step of {1e3 * step:5.1f} ms: simulated {modelled:6.1%}, the loader "
                f"{np.median(real):6.1%} ({min(real):.1%} to {max(real):.1%})",
                flush=True,
            )


# --- reading what is near ---


def readahead(folder: str, shards: str, nodes: int) -> dict[str, float]:
    """Bytes that the disk gives a node which reads its part of every batch, against those of its samples."""
    from mde_dist.data.sampler import GlobalSampler, rank_indices
    from mde_dist.data.shards import open_split

    with open_split(shards, "train") as split:
        for shard in split.info.shards:
            with Path(shards, shard.name).open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        its, used, batch = GlobalSampler(len(split), split.block, 4, seed=0), 0, 4 * nodes
        image, depth = np.empty((*split.size, 3), np.uint8), np.empty(split.size, np.uint16)
        begun = resource.getrusage(resource.RUSAGE_SELF).ru_inblock
        for first in range(0, len(split) - batch, batch):
            for sample in its.at(rank_indices(first, batch, 1, nodes, 0, 0))[1].tolist():
                split.read_into(sample, image, depth)
                used += sum(int(split._index[sample][f"{member}_bytes"]) for member in ("depth", "image"))
        return {"ratio": 512 * (resource.getrusage(resource.RUSAGE_SELF).ru_inblock - begun) / used}


def show_readahead(given: argparse.Namespace) -> None:
    for nodes in (1, 2, 8, 64):
        ratios = [in_ranks(1, readahead, shards=given.shards, nodes=nodes)["ratio"] for _ in range(3)]
        print(
            f"  one node of {nodes:2}: the disk gave {said(ratios, 1, 'times')} the bytes of the samples it read",
            flush=True,
        )


Show = Callable[[argparse.Namespace], None]

DATA: dict[str, tuple[Callable[..., dict], Show | None]] = {
    "order": (order, show_order),
    "index": (index, show_index),
    "made_manifest": (made_manifest, None),
    "manifest": (manifest, show_manifest),
    "wait": (wait, show_wait),
    "readahead": (readahead, show_readahead),
}
