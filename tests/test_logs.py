"""A rank's output in its file; the terminal as before."""

import subprocess
import sys
import textwrap

import pytest

from mde_dist.distributed.rank_log import log_path, redirect_to_rank_log
from mde_dist.utils.errors import UserError


def run(code: str, *arguments) -> subprocess.CompletedProcess[str]:
    head = (
        "import os, sys\nfrom pathlib import Path\n"
        "from mde_dist.distributed.rank_log import emergency_print, redirect_to_rank_log\n"
    )
    line = [sys.executable, "-c", head + textwrap.dedent(code), *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, timeout=60)


def test_rank_0_shows_and_notes_what_it_says(tmp_path, capsys):
    with redirect_to_rank_log(tmp_path, 0, 2):
        print("hello")
        print("careful", file=sys.stderr)
    print("after")
    assert capsys.readouterr() == ("hello\nafter\n", "careful\n")
    first, *rest = log_path(tmp_path, 0).read_text().splitlines()
    assert ", rank 0 of 2, process " in first
    assert rest == ["hello", "careful"]


def test_other_ranks_note_only_and_native_code_too(tmp_path):
    done = run(
        """
        with redirect_to_rank_log(Path(sys.argv[1]), 1, 2):
            print("hello")
            os.write(2, b"from native code\\n")
            emergency_print("last words", terminal=True)
        print("after", flush=True)
        """,
        tmp_path,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "after\n", "last words\n")
    assert log_path(tmp_path, 1).read_text().splitlines()[1:] == ["hello", "from native code", "last words"]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_mistake_of_the_user_is_noted_and_left_to_the_terminal(tmp_path, rank):
    code = """
        from mde_dist.utils.errors import UserError
        try:
            with redirect_to_rank_log(Path(sys.argv[1]), int(sys.argv[2]), 2):
                raise UserError("no such thing")
        except UserError as error:
            print(error, file=sys.stderr)
        """
    done = run(code, tmp_path, rank)
    assert done.stderr == "no such thing\n"
    assert log_path(tmp_path, rank).read_text().splitlines()[1:] == ["error: no such thing"]


def test_the_traceback_of_another_rank_is_in_its_log_alone(tmp_path):
    code = "with redirect_to_rank_log(Path(sys.argv[1]), int(sys.argv[2]), 2): 1 / 0"
    done = run(code, tmp_path, 1)
    assert (done.returncode, done.stderr) == (1, "")
    assert log_path(tmp_path, 1).read_text().count("ZeroDivisionError") == 1
    done = run(code, tmp_path, 0)
    assert done.stderr.count("ZeroDivisionError") == 1
    assert log_path(tmp_path, 0).read_text().count("ZeroDivisionError") == 1


def test_a_crash_in_native_code_says_where(tmp_path):
    done = run("with redirect_to_rank_log(Path(sys.argv[1]), 1, 2): os.abort()", tmp_path)
    assert done.returncode == -6
    assert "Fatal Python error: Aborted" in log_path(tmp_path, 1).read_text()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_log_on_a_full_disk_is_done_without(tmp_path, rank):
    (tmp_path / "logs").mkdir()
    log_path(tmp_path, rank).symlink_to("/dev/full")
    done = run(
        """
        with redirect_to_rank_log(Path(sys.argv[1]), int(sys.argv[2]), 2):
            print("x" * 100_000)
        print("after")
        """,
        tmp_path,
        rank,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("after\n")


def test_a_log_that_cannot_be_opened_is_one_line(tmp_path):
    (tmp_path / "logs").write_text("")
    with pytest.raises(UserError, match="cannot be written"), redirect_to_rank_log(tmp_path, 0, 1):
        pass


def test_last_words_on_a_terminal_stand_below_what_is_drawn_and_give_the_cursor_back(tmp_path):
    done = run(
        """
        os.environ["TERM"] = "xterm"
        screen, terminal = os.openpty()
        os.dup2(terminal, 2)
        with redirect_to_rank_log(Path(sys.argv[1]), 0, 1):
            emergency_print("last words", terminal=True)
        said = b""
        while not said.endswith(b"words\\r\\n"):  # a terminal passes on what it got in pieces
            said += os.read(screen, 1000)
        os.write(1, said)
        """,
        tmp_path,
    )
    assert done.stdout == "\n\x1b[?25hlast words\n", done.stderr  # subprocess reads \r\n as a line's end
    assert log_path(tmp_path, 0).read_text().splitlines()[1:] == ["last words"]
