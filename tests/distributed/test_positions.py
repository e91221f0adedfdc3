"""The stream on real ranks over gloo: the same samples as the same views at every position, whatever the topology."""

import json
from collections import Counter
from pathlib import Path

import pytest
from warm import warm_run

pytestmark = pytest.mark.distributed

SAMPLES = 30  # of the training split of `room_shards`: shards of 8, 8, 8 and 6
SCRIPT = Path(__file__).with_name("log_positions.py")


def job(name, samples_seen=0, batches=8, batch_size=12, accumulate=1, threads=1):
    return dict(locals())


JOBS = {
    "one thread": job("one thread"),
    "three threads": job("three threads", threads=3),
    "accumulated": job("accumulated", batches=4, batch_size=24, accumulate=2, threads=3),
    "resumed in mid-epoch": job("resumed in mid-epoch", samples_seen=36, batches=5, threads=3),
    "resumed with a larger batch": job("resumed with a larger batch", samples_seen=48, batches=2, batch_size=24),
}


@pytest.fixture(scope="module")
def logs(room_shards, tmp_path_factory):
    """Topology -> job -> stream position -> [epoch, key, crc32 of image, depth, and of both of the view]."""
    root = tmp_path_factory.mktemp("stream")
    (root / "jobs.json").write_text(json.dumps(list(JOBS.values())))
    found = {}
    for ranks in (1, 2, 3, 4):
        out = root / str(ranks)
        out.mkdir()
        done = warm_run(SCRIPT, room_shards, out, root / "jobs.json", processes=ranks)
        assert done.returncode == 0, done.stderr
        found[ranks] = {}
        for name in JOBS:
            files = sorted(out.glob(f"{name}.*.jsonl"))
            assert len(files) == ranks
            lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
            found[ranks][name] = {position: rest for position, *rest in lines}
            assert len(found[ranks][name]) == len(lines), "a position came twice"
    return found


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("name", JOBS)
def test_every_topology_gives_every_position_the_same_sample_as_the_same_view(logs, ranks, name):
    start, length = JOBS[name]["samples_seen"], JOBS[name]["batches"] * JOBS[name]["batch_size"]
    reference = logs[1]["one thread"]
    assert sorted(logs[ranks][name]) == list(range(start, start + length))
    assert logs[ranks][name] == {position: reference[position] for position in range(start, start + length)}


def test_three_epochs_bring_every_sample_exactly_three_times(logs):
    lines = logs[4]["three threads"]
    keys = Counter(lines[position][1] for position in range(3 * SAMPLES))
    assert len(keys) == SAMPLES
    assert set(keys.values()) == {3}
    for epoch in range(3):
        here = [lines[position] for position in range(epoch * SAMPLES, (epoch + 1) * SAMPLES)]
        assert {line[0] for line in here} == {epoch}
        assert len({line[1] for line in here}) == SAMPLES


def test_the_order_and_the_views_change_from_epoch_to_epoch(logs):
    lines = logs[1]["one thread"]
    orders = {tuple(lines[epoch * SAMPLES + place][1] for place in range(SAMPLES)) for epoch in range(3)}
    assert len(orders) == 3
    views = {(line[1], line[4], line[5]) for line in lines.values()}
    assert len(views) > 2 * SAMPLES  # of 96: some are drawn without flip and colour more than once
    assert len({(line[1], line[2], line[3]) for line in lines.values()}) == SAMPLES  # what is stored does not
