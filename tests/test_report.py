"""What a report reads of runs, and what it makes of it, without a browser: see test_page.py for the page itself."""

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from made_runs import BEGAN, LOGGED, HeldOut, held_out, make_run, untrained
from PIL import Image

from mde_dist import report
from mde_dist.reporting.axes import linear, logarithmic
from mde_dist.reporting.curves import MOST_POINTS, Chart, downsample, score_charts, speed_charts, training_charts
from mde_dist.reporting.extremes import extremes, ranked
from mde_dist.reporting.history import Run, read_run, read_runs, short_names
from mde_dist.reporting.pages import collect, groups_of, render
from mde_dist.reporting.panels import MOST_TIMES, films, times_of
from mde_dist.reporting.plots import plot
from mde_dist.reporting.report import write_report
from mde_dist.reporting.tables import differing, headline, image_table, run_info, scene_table
from mde_dist.reporting.where import breakdown_of
from mde_dist.utils.errors import UserError
from mde_dist.utils.visualization import Panel, colorize, colorize_error, draw_panels


@pytest.fixture(scope="module")
def images(room_shards) -> HeldOut:
    return held_out(room_shards)


@pytest.fixture(scope="module")
def made(images, scratch) -> Path:
    """Two runs of one history, one of which was stopped and went on three times."""
    folder = scratch("runs")
    weights = untrained(folder / "weights.safetensors", images)
    make_run(folder / "calm", images, weights=weights)
    make_run(folder / "restarted", images, starts=(0, 336, 600, 960), weights=weights)
    return folder


@pytest.fixture
def calm(made, tmp_path) -> Path:
    """A copy of a run, to be broken."""
    return shutil.copytree(made / "calm", tmp_path / "calm", copy_function=lambda *a: Path(a[1]).hardlink_to(a[0]))


def rewrite(path: Path, text: str) -> None:
    path.unlink()  # it may be a link to another's
    path.write_text(text)


def lines_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def write_lines(run: Path, lines: list[dict]) -> None:
    rewrite(run / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))


def points(charts: list[Chart]) -> dict[tuple[str, str], list[list[tuple[float, float]]]]:
    """Per title and axis of charts of one run: its stretches."""
    return {(c.title, c.over): [[(p.x, p.y) for p in stretch] for stretch in c.curves[0].stretches] for c in charts}


def all_charts(run: Run) -> list[Chart]:
    return [*score_charts([(0, run)], "eigen"), *training_charts([(0, run)]), *speed_charts([(0, run)])]


def page_of(runs: list[Path]) -> tuple[list[str], str]:
    """What a page leaves out, and the page."""
    found = collect(read_runs(runs))
    return found.missing, render(found, "make")


# --- curves ---


@pytest.mark.parametrize(
    ("loss", "unit"),
    [
        ({}, "m²"),  # a config from before there was a choice
        ({"kind": "mse"}, "m²"),
        ({"kind": "l1"}, "m"),
        ({"kind": "berhu"}, "m"),
        ({"kind": "log_l1"}, ""),
        ({"kind": "silog"}, ""),
        ({"kind": "l1", "gradient_weight": 0.5}, ""),
        ({"kind": "mse", "gradient_weight": 0.0}, "m²"),
    ],
)
def test_a_loss_has_the_unit_of_its_kind(made, loss, unit):
    run = read_run(made / "calm", "calm")
    config = {**run.config, **{f"loss.{name}": value for name, value in loss.items()}}
    (chart,) = (c for c in training_charts([(0, replace(run, config=config))]) if c.title.startswith("Training loss"))
    assert chart.unit == unit
    said = plot(chart).summary
    assert f" {unit} at" in said if unit else not re.search(r"\d m²? at", said)


def test_losses_of_two_kinds_share_no_axis(made):
    one, other = read_runs([made / "calm", made / "restarted"])
    other = replace(other, config={**other.config, "loss.kind": "silog"})
    same = training_charts([(0, one), (1, one)])
    differ = training_charts([(0, one), (1, other)])
    assert (same[0].unit, [curve.run for curve in same[0].curves]) == ("m²", [0, 1])
    losses = [c for c in differ if c.title.startswith("Training loss")]
    assert [(c.unit, [curve.run for curve in c.curves]) for c in losses] == [("m²", [0]), ("", [1])]
    assert len({c.title for c in losses}) == 2
    assert [c.title for c in differ if c not in losses] == [c.title for c in same[1:]]


