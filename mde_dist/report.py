"""Run directory -> pictures: curves over training, and depth panels of held-out images.

python -m mde_dist.report --run DIR
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .command import parse, run_command
from .data.depth import to_metres
from .data.shards import open_split
from .data.store import CacheOptions
from .errors import UserError
from .evaluate import held_out_shards
from .pictures import Panel, draw_curves, draw_panels
from .predictor import Predictor, open_predictor
from .run.checkpoint import find_model
from .run.records import read_records
from .run.scores import show_scores


@dataclass(frozen=True)
class ReportCommand:
    """Draw the curves and panels of a run."""

    run: Path
    """Run directory."""
    images: int = 8
    """Held-out images in the panels, evenly spaced over the split."""


def main(argv: list[str]) -> None:
    command = parse(ReportCommand, argv, "python -m mde_dist.report")
    if command.images < 1:
        raise UserError(f"--images {command.images}: must be at least 1")
    made = draw(command.run, command.images)
    show_scores(command.run, load_records(command.run))
    for path in made:
        print(f"made: {path}")


def draw(run: Path, images: int = 8) -> list[Path]:
    """Write curves.png and panels.png into the run directory; returns their paths. Raises UserError."""
    records = load_records(run)
    evaluations = [record for record in records if "evaluation" in record and "baseline" not in record]
    curves = run / "curves.png"
    title = f"{run.name}: {evaluations[-1]['evaluation']} protocol" if evaluations else run.name
    steps = [record for record in records if "loss" in record]
    draw_curves(curves, evaluations, baselines(records), steps, title)
    predictor = open_predictor(find_model(run, None), torch.device("cpu"))
    panels = run / "panels.png"
    draw_panels(panels, list(held_out_panels(predictor, images)), f"{run.name}: held-out images")
    return [curves, panels]


def load_records(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl. Raises UserError."""
    path = run / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"--run {run}: no metrics.jsonl in it; is it a run directory?")
    return read_records(path)


def baselines(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [record for record in records if "baseline" in record]


def held_out_panels(predictor: Predictor, images: int) -> Iterator[Panel]:
    """Evenly spaced images of the split that the model was evaluated on."""
    config = predictor.config
    cache = CacheOptions(Path(config.get("data.cache", CacheOptions.directory)))
    with open_split(held_out_shards(config), config["data.eval_split"], cache) as shards:
        image, depth = np.empty((*shards.size, 3), np.uint8), np.empty(shards.size, np.uint16)
        for sample in np.linspace(0, len(shards) - 1, min(images, len(shards))).astype(int):
            shards.read_into(int(sample), image, depth)
            truth, prediction = to_metres(depth), predictor(image)
            yield Panel(f"{shards.key(int(sample))}\n{abs_rel(prediction, truth):.3f}", image.copy(), truth, prediction)


def abs_rel(prediction: np.ndarray, truth: np.ndarray) -> float:
    """abs_rel over all valid pixels, for the title of a panel."""
    valid = truth > 0
    return float(np.mean(np.abs(prediction - truth)[valid] / truth[valid]))


if __name__ == "__main__":
    run_command(main)
