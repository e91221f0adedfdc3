"""Depth as colours: panels and single maps, as pixels and as image files. The only place that loads matplotlib."""

import logging
import os
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from mde_dist.utils.console import printable_lines
from mde_dist.utils.errors import UserError
from mde_dist.utils.io import atomic_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DEPTH_COLORS = "magma_r"  # even steps in brightness, also for colour-blind eyes and in grey; near is bright
ERROR_COLORS = "viridis"  # no grey in it: that means a hole


@dataclass(frozen=True)
class Panel:
    """One row of the panels: image uint8 (height, width, 3); truth and prediction float metres (height, width)."""

    title: str
    image: np.ndarray
    truth: np.ndarray
    prediction: np.ndarray


@dataclass(frozen=True)
class Thumbnail:
    """One pair to look at; image uint8 (height, width, 3), depth float metres (height, width), 0 = hole."""

    title: str
    image: np.ndarray
    depth: np.ndarray


_loading = threading.Lock()  # the environment and the logger are changed meanwhile


@cache
def load_matplotlib() -> Any:
    """The module, with figure, backends.backend_agg, colors and ticker; also where MPLBACKEND names a backend that is
    not there, as in what a notebook starts: nothing here opens a window. Raises UserError."""
    with _loading:
        return _load_matplotlib()


def _load_matplotlib() -> Any:
    backend, log = os.environ.pop("MPLBACKEND", None), logging.getLogger("matplotlib")
    level = log.level
    log.setLevel(logging.ERROR)  # a user without a home reads at length that the cache is in a temporary folder
    try:
        import matplotlib.backends.backend_agg
        import matplotlib.colors
        import matplotlib.figure
        import matplotlib.ticker
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"matplotlib cannot be loaded ({error}); see MATPLOTLIBRC and the files matplotlibrc, and whether TMPDIR "
            "can be written"
        ) from None
    finally:
        log.setLevel(level)
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    if backend is not None:
        with suppress(ValueError):
            matplotlib.rcParams["backend"] = backend  # for a notebook that draws itself
    return matplotlib


@contextmanager
def own_style() -> Iterator[Any]:
    """Within the block matplotlib, which is yielded, draws as it does by itself, whatever its configuration says."""
    matplotlib = load_matplotlib()
    with matplotlib.rc_context(matplotlib.rcParamsDefault):
        yield matplotlib


@contextmanager
def figure_file(path: Path, size: tuple[float, float], dpi: int, layout: str | None = None) -> Iterator["Figure"]:
    """Yields a figure of width and height in inches, which is written as a PNG file when the block ends well."""
    with own_style() as matplotlib:
        figure = matplotlib.figure.Figure(figsize=size, dpi=dpi, layout=layout)
        matplotlib.backends.backend_agg.FigureCanvasAgg(figure)
        yield figure
        with atomic_file(path) as file, warnings.catch_warnings():
            # a letter that its font lacks is a box in the picture; its advice names a place in this file
            warnings.filterwarnings("ignore", message=r"Glyph \d+ .* missing from")
            figure.savefig(file, format="png", metadata={"Software": None})


def color_map(name: str) -> Any:
    """0..1 -> RGBA 0..1."""
    return load_matplotlib().colormaps[name]


def colorize(depth: np.ndarray, low: float, high: float) -> np.ndarray:
    """float metres (height, width) -> RGB uint8 (height, width, 3) over low..high metres; holes (0) are grey."""
    scaled = (depth - low) / max(high - low, 1e-6)
    colors = (color_map(DEPTH_COLORS)(np.clip(scaled, 0, 1))[..., :3] * 255).round().astype(np.uint8)
    colors[depth <= 0] = 128
    return colors


def colorize_error(prediction: np.ndarray, truth: np.ndarray, worst: float) -> np.ndarray:
    """Both float metres (height, width) -> RGB uint8 (height, width, 3): |error| over 0..worst; holes are grey."""
    scaled = np.clip(np.abs(prediction - truth) / worst, 0, 1)
    colors = (color_map(ERROR_COLORS)(scaled)[..., :3] * 255).round().astype(np.uint8)
    colors[truth <= 0] = 128
    return colors