def test_three_restarts_leave_no_gap_and_no_point_twice(made):
    calm, restarted = (read_run(made / name, name) for name in ("calm", "restarted"))
    charts, undisturbed = points(all_charts(restarted)), points(all_charts(calm))
    assert {over for _, over in charts} == {"samples", "time"}
    assert {title for title, over in charts if over == "samples"} >= {"abs_rel", "delta1", "silog", "Training loss"}
    for (title, over), stretches in charts.items():
        if over == "samples":
            assert len(stretches) == 1, f"{title} is broken"
            assert stretches == undisturbed[title, over]
        else:
            assert [len(stretch) for stretch in stretches] == [14, 11, 15, 10]
            xs = [x for stretch in stretches for x, _ in stretch]
            assert xs == sorted(set(xs))
            assert max(xs) < 150, "the three hours between the starts are in it"


def test_restarts_are_marked_where_they_were(made):
    run = read_run(made / "restarted", "restarted")
    over_samples, over_time = (
        next(c for c in all_charts(run) if c.over == over and c.marks) for over in ("samples", "time")
    )
    assert [mark.x for mark in over_samples.marks] == [336, 600, 960]
    # no time passes on the clock between two starts: each begins where the one before wrote its last line
    assert [mark.x for mark in over_time.marks] == pytest.approx([33.6, 60.0, 96.0])
    assert "went on at sample 600, 1 h after the last line before" in over_time.marks[1].text
    assert not any(chart.marks for chart in all_charts(read_run(made / "calm", "calm")))


def test_a_start_that_nothing_came_of_is_told_but_not_marked(calm):
    lines = lines_of(calm)
    again = next(line for line in lines if "start" in line)
    write_lines(calm, [*lines, {**again, "samples": 1200, "start": {**again["start"], "time": BEGAN + 9000}}])
    run = read_run(calm, "calm")
    assert not any(chart.marks for chart in all_charts(run))
    assert run_info(run)["starts"] == "2" and "2 min in training" in headline(run)


def test_lines_that_were_written_twice_count_once(calm):
    lines = lines_of(calm)
    again = [line | {"loss": 9.0} for line in lines if line.get("samples") == 2 * LOGGED and "loss" in line]
    write_lines(calm, lines + again)
    run = read_run(calm, "calm")
    assert len(run.steps) == 1200 // LOGGED
    assert run.steps[1].values["loss"] == 9.0


def test_values_that_are_not_finite_are_holes(calm):
    lines = lines_of(calm)
    bad = {5 * LOGGED, 6 * LOGGED, 9 * LOGGED}
    for line in lines:
        if "loss" in line and line["samples"] in bad:
            line["loss"] = None
    write_lines(calm, lines)
    loss = next(chart for chart in training_charts([(0, read_run(calm, "calm"))]) if chart.title == "Training loss")
    assert [len(stretch) for stretch in loss.curves[0].stretches] == [4, 2, 41]
    assert loss.curves[0].lost == 3
    assert "3 values were not finite" in plot(loss).summary


def test_a_long_run_is_thinned_and_nothing_that_stood_out_is_lost():
    values = np.sin(np.arange(100_000) / 9000) + 2
    values[70_000], values[70_001] = 50, -50
    (stretch,) = downsample([list(zip(range(100_000), values, strict=True))])
    assert MOST_POINTS / 2 < len(stretch) <= MOST_POINTS
    assert max(point.high for point in stretch) == 50 and min(point.low for point in stretch) == -50
    xs = [point.x for point in stretch]
    assert xs == sorted(xs)
    ordinary = [point for point in stretch if point.high < 10]
    assert all(point.y == pytest.approx(math.sin(point.x / 9000) + 2, abs=1e-3) for point in ordinary)


def test_the_best_evaluation_is_marked_however_many_there_are(made):
    run = read_run(made / "calm", "calm")
    many = [replace(run.evaluations[0], samples=n, values={"abs_rel": abs(n - 70) + 1.0}) for n in range(100)]
    for lines, dots in ((run.evaluations, 5), (many, 1)):
        (chart,) = [c for c in score_charts([(0, replace(run, evaluations=lines))], "eigen") if c.title == "abs_rel"]
        (stroke,) = plot(chart).strokes
        assert len(stroke.dots) == dots
        assert sum(dot.best for dot in stroke.dots) == 1
    assert "abs_rel 1.0000 after 70 samples" in stroke.dots[0].text


