"""What is shown of long work: counts, rates and times, as bars of any width and as plain lines that are few."""

import io

import pytest
from rich.console import Console

from mde_dist.training.display import Display
from mde_dist.training.scores import Scores
from mde_dist.utils.progress import PLAIN_SECONDS, Bar, Bars, progress_bar

SCORES = {"abs_rel": 0.25, "delta1": 0.5, "rmse": 1.0}
RECORDS = [
    {"samples": 0, "baseline": "training mean everywhere", "evaluation": "eigen", **SCORES},
    {"samples": 24, "evaluation": "eigen", **SCORES},
    {"samples": 48, "evaluation": "eigen", **SCORES | {"abs_rel": 0.3}},
]
VALUES = {"loss": 0.5, "lr": 1e-4, "images_per_second": 1.0, "data_wait": 0.01, "memory_gb": 1.5, "mfu": 0.3}


class Clock:
    """A time that goes on where it is told to."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def drawn(thing, width: int, height: int = 24) -> list[str]:
    """The lines that a terminal of this size would show."""
    console = Console(file=io.StringIO(), force_terminal=True, width=width, height=height, color_system=None)
    console.print(thing)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


# --- rates and times ---


def test_before_anything_is_done_there_is_no_rate_and_no_time_left():
    clock = Clock()
    bar = Bar("packing", "pairs", clock=clock)
    clock.now += 5  # workers start
    bar.update(0, 100)
    assert str(bar) == "packing: 0/100 pairs"
    clock.now += 5
    bar.update(0, 100)
    assert (bar.rate, bar.left, bar.elapsed) == (None, None, 10)
    clock.now += 2
    bar.update(4, 100)  # what precedes the first pairs does not count
    assert str(bar) == "packing: 4/100 pairs, 2.0 pairs/s, 0:00:48 left"
    assert (bar.rate, bar.left, bar.elapsed) == (2, 48, 12)


def test_the_rate_is_that_of_late():
    clock = Clock()
    bar = Bar("packing", "pairs", clock=clock)
    for done in range(1000):  # 1 a second, and then 10
        clock.now += 1 if done < 500 else 0.1
        bar.update(done, 10_000)
    assert bar.rate == pytest.approx(10)
    assert bar.left == pytest.approx((10_000 - 999) / 10)


def test_work_that_others_had_done_before_is_not_counted_into_the_rate():
    clock = Clock()
    bar = Bar("training", "samples", 5000, 6000, clock)
    for done in (5010, 5020):
        clock.now += 1
        bar.update(done, 6000)
    assert bar.rate == 10


def test_a_rest_changes_no_rate():
    clock = Clock()
    bar = Bar("training", "samples", 0, 100, clock)
    for done in (10, 20):
        clock.now += 1
        bar.update(done, 100)
    bar.pause()
    clock.now += 500
    assert bar.left == 8
    for done in (30, 40):
        clock.now += 2
        bar.update(done, 100)
    assert bar.rate == 5


# --- plain lines ---


@pytest.mark.parametrize(("seconds", "lines"), [(0.01, 0), (1.0, 19), (PLAIN_SECONDS * 7, 99)], ids=str)
def test_without_a_terminal_lines_are_few_and_none_where_it_is_quick(capsys, seconds, lines):
    clock = Clock()
    with progress_bar(Console(), "verifying", "samples", clock) as progress:
        for done in range(100):
            progress(done, 100)
            clock.now += seconds
    said = capsys.readouterr().out.splitlines()
    assert len(said) == lines
    assert all(line.startswith("verifying: ") and line.endswith(" left") for line in said)


def test_what_failed_is_not_hidden(capsys):
    with pytest.raises(ZeroDivisionError), progress_bar(Console(), "verifying", "samples") as progress:
        progress(1 // 0, 1)


# --- drawings ---


def test_a_bar_says_less_where_there_is_less_room():
    clock = Clock()
    bar = Bar("packing", "pairs", clock=clock)
    for done in (0, 1000, 2000):
        bar.update(done, 48_000)
        clock.now += 10
    words = {80: "100/s 0:00:30 0:07:40 left", 60: "100/s 0:07:40 left", 52: "100/s", 40: ""}  # by columns
    for columns, more in words.items():
        (line,) = drawn(Bars(bar), columns)
        assert line.split()[0] == "packing"
        assert line.split("2,000/48,000 pairs")[1].split() == more.split()


def test_a_bar_does_not_change_its_length_while_it_moves():
    clock = Clock()
    bar = Bar("packing", "pairs", total=1000, clock=clock)
    places = set()
    for done in (0, 9, 99, 999):
        clock.now += 3
        bar.update(done, 1000)
        (line,) = drawn(Bars(bar), 80)
        places.add((line.index("/1,000 pairs"), line.index("0:00:")))
    assert len(places) == 1


@pytest.mark.parametrize("width", [120, 80, 60, 40, 20])
def test_a_display_fits(width):
    bar, display_bar = Bar("evaluating", "images", 3, 654), Bar("training", "samples", 24, 48_000)
    display = Display(display_bar, Scores(RECORDS))
    display.values, display.task = VALUES | {"slowest_rank": 3, "slower": 0.2}, bar
    lines = drawn(display, width)
    assert max(map(len, lines)) <= width
    assert lines[-2].startswith("tra") and lines[-1].startswith("eva")
    said = " ".join(" ".join(lines).split())
    for part in ("loss 0.5000", "lr 1.00e-04", "1% waiting for data", "MFU 30.0%", "1.5 GB"):
        assert part in said


def test_the_table_has_last_and_best_baselines_and_the_blog_and_leaves_where_it_is_too_high():
    display = Display(Bar("training", "samples", 48, 96), Scores(RECORDS))
    lines = [line.split() for line in drawn(display, 80)]
    assert [line[-3:] for line in lines if line][:5] == [
        ["abs_rel", "delta1", "rmse"],
        ["0.3000", "0.5000", "1.0000"],
        ["0.2500", "0.5000", "1.0000"],
        ["0.2500", "0.5000", "1.0000"],
        ["v2", "0.179", "0.73"],
    ]
    assert "abs_rel" not in " ".join(drawn(display, 80, height=12))
    display.finished = True  # in the midst of the training: the table is the last word on it
    assert "abs_rel" in " ".join(drawn(display, 80))
    display.bar.update(96, 96)  # at its end it follows once more, in the summary
    assert "abs_rel" not in " ".join(drawn(display, 80))
