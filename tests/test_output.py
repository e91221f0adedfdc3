"""Output that is lost, or a terminal that lacks letters, ends no command."""

import ast
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from commands import environment, small
from faults import patch, together
from terminals import Terminal
from warm import warm_run, without_pictures

import mde_dist
from mde_dist.training.checkpoint import newest_checkpoint

LOSSES = ("its reader", "the disk", "the terminal")


def lose_output(how: str, handles: tuple[int, ...] = (1, 2)) -> None:
    """A `before`: what goes to these handles is lost, because something is gone or full."""
    if how == "the disk":
        lost = os.open("/dev/full", os.O_WRONLY)
    else:
        other, lost = os.pipe() if how == "its reader" else os.openpty()
        os.close(other)
    for handle in handles:
        os.dup2(lost, handle)


@pytest.mark.slow
@pytest.mark.parametrize("how", LOSSES)
def test_a_training_outlives_its_output(room_shards, tmp_path, how):
    before = partial(together, without_pictures, partial(lose_output, how))
    done = warm_run(
        "train", before=before, run=tmp_path / "run", **small(data_shards=room_shards, train_total_samples=12)
    )
    log = (tmp_path / "run/logs/rank-0.log").read_text()
    assert done.returncode == 0, log
    assert (tmp_path / "run/model.safetensors").is_file()
    assert log.splitlines()[-1].startswith("      python -m mde_dist.export")  # it has what the terminal lacks


@pytest.mark.slow
@pytest.mark.parametrize("ignored", [False, True], ids=["", "nohup"])
def test_a_closed_window_leaves_a_checkpoint_or_under_nohup_the_run(room_shards, tmp_path, ignored):
    given, directory = small(data_shards=room_shards, train_total_samples=48), tmp_path / "run"
    before = partial(together, without_pictures, *[partial(signal.signal, signal.SIGHUP, signal.SIG_IGN)] * ignored)
    terminal = Terminal()
    with terminal.start("train", before=before, run=directory, **given) as process:
        terminal.wait(lambda: (directory / "checkpoints/step-00000001").is_dir(), process)
        terminal.__exit__()
        assert process.wait(60) == (0 if ignored else 128 + signal.SIGHUP), process.output()
    assert (directory / "model.safetensors").is_file() == ignored
    assert (directory / "PREEMPTED").is_file() != ignored
    assert newest_checkpoint(directory / "checkpoints").state.samples_seen >= 12
    assert "Traceback" not in (directory / "logs/rank-0.log").read_text()


@pytest.mark.parametrize(("how", "code"), list(zip(LOSSES, (0, 2, 0), strict=True)))
def test_a_command_whose_output_is_lost_says_so_where_somebody_may_want_it(how, code):
    done = warm_run("config", before=partial(lose_output, how, (1,)))
    assert done.returncode == code
    assert [line[:6] for line in done.stderr.splitlines()] == ["error:"] * (code > 0)


def test_an_error_that_nobody_hears_keeps_its_exit_code():
    assert warm_run("config", "--train.total-samples", "-1", before=partial(lose_output, "its reader")).returncode == 2


def test_help_goes_into_a_pipe_that_closes_early():
    done = warm_run("train", "--help", before=partial(lose_output, "its reader", (1,)))
    assert (done.returncode, done.stderr) == (0, "")


def test_a_command_started_without_outputs_does_not_print_into_its_files(tmp_path):
    """A file would be opened as handle 1, and all that is printed would go there."""
    target = tmp_path / "printed"
    code = (
        "import os; from mde_dist.utils.cli import run_command\n"
        f"run_command(lambda argv: [open({str(target)!r}, 'w'), print('text', flush=True), os.write(1, b'native')])\n"
    )
    pid = os.posix_spawn(
        sys.executable,
        [sys.executable, "-c", code],
        os.environ,
        file_actions=[(os.POSIX_SPAWN_CLOSE, 1), (os.POSIX_SPAWN_CLOSE, 2)],
    )
    assert os.waitpid(pid, 0)[1] == 0
    assert target.read_bytes() == b""


DRAW = """
import sys
from pathlib import Path
import numpy as np
from rich.console import Console
from rich.table import Table
from mde_dist.utils.cli import run_command
from mde_dist.reporting.axes import linear
from mde_dist.utils.visualization import Thumbnail, draw_thumbnails, own_style

def main(argv):
    image = np.arange(60, dtype=np.uint8).reshape(4, 5, 3)
    draw_thumbnails(Path(argv[0]), [Thumbnail("a pair", image, np.arange(20.0).reshape(4, 5))], "pairs, …")
    with own_style():
        print("…", [text for _, text in linear(0.1, 9.7).ticks])
    table = Table("ü")
    table.add_row("…")
    Console().print(table)

run_command(main)
"""


def test_pictures_and_words_come_out_whatever_notebooks_locale_and_configuration_say(tmp_path):
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\nfont.size: 40\naxes.autolimit_mode: round_numbers\n")
    odd = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "MPLBACKEND": "module://no.such_backend"}
    script, drawn = tmp_path / "draw.py", []
    script.write_text(DRAW, "utf-8")
    for name, env, cwd in (("plain.png", {}, None), ("odd ü.png", odd, tmp_path)):
        line = [sys.executable, str(script), str(tmp_path / name)]
        done = subprocess.run(line, env=environment(**env), cwd=cwd, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr
        drawn.append((tmp_path / name).read_bytes())
        assert b"['2', '4', '6', '8']" in done.stdout
    assert drawn[0] == drawn[1]


@pytest.mark.slow
def test_what_fails_after_the_weights_are_published_is_a_warning(room_shards, tmp_path):
    before = partial(patch, "pictures", raising)
    options = small(data_shards=room_shards, train_total_samples=12)
    done = warm_run("train", before=before, run=tmp_path / "run", **options)
    assert done.returncode == 0, done.stderr
    (said,) = [line for line in done.stdout.splitlines() if line.startswith("warning")]
    assert "ZeroDivisionError" in said
    assert "README.md" in done.stdout and "next: " in done.stdout


def raising(do_it: object, arguments: object) -> None:
    raise ZeroDivisionError("in two\nlines")


def test_text_files_are_of_utf_8_in_every_locale():
    """No file of the package is opened as text without saying so."""
    found = []
    for path in sorted(Path(mde_dist.__file__).parent.rglob("*.py")):
        for call in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(call, ast.Call) and opens_text(call) and not names_encoding(call):
                found.append(f"{path.name}:{call.lineno}: {ast.unparse(call)}")
    assert not found


def opens_text(call: ast.Call) -> bool:
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    if name in ("read_text", "write_text") or any(word.arg in ("text", "universal_newlines") for word in call.keywords):
        return name != "print"
    if name not in ("open", "fdopen") or ast.unparse(call.func) in ("Image.open", "av.open", "tarfile.open", "os.open"):
        return False
    own = ast.unparse(call.func) in ("open", "os.fdopen")  # or a method of a path, which is not among its arguments
    modes = [*call.args[own : own + 1], *(word.value for word in call.keywords if word.arg == "mode")]
    return bool(modes or own) and not any("b" in str(getattr(mode, "value", "b")) for mode in modes)


def names_encoding(call: ast.Call) -> bool:
    place = {"read_text": 0, "write_text": 1}.get(getattr(call.func, "attr", ""), 3)
    return len(call.args) > place or any(word.arg in ("encoding", None) for word in call.keywords)
