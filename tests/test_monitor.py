"""metrics.jsonl holds every line once, whatever was cut off."""

import json

from mde_dist.run.monitor import Account, Monitor, keep_until, read_records


def lines(path):
    return [(r["samples"], "evaluation" in r) for r in read_records(path)]


def test_lines_behind_the_checkpoint_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    records = [{"samples": n} for n in (10, 20, 30)] + [{"samples": 20, "evaluation": "eigen"}]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    keep_until(path, samples_seen=20, evaluated=20)
    assert lines(path) == [(10, False), (20, False), (20, True)]


def test_an_evaluation_that_the_checkpoint_does_not_know_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"samples": 20}\n{"samples": 10, "evaluation": "e"}\n{"samples": 20, "evaluation": "e"}\n')
    keep_until(path, samples_seen=20, evaluated=10)
    assert lines(path) == [(20, False), (10, True)]


def test_a_line_that_was_cut_off_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"samples": 10}\n{"sampl')
    keep_until(path, 100, 100)
    assert path.read_text() == '{"samples": 10}\n'


def test_ranks_other_than_0_say_and_write_nothing(tmp_path, capsys):
    with Monitor(None, 0, 0, 100) as monitor:
        monitor.say("hello")
        monitor.step(10, loss=1.0, images_per_second=1.0, data_wait=0.0)
    assert capsys.readouterr().out == ""
    assert list(tmp_path.iterdir()) == []


def test_without_a_terminal_lines_are_plain_and_few(tmp_path, capsys):
    with Monitor(tmp_path / "metrics.jsonl", 0, 0, 100) as monitor:
        for step in range(50):
            monitor.step(step, loss=1.0, images_per_second=1.0, data_wait=0.0)
    assert capsys.readouterr().out.splitlines() == ["samples 0/100 loss 1.0000, 1.0 images/s, 0% waiting for data"]
    assert len(read_records(tmp_path / "metrics.jsonl")) == 50


def test_account_counts_images_and_waiting():
    account = Account()
    with account.waiting():
        sum(range(100_000))
    account.step(8)
    account.step(8)
    rates = account.rates()
    assert rates["images_per_second"] > 0
    assert 0 < rates["data_wait"] <= 1
    account.restart()
    assert account.rates() == {"images_per_second": 0.0, "data_wait": 0.0}