def test_a_short_run_is_drawn_as_it_is_and_groups_stay_apart():
    pairs = [(1.0, 2.0), (2.0, 3.0), (3.0, None), (4.0, 5.0)]
    stretches = downsample([pairs, [(5.0, 1.0)], [(6.0, None)]])
    assert [[(p.x, p.y, p.low, p.high) for p in stretch] for stretch in stretches] == [
        [(1, 2, 2, 2), (2, 3, 3, 3)],
        [(4, 5, 5, 5)],
        [(5, 1, 1, 1)],
    ]


@pytest.mark.parametrize(
    ("low", "high", "labels"),
    [
        (0, 2400, ["0", "500", "1k", "1.5k", "2k"]),
        (0, 1_300_000, ["0", "500k", "1M"]),
        (0, 0.0006, ["0", "2e−4", "4e−4", "6e−4"]),
        (-0.2, 0.3, ["−0.2", "−0.1", "0", "0.1", "0.2", "0.3"]),
        (5, 5, ["4.6", "4.8", "5", "5.2", "5.4"]),
    ],
    ids=["samples", "millions", "learning rates", "both signs", "all the same"],
)
def test_axes_have_round_numbers(low, high, labels):
    axis = linear(low, high)
    assert [text for _, text in axis.ticks] == labels
    assert all(axis.low <= value <= axis.high * (1 + 1e-9) for value, _ in axis.ticks)
    assert axis.share(axis.low) == 0 and axis.share(axis.high) == 1


def test_a_logarithmic_axis_has_few_ticks_whatever_it_spans():
    for low, high in ((0.3, 4.0), (0.02, 900.0), (1e-6, 1e6)):
        axis = logarithmic(low, high)
        assert 2 <= len(axis.ticks) <= 7
        assert axis.share((low * high) ** 0.5) == pytest.approx(0.5)


# --- what is read ---


def test_a_run_in_one_line_and_in_facts(made):
    run = read_run(made / "restarted", "restarted")
    assert headline(run) == "finished at sample 1,200 · 21 September 2026 14:13 UTC · 2 min in training · 2 × cpu, fp32"
    known = run_info(run)
    assert known["starts"] == "4"
    assert known["devices"] == "2 × cpu, fp32 on node1, node2, node3, node4"
    assert run.record["ground_truth"]["manifest"][:12] in known["held out"]
    assert "eigen protocol, 8 images, fingerprint " in known["evaluation"]


def test_an_old_run_has_no_times_no_panels_and_no_records(calm):
    lines = [{k: v for k, v in line.items() if k != "time"} for line in lines_of(calm) if "start" not in line]
    write_lines(calm, lines)
    shutil.rmtree(calm / "panels")
    shutil.rmtree(calm / "evaluations")
    said: list[str] = []
    made = write_report(read_runs([calm]), tell=said.append)
    assert [path.name for path in made] == ["report.html", "curves.png", "speed.png"]
    assert len(said) == 3 and "an older version" in said[2] and "last.json is not there" in said[0]
    run = read_run(calm, "calm")
    assert run.starts == [] and run.record is None and run.snapshots is None
    assert {chart.over for chart in all_charts(run)} == {"samples"}


def test_a_run_that_just_began(calm):
    lines = lines_of(calm)
    (calm / "model.safetensors").unlink()
    for keep in (0, 1, 4):  # nothing, its start, its start with baselines and a step
        write_lines(calm, lines[:keep])
        missing, page = page_of([calm])
        assert "not evaluated yet" in "".join(missing)
        assert "Nothing was evaluated yet" in page
    assert "not finished: at sample 24 of 1,200" in page


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("config.toml", "this is = = no TOML"),
        ("evaluations/last.json", '{"format": "mde_dist.evaluation"'),
        ("evaluations/last.json", "[" * 100_000),
        ("panels/keys.json", '["1", "2", "3", "4", "5"]'),
        ("panels/truth.png", "no picture"),
        ("metrics.jsonl", '{"samples": "many", "loss": 1}\n[]\n3\n{"samples": 24, "loss": "x", "lr": NaN}\n'),
    ],
    ids=["config", "record cut off", "record nested", "panels of another number", "panels no picture", "metrics"],
)
def test_damaged_files_are_noted_and_the_rest_is_shown(calm, file, text):
    rewrite(calm / file, text)
    missing, page = page_of([calm])
    assert page.rstrip().endswith("</html>")
    assert missing and all("\n" not in line for line in missing)


