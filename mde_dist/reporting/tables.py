"""Tables of text: how runs were made, where they differ, and the scores of every image and every scene."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import torch

from mde_dist.evaluation.metrics import HIGHER_IS_BETTER, PROTOCOLS, image_metrics
from mde_dist.evaluation.results import load_rows, short_hash
from mde_dist.reporting.curves import duration
from mde_dist.reporting.history import Line, Run, RunPoint
from mde_dist.training.scores import BLOG

_HASH = 12
"""Letters of a hash that are shown."""


def run_info(run: Run) -> dict[str, str]:
    """Facts about a run, its data and its device, by their names."""
    config, found = run.config, {"state": state_of(run)}
    spans = run.spans()
    if spans:
        begun, ended = when(spans[0][0]), when(spans[-1][1], after=spans[0][0])
        found["time"] = f"{begun} to {ended}, {in_training(run)}"
        found["starts"] = str(len(spans))
    hosts: dict[str, dict[str, None]] = {}
    for start in run.starts:
        hosts.setdefault(on_what(start.values), {})[str(start.values.get("host", ""))] = None
    found["devices"] = "; ".join(f"{what} on {', '.join(names)}" for what, names in hosts.items() if what)
    found["model"] = ", ".join(_model(config))
    found["batch"] = str(config.get("train.batch_size", ""))
    found["left out"] = ", ".join(_left_out(run))
    found["versions"] = _versions(run)
    found["data"] = _shards(config, "data.shards", "data.train_split", run.manifest("manifest"))
    held_out = "data.eval_shards" if config.get("data.eval_shards", "None") != "None" else "data.shards"
    found["held out"] = _shards(config, held_out, "data.eval_split", run.manifest("eval_manifest"))
    if run.last is not None:
        images = f"{run.last.values.get('images', 0):,.0f} images"
        mark = f", fingerprint {short_hash(run.fingerprint)}" if run.fingerprint else ""
        found["evaluation"] = f"{run.protocol} protocol, {images}{mark}"
    return {name: text for name, text in found.items() if text}


def as_table(columns: Sequence[Mapping[str, str]]) -> list[tuple[str, list[str]]]:
    """The facts of several runs by their names, each with the value of each run."""
    names = dict.fromkeys(name for column in columns for name in column)
    return [(name, [column.get(name, "–") for column in columns]) for name in names]


def headline(run: Run) -> str:
    """A run in one line."""
    spans = run.spans()
    parts = [state_of(run)]
    if spans:
        parts += [when(spans[0][0]), in_training(run)]
        parts += [name for name in (on_what(run.starts[-1].values),) if name]
    return " · ".join(parts)


def state_of(run: Run) -> str:
    total = f" of {run.total:,}" if run.total else ""
    if run.finished:
        return f"finished at sample {run.samples:,}"
    if run.preempted:
        return f"stopped at sample {run.samples:,}{total}; the same command goes on"
    return f"not finished: at sample {run.samples:,}{total}" if run.samples else "just begun"


def in_training(run: Run) -> str:
    return f"{duration(sum(ended - began for began, ended in run.spans()))} in training"


def when(seconds: float, after: float | None = None) -> str:
    """A moment in UTC; without the date where it is that of `after`."""
    try:
        moment = datetime.fromtimestamp(seconds, UTC)
        day = datetime.fromtimestamp(after, UTC).date() if after is not None else None
    except (ValueError, OSError, OverflowError):
        return "an unknown time"
    clock = f"{moment:%H:%M} UTC"
    return clock if day == moment.date() else f"{moment.day} {moment:%B %Y} {clock}"


def on_what(start: Mapping[str, Any]) -> str:
    """The devices that a start of a run names."""
    ranks, device = start.get("ranks"), start.get("device")
    if not isinstance(ranks, int) or not isinstance(device, str):
        return ""
    words = [f"{ranks} × {device}" if ranks > 1 else device]
    return ", ".join([*words, *([str(start["precision"])] if start.get("precision") else [])])


def starts(run: Run) -> list[dict[str, str]]:
    """A row per start of the run, where there were several."""
    rows, spans = [], run.spans()
    for number, (start, (began, _)) in enumerate(zip(run.starts, spans, strict=True)):
        pause = duration(max(0.0, began - spans[number - 1][1])) if number else ""
        batch = start.values.get("batch_size", "")
        rows.append(
            {"at": when(began), "sample": f"{start.samples:,}", "pause": pause, "on": on_what(start.values)}
            | {"host": str(start.values.get("host", ""))}
            | {"batch": str(batch)}
        )
    return rows if len(rows) > 1 else []


def _model(config: Mapping[str, Any]) -> Iterator[str]:
    if "model.encoder" in config:
        yield str(config["model.encoder"])
    if "model.weights" in config:
        yield "from scratch" if config["model.weights"] == "none" else f"{config['model.weights']} weights"
    if config.get("data.size", "None") != "None":
        yield f"trained at {config['data.size']}"


def _left_out(run: Run) -> Iterator[str]:
    last = run.steps[-1].values if run.steps else {}
    for name, what in (("replaced", "damaged samples replaced"), ("skipped", "batches that were not finite")):
        if last.get(name):
            yield f"{last[name]:,.0f} {what}"


def _versions(run: Run) -> str:
    last = run.starts[-1].values if run.starts else run.state
    versions = last.get("versions")
    return ", ".join(f"{name} {version}" for name, version in versions.items()) if isinstance(versions, dict) else ""


def _shards(config: Mapping[str, Any], name: str, split: str, manifest: str | None) -> str:
    if name not in config:
        return ""
    return f"{config[name]}, split {config.get(split, '')}" + (f", manifest {manifest[:_HASH]}" if manifest else "")


def differing(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """The fields of the config, other than the name of the run, that runs differ in, with the value of each run."""
    names = dict.fromkeys(name for run in runs for name in run.config if name != "run")
    rows = [(name, [str(run.config.get(name, "–")) for run in runs]) for name in names]
    return [(name, values) for name, values in rows if len(set(values)) > 1]


@dataclass(frozen=True)
class Score:
    """A row of the table of scores."""

    name: str
    run: int | None
    """Place of the run on the page; None for what is no run."""
    values: Mapping[str, float]

    def shown(self, metric: str) -> str:
        """Four digits where they were measured here."""
        value = self.values.get(metric)
        return "" if value is None else f"{value:g}" if self.values is BLOG else f"{value:.4f}"


def scores(runs: Sequence[RunPoint]) -> list[Score]:
    """The last and the best evaluation of each run, the constant baselines, and the blog's figures."""
    rows = []
    for index, run in runs:
        if run.last is not None and run.best is not None:
            who = f"{run.name}: " if len(runs) > 1 else ""
            moments = {"last": run.last, "best": run.best} if run.best is not run.last else {"last and best": run.last}
            rows += [
                Score(f"{who}{what}, after {line.samples:,} samples", index, line.values)
                for what, line in moments.items()
            ]
    lines: dict[tuple[str, float | None], Line] = {}
    for _, run in runs:
        for line in run.baselines:
            lines.setdefault((line.kind, line.values.get("abs_rel")), line)
    rows += [Score(line.kind, None, line.values) for line in lines.values()]
    return [*rows, Score("the blog's ResNet18, on NYU Depth v2", None, BLOG)]


