"""Source -> shards: in parallel over processes, resumable shard by shard, published as a whole.

Everything is written into a hidden folder in the output. A shard and its part file (index rows, statistics) stand there
once the shard is whole, so a run that was cut off continues behind them; the last step merges the parts and moves the
shards into the output, the manifest last. The bytes are a function of source and options, not of the number of workers.
"""

import hashlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import save

from mde_dist import __version__
from mde_dist.data import depth
from mde_dist.data.manifest import (
    FORMAT,
    INDEX,
    NAME,
    PACKING,
    VERSION,
    Manifest,
    ShardInfo,
    write_manifest,
    write_split,
)
from mde_dist.data.statistics import Statistics
from mde_dist.data.tar import index_rows, scan
from mde_dist.packing.claim import claimed, refuse_full
from mde_dist.packing.holdout import VAL, make_val_split
from mde_dist.packing.pool import Progress, WorkerLost, count, run_jobs
from mde_dist.packing.probe import Probe, probe
from mde_dist.packing.sources import BadPair, Pair, RawPair, Source
from mde_dist.packing.writer import ShardWriter
from mde_dist.utils.errors import UserError
from mde_dist.utils.folders import NOT_UTF8, is_utf8
from mde_dist.utils.io import atomic_file, leads_nowhere, sha256_of, write_atomic
from mde_dist.utils.publish import publish

_DECODING = 3  # of images; counted up where the same source gives other pixels, or a part file other arrays


@dataclass(frozen=True)
class PackConfig:
    size: tuple[int, int] | None = None
    """Resize to (height, width) pixels; None keeps the source's size."""
    samples_per_shard: int = 256
    codec: str = "blosc"
    jpeg_quality: int = 95
    """Quality of images that are resized, turned, or are no baseline JPEG; the others keep their own bytes."""
    limit: int | None = None
    """Pairs per split, the first ones of the source."""
    skip_bad: bool = False
    """Leave out pairs that cannot be used, and count them, instead of stopping."""
    validation: float | None = None
    """Share of the pairs of `train`, as whole rooms, that become the split `val`."""


@dataclass(frozen=True)
class ShardJob:
    """One shard to write."""

    name: str
    split: str
    pairs: tuple[Pair, ...]


def plan(source: Source, options: PackConfig) -> tuple[list[ShardJob], dict[str, list[str]]]:
    """The shards to write, and per split the pairs left out because a file is missing. Raises UserError."""
    jobs, missing = [], {}
    for name, split in source.splits.items():
        pairs = list(split.pairs[: options.limit])
        absent = {pair.key: source.missing(pair) for pair in pairs}
        missing[name] = [_why_absent(pair, absent[pair.key][0]) for pair in pairs if absent[pair.key]]
        if missing[name] and not options.skip_bad:
            raise UserError(
                f"split {name}: {missing[name][0]} ({len(missing[name])} of {len(pairs)} pairs cannot be used); "
                "complete the source, or leave such pairs out with --skip-bad"
            )
        pairs = [pair for pair in pairs if not absent[pair.key]]
        if name == "train":  # neighbours in the source are frames of one scene: spread them over the shards, once
            pairs.sort(key=lambda pair: hashlib.sha256(pair.key.encode()).digest())
        if not pairs:
            raise UserError(f"split {name}: no pair is left to pack")
        for number, start in enumerate(range(0, len(pairs), options.samples_per_shard)):
            group = tuple(pairs[start : start + options.samples_per_shard])
            jobs.append(ShardJob(f"{name}-{number:06d}", name, group))
    return jobs, missing


def _why_absent(pair: Pair, path: Path) -> str:
    if not is_utf8(pair.image):
        return f"{path}: {NOT_UTF8}"
    return f"{path} is {'a link that leads nowhere' if leads_nowhere(path) else 'missing'}"


@dataclass(frozen=True)
class PackContext:
    """Context that every worker gets."""

    source: Source
    options: PackConfig
    size: tuple[int, int]
    partial: Path
    """Hidden folder where shards and parts stand until all are there."""
    records: Mapping[str, dict[str, Any]]
    """Entries of the manifest about a split, besides those of its shards."""
    packed_in: Mapping[str, str] = field(default_factory=dict)
    """Name of a shard -> K/N, the part of a job array that packs it: one that differs is refused, not replaced."""


