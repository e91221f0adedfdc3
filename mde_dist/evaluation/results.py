"""Result of an evaluation, as a record that can be shown, written, read again, and told from another."""

import csv
import hashlib
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table

from mde_dist import __version__
from mde_dist.data.dataset import DepthDataset
from mde_dist.data.shards import ShardDataset
from mde_dist.evaluation.breakdown import summarise_breakdown
from mde_dist.evaluation.metrics import (
    DEFINITIONS,
    N_COLUMNS,
    PROTOCOLS,
    SUFFICIENT_STATISTICS,
    Protocol,
    image_metrics,
    summarise,
)
from mde_dist.utils.console import open_console, say
from mde_dist.utils.errors import UserError
from mde_dist.utils.io import write_atomic, writing

FORMAT, VERSION = "mde_dist.evaluation", 1
EVALUATIONS = "evaluations"
"""Folder of a run directory with last.json and best.json, the records of its last and of its best evaluation."""
_LARGEST = 1 << 30  # bytes of a record that is read
N_HASH_COLUMNS = 4
"""Columns of `digest_measure`."""


@dataclass(frozen=True)
class GroundTruth:
    """Ground truth of a split."""

    location: str
    split: str
    size: tuple[int, int]
    """Height and width of the maps, pixels."""
    manifest: str | None
    """sha256 of the shards' manifest; None where a source folder was read."""
    keys: list[str]
    """Keys of the images, in the split's order."""
    scenes: list[str]
    sha256: str
    """Hash of all keys and depth maps, whichever way they are stored: equal where the same ground truth was scored."""


def target_hashes(prediction: torch.Tensor, depth: torch.Tensor) -> torch.Tensor:
    """float64 (batch, DIGEST): 192 bits of the sha256 of each depth map, uint16 counts, in parts held exactly."""
    found = [hashlib.sha256(counts.tobytes()).digest() for counts in depth.cpu().numpy().astype("<u2")]
    parts = [[int.from_bytes(digest[6 * k : 6 * k + 6], "big") for k in range(N_HASH_COLUMNS)] for digest in found]
    return torch.tensor(parts, dtype=torch.float64, device=depth.device)


def hash_ground_truth(keys: Sequence[str], size: tuple[int, int], rows: torch.Tensor) -> str:
    """One hash for all images, in whatever order they come, from their `target_hashes`."""
    lines = sorted(f"{key} {[int(part) for part in row]}" for key, row in zip(keys, rows.tolist(), strict=True))
    return hashlib.sha256("\n".join([f"{size[0]}x{size[1]}", *lines]).encode()).hexdigest()


def ground_truth_of(samples: DepthDataset, split: str, rows: torch.Tensor) -> GroundTruth:
    """Ground truth that was scored, the first images of `samples` or all, from their `target_hashes`."""
    keys = [samples.key(sample) for sample in range(len(rows))]
    manifest = samples.manifest.sha256 if isinstance(samples, ShardDataset) else None
    sha256 = hash_ground_truth(keys, samples.size, rows)
    return GroundTruth(samples.location, split, samples.size, manifest, keys, samples.scenes[: len(keys)], sha256)


def fingerprint(protocol: Protocol, images: int, ground_truth: GroundTruth) -> dict[str, Any]:
    """Everything that two results must have in common to be compared.

    The version is that of the definitions of the metrics: records of other releases can be compared. mde_dist 0.1 had
    its own version in place of it.
    """
    numbers = json.loads(json.dumps(asdict(protocol)).replace("Infinity", "null"))  # JSON has no infinity
    return {"protocol": numbers, "images": images, "ground_truth": ground_truth.sha256, "definitions": DEFINITIONS}


def short_hash(fingerprint: Mapping[str, Any]) -> str:
    """A fingerprint in twelve letters."""
    return hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()[:12]


def to_json(
    tables: Mapping[str, Sequence[torch.Tensor]],
    protocols: Sequence[Protocol],
    ground_truth: GroundTruth,
    predictor: Mapping[str, Any],
    findings: Sequence[str],
    where: torch.Tensor | None = None,
) -> dict[str, Any]:
    """`tables`: `score` rows by name ("model" and baselines) and protocol -> the record that `--json` writes.

    `where`: rows of `split_breakdown` under the first protocol.

    Raises UserError where nothing could be scored.
    """
    summaries = {
        name: [summarise(rows, protocol) for rows, protocol in zip(column, protocols, strict=True)]
        for name, column in tables.items()
    }
    for summary in summaries["model"]:
        if not summary.images:
            raise UserError(
                f"protocol {summary.protocol}: none of the {len(ground_truth.keys)} images has a pixel to score"
            )
    return {
        "format": FORMAT,
        "version": VERSION,
        "made_by": f"mde_dist {__version__}",
        "predictor": dict(predictor),
        "ground_truth": {
            **{"place": ground_truth.location, "split": ground_truth.split, "size": list(ground_truth.size)},
            **{"manifest": ground_truth.manifest, "sha256": ground_truth.sha256, "images": len(ground_truth.keys)},
        },
        "fingerprints": {
            s.protocol: fingerprint(PROTOCOLS[s.protocol], s.images, ground_truth) for s in summaries["model"]
        },
        "results": {
            name: {summary.protocol: {"images": summary.images, **summary.metrics} for summary in column}
            for name, column in summaries.items()
        },
        "unscored": {s.protocol: [ground_truth.keys[sample] for sample in s.unscored] for s in summaries["model"]},
        "findings": list(findings),
        "where": {} if where is None else {protocols[0].name: summarise_breakdown(where)},
        "images": {
            "keys": ground_truth.keys,
            "scenes": ground_truth.scenes,
            "terms": {p.name: _terms(rows) for p, rows in zip(protocols, tables["model"], strict=True)},
        },
    }