@dataclass(frozen=True)
class Column:
    title: str
    numbers: bool


@dataclass(frozen=True)
class ImageTable:
    columns: Sequence[Column]
    rows: Sequence[Sequence[str]]


def image_table(runs: Sequence[RunPoint]) -> ImageTable | None:
    """Every image of the last evaluation; of runs that were scored on the same images abs_rel side by side."""
    known = [(run, *_images(run)) for _, run in runs if run.record is not None]
    if not known:
        return None
    first, keys, table = known[0]
    scenes = _scenes(first, len(keys))
    columns = [Column("image", False)] + ([Column("scene", False)] if scenes else []) + [Column("pixels", True)]
    heads = [[key, *([scenes[index]] if scenes else []), f"{table[key][0]:.0f}"] for index, key in enumerate(keys)]
    if len(known) == 1:
        metrics = PROTOCOLS[first.protocol or "eigen"].metrics
        columns += [Column(metric, True) for metric in metrics]
        cells = [[_cell(table[key], number) for number in range(1, len(metrics) + 1)] for key in keys]
    else:
        columns += [Column(f"abs_rel, {run.name}", True) for run, _, _ in known]
        columns += [Column(f"{run.name} − {first.name}", True) for run, _, _ in known[1:]]
        cells = [_side_by_side([other.get(key) for _, _, other in known]) for key in keys]
    return ImageTable(columns, [head + row for head, row in zip(heads, cells, strict=True)])


