"""The commands on a real terminal: bars move, numbers and scores stand at its lower end, Ctrl-C leaves it as it was.

And the same through a pipe: plain lines, few of them.
"""

import re

import pytest
from commands import records, small
from terminals import Terminal
from trees import packed_yet
from warm import warm_run, without_pictures

from mde_dist.training.checkpoint import newest_checkpoint


@pytest.mark.slow
def test_a_training_is_to_be_looked_at_and_ctrl_c_leaves_terminal_and_run_whole(room_shards, tmp_path):
    given = small(
        data_shards=room_shards, train_total_samples=1200, train_checkpoint_every=1200, train_evaluate_every=36
    )
    with Terminal() as terminal:
        before = terminal.settings
        with terminal.start("train", run=tmp_path / "run", **given) as process:
            terminal.wait(lambda: "model at sample" in terminal.text, process)
            seen = counts(terminal)
            terminal.wait(lambda: len(counts(terminal) - seen) > 1, process)
            shown = terminal.text
            assert not terminal.cursor_is_shown
            terminal.press(b"\x03")
            assert terminal.end(process) == 130, terminal.all
        assert terminal.cursor_is_shown
        assert terminal.settings == before
        end = terminal.all
    assert re.search(r"^training mean everywhere +0\.\d{4} ", shown, re.MULTILINE), shown
    assert re.search(r"^the blog's ResNet18, NYU Depth v2 +0\.179 +0\.73$", shown, re.MULTILINE), shown
    assert re.search(r"^loss \d+\.\d{4}   lr \d\.\d\de-\d\d   \d+% waiting for data", shown, re.MULTILINE), shown
    bar = r"training +[━╸╺]+ +\d+/1,200 samples +[\d.,]+/s \d:\d\d:\d\d +\d:\d\d:\d\d left"
    assert re.search(f"^{bar}$", shown, re.MULTILINE), shown  # below it stands another one during an evaluation
    assert max(len(line) for line in shown.splitlines()) <= 80
    # of the display the last state is left, and nothing of those before
    assert end.count("/1,200 samples") == 1 and end.count("the blog's") == 1 and "^C" not in end
    assert re.search(r"training [^\n]* left\nstopped at sample \d+ by a signal", end), end
    stopped = newest_checkpoint(tmp_path / "run/checkpoints").state.samples_seen
    assert f"stopped at sample {stopped} by a signal" in end
    assert (tmp_path / "run/PREEMPTED").exists()
    assert records(tmp_path / "run")[-1]["samples"] <= stopped


def counts(terminal: Terminal) -> set[str]:
    """How far the training was in the frames so far."""
    return {found for frame in terminal.frames for found in re.findall(r"(\d+)/1,200 samples", frame)}


@pytest.mark.slow
def test_a_training_through_a_pipe_is_plain_lines(room_shards, tmp_path):
    options = small(data_shards=room_shards, train_total_samples=24)
    done = warm_run("train", before=without_pictures, run=tmp_path / "run", **options)
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout and "\r" not in done.stdout and "━" not in done.stdout
    line = r"samples 12/24 loss \d+\.\d{4}, lr \d\.\d\de-\d\d, [\d.]+ images/s, \d+% waiting for data, .* left"
    assert sum(text.startswith("samples ") for text in done.stdout.splitlines()) <= 2
    assert re.search(f"^{line}$", done.stdout, re.MULTILINE), done.stdout


def test_verifying_shows_its_bar_and_what_to_do_next_without_colours_where_none_are_wanted(room_shards):
    with Terminal() as terminal:
        assert terminal.run("shard", verify=room_shards, workers=1, NO_COLOR="1") == 0, terminal.all
        assert terminal.cursor_is_shown
        said = terminal.all
    assert re.match(r"verifying ━+ 38/38 samples +[\d.,]+/s 0:\d\d:\d\d\n", said), said
    # a line as long as it is, to be copied: it is the terminal that breaks it
    said = said.replace("\n", "")
    assert said.endswith(f"next: accelerate launch -m mde_dist.train --data.shards {room_shards}")
    assert not re.search(rb"\x1b\[[\d;]*[34]\d", terminal.written)


def test_a_dumb_terminal_gets_plain_lines(room_shards):
    with Terminal() as terminal:
        assert terminal.run("shard", verify=room_shards, workers=1, TERM="dumb") == 0
    # how far it is: where it is slow
    lines = [line for line in terminal.written.splitlines() if not line.startswith(b"verifying: ")]
    assert len(lines) == 2 and b"\x1b" not in terminal.written, lines


def test_ctrl_c_ends_a_packing_without_a_traceback(tmp_path):
    options = {"layout": "rooms", "samples-per-shard": 8, "workers": 2, "output": tmp_path / "shards"}
    with Terminal() as terminal:
        before = terminal.settings
        with terminal.start("shard", **options) as process:
            terminal.wait(lambda: "packing ━" in terminal.text, process)  # while its workers start
            terminal.press(b"\x03")
            assert terminal.end(process) == 130, terminal.all
        assert terminal.cursor_is_shown and terminal.settings == before, terminal.written[-500:]
        assert terminal.all.splitlines()[-1] == "interrupted", terminal.all
        assert "Traceback" not in terminal.all
    assert not packed_yet(tmp_path / "shards")
