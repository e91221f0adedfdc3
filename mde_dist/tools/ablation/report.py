"""Report on the rows: as a table on the terminal, as Markdown, as JSON and as a picture."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.table import Table as Grid

from mde_dist import __version__
from mde_dist.evaluation.bootstrap import LEVEL, NOTE, RESAMPLES
from mde_dist.evaluation.metrics import HIGHER_IS_BETTER
from mde_dist.evaluation.results import short_hash
from mde_dist.tools.ablation.numbers import SEED, AblationResult, RowStatistics, hardware_summary
from mde_dist.tools.ablation.plot import draw
from mde_dist.tools.ablation.table import Table, describe_changes
from mde_dist.training.config import as_json
from mde_dist.utils.console import open_console, say
from mde_dist.utils.io import write_atomic, writing
from mde_dist.utils.markdown import code, plain
from mde_dist.utils.markdown import row as cells
from mde_dist.utils.progress import clock_time

FORMAT, VERSION = "mde_dist.tools.ablation", 1
_LEFT_TO_FILE = ("images/s", "parameters", "GFLOP/image")
SHOWN = ("abs_rel", "delta1", "rmse")
"""Metrics that the tables have; table.json has all."""


def write(found: AblationResult, table: Table, failed: Mapping[str, str], output: Path) -> list[Path]:
    """table.md, table.json and table.png -> their paths. Raises UserError where the disk does not take them."""
    paths = [output / f"table.{kind}" for kind in ("md", "json", "png")]
    with writing(output):
        write_atomic(paths[0], "\n".join(markdown(found, table, failed)) + "\n")
        write_atomic(paths[1], json.dumps(as_record(found, table, failed), indent=1) + "\n")
        draw(paths[2], found, table.reference)
    return paths


def show(found: AblationResult, table: Table) -> None:
    """On the terminal."""
    headings = _headings(found, table)
    # the numbers that one chooses by; table.md has them all
    chosen = [index for index, name in enumerate(headings) if name not in _LEFT_TO_FILE and name != "rmse"]
    grid = Grid()
    for index in chosen:
        grid.add_column(headings[index], justify="right" if index else "left", overflow="fold")
    for figures in found.figures.values():
        cells_of = _cells(figures, found, table)
        grid.add_row(*(cells_of[index].replace(" [", "\n[") for index in chosen))
    open_console().print(grid)
    for note in _notes(found, table):
        say(note)


def markdown(found: AblationResult, table: Table, failed: Mapping[str, str]) -> Iterator[str]:
    """The lines of table.md."""
    headings = _headings(found, table)
    yield cells(*headings)
    yield cells("---", *["---:"] * (len(headings) - 1))
    for figures in found.figures.values():
        yield cells(plain(figures.row), *_cells(figures, found, table)[1:])
    yield ""
    yield from (f"- {note}" for note in _notes(found, table))
    yield from (f"- not in it: {plain(name)}: {plain(why, 500)}" for name, why in failed.items())
    changed = {row: changes for row in table.rows if (changes := table.changes(row))}
    if changed:
        yield f"\nWhat the rows change against {plain(table.reference)}:\n"
        for row, changes in changed.items():
            yield f"- {plain(row)}: {', '.join(map(code, describe_changes(changes)))}"


def as_record(found: AblationResult, table: Table, failed: Mapping[str, str]) -> dict[str, Any]:
    """Content of table.json."""
    reference = found.figures.get(table.reference)
    metrics = found.protocol.metrics
    return {
        **{"format": FORMAT, "version": VERSION, "made_by": f"mde_dist {__version__}"},
        **{"fingerprint": found.fingerprint, "reference": table.reference, "failed": dict(failed)},
        "bootstrap": {"level": LEVEL, "resamples": RESAMPLES, "seed": SEED, "over": "images"},
        "rows": {
            row: {
                "config": as_json(next(iter(table.rows[row].values())).config),
                "changes": table.changes(row),
                "seeds": list(figures.seeds),
                "cost": figures.cost,
                "each": {metric: figures.each[:, k].tolist() for k, metric in enumerate(metrics)},
                "mean": dict(zip(metrics, figures.mean.tolist(), strict=True)),
                "interval": dict(zip(metrics, figures.ends.T.tolist(), strict=True)),
            }
            | (
                {}
                if reference is None or not figures.common(reference).seeds
                else _against(figures, reference, metrics)
            )
            for row, figures in found.figures.items()
        },
    }


def _against(figures: RowStatistics, reference: RowStatistics, metrics: tuple[str, ...]) -> dict[str, Any]:
    """Mean and both ends of the interval."""
    absolute, first = figures.difference(reference), metrics.index("abs_rel")
    return {
        "difference": dict(zip(metrics, absolute.T.tolist(), strict=True)),
        "relative_difference": {"abs_rel": figures.relative(reference, first).tolist()},
    }


def _headings(found: AblationResult, table: Table) -> list[str]:
    shown = [metric for metric in SHOWN if metric in found.protocol.metrics]
    against = [f"{metric} against {plain(table.reference, 20)}" for metric in shown[:2]]
    return ["", *shown, *against, "seeds", "training", "images/s", "parameters", "GFLOP/image"]


def _cells(figures: RowStatistics, found: AblationResult, table: Table) -> list[str]:
    metrics, ends = found.protocol.metrics, figures.ends
    shown = [metrics.index(metric) for metric in SHOWN if metric in metrics]
    numbers = [f"{figures.mean[k]:.4f} [{ends[0, k]:.4f}, {ends[1, k]:.4f}]" for k in shown]
    reference = found.figures.get(table.reference)
    against = [_compared(figures, reference, metrics[k], k) for k in shown[:2]]
    spread = [f"±{figures.each[:, shown[0]].std(ddof=1):.4f}"] if len(figures.seeds) > 1 else []
    cost = figures.cost
    return [
        *(figures.row, *numbers, *against, " ".join([str(len(figures.seeds)), *spread])),
        *(clock_time(cost["seconds"]), f"{cost['images_per_second']:.1f}", f"{cost['million_parameters']:.2f} M"),
        f"{cost['gflops']:.2f}" if "gflops" in cost else "-",
    ]


def _compared(figures: RowStatistics, reference: RowStatistics | None, metric: str, k: int) -> str:
    """The difference in words; of an error as a share of the reference's."""
    if reference is None or reference is figures or not figures.common(reference).seeds:
        return "-"
    higher = metric in HIGHER_IS_BETTER
    mean, low, high = figures.difference(reference)[:, k] if higher else figures.relative(reference, k)
    text = f"{mean:+.4f} [{low:+.4f}, {high:+.4f}]" if higher else f"{mean:+.1%} [{low:+.1%}, {high:+.1%}]"
    if low <= 0 <= high:
        return f"{text} not clear"
    return f"{text} {'better' if (low > 0) == higher else 'worse'}"


def _notes(found: AblationResult, table: Table) -> list[str]:
    config = next(iter(table.rows[table.reference].values())).config
    images = found.fingerprint["images"]
    seeds = {len(figures.seeds) for figures in found.figures.values()}
    return [
        f"protocol {found.protocol.name}, {images} images, fingerprint {short_hash(found.fingerprint)}, "
        f"mde_dist {__version__}; "
        f"each training was scored once, at its end, after {config.train.total_samples:,} samples in the first row",
        f"in brackets: {LEVEL:.0%} of {RESAMPLES:,} bootstrap resamples of the images (seed {SEED}), of the mean over "
        f"{'/'.join(map(str, sorted(seeds)))} seeds; {NOTE}; ± is the standard deviation of {SHOWN[0]} over seeds",
        "differences are over the seeds that both rows have; the intervals say nothing of the spread over seeds",
        "training: time of the steps of one training, the mean over seeds; GFLOP of forward and backward pass; trained "
        f"with {hardware_summary([t for row in table.rows.values() for t in row.values()])}",
    ]
