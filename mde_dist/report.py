"""Run directories -> one HTML page that opens from disk, and its curves and panels as PNG files.

    python -m mde_dist.report --run DIR
    python -m mde_dist.report --run DIR DIR … --output FILE.html

One run's page is RUN/report.html, beside RUN/curves.png, speed.png and panels.png; several runs, side by side, are
report.html in the current directory. With --output the pictures lie beside FILE.html, and are named after it.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from mde_dist.utils.cli import RUN_DIR, parse, run_command
from mde_dist.utils.console import say


@dataclass(frozen=True)
class ReportCommand:
    """Show a run, or several side by side, on one HTML page, with the curves and panels as PNG files."""

    run: Annotated[tuple[Path, ...], RUN_DIR]
    """Run directories."""
    output: Path | None = None
    """The page; by default RUN/report.html, or report.html here where several runs are named."""


def main(argv: list[str]) -> None:
    command = parse(ReportCommand, argv, "python -m mde_dist.report")
    # imported here: torch takes seconds and hundreds of megabytes, which --help and a wrong option do without
    from mde_dist.reporting.history import read_runs
    from mde_dist.reporting.report import scored_lines, write_report
    from mde_dist.training.scores import show_scores

    runs = read_runs(command.run)
    made = write_report(runs, command.output)
    for run in runs:
        show_scores(run.path, scored_lines(run))
    for path in made:
        say(f"made: {path}")


if __name__ == "__main__":
    run_command(main)