def _terms(rows: torch.Tensor) -> dict[str, list[float]]:
    columns = rows.T.tolist()
    return {
        "pixels": [int(count) for count in columns[0]],
        **dict(zip(SUFFICIENT_STATISTICS, columns[1:], strict=True)),
    }


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    """Raises UserError where the disk does not take it."""
    with writing(path):
        path.parent.mkdir(exist_ok=True)
        write_atomic(path, json.dumps(record, indent=1, allow_nan=False) + "\n")


def write_csv(
    path: Path, protocols: Sequence[Protocol], tables: Sequence[torch.Tensor], ground_truth: GroundTruth
) -> None:
    """One row per image: key, scene, and per protocol scored pixels and metrics; empty where no pixel was scored."""
    columns = [f"{p.name}_{name}" for p in protocols for name in ("pixels", *p.metrics)]
    values = [
        torch.cat([rows[:, :1], image_metrics(rows, protocol)], dim=1).tolist()
        for protocol, rows in zip(protocols, tables, strict=True)
    ]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["key", "scene", *columns])
    for key, scene, *image in zip(ground_truth.keys, ground_truth.scenes, *values, strict=True):
        cells = [[int(row[0]), *(row[1:] if row[0] else [""] * len(row[1:]))] for row in image]
        writer.writerow([key, scene, *(cell for row in cells for cell in row)])
    with writing(path):
        write_atomic(path, text.getvalue())


def read_record(path: Path) -> dict[str, Any]:
    """A record that `--json` wrote, checked as far as comparing needs it. Raises UserError."""
    try:
        if path.stat().st_size > _LARGEST:
            raise ValueError("it is too large")
        record = json.loads(path.read_bytes())
        if not isinstance(record, dict) or (record.get("format"), record.get("version")) != (FORMAT, VERSION):
            raise ValueError(f"it is not a record of format {FORMAT} {VERSION}")
        for name in record["fingerprints"]:
            if name not in PROTOCOLS:
                raise ValueError(f"it names the protocol {name!r}, which this version does not know")
            _, rows = load_rows(record, name)
            stated, scored = record["fingerprints"][name]["images"], int((rows[:, 0] > 0).sum())
            if stated != scored:
                raise ValueError(f"protocol {name}: it states {stated} scored images and has {scored}")
        if not isinstance(record["predictor"], dict):
            raise ValueError("it does not say what was scored")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise UserError(f"{path} is no result of evaluate --json ({type(error).__name__}: {error})") from None
    return record


def load_rows(record: Mapping[str, Any], protocol: str) -> tuple[list[str], np.ndarray]:
    """(keys, `score` rows float64 (images, 1 + terms)) of a record. Raises ValueError, KeyError or TypeError."""
    keys, terms = record["images"]["keys"], record["images"]["terms"][protocol]
    rows = np.array([terms[name] for name in ("pixels", *SUFFICIENT_STATISTICS)], dtype=np.float64).T
    if rows.shape != (len(keys), N_COLUMNS) or not np.isfinite(rows).all() or len(set(keys)) != len(keys):
        raise ValueError(f"protocol {protocol}: its images are not whole")
    return [str(key) for key in keys], rows


def check_same_images(
    a: tuple[Sequence[str], np.ndarray], b: tuple[Sequence[str], np.ndarray], names: tuple[str, str]
) -> None:
    """Two records of one fingerprint have the same images and scored the same pixels of them, in whatever order.

    `a`, `b`: as `load_rows` gives them; `names`: of both. Raises UserError where they were changed by hand.
    """
    pixels = [dict(zip(keys, rows[:, 0].tolist(), strict=True)) for keys, rows in (a, b)]
    if other := [key for key in {**pixels[0], **pixels[1]} if pixels[0].get(key) != pixels[1].get(key)]:
        raise UserError(
            f"{' and '.join(names)} cannot be compared: their fingerprint is the same, but {len(other)} images differ, "
            f"such as {other[0]}; evaluate both again"
        )


def show(record: Mapping[str, Any], title: str) -> None:
    """One table per protocol: the scores beside the constant baselines."""
    for name, fingerprint in record["fingerprints"].items():
        protocol = PROTOCOLS[name]
        columns = {who: results[name] for who, results in record["results"].items()}
        say(f"{title}: protocol {name}, {fingerprint['images']} images")  # a path stays whole, for copying
        table = Table()
        for who in ("", *columns):
            table.add_column(who, justify="right" if who else "left")
        for metric in protocol.metrics:
            table.add_row(metric, *(f"{column[metric]:.4f}" for column in columns.values()))
        open_console().print(table)
        say(f"{_description(protocol)}; fingerprint {short_hash(fingerprint)}")
    for name, keys in record["unscored"].items():
        if keys:
            say(f"{name}: {len(keys)} images without a valid pixel were not scored: {', '.join(keys[:10])}")
    for finding in record["findings"]:
        say(f"warning: {finding}")


def _description(protocol: Protocol) -> str:
    low, high = protocol.valid
    words = [f"truth {low:g}..{high:g} m" if math.isfinite(high) else f"truth above {low:g} m"]
    if protocol.crop:
        words.append("rows {}:{}, columns {}:{} of 480x640".format(*protocol.crop))
    if protocol.align != "none":
        words.append(f"{protocol.align} fitted to each image's truth: not comparable with metric protocols")
    words.append("prediction {:g}..{:g} m".format(*protocol.clamp) if protocol.clamp else "prediction as it is")
    return ", ".join([*words, f"mean over {protocol.mean_over}"])