def pack(
    source: Source,
    output: Path,
    options: PackConfig,
    workers: int,
    progress: Progress,
    probes: Mapping[str, Probe] | None = None,
) -> Manifest:
    """Write the shards of `source` to the directory `output` and return its manifest.

    `progress(done, total)` is called a few times a second with counts of pairs; `probes` are taken if not given. Raises
    UserError where a pair cannot be used and `options.skip_bad` is off, or where the disk does not take it; nothing is
    published then.
    """
    work, jobs, missing = _prepare(source, output, options, probes)
    with _errors_as_one_line(output), claimed(output, _about(work), None) as parts:
        packed_in = {job.name: name for (first, every), name in parts.items() for job in jobs[first::every]}
        work = replace(work, packed_in=packed_in)
        fingerprints = _pack_jobs(work, jobs, workers, progress)
        return _publish(work, output, _merge(work, jobs, missing, fingerprints))


def pack_part(
    source: Source,
    output: Path,
    options: PackConfig,
    workers: int,
    progress: Progress,
    part: tuple[int, int],
    probes: Mapping[str, Probe] | None = None,
) -> int:
    """Write shard K of every N, with `part` = (K, N), where `pack` looks for what is done -> how many that are.

    Several processes, also on several nodes, may each pack a part at the same time; `pack` then has to publish only,
    and the bytes are those of a pack without parts. Raises UserError as `pack` does.
    """
    work, jobs, _ = _prepare(source, output, options, probes)
    first, every = part
    with _errors_as_one_line(output), claimed(output, _about(work), part):
        _pack_jobs(work, jobs[first::every], workers, progress)
    return len(jobs[first::every])


def _prepare(
    source: Source, output: Path, options: PackConfig, probes: Mapping[str, Probe] | None
) -> tuple[PackContext, list[ShardJob], dict[str, list[str]]]:
    """Plan the shards to pack, and list the pairs left out because a file is missing. Raises UserError."""
    size = options.size or next(iter((probes or probe(source)).values())).size
    held_out = make_val_split(source, options.validation) if options.validation else None
    source = held_out.source if held_out else source
    jobs, missing = plan(source, options)
    record = {VAL: {"held_out": held_out.record()}} if held_out else {}
    return PackContext(_without_pairs(source), options, size, output / PACKING, record), jobs, missing


def _about(work: PackContext) -> dict[str, Any]:
    """With what all parts have to be packed, as JSON takes it; what a file holds is in the fingerprints of shards."""
    splits = {f"depth of {name}": f"{split.depth_map}, {split.scale}" for name, split in work.source.splits.items()}
    about = {"version": __version__, "layout": work.source.layout, **asdict(work.options), "size": work.size, **splits}
    return json.loads(json.dumps(about))


