"""Origin of a model.safetensors, as far as its run tells: how long it was trained, on which data, and its scores."""

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mde_dist.data.config import CacheOptions
from mde_dist.data.manifest import Manifest
from mde_dist.data.store import open_store
from mde_dist.evaluation.metrics import PROTOCOLS
from mde_dist.evaluation.results import EVALUATIONS, read_record, short_hash
from mde_dist.models.weights import EMA, MODEL, read_state_file
from mde_dist.utils.errors import UserError
from mde_dist.utils.jsonl import read_records
from mde_dist.utils.urls import is_remote

_DAMAGE = (UserError, OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)
"""Errors of reading files that may hold anything."""


@dataclass(frozen=True)
class Scores:
    """An evaluation of these very weights, under one protocol."""

    protocol: str
    images: int
    fingerprint: str
    """Hash in twelve letters, see `results.short_hash`."""
    location: str
    split: str
    manifest: str | None
    """sha256 of the manifest of the shards that were scored on."""
    columns: Mapping[str, Mapping[str, float]]
    """"model" and baselines -> metric -> value."""


@dataclass(frozen=True)
class Origin:
    """Facts about some weights; empty where their run cannot be read."""

    samples: int | None = None
    """Samples that they were trained on."""
    manifest: str | None = None
    """sha256 of the manifest of the training shards."""
    torch: str | None = None
    """Version that trained them."""
    scores: list[Scores] = field(default_factory=list)


def find_origin(weights: Path, run: Path) -> Origin:
    """Collect what the directory `run` tells of the model at `weights`. Files that are missing or damaged are passed
    over.

    A checkpoint with the same tensors says how far they were trained; an evaluation counts where it was made there.
    """
    wanted = _tensor_digest(weights)
    for path in sorted((run / "checkpoints").glob("step-*"), reverse=True):
        # the average is what was evaluated, where there is one
        scored = next((name for name in (EMA, MODEL) if (path / name).is_file()), MODEL)
        for name in dict.fromkeys((scored, MODEL)):
            try:
                if _tensor_digest(path / name) != wanted:
                    continue
                record = read_state_file(path)
                samples, identity = int(record["samples_seen"]), record["identity"]
                scores = list(_scores(run, samples)) if name == scored else []
                return Origin(samples, str(identity["manifest"]), str(record["versions"]["torch"]), scores)
            except _DAMAGE:
                continue
    return Origin()


def manifest_at(location: str | None, sha256: str | None) -> Manifest | None:
    """The manifest of the shards at `location`, where they lie on this machine and are those of this hash."""
    if not location or is_remote(location):
        return None
    try:
        manifest, _ = open_store(location, CacheOptions())
    except _DAMAGE:
        return None
    return manifest if manifest.sha256 == sha256 else None


def _tensor_digest(path: Path) -> str:
    """sha256 of a safetensors file without its header, so without what it says of itself."""
    with path.open("rb") as file:
        file.seek(8 + int.from_bytes(file.read(8), "little"))
        return hashlib.file_digest(file, "sha256").hexdigest()


def _scores(run: Path, samples: int) -> Iterator[Scores]:
    """Scores of the run's evaluations at this sample."""
    for name in ("last.json", "best.json"):
        try:
            record = read_record(run / EVALUATIONS / name)
            if record["predictor"]["samples"] == samples:
                yield from [_score(record, protocol, _baselines(run)) for protocol in record["fingerprints"]]
                return
        except _DAMAGE:
            continue


def _score(record: Mapping[str, Any], protocol: str, baselines: list[dict[str, Any]]) -> Scores:
    """Raises ValueError, KeyError or TypeError."""
    truth, fingerprint = record["ground_truth"], record["fingerprints"][protocol]
    found = {str(who): results[protocol] for who, results in record["results"].items()}
    found |= {
        str(b["baseline"]): b
        for b in baselines
        if (b.get("evaluation"), b["images"]) == (protocol, fingerprint["images"])
    }
    metrics = PROTOCOLS[protocol].metrics
    columns = {who: {metric: float(values[metric]) for metric in metrics} for who, values in found.items()}
    if not all(math.isfinite(value) for column in columns.values() for value in column.values()):
        raise ValueError("a score is no number")
    location, split, manifest = str(truth["place"]), str(truth["split"]), truth["manifest"]
    return Scores(
        protocol,
        int(fingerprint["images"]),
        short_hash(fingerprint),
        location,
        split,
        manifest and str(manifest),
        columns,
    )


def _baselines(run: Path) -> list[dict[str, Any]]:
    """Scores of the constant baselines, as the run logged them."""
    try:
        return [record for record in read_records(run / "metrics.jsonl") if "baseline" in record]
    except _DAMAGE:
        return []