def test_where_the_errors_are_is_left_out_where_it_is_not_whole(made):
    run = read_run(made / "calm", "calm")
    assert breakdown_of(run) is not None
    for wrong in ({}, {"eigen": 3}, {"eigen": {"distance": {"edges": [0, 1]}, "position": {"abs_rel": [[1]]}}}):
        assert breakdown_of(replace(run, record={**run.record, "where": wrong})) is None


@pytest.mark.parametrize(
    "arguments", [[], ["/nowhere"], ["EMPTY"], ["RUN", "RUN"], ["RUN", "--output", "/no/where.html"]]
)
def test_mistakes_are_one_line(made, tmp_path, arguments):
    given = [a.replace("EMPTY", str(tmp_path)).replace("RUN", str(made / "calm")) for a in arguments]
    with pytest.raises(UserError) as error:
        report.main(["--run", *given])
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


# --- pictures ---


def test_the_page_and_its_pictures_lie_in_the_run_and_have_content(calm, capsys):
    report.main(["--run", str(calm)])
    said = capsys.readouterr().out
    for name in ("report.html", "curves.png", "speed.png", "panels.png"):
        assert f"made: {calm / name}" in said
    assert "model at sample 1200" in said and "training mean everywhere" in said
    for name in ("curves.png", "speed.png", "panels.png"):
        with Image.open(calm / name) as picture:
            pixels = np.asarray(picture.convert("RGB"))
        assert min(pixels.shape[:2]) > 200
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 100


def test_the_page_of_two_runs_lies_where_it_is_told(made, tmp_path, capsys):
    report.main(["--run", str(made / "calm"), str(made / "restarted"), "--output", str(tmp_path / "both.html")])
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"both.html", "both-curves.png", "both-speed.png", "both-panels.png"}
    said = capsys.readouterr().out
    assert all(f"made: {tmp_path / name}" in said for name in names)
    assert said.count("training mean everywhere") == 2


def test_the_same_runs_give_the_same_page(made):
    one, two = (page_of([made / "calm", made / "restarted"]) for _ in range(2))
    assert one == two


def test_panels_of_a_perfect_prediction_have_no_error_and_holes_are_grey(tmp_path):
    truth = np.linspace(1, 4, 48 * 64, dtype=np.float32).reshape(48, 64)
    prediction = truth.copy()
    truth[:10, :10] = 0
    draw_panels(tmp_path / "panels.png", [Panel("one", np.zeros((48, 64, 3), np.uint8), truth, prediction)], "title")
    assert (tmp_path / "panels.png").stat().st_size > 1000
    errors = colorize_error(prediction, truth, worst=1.0)
    assert (errors[:10, :10] == 128).all()
    assert len(np.unique(errors[10:].reshape(-1, 3), axis=0)) == 1
    assert not (colorize_error(prediction + 2, truth, worst=1.0)[10:] == errors[10:]).all(-1).any()


def test_colours_follow_depth_and_holes_are_grey():
    depth = np.array([[1.0, 2.0, 3.0, 0.0, 9.0, 0.5]])
    colors = colorize(depth, 1.0, 3.0)[0].astype(int)
    assert (colors[3] == 128).all()
    assert (colors[4] == colors[2]).all() and (colors[5] == colors[0]).all()  # beyond the range: its ends
    brightness = colors[:3].sum(-1)
    assert brightness[0] > brightness[1] > brightness[2]  # near is bright


def test_few_moments_of_a_long_training_are_shown_with_the_first_the_best_and_the_last(made):
    run = read_run(made / "calm", "calm")
    one = run.snapshots.predictions[240]
    show = replace(run.snapshots, predictions={samples: one for samples in range(100, 10_001, 100)})
    best = replace(run.evaluations[0], samples=4300, values={"abs_rel": 0.01})
    times = times_of(replace(run, snapshots=show, evaluations=[*run.evaluations, best]))
    assert len(times) <= MOST_TIMES
    assert times[0] == 100 and times[-1] == 10_000 and 4300 in times


def test_runs_share_a_film_only_where_their_images_are_the_same(made, calm):
    runs = read_runs([made / "calm", made / "restarted"])
    (film,) = films(runs)
    assert [run.name for _, run, _ in film.runs] == ["calm", "restarted"]
    assert film.times == [240, 480, 720, 960, 1200]
    assert "calm after 480 samples: abs_rel " in film.words(500)
    rewrite(calm / "panels" / "keys.json", json.dumps(["x", "y", "z"]))
    assert len(films([*runs, read_run(calm, "other")])) == 2


