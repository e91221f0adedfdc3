"""Source -> shards: in parallel over processes, resumable shard by shard, published as a whole.

Everything is written into a hidden directory beside the output. A shard and its part file (index rows, statistics)
stand there once the shard is whole, so a run that was cut off continues behind them; the last step merges the parts and
renames the directory. The bytes are a function of source and options, not of the number of workers.
"""

import hashlib
import io
import json
import multiprocessing
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import save

from .. import __version__
from ..errors import UserError
from ..files import atomic_file, sha256_of, sync_directory, write_atomic
from . import depth
from .shards import FORMAT, INDEX, VERSION
from .sources import BadPair, Pair, RawPair, Source
from .statistics import Statistics
from .writer import ShardWriter

INDOOR_METRES = (0.3, 10.0)
"""Where the median of an indoor depth map lies, generously; outside, the scale is wrong."""
MAX_MEDIAN_RATIO = 3.0
"""Medians of two splits of one data set that differ by more than this speak of different units."""
_PROBES = 16  # pairs per split that are read before anything is written


@dataclass(frozen=True)
class PackOptions:
    size: tuple[int, int] | None = None
    """Resize to (height, width) pixels; None keeps the source's size."""
    samples_per_shard: int = 256
    codec: str = "zst"
    jpeg_quality: int = 95
    """Of images that are resized or are no baseline JPEG; the others keep their own bytes."""
    limit: int | None = None
    """Pairs per split, the first ones of the source."""
    skip_bad: bool = False
    """Leave out pairs that cannot be used, and count them, instead of stopping."""


@dataclass(frozen=True)
class Probe:
    """What a look at a few pairs of a split shows."""

    size: tuple[int, int]
    median: float
    """Metres, over the valid pixels."""
    holes: float
    """Share of pixels without measurement."""


@dataclass(frozen=True)
class Job:
    """One shard to write."""

    name: str
    split: str
    pairs: tuple[Pair, ...]