def color_bar(colors: str) -> np.ndarray:
    """A colour map from left to right, RGB uint8 (4, 256, 3)."""
    row = (color_map(colors)(np.linspace(0, 1, 256))[:, :3] * 255).round().astype(np.uint8)
    return np.repeat(row[None], 4, axis=0)


def save_image(path: Path, image: np.ndarray) -> None:
    """RGB uint8 (height, width, 3) -> a PNG file."""
    with atomic_file(path) as file:
        Image.fromarray(image).save(file, format="PNG")


def literal(text: str) -> str:
    """A name as matplotlib shows it letter by letter: between two `$` it would be a formula, or an error in one."""
    return printable_lines(text).replace("$", r"\$")


def draw_panels(path: Path, panels: Sequence[Panel], title: str) -> None:
    """Image, truth, prediction and absolute error per row; one depth scale and one error scale, in metres, for all."""
    valid = np.concatenate([panel.truth[panel.truth > 0] for panel in panels])
    low, high = (float(edge) for edge in np.percentile(valid, (1, 99)))
    errors = [np.where(p.truth > 0, np.abs(p.prediction - p.truth), np.nan) for p in panels]
    worst = max(float(np.nanpercentile(np.concatenate([e.reshape(-1) for e in errors]), 98)), 1e-3)
    height = 2.02 * len(panels) + 1.25
    with figure_file(path, (11, height), dpi=80) as figure:
        figure.suptitle(literal(title), y=1 - 0.1 / height)
        axes = figure.subplots(len(panels), 4, squeeze=False)
        figure.subplots_adjust(0.055, 0.65 / height, 0.995, 1 - 0.6 / height, wspace=0.025, hspace=0.04)
        depth_style: dict[str, Any] = {"cmap": DEPTH_COLORS, "vmin": low, "vmax": high}
        error_style: dict[str, Any] = {"cmap": ERROR_COLORS, "vmin": 0.0, "vmax": worst}
        for row, panel, error in zip(axes, panels, errors, strict=True):
            row[0].imshow(panel.image)
            row[0].set_ylabel(literal(panel.title), fontsize=7)
            row[1].imshow(np.where(panel.truth > 0, panel.truth, np.nan), **depth_style)
            shown = row[2].imshow(panel.prediction, **depth_style)
            wrong = row[3].imshow(error, **error_style)
            for axis in row:
                axis.set(xticks=[], yticks=[], facecolor="0.5")  # holes show as grey
        for axis, name in zip(axes[0], ("image", "truth", "prediction", "absolute error"), strict=True):
            axis.set_title(name, fontsize=10)
        for drawn, left, width, label in ((shown, 0.36, 0.33, "depth, metres"), (wrong, 0.78, 0.2, "error, metres")):
            bar = figure.add_axes((left, 0.48 / height, width, 0.11 / height))
            figure.colorbar(drawn, cax=bar, orientation="horizontal", label=label)


def draw_thumbnails(path: Path, thumbnails: Sequence[Thumbnail], title: str) -> None:
    """Each image over its depth; one scale in metres for all, so that a split in another unit stands out."""
    valid = np.concatenate([thumbnail.depth[thumbnail.depth > 0] for thumbnail in thumbnails])
    low, high = (float(edge) for edge in np.percentile(valid, (1, 99)))
    with figure_file(path, (max(1.7 * len(thumbnails), 5), 3.9), dpi=90, layout="constrained") as figure:
        figure.suptitle(literal(title), fontsize=9)
        axes = figure.subplots(2, len(thumbnails), squeeze=False)
        for (top, bottom), thumbnail in zip(axes.T, thumbnails, strict=True):
            top.imshow(thumbnail.image)
            top.set_title(literal(thumbnail.title), fontsize=7)
            depth = np.where(thumbnail.depth > 0, thumbnail.depth, np.nan)
            shown = bottom.imshow(depth, cmap=DEPTH_COLORS, vmin=low, vmax=high)
            for axis in (top, bottom):
                axis.set(xticks=[], yticks=[], facecolor="0.5")  # holes show as grey
        figure.colorbar(shown, ax=axes, location="bottom", shrink=0.6, aspect=50, pad=0.01, label="depth, metres")