@contextmanager
def _errors_as_one_line(output: Path) -> Iterator[None]:
    """Turn errors of a disk or a dying process into one line: raises UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {output}: {error.strerror}; finished shards are kept") from None
    except WorkerLost:
        raise UserError("a packing process was killed (out of memory?); finished shards are kept") from None


def _pack_jobs(work: PackContext, jobs: Sequence[ShardJob], workers: int, progress: Progress) -> dict[str, str]:
    """Write what is not there yet -> the fingerprint of each shard, by name."""
    fingerprints = {}
    total = sum(len(job.pairs) for job in jobs)
    for name, fingerprint, bad in run_jobs(_pack_shard, ((work, job) for job in jobs), workers, progress, total):
        if bad and not work.options.skip_bad:
            raise UserError(f"{bad[0]}; mend it, or leave such pairs out with --skip-bad (finished shards are kept)")
        fingerprints[name] = fingerprint
    return fingerprints


def _without_pairs(source: Source) -> Source:
    """For the workers, which get the pairs of their shard with the job: tens of thousands more would go to each."""
    return replace(source, splits={name: replace(split, pairs=()) for name, split in source.splits.items()})


def _pack_shard(work: PackContext, job: ShardJob) -> tuple[str, str, list[str]]:
    """Write one shard and its part file -> its name, its fingerprint, and what is bad.

    Without skip_bad the first bad pair ends it unwritten. Raises UserError where a part has packed another one.
    """
    fingerprint = _fingerprint(work, job)
    part, tar = (work.partial / f"{job.name}.{kind}" for kind in ("part", "tar"))
    notes = _open_part(part)[1] if part.is_file() else {}
    if notes.get("fingerprint") == fingerprint and tar.is_file():
        count(len(job.pairs))
        return job.name, fingerprint, json.loads(notes["bad"])
    if notes and job.name in work.packed_in:
        which = work.packed_in[job.name]
        raise UserError(
            f"{job.name} of part {which} was packed from another source, or its files have changed since; pack part "
            f"{which} again (--part {which})"
        )
    part.unlink(missing_ok=True)
    statistics = Statistics.empty(work.size)
    try:
        rows, bad = _write_tar(work, job, tar, statistics)
    except BadPair as error:
        return job.name, fingerprint, [str(error)]
    arrays = {"rows": rows.view(np.uint8).reshape(len(rows), INDEX.itemsize)} | vars(statistics)
    notes = {"fingerprint": fingerprint, "sha256": sha256_of(tar), "bad": json.dumps(bad)}
    write_atomic(part, save(arrays, notes))
    return job.name, fingerprint, bad


def _write_tar(work: PackContext, job: ShardJob, tar: Path, statistics: Statistics) -> tuple[np.ndarray, list[str]]:
    """One shard -> its index rows, and the pairs left out. Raises BadPair unless they may be."""
    bad: list[str] = []
    with atomic_file(tar) as file, ShardWriter(file, work.options.codec) as writer:
        for pair in job.pairs:
            try:
                raw = work.source.read(pair, work.source.splits[job.split].scale)
                jpeg, millimetres = _fit(work.source.path_of(pair.image), raw, work.size, work.options)
                if not millimetres.any():
                    raise BadPair(f"{work.source.path_of(pair.depth)} has no valid pixel")
            except BadPair as error:
                if not work.options.skip_bad:
                    raise
                bad.append(str(error))
            else:
                meta = {"scene": pair.scene, "source": pair.image, "split": job.split}
                writer.write(pair.key, jpeg, depth.encode(millimetres, work.options.codec), meta)
                turned, stray = raw.orientation != 1, raw.stray_bytes
                statistics.add(millimetres, reencoded=jpeg is not raw.jpeg, turned=turned, stray=stray)
            count(1)
    return index_rows(tar, scan(tar).samples), bad


def _fingerprint(work: PackContext, job: ShardJob) -> str:
    """Hash of everything that determines a shard, so that one packed before a change of source or options is not taken
    for it."""
    options = [work.size, work.options.codec, work.options.jpeg_quality]
    pairs = [[pair.key, pair.scene, *work.source.stamp(pair)] for pair in job.pairs]
    scale = repr(work.source.splits[job.split].scale)
    versions = [FORMAT, VERSION, __version__, _DECODING]
    return hashlib.sha256(json.dumps([*versions, options, scale, pairs]).encode()).hexdigest()


def _fit(path: Path, raw: RawPair, size: tuple[int, int], options: PackConfig) -> tuple[bytes, np.ndarray]:
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
    work: PackContext, jobs: list[ShardJob], missing: Mapping[str, list[str]], fingerprints: Mapping[str, str]
) -> dict[str, Any]:
    """Parts -> index and mean map of every split, and their records for the manifest. Raises UserError."""
    records = {}
    for name, split in work.source.splits.items():
        statistics = Statistics.empty(work.size)
        skipped = list(missing[name])
        shards: list[tuple[ShardInfo, np.ndarray]] = []
        for job in (job for job in jobs if job.split == name):
            arrays, notes = _open_part(work.partial / f"{job.name}.part")
            if notes.get("fingerprint") != fingerprints[job.name]:
                raise UserError(f"{job.name} was packed anew meanwhile, by another command; start again")
            skipped += json.loads(notes["bad"])
            index = arrays["rows"].reshape(-1).view(INDEX)
            if not len(index):
                continue  # every pair of this shard was bad
            statistics.merge(arrays)
            tar = work.partial / f"{job.name}.tar"
            shards.append((ShardInfo(tar.name, tar.stat().st_size, notes["sha256"], len(index)), index))
        if not shards:
            raise UserError(f"split {name}: no pair can be used; the first: {skipped[0]}")
        records[name] = write_split(work.partial, name, shards, statistics, work.options.codec) | {
            "depth_scale": str(split.scale),
            "depth_map": split.depth_map,
            "reencoded_images": int(statistics.reencoded[0]),
            "turned_images": int(statistics.turned[0]),
            "stray_bytes": int(statistics.stray[0]),
            "skipped": skipped,
            **work.records.get(name, {}),
        }
    return records


def _publish(work: PackContext, output: Path, splits: dict[str, Any]) -> Manifest:
    """Write the manifest and move what it names into the output; what only the work needed goes. Raises UserError."""
    manifest = write_manifest(work.partial, work.options.codec, work.size, work.source.layout, splits)
    refuse_full(output)  # it was empty when the packing began, which may be hours ago
    publish(work.partial, output, [*sorted(manifest.files), NAME])
    return replace(manifest, location=str(output))