def probe(source: Source) -> dict[str, Probe]:
    """Read a few pairs of each split, evenly spaced. Raises UserError where none can be read."""
    probes = {}
    for name, split in source.splits.items():
        raw, error = [], None
        for pair in split.pairs[:: max(1, len(split.pairs) // _PROBES)][:_PROBES]:
            try:
                raw.append(source.read(pair, split.scale))
            except BadPair as bad:
                error = bad
        if not raw:
            raise UserError(f"split {name}: none of the pairs that were tried can be used; {error}")
        millimetres = np.concatenate([pair.depth[::4, ::4].reshape(-1) for pair in raw])
        median = float(np.median(millimetres[millimetres > 0])) / 1000
        sizes = [pair.image.shape[:2] for pair in raw]
        probes[name] = Probe(max(set(sizes), key=sizes.count), median, float(np.mean(millimetres == 0)))
    return probes


def check_units(source: Source, probes: Mapping[str, Probe], overruled: Sequence[str]) -> None:
    """Refuse depths that cannot be an indoor data set in metres, unless the user gave the scale. Raises UserError."""
    low, high = INDOOR_METRES
    checked = {name: found.median for name, found in probes.items() if name not in overruled and "" not in overruled}
    for name, median in checked.items():
        if not low <= median <= high:
            raise UserError(
                f"split {name}: the median depth is {median:.4g} m with {source.splits[name].scale}; an indoor median "
                f"lies within {low:g}..{high:g} m; give metres per stored unit: --depth-scale {name}=VALUE"
            )
    if checked and max(checked.values()) > MAX_MEDIAN_RATIO * min(checked.values()):
        shown = ", ".join(f"{name} {median:.3g} m" for name, median in checked.items())
        raise UserError(
            f"median depths differ by more than {MAX_MEDIAN_RATIO:g}x between splits ({shown}): "
            "one of them is in another unit; give its metres per stored unit: --depth-scale SPLIT=VALUE"
        )


def plan(source: Source, options: PackOptions) -> tuple[list[Job], dict[str, list[str]]]:
    """The shards to write, and per split the pairs left out because a file is missing. Raises UserError."""
    jobs, missing = [], {}
    for name, split in source.splits.items():
        pairs = list(split.pairs[: options.limit])
        absent = {pair.key: source.missing(pair) for pair in pairs}
        missing[name] = [f"{files[0]} is missing" for files in absent.values() if files]
        if missing[name] and not options.skip_bad:
            raise UserError(
                f"split {name}: {missing[name][0]} ({len(missing[name])} of {len(pairs)} pairs lack a file); "
                "complete the source, or leave such pairs out with --skip-bad"
            )
        pairs = [pair for pair in pairs if not absent[pair.key]]
        if name == "train":  # neighbours in the source are frames of one scene: spread them over the shards, once
            pairs.sort(key=lambda pair: hashlib.sha256(pair.key.encode()).digest())
        if not pairs:
            raise UserError(f"split {name}: no pair is left to pack")
        for number, start in enumerate(range(0, len(pairs), options.samples_per_shard)):
            group = tuple(pairs[start : start + options.samples_per_shard])
            jobs.append(Job(f"{name}-{number:06d}", name, group))
    return jobs, missing


def pack(
    source: Source, output: Path, options: PackOptions, workers: int, progress: Callable[[int, int], None]
) -> dict[str, Any]:
    """Write the shards of `source` to the directory `output` and return its manifest.

    `progress(done, total)` is called a few times a second with counts of pairs. Raises UserError where a pair cannot be
    used and `options.skip_bad` is off; nothing is published then.
    """
    probes = probe(source)
    size = options.size or next(iter(probes.values())).size
    jobs, missing = plan(source, options)
    partial = _partial_directory(source, output, options, size, jobs)
    for job, bad in _run(source, partial, options, size, jobs, workers, progress):
        missing[job.split] += bad
        if bad and not options.skip_bad:
            raise UserError(f"{bad[0]}; mend it, or leave such pairs out with --skip-bad (finished shards are kept)")
    manifest = _merge(source, partial, options, size, jobs, missing)
    _publish(partial, output, manifest)
    return manifest


def _partial_directory(
    source: Source, output: Path, options: PackOptions, size: tuple[int, int], jobs: list[Job]
) -> Path:
    """The hidden directory for this very work; what an earlier run of other work left in its place is removed."""
    work = {
        "version": [FORMAT, VERSION, __version__],
        "options": [size, options.samples_per_shard, options.codec, options.jpeg_quality],
        "scales": {name: repr(split.scale) for name, split in source.splits.items()},
        "jobs": [[job.name, [[pair.key, *_stamp(source, pair)] for pair in job.pairs]] for job in jobs],
    }
    fingerprint = hashlib.sha256(json.dumps(work).encode()).hexdigest()
    partial = output.with_name(f".{output.name}.partial")
    try:
        if partial.is_dir() and not _holds(partial / "work", fingerprint):
            shutil.rmtree(partial)
        partial.mkdir(parents=True, exist_ok=True)
        write_atomic(partial / "work", fingerprint)
    except OSError as error:
        raise UserError(f"cannot write {partial}: {error.strerror}") from None
    return partial


def _holds(path: Path, text: str) -> bool:
    return path.is_file() and path.read_text() == text


def _stamp(source: Source, pair: Pair) -> list[Any]:
    """What tells a changed source file from the one packed before."""
    if pair.image.startswith("room:"):
        return [pair.image]
    stats = [(source.root / path).stat() for path in (pair.image, pair.depth)]
    return [pair.image, pair.depth, *((stat.st_size, stat.st_mtime_ns) for stat in stats)]


def _run(
    source: Source,
    partial: Path,
    options: PackOptions,
    size: tuple[int, int],
    jobs: list[Job],
    workers: int,
    progress: Callable[[int, int], None],
) -> Iterator[tuple[Job, list[str]]]:
    """Write the shards that are not there yet, in parallel; yields each with what is bad in it."""
    total = sum(len(job.pairs) for job in jobs)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    done = context.Value("q", 0)
    with ProcessPoolExecutor(workers, context, initializer=_set_counter, initargs=(done,)) as pool:
        futures: dict[Future[list[str]], Job] = {
            pool.submit(_pack_shard, source, partial, options, size, job): job for job in jobs
        }
        try:
            pending = set(futures)
            while pending:
                finished, pending = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
                progress(done.value, total)
                for future in finished:
                    yield futures[future], future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


_counter: Any = None  # pairs done, shared by the workers


def _set_counter(counter: Any) -> None:
    global _counter
    _counter = counter


def _count(pairs: int) -> None:
    with _counter.get_lock():
        _counter.value += pairs


def _pack_shard(source: Source, partial: Path, options: PackOptions, size: tuple[int, int], job: Job) -> list[str]:
    """Write one shard and its part file; returns what is bad. Without skip_bad the first bad pair ends it unwritten."""
    part = partial / f"{job.name}.part"
    if part.is_file():
        _count(len(job.pairs))
        return json.loads(_open_part(part)[1]["bad"])
    scale = source.splits[job.split].scale
    statistics = Statistics.empty(size)
    bad: list[str] = []
    tar = partial / f"{job.name}.tar"
    with atomic_file(tar) as file:
        writer = ShardWriter(file, options.codec)
        for pair in job.pairs:
            try:
                raw = source.read(pair, scale)
                jpeg, millimetres = _fit(source.root / pair.image, raw, size, options)
            except BadPair as error:
                bad.append(str(error))
                if not options.skip_bad:
                    return bad
            else:
                meta = {"scene": pair.scene, "source": pair.image, "split": job.split}
                writer.write(pair.key, jpeg, depth.encode(millimetres, options.codec), meta)
                statistics.add(millimetres, reencoded=jpeg is not raw.jpeg)
            _count(1)
        rows = writer.close()
    arrays = {"rows": rows.view(np.uint8).reshape(len(rows), INDEX.itemsize)} | vars(statistics)
    write_atomic(part, save(arrays, {"sha256": sha256_of(tar), "bad": json.dumps(bad)}))
    return bad


def _fit(path: Path, raw: RawPair, size: tuple[int, int], options: PackOptions) -> tuple[bytes, np.ndarray]:
    """JPEG bytes and uint16 millimetres at `size`; the source's own JPEG bytes where nothing has to change."""
    image, millimetres = raw.image, raw.depth
    if image.shape[:2] != size:
        height, width = image.shape[:2]
        if options.size is None:
            raise BadPair(f"{path} is {height}x{width}, but the others are {size[0]}x{size[1]}; choose one with --size")
        # area when shrinking, so that nothing aliases; bilinear when enlarging
        shrinks = size[0] <= height and size[1] <= width
        method = Image.Resampling.BOX if shrinks else Image.Resampling.BILINEAR
        image = np.asarray(Image.fromarray(image).resize((size[1], size[0]), method))
        millimetres = depth.resize_depth(millimetres, size)
    elif raw.jpeg is not None:
        return raw.jpeg, millimetres
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=options.jpeg_quality, subsampling=0)  # 0 = 4:4:4, no blur
    return buffer.getvalue(), millimetres


def _open_part(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Arrays and metadata of a part file."""
    with safe_open(path, "numpy") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


def _merge(
    source: Source,
    partial: Path,
    options: PackOptions,
    size: tuple[int, int],
    jobs: list[Job],
    bad: dict[str, list[str]],
) -> dict[str, Any]:
    """Parts -> index and mean map of every split, and the manifest."""
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "made_by": f"mde_dist {__version__}",
        "codec": options.codec,
        "image_size": list(size),
        "source": {"layout": source.layout},
        "splits": {},
    }
    for name, split in source.splits.items():
        statistics = Statistics.empty(size)
        shards: list[dict[str, Any]] = []
        rows: list[np.ndarray] = []
        for job in (job for job in jobs if job.split == name):
            arrays, notes = _open_part(partial / f"{job.name}.part")
            index = arrays["rows"].reshape(-1).view(INDEX)
            if not len(index):
                continue  # every pair of this shard was bad
            index["shard"] = len(shards)
            rows.append(index)
            statistics.merge(arrays)
            tar = partial / f"{job.name}.tar"
            shards.append(
                {"name": tar.name, "samples": len(index), "bytes": tar.stat().st_size, "sha256": notes["sha256"]}
            )
        if not rows:
            raise UserError(f"split {name}: no pair can be used; the first: {bad[name][0]}")
        with atomic_file(partial / f"{name}.index.npy") as file:
            np.save(file, np.concatenate(rows), allow_pickle=False)
        write_atomic(partial / f"{name}.mean.{options.codec}", depth.encode(statistics.mean_map(), options.codec))
        manifest["splits"][name] = {
            "samples": sum(len(index) for index in rows),
            "shards": shards,
            "index": {"name": f"{name}.index.npy", "sha256": sha256_of(partial / f"{name}.index.npy")},
            "mean_map": f"{name}.mean.{options.codec}",
            "depth": statistics.summary(),
            "depth_scale": str(split.scale),
            "reencoded_images": int(statistics.reencoded[0]),
            "skipped": bad[name],
        }
    return manifest


def _publish(partial: Path, output: Path, manifest: dict[str, Any]) -> None:
    """Drop what only the work needed, write the manifest, and give the directory its name."""
    for path in [*partial.glob("*.part"), partial / "work"]:
        path.unlink()
    published = {shard["name"] for split in manifest["splits"].values() for shard in split["shards"]}
    for path in partial.glob("*.tar"):
        if path.name not in published:
            path.unlink()
    write_atomic(partial / "manifest.json", json.dumps(manifest, indent=1) + "\n")
    sync_directory(partial)
    partial.rename(output)  # replaces an empty directory, fails on any other
    sync_directory(output.parent)
