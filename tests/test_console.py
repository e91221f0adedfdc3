"""Names of files, runs and rows reach the terminal as they are: none of them is markup, or a command to it."""

import ast
import io
import os
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from rich.live import Live
from rich.table import Table
from trees import folder

import mde_dist
from mde_dist import shard
from mde_dist.evaluation.metrics import PROTOCOLS, SUFFICIENT_STATISTICS
from mde_dist.tools.ablation import report
from mde_dist.tools.ablation.numbers import AblationResult, figures_of
from mde_dist.tools.ablation.table import read_table
from mde_dist.training.scores import show_scores
from mde_dist.utils.cli import run_command
from mde_dist.utils.console import open_console, printable, say
from mde_dist.utils.errors import UserError
from mde_dist.utils.visualization import figure_file, literal

MARKUP = ["[/b]", "[red]x", "[link=https://a.example]b", ":smile:", "a[0]"]
COMMANDS = [
    "\x1b[2J",
    "\x1b]0;title\x07",
    "a\rb",
    "\x9b31m",
    "\u202egnp.exe",
    "a\nerror: b",
    "two  blanks",
    "\udcff",
    "a\x08\x08",
]


def drawn(table: Table) -> str:
    console = open_console(io.StringIO())
    console.width = 400
    console.print(table)
    return console.file.getvalue()


def harmless(text: str) -> bool:
    return all(letter == "\n" or unicodedata.category(letter) not in ("Cc", "Cs", "Cf", "Zl", "Zp") for letter in text)


@pytest.mark.parametrize("name", MARKUP)
def test_what_looks_like_markup_is_a_name(name, capsys):
    table = Table(name, "b", title=f"{name} title")
    table.add_row(f"{name} cell", "c")
    shown = drawn(table)
    assert f"{name} title" in shown and f"{name} cell" in shown and shown.count(name) == 3
    say(f"made: {name}")
    assert capsys.readouterr().out == f"made: {name}\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_what_a_terminal_would_obey_is_written_out(name, capsys):
    table = Table(name, title=name)
    table.add_row(name)
    assert harmless(drawn(table))
    say(f"made: {name}", f"and {name}")
    said = capsys.readouterr().out
    assert harmless(said) and said.count("\n") == 2
    assert printable(name) in said and printable(name).isascii()


def test_bytes_that_are_no_text_are_written_out_as_bytes():
    assert printable(os.fsdecode(b"caf\xe9.png")) == r"caf\xe9.png"


def test_names_in_other_scripts_stay():
    for name in ("深度", "глубина", "عمق", "e\u0301", "👩‍🔬", "a b\u3000c"):
        assert printable(name) == name


def test_what_is_said_above_a_live_display_is_as_harmless(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal
    console = open_console(io.StringIO())
    monkeypatch.setattr(sys, "stdout", console.file)
    with Live(Table("[/b]"), console=console, auto_refresh=False, redirect_stdout=True):
        say("\x1b]52;c;AAAA\x07[/b]")
    assert "\\x1b]52;c;AAAA\\x07[/b]" in console.file.getvalue() and "\x1b]52" not in console.file.getvalue()


def test_an_error_is_one_line_whatever_it_names(monkeypatch, capsys):
    def fail(argv: list[str]) -> None:
        raise UserError(f"{argv[0]}: no such file")

    for name in MARKUP + COMMANDS:
        monkeypatch.setattr(sys, "argv", ["x", name])
        with pytest.raises(SystemExit) as stop:
            run_command(fail)
        said = capsys.readouterr().err
        assert stop.value.code == 2 and harmless(said) and said.count("\n") == 1, said
        assert f"error: {printable(name)}: no such file\n" == said


def test_a_packing_into_a_folder_with_such_a_name_ends_well(tmp_path, capsys):
    source, output = folder(tmp_path / "[red]", count=3), tmp_path / "o[/b]\x1b[2J"
    shard.main(["--source", str(source), "--output", str(output), "--workers", "1"])
    with pytest.raises(SystemExit) as stop:
        shard.main(["--verify", str(output), "--workers", "1"])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    assert "o[/b]\\x1b[2J" in said and "[red]: layout folder" in said and harmless(said)


def test_rows_of_an_ablation_and_lines_of_metrics_are_shown_as_they_are_named(tmp_path, capsys):
    (tmp_path / "table.toml").write_text('[rows."[/b] :smile: \\u001b[31m"]\n[rows."[red]b"]\noptim.ema_samples = 0\n')
    table = read_table(tmp_path / "table.toml", tmp_path / "out")
    protocol, rows = PROTOCOLS["eigen"], np.full((3, 1 + len(SUFFICIENT_STATISTICS)), 0.5)
    cost = {"seconds": 1.0, "images_per_second": 1.0, "million_parameters": 1.0}
    figures = {row: figures_of(row, {0: rows}, protocol, cost) for row in table.rows}
    mark = {"protocol": {}, "images": 3, "ground_truth": "", "version": ""}
    report.show(AblationResult(protocol, mark, figures), table)
    lines = [{"baseline": name, "abs_rel": 0.5} for name in MARKUP + COMMANDS]
    show_scores(Path("[/b]"), [*lines, {"evaluation": "[/i]", "images": 3, "samples": 1, "abs_rel": 0.5}])
    said = capsys.readouterr().out
    assert harmless(said) and ":smile:" in said and "[red]b" in said and all(name in said for name in MARKUP)


@pytest.mark.parametrize("name", [r"a $\nothing$ b", "$5 and $6", "50$", "\x1b$"])
def test_a_picture_shows_a_name_letter_by_letter(name, tmp_path):
    drawings = []
    for options in ({"s": literal(name)}, {"s": printable(name), "parse_math": False}):
        with figure_file(tmp_path / "x.png", (3, 1), 80) as figure:  # in which a formula that is none raises
            figure.text(0, 0.5, **options)
        drawings.append((tmp_path / "x.png").read_bytes())
    assert drawings[0] == drawings[1]


def test_a_picture_of_a_name_that_the_font_lacks_is_drawn_in_silence(tmp_path, recwarn):
    with figure_file(tmp_path / "x.png", (3, 1), 80) as figure:
        figure.text(0, 0.5, literal("客厅"))
    assert not recwarn.list


def test_nothing_writes_to_the_terminal_past_these_functions():
    """All of the package prints with `say` and draws on `open_console`; the exceptions write for programs."""
    for_programs = {"utils/console.py", "config.py", "bench.py"}
    package, found = Path(mde_dist.__file__).parent, set()
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            called = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""
            if called == "Console" or (called == "print" and node.args):
                found.add(path.relative_to(package).as_posix())
            assert not (isinstance(node, ast.Attribute) and node.attr == "from_markup"), path
    assert found == for_programs