def test_best_and_worst_images_are_those_of_the_record(made):
    run = read_run(made / "calm", "calm")
    found = extremes(run)
    for cases, chosen in zip((found.best, found.worst), ranked(run.record, "eigen"), strict=True):
        assert [case.key for case in cases] == [one.key for one in chosen]
    scores = [case.scores["abs_rel"] for case in (*found.best, *reversed(found.worst))]
    assert len(scores) == 8 and scores == sorted(scores)
    assert found.learned == 1200
    assert [tile.label for tile in found.best[0].tiles] == ["image", "truth", "prediction", "error"]


def test_damaged_weights_predict_nothing_for_the_page(calm):
    weights = calm / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 64
    weights.unlink()
    weights.write_bytes(data)
    with pytest.raises(UserError, match=f"{weights} is damaged"):
        extremes(read_run(calm, "calm"))


def test_a_run_that_goes_on_with_more_samples_is_not_finished(calm):
    assert read_run(calm, "calm").finished
    rewrite(calm / "config.toml", (calm / "config.toml").read_text().replace("1200", "2400"))
    assert not read_run(calm, "calm").finished


def test_other_shards_than_those_that_were_evaluated_are_not_shown(made, room_shards):
    run = read_run(made / "calm", "calm")
    truth = {**run.record["ground_truth"], "manifest": "0" * 64}
    with pytest.raises(UserError, match="other shards"):
        extremes(replace(run, record={**run.record, "ground_truth": truth}))


# --- several runs ---


def test_names_are_as_long_as_they_have_to_be():
    assert short_names([Path("/a/b/one"), Path("/a/b/two")]) == ["one", "two"]
    assert short_names([Path("/a/x/one"), Path("/a/y/one")]) == ["x/one", "y/one"]


def test_runs_of_other_protocols_or_images_share_no_chart_of_scores(made, images, scratch):
    folder = scratch("others")
    make_run(folder / "full", images, protocol="full", total=240)
    fewer = replace(images, **{n: getattr(images, n)[:5] for n in ("keys", "scenes", "image", "truth")})
    make_run(folder / "fewer", fewer, total=240)
    runs = read_runs([made / "calm", folder / "full", made / "restarted", folder / "fewer"])
    assert [[run.name for _, run in group] for group in groups_of(runs)] == [["calm", "restarted"], ["full"], ["fewer"]]
    text = render(collect(runs), "make")
    assert "cannot be held against each other" in text
    assert text.count("full protocol, fingerprint") >= 1 and text.count("eigen protocol, fingerprint") >= 2


def test_the_table_of_two_runs_has_both_and_the_difference(made, images, scratch):
    folder = scratch("other")
    make_run(folder / "other", images, seed=1, total=480, changes={"optim.lr": 0.1})
    runs = read_runs([made / "calm", folder / "other"])
    table = image_table(list(enumerate(runs)))
    assert [column.title for column in table.columns][-3:] == ["abs_rel, calm", "abs_rel, other", "other − calm"]
    assert [row[0] for row in table.rows] == images.keys
    for row in table.rows:
        one, other, gap = (float(cell.replace("−", "-")) for cell in row[-3:])
        assert gap == pytest.approx(other - one, abs=1.5e-4)
    assert differing(runs) == [("train.total_samples", ["1200", "480"]), ("optim.lr", ["0.0006", "0.1"])]


def test_scenes_are_means_of_their_images_from_the_worst_to_the_best(made, images):
    run = read_run(made / "calm", "calm")
    scenes = ["kitchen"] * 3 + ["bath"] * 4 + [""]
    run = replace(run, record={**run.record, "images": {**run.record["images"], "scenes": scenes}})
    found = scene_table([(0, run)])
    assert {scene.name: scene.images for scene in found.rows} == {"kitchen": 3, "bath": 4, "": 1}
    assert found.several and not found.left_out
    values = [scene.values[0] for scene in found.rows]
    assert values == sorted(values, reverse=True)
    table = image_table([(0, run)])
    kitchen = [float(row[3]) for row in table.rows if row[1] == "kitchen"]
    assert next(s for s in found.rows if s.name == "kitchen").values[0] == pytest.approx(np.mean(kitchen), abs=1e-4)
    many = {**run.record, "images": {**run.record["images"], "scenes": images.scenes}}
    assert not scene_table([(0, replace(run, record=many))]).several
