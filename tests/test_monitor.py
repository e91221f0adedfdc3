"""metrics.jsonl holds every line once, whatever was cut off."""

import json

from mde_dist.training.monitor import ProgressMonitor, progress_text
from mde_dist.training.scores import show_scores
from mde_dist.utils.jsonl import read_records, truncate_after

SPEED = {"lr": 1e-4, "images_per_second": 1.0, "data_wait": 0.0, "memory_gb": 0.5, "seconds_left": 3661}


SCORE = {"abs_rel": 0.3, "images": 8}


def lines(path):
    return [(r["samples"], "evaluation" in r) for r in read_records(path)]


def test_lines_behind_the_checkpoint_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    records = [{"samples": n} for n in (10, 20, 30)] + [{"samples": 20, "evaluation": "eigen", **SCORE}]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    truncate_after(path, samples_seen=20, evaluated=20)
    assert lines(path) == [(10, False), (20, False), (20, True)]


def test_an_evaluation_that_the_checkpoint_does_not_know_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    evaluations = [{"samples": n, "evaluation": "eigen", **SCORE} for n in (10, 20)]
    path.write_text("".join(json.dumps(record) + "\n" for record in [{"samples": 20}, *evaluations]))
    truncate_after(path, samples_seen=20, evaluated=10)
    assert lines(path) == [(20, False), (10, True)]


