"""The rows as a picture: what each seed scored, the mean with its interval, and what training cost."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mde_dist.evaluation.metrics import HIGHER_IS_BETTER
from mde_dist.reporting.styles import style
from mde_dist.tools.ablation.numbers import AblationResult
from mde_dist.utils.visualization import figure_file, literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_PANELS = ("abs_rel", "delta1")


def draw(path: Path, found: AblationResult, reference: str) -> None:
    """One line per row, the first one at the top."""
    rows = list(found.figures.values())
    height = 0.34 * len(rows) + 1.5
    with figure_file(path, (12, height), dpi=90) as figure:
        widest = max(len(row.row) for row in rows)
        figure.subplots_adjust(min(0.3, 0.02 + 0.0068 * widest), 0.62 / height, 0.985, 1 - 0.62 / height, wspace=0.08)
        shown = [metric for metric in _PANELS if metric in found.protocol.metrics]
        axes = figure.subplots(1, len(shown) + 1, sharey=True, squeeze=False)[0]
        positions = np.arange(len(rows))
        for axis, metric in zip(axes, shown, strict=False):
            _draw_metric(axis, found, metric, reference)
        seconds = np.array([row.cost["seconds"] for row in rows])
        unit, size = ("minutes", 60) if seconds.max() < 7200 else ("hours", 3600)
        axes[-1].barh(positions, seconds / size, height=0.5, color=style(6).light, alpha=0.6)
        axes[-1].set_title("training of one seed", fontsize=10)
        axes[-1].set_xlabel(unit, fontsize=9)
        for axis in axes:
            axis.grid(axis="x", alpha=0.3)
            axis.tick_params(labelsize=8, length=2)
        axes[0].set_yticks(positions, [literal(row.row) for row in rows])
        axes[0].set_ylim(len(rows) - 0.5, -0.5)
        title = f"{found.protocol.name}, {found.fingerprint['images']} images: mean over seeds"
        title += " with its 95% interval over images; small: single seeds"
        figure.suptitle(title, fontsize=10, y=1 - 0.12 / height)


def _draw_metric(axis: "Axes", found: AblationResult, metric: str, reference: str) -> None:
    k = found.protocol.metrics.index(metric)
    for position, row in enumerate(found.figures.values()):
        look = style(0 if row.row == reference else 1)
        low, high = row.ends[:, k]
        axis.plot([low, high], [position, position], color=look.light, linewidth=2)
        axis.plot(row.mean[k], position, marker=look.marker, color=look.light, markersize=6.5)
        axis.plot(row.each[:, k], [position + 0.24] * len(row.seeds), ".", color="0.35", markersize=3.5)
    if reference in found.figures:
        axis.axvline(found.figures[reference].mean[k], color="0.4", linestyle=":", linewidth=1.2)
    better = "higher" if metric in HIGHER_IS_BETTER else "lower"
    axis.set_title(f"{metric} ({better} is better)", fontsize=10)
