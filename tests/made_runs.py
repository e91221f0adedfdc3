"""Run directories as a training writes them, in the real formats, made in a second: for tests of the report."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mde_dist.data.config import CacheOptions
from mde_dist.data.depth import metres_to_millimetres, to_metres
from mde_dist.data.shards import open_split
from mde_dist.evaluation.breakdown import score_with_breakdown, split_breakdown
from mde_dist.evaluation.metrics import PROTOCOLS, score, summarise
from mde_dist.evaluation.results import EVALUATIONS, GroundTruth, hash_ground_truth, target_hashes, to_json, write_json
from mde_dist.models.config import ModelConfig
from mde_dist.models.depth_model import create_pretrained_model
from mde_dist.models.weights import MODEL, OPTIMIZER, serialize_model
from mde_dist.training.checkpoint import save_checkpoint
from mde_dist.training.snapshots import write_snapshots

BEGAN = 1_790_000_000.0
"""When the runs began, seconds since 1970."""
EVERY, LOGGED = 240, 24
"""Samples between evaluations, and between lines about steps."""


@dataclass(frozen=True)
class HeldOut:
    """The images that are scored."""

    place: str
    manifest: str
    keys: list[str]
    scenes: list[str]
    image: np.ndarray
    """uint8 (images, height, width, 3)."""
    truth: np.ndarray
    """float32 (images, height, width) metres."""


def held_out(shards: Path, split: str = "test") -> HeldOut:
    with open_split(str(shards), split, CacheOptions()) as samples:
        count = len(samples)
        image, depth = np.empty((count, *samples.size, 3), np.uint8), np.empty((count, *samples.size), np.uint16)
        for sample in range(count):
            samples.read_into(sample, image[sample], depth[sample])
        depth[:, :6, :9] = 0  # holes
        keys = [samples.key(sample) for sample in range(count)]
        manifest, scenes = samples.manifest.sha256, list(samples.scenes)
    return HeldOut(str(shards), manifest, keys, scenes, image, to_metres(depth))


def predicted(images: HeldOut, samples_seen: int, seed: int = 0) -> np.ndarray:
    """Depth as a model might see it that learns: a mean map at first, nearly the truth in the end; metres."""
    draw = np.random.default_rng([seed, samples_seen])
    mean = images.truth.mean(0)
    far = np.exp(-samples_seen / 700)
    strange = 1 + 0.3 * np.exp(draw.normal(size=(len(images.truth), 1, 1))) * far
    return ((images.truth * (1 - far) + mean * far) * strange + 0.3).astype(np.float32)


def make_run(
    path: Path,
    images: HeldOut,
    total: int = 1200,
    starts: Sequence[int] = (0,),
    protocol: str = "eigen",
    seed: int = 0,
    weights: Path | None = None,
    changes: dict[str, Any] | None = None,
) -> Path:
    """A finished run, which went on at each of `starts`. `weights`: a model.safetensors to publish."""
    path.mkdir(parents=True)
    config = {"train.total_samples": total, "train.batch_size": LOGGED, "optim.lr": 0.0006, "data.shards": images.place}
    config |= {"data.eval_split": "test", "data.train_split": "train", "model.encoder": "resnet18"}
    config |= {"evaluate.protocol": protocol} | (changes or {})
    (path / "config.toml").write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in config.items()))
    lines = [*_baselines(images, protocol)]
    for number, (begin, end) in enumerate(zip(starts, [*starts[1:], total], strict=True)):
        lines.append({"samples": begin, "start": _start(number, begin)})
        if not begin:
            lines[:0] = [lines.pop()]
        for samples in range(begin + LOGGED, end + 1, LOGGED):
            lines.append(_step(number, samples, total))
            if samples % EVERY == 0 or samples == total:
                line = _evaluate(path, images, samples, protocol, seed)
                lines.append({**line, "time": _time(number, samples)})
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    identity = {"manifest": images.manifest, "eval_manifest": images.manifest}
    state = {"step": total // LOGGED, "samples_seen": total, "config": config, "identity": identity}
    save_checkpoint(path / "checkpoints", {MODEL: b"", OPTIMIZER: b""}, state, 1, None)
    if weights is not None:
        os.link(weights, path / MODEL)
    return path


def _time(start: int, samples: int) -> float:
    """An hour passes between a stop and the next start."""
    return BEGAN + samples / 10 + 3600 * start


def _start(number: int, samples: int) -> dict[str, Any]:
    versions = {"mde_dist": "0.1.0", "torch": "2.9.1"}
    where = {"ranks": 2, "device": "cpu", "precision": "fp32", "batch_size": LOGGED, "host": f"node{number + 1}"}
    return {"time": _time(number, samples), **where, "versions": versions}


def _step(start: int, samples: int, total: int) -> dict[str, Any]:
    """The same for the same sample, whatever start it belongs to, but for the time."""
    draw = np.random.default_rng(samples)
    loss = float(4 * np.exp(-samples / 300) + 0.3 + 0.1 * draw.random())
    speeds = {"images_per_second": 10 + draw.random(), "data_wait": 0.02 * draw.random(), "memory_gb": 1.6}
    values = {"loss": loss, "lr": 6e-4 * (1 - samples / total), "grad_norm": 20 * loss, "batch": "c0ffee"}
    return {"samples": samples, **values, **speeds, "seconds_left": 0, "time": _time(start, samples)}


def _baselines(images: HeldOut, protocol: str) -> list[dict[str, Any]]:
    mean = images.truth.mean(0)
    maps = {"training mean everywhere": np.full_like(mean, mean.mean()), "mean map of training": mean}
    return [
        {"samples": 0, "baseline": name, "evaluation": protocol, "images": len(images.keys), **_scores(blind, images)}
        for name, blind in maps.items()
    ]


def _scores(prediction: np.ndarray, images: HeldOut, protocol: str = "eigen") -> dict[str, float]:
    spread = torch.from_numpy(np.broadcast_to(prediction, images.truth.shape).copy())
    return summarise(score(spread, torch.from_numpy(images.truth), PROTOCOLS[protocol]), PROTOCOLS[protocol]).metrics


def _evaluate(path: Path, images: HeldOut, samples: int, protocol: str, seed: int) -> dict[str, Any]:
    """Write what an evaluation leaves behind -> its line of metrics.jsonl."""
    prediction, truth = predicted(images, samples, seed), images.truth
    both = torch.from_numpy(prediction), torch.from_numpy(truth)
    rules, size = PROTOCOLS[protocol], truth.shape[1:]
    rows, where = split_breakdown(score_with_breakdown(*both, rules))
    sha256 = hash_ground_truth(
        images.keys, size, target_hashes(both[0], torch.from_numpy(metres_to_millimetres(truth)))
    )
    known = GroundTruth(images.place, "test", size, images.manifest, images.keys, images.scenes, sha256)
    about = {"path": str(path), "samples": samples}
    write_json(path / EVALUATIONS / "last.json", to_json({"model": [rows]}, [rules], known, about, [], where))
    chosen = np.linspace(0, len(images.keys) - 1, 3).astype(int)
    maps = [metres_to_millimetres(depth[chosen]) for depth in (truth, prediction)]
    write_snapshots(path, samples, [images.keys[place] for place in chosen], images.image[chosen], *maps)
    metrics = summarise(rows, rules).metrics
    at = {"samples": samples, "evaluation": protocol, "images": len(images.keys)}
    return {**at, **metrics}


def untrained(path: Path, images: HeldOut) -> Path:
    """The weights of a model that has learned nothing, as a training publishes them."""
    config = {"model.encoder": "resnet18", "data.shards": images.place, "data.eval_shards": None}
    metadata = {"config": {**config, "data.train_split": "train", "data.eval_split": "test"}, "size": [32, 32]}
    path.write_bytes(serialize_model(create_pretrained_model(ModelConfig(), seed=3).state_dict(), metadata))
    return path