def test_a_line_that_was_cut_off_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"samples": 10}\n{"sampl')
    truncate_after(path, 100, 100)
    assert path.read_text() == '{"samples": 10}\n'


NO_RECORDS = [
    b"\xff\xfe",
    b"5",
    b"{}",
    b"[]",
    b"null",
    b"\0" * 20,
    b'{"samples": 12, "lo\0\0\0',
    b'{"samples": "many"}',
    b'{"samples": true}',
    b'{"samples": -1}',
    b'{"samples": 1e3}',
    b'{"samples": NaN}',
    b'{"samples": 1' + b"0" * 30 + b"}",
    b'{"samples": 1' + b"0" * 5000 + b"}",
    b"[" * 100_000,
    b'{"samples": 10, "start": 3}',
    b'{"samples": 10, "evaluation": "eigen"}',
    b'{"samples": 10, "evaluation": "eigen", "abs_rel": "low", "images": 8}',
    b'{"samples": 10, "evaluation": "eigen", "abs_rel": NaN, "images": 8}',
    b'{"samples": 10, "evaluation": "eigen", "abs_rel": 1e999, "images": 8}',
    b'{"samples": 10, "evaluation": 7, "abs_rel": 0.5, "images": 8}',
    b'{"samples": 0, "baseline": ["x"], "abs_rel": 0.5, "images": 8}',
]


def test_lines_that_are_no_records_stop_nothing_and_are_said_once(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    score = {"samples": 20, "evaluation": "eigen", "delta1": "half", "rmse": 1.0, "by a newer version": "x", **SCORE}
    whole = [{"samples": 10, "loss": 1.0}, {"samples": 20, "loss": None}, score, {"samples": 20, "start": {}}]
    good = [json.dumps(record).encode() for record in whole]
    for bad in NO_RECORDS:
        path.write_bytes(b"\n".join([good[0], bad, b"", *good]))
        assert read_records(path) == [whole[0], *whole], bad
    path.write_bytes(b"\n".join([*NO_RECORDS, *good, b'{"samples": 3']))
    with ProgressMonitor(path, 20, 20, 100):  # a run that goes on
        pass
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 1 and str(path) in said[0] and "lines 1, 2, 3 and 19 more" in said[0]
    assert [json.loads(line) for line in path.read_bytes().splitlines()] == whole
    show_scores(tmp_path, read_records(path))
    assert "model at sample 20 " in capsys.readouterr().out


def test_ranks_other_than_0_write_nothing_but_their_log(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with ProgressMonitor(None, 0, 0, 100) as monitor:
        monitor.print("hello")
        monitor.log(samples=0)
        monitor.step(10, loss=1.0, **SPEED)
    assert capsys.readouterr().out.splitlines()[0] == "hello"  # stdout is this rank's log by then
    assert list(tmp_path.iterdir()) == []


def test_without_a_terminal_lines_are_plain_and_few(tmp_path, capsys):
    with ProgressMonitor(tmp_path / "metrics.jsonl", 0, 0, 100) as monitor:
        for step in range(50):
            monitor.step(step, loss=1.0, **SPEED)
    line = "samples 0/100 loss 1.0000, lr 1.00e-04, 1.0 images/s, 0% waiting for data, 0.5 GB, 1:01:01 left"
    assert capsys.readouterr().out.splitlines() == [line]
    assert len(read_records(tmp_path / "metrics.jsonl")) == 50


def test_what_is_worth_saying_is_said_and_what_is_not_known_is_left_out():
    said = progress_text({"loss": None, **SPEED, "mfu": 0.123, "slowest_rank": 3, "slower": 0.2, "seconds_left": None})
    assert said == (
        "loss not finite, lr 1.00e-04, 1.0 images/s, 0% waiting for data, MFU 12.3%, "
        "rank 3 is 20% slower than the mean, 0.5 GB"
    )
    assert "slower" not in progress_text({"loss": 1.0, **SPEED, "slowest_rank": 0, "slower": 0.01})


def test_starts_are_kept_with_what_they_began(tmp_path):
    path = tmp_path / "metrics.jsonl"
    starts = [{"samples": samples, "start": {"ranks": 1}} for samples in (0, 20, 20, 40)]
    path.write_text("".join(json.dumps(record) + "\n" for record in [*starts[:2], {"samples": 30}, *starts[2:]]))
    assert truncate_after(path, samples_seen=20, evaluated=0) == starts[:3]
    assert read_records(path) == starts[:3]
    assert truncate_after(path, samples_seen=0, evaluated=0) == []
    assert path.read_text() == ""


def test_plain_lines_have_their_least_distance_in_time_whatever_is_done(tmp_path, capsys):
    now = [0.0]
    with ProgressMonitor(tmp_path / "metrics.jsonl", 0, 0, 1000, clock=lambda: now[0]) as monitor:
        for step in range(60):
            now[0] += 1
            monitor.update(step)
            monitor.step(step, loss=1.0, **SPEED)
        steps = capsys.readouterr().out.splitlines()
        progress = monitor.task("evaluating")
        for done in range(1, 61):
            now[0] += 1
            progress(done, 60)
        phase = capsys.readouterr().out.splitlines()
        quick = monitor.task("evaluating")
        for done in range(1, 61):
            quick(done, 60)
    assert [line.split()[1] for line in steps] == [f"{step}/1000" for step in range(0, 60, 5)]
    assert [line.split()[1] for line in phase] == [f"{done}/60" for done in range(5, 61, 5)]
    assert phase[1] == "evaluating: 10/60 images, 1.0 images/s, 0:00:50 left"
    assert capsys.readouterr().out == ""


def test_a_run_that_goes_on_knows_its_scores(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    scores = {"evaluation": "eigen", "images": 8, "delta1": 0.5}
    with ProgressMonitor(path, 0, 0, 100) as monitor:
        monitor.log(samples=0, baseline="training mean everywhere", abs_rel=0.5, **scores)
        for samples, abs_rel in ((10, 0.3), (20, 0.4), (30, 0.2)):
            monitor.log(samples=samples, abs_rel=abs_rel, **scores)
    with ProgressMonitor(path, 25, 20, 100):
        pass
    show_scores(tmp_path, read_records(path))
    said = capsys.readouterr().out
    assert "model at sample 20 " in said and "best, at sample 10 " in said and "training mean everywhere " in said
    assert "sample 30" not in said