def _images(run: Run) -> tuple[list[str], dict[str, list[float]]]:
    """Keys, and for each the pixels that were scored and its metrics."""
    assert run.record is not None and run.protocol is not None
    keys, rows = load_rows(run.record, run.protocol)
    values = image_metrics(torch.from_numpy(rows), PROTOCOLS[run.protocol]).tolist()
    return keys, {key: [row[0], *image] for key, row, image in zip(keys, rows.tolist(), values, strict=True)}


def _cell(image: Sequence[float], number: int) -> str:
    return f"{image[number]:.4f}" if image[0] else "–"


def _side_by_side(images: Sequence[Sequence[float] | None]) -> list[str]:
    values = [image[1] if image and image[0] else None for image in images]  # abs_rel is every protocol's first metric
    shown = ["–" if value is None else f"{value:.4f}" for value in values]
    gaps = [None if value is None or values[0] is None else value - values[0] for value in values[1:]]
    return shown + ["–" if gap is None else f"{gap:+.4f}".replace("-", "−") for gap in gaps]


def _scenes(run: Run, images: int) -> list[str]:
    """The scene of each image; empty where they are not known."""
    found = run.record["images"].get("scenes") if run.record else None
    if not isinstance(found, list) or len(found) != images or not any(found):
        return []
    return [str(scene) for scene in found]


@dataclass(frozen=True)
class Scene:
    name: str
    images: int
    values: Sequence[float | None]
    """Mean abs_rel of its images, of each run."""


@dataclass(frozen=True)
class Scenes:
    runs: Sequence[RunPoint]
    rows: Sequence[Scene]
    """Scenes from the worst to the best one."""
    most: float
    """The greatest of all values."""
    left_out: int
    """Scenes between these."""
    several: bool
    """True where any scene has more than one image."""


MOST_SCENES = 16


def scene_table(runs: Sequence[RunPoint]) -> Scenes | None:
    """Scores by scene of runs that were scored on the same images; None where no scenes are known."""
    known = [(index, run) for index, run in runs if run.record is not None]
    if not known:
        return None
    tables = [_images(run)[1] for _, run in known]
    keys = list(tables[0])
    by_scene: dict[str, list[str]] = {}
    for key, scene in zip(keys, _scenes(known[0][1], len(keys)), strict=False):
        by_scene.setdefault(scene, []).append(key)
    if len(by_scene) < 2:
        return None
    rows = [
        Scene(scene, len(members), [_mean(table[key] for key in members if key in table) for table in tables])
        for scene, members in by_scene.items()
    ]
    rows.sort(key=lambda row: -(row.values[0] if row.values[0] is not None else -1.0))
    shown = rows if len(rows) <= MOST_SCENES else rows[: MOST_SCENES // 2] + rows[-MOST_SCENES // 2 :]
    most = max((value for row in shown for value in row.values if value is not None), default=0.0) or 1.0
    return Scenes(known, shown, most, len(rows) - len(shown), len(by_scene) < len(keys))


def _mean(images: Iterable[Sequence[float]]) -> float | None:
    values = [image[1] for image in images if image[0]]
    return float(np.mean(values)) if values else None


def better(metric: str) -> str:
    return "higher" if metric in HIGHER_IS_BETTER else "lower"
