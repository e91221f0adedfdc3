"""Training on real ranks from where data go wrong: a server that is slow, cuts, fails, changes, goes; a stuck disk.

No launcher ends the ranks here, but for one test: each has to end by itself, with the same status.
"""

import os
import shutil

import pytest
from commands import learned, records, small, start, wait_for
from servers import Fault, FileServer
from warm import warm_run, warm_start, without_pictures

from mde_dist.packing.pack import PackConfig, pack
from mde_dist.packing.sources import rooms

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def many_shards(scratch):
    """40 training rooms, two in a shard, and 4 test rooms: more shards than are fetched ahead."""
    output = scratch("server") / "served/rooms"
    output.parent.mkdir()
    options = PackConfig(size=(48, 64), samples_per_shard=2)
    pack(rooms({"train": 40, "test": 4}), output, options, workers=2, progress=lambda done, total: None)
    return output


def options(**changes):
    return small(**({"data_shuffle_shards": 1, "data_remote_timeout": 4, "train_total_samples": 120} | changes))


@pytest.fixture(scope="module")
def local(many_shards, scratch):
    """What the same training learns from the directory itself."""
    directory = scratch("local") / "run"
    done = warm_run("train", processes=2, before=without_pictures, run=directory, **options(data_shards=many_shards))
    assert done.returncode == 0, done.stderr
    return learned(directory)


@pytest.fixture
def server(many_shards):
    with FileServer(many_shards.parent) as server:
        yield server


def remote(server, cache, **changes):
    return options(data_shards=f"{server.url}/rooms", data_cache=cache, **changes)


def errors(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith("error")]


def test_two_ranks_learn_the_same_from_a_server_and_fetch_every_file_once(server, local, many_shards, tmp_path):
    given = remote(server, tmp_path / "cache")
    done = warm_run("train", processes=2, before=without_pictures, run=tmp_path / "run", **given)
    assert done.returncode == 0, done.stderr
    assert learned(tmp_path / "run") == local
    tars = {f"rooms/{path.name}" for path in many_shards.glob("*.tar")}
    assert {path for path in server.requests if path.endswith(".tar")} == tars
    assert {server.requests[path] for path in tars} == {1}
    done = warm_run("evaluate", processes=2, run=tmp_path / "run", cache=tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    assert {server.requests[path] for path in tars} == {1}


def test_a_server_that_is_slow_cuts_and_fails_now_and_then_changes_nothing(server, local, tmp_path):
    faults = Fault(cut=9000), Fault(status=500), Fault(status=503), Fault(cut=1, rate=20_000), Fault(reset=True)
    for number, fault in enumerate(faults):
        server.fail(fault, times=1)  # the manifest's first answers
        for shard in (number, number + 7, number + 14):
            server.fail(fault, path=f"rooms/train-{shard:06d}.tar", times=2)
    server.fail(Fault(rate=200_000))
    given = remote(server, tmp_path / "cache", data_remote_timeout=30)
    done = warm_run("train", processes=2, before=without_pictures, run=tmp_path / "run", **given)
    assert done.returncode == 0, done.stderr
    assert learned(tmp_path / "run") == local
    assert server.requests["rooms/train-000000.tar"] == 3


def test_a_shard_that_was_changed_on_the_server_ends_the_run_with_one_line(server, many_shards, tmp_path):
    changed = bytearray((many_shards / "train-000005.tar").read_bytes())
    changed[700] ^= 1
    server.fail(Fault(content=bytes(changed)), path="rooms/train-000005.tar")
    done = warm_run("train", processes=2, run=tmp_path / "run", **remote(server, tmp_path / "cache"))
    assert done.returncode == 2
    (said,) = errors(done.stderr)
    assert "train-000005.tar is not the file that the manifest names" in said
    assert server.requests["rooms/train-000005.tar"] <= 12  # it is not asked for again and again


def test_a_server_that_stays_away_ends_every_rank_with_one_line_and_the_run_goes_on_later(server, local, tmp_path):
    directory = tmp_path / "run"
    # little room, so that shards have to be fetched again and again: what is on its way, and little more
    given = remote(server, tmp_path / "cache", data_cache_gb=0.0004, data_prefetch_batches=1)
    process = start("train", processes=2, run=directory, **given)
    wait_for(lambda: (directory / "checkpoints/step-00000002").is_dir(), process)
    server.fail(Fault(status=503))
    output, _ = process.communicate(timeout=90)
    assert process.returncode != 0, "it should have needed the server"
    (said,) = errors(output)
    assert ".tar: no new byte for" in said
    assert output.count("Traceback") <= 1  # the launcher's own
    assert records(directory)[-1]["samples"] < 120
    server.behave()
    done = warm_run("train", processes=2, before=without_pictures, run=directory, **given)
    assert done.returncode == 0, done.stderr
    assert "resumed at sample" in done.stdout
    assert learned(directory) == local


def test_a_server_that_is_not_there_at_all_is_one_line_too(tmp_path, many_shards):
    with FileServer(many_shards.parent) as server:
        url = server.url
    given = options(data_shards=f"{url}/rooms", data_cache=tmp_path / "cache", data_remote_timeout=2)
    done = warm_run("train", processes=2, run=tmp_path / "run", **given)
    assert done.returncode == 2
    (said,) = errors(done.stderr)
    assert "rooms/manifest.json: no new byte for" in said
    assert not (tmp_path / "run").exists()


def test_a_cache_without_room_for_what_is_on_its_way_is_refused(server, tmp_path):
    done = warm_run("train", run=tmp_path / "run", **remote(server, tmp_path / "cache", data_cache_gb=0.00005))
    assert done.returncode == 2
    (said,) = errors(done.stderr)
    assert "data.cache_gb = 5e-05: too small" in said


def test_a_signal_ends_a_wait_for_a_silent_server_with_a_checkpoint(server, tmp_path):
    directory = tmp_path / "run"
    given = remote(server, tmp_path / "cache", data_cache_gb=0.0004, data_prefetch_batches=1, data_remote_timeout=100)
    process = warm_start("train", run=directory, **given)
    wait_for(lambda: (directory / "checkpoints/step-00000002").is_dir(), process)
    server.fail(Fault(stall=True))
    asked = server.requests.total()
    wait_for(lambda: server.requests.total() > asked, process)
    process.terminate()
    try:
        output, _ = process.communicate(timeout=60)
    finally:
        server.release.set()
    assert (directory / "PREEMPTED").is_file(), output
    assert not errors(output)


# --- the same for a disk: a read that does not come back ---


def test_a_read_that_is_stuck_ends_every_rank_with_one_line_and_the_run_goes_on_later(local, many_shards, tmp_path):
    shards, directory = shutil.copytree(many_shards, tmp_path / "rooms"), tmp_path / "run"
    given = options(data_shards=shards, data_prefetch_batches=1, data_read_timeout=2)
    process = warm_start("train", processes=2, run=directory, **given)
    wait_for(lambda: (directory / "checkpoints/step-00000001").is_dir(), process)
    aside = tmp_path / "aside"
    aside.mkdir()
    for tar in shards.glob("train-*.tar"):  # opening a pipe that nobody writes to hangs, as a lost file server does
        tar.rename(aside / tar.name)
        os.mkfifo(tar)
    output, _ = process.communicate(timeout=90)
    assert process.returncode == 2, "it should have needed the shards"
    (said,) = errors(output)
    assert "a read has not come back for" in said
    assert ".tar" in said
    for tar in aside.iterdir():
        tar.replace(shards / tar.name)
    done = warm_run("train", processes=2, before=without_pictures, run=directory, **given)
    assert done.returncode == 0, done.stderr
    assert learned(directory) == local


def test_a_poisoned_stream_ends_on_every_topology_at_the_same_sample(many_shards, tmp_path):
    shards = shutil.copytree(many_shards, tmp_path / "rooms")
    for number in (3, 8, 13):
        path = shards / f"train-{number:06d}.tar"
        data = bytearray(path.read_bytes())
        data[600] ^= 8  # in the first depth map
        path.write_bytes(data)
    said, replaced = set(), set()
    for ranks in (1, 2, 3):
        given = options(data_shards=shards, data_max_bad_fraction=0.07, train_log_every=12)
        done = warm_run("train", processes=ranks, run=tmp_path / f"{ranks}", **given)
        assert done.returncode == 2
        (line,) = errors(done.stderr)
        assert "more than data.max_bad_fraction = 0.07" in line
        said.add(line.partition(": ")[2])
        replaced.add(tuple((r["samples"], r.get("replaced", 0)) for r in records(tmp_path / f"{ranks}") if "loss" in r))
        assert "depth fails its checksum" in done.stdout
    assert len(said) == len(replaced) == 1


def test_ranks_that_see_different_shards_are_refused(many_shards, room_shards, tmp_path):
    """As where the disks of two nodes hold different packs: here the rank's own number chooses the directory."""
    script = tmp_path / "start.py"
    script.write_text(
        "import os, sys\n"
        "from mde_dist.utils.cli import run_command\n"
        "from mde_dist.train import main\n"
        "place = sys.argv.pop(1 + int(os.environ['LOCAL_RANK']))\n"
        "del sys.argv[1]\n"
        "run_command(lambda argv: main(['--data.shards', place, *argv]))\n"
    )
    done = warm_run(script, many_shards, room_shards, processes=2, run=tmp_path / "run", **options())
    assert done.returncode == 2
    (said,) = errors(done.stderr)
    assert "(rank 1)" in said
    assert "the shards differ from those of rank 0" in said
    done = warm_run(script, many_shards, tmp_path / "nothing", processes=2, run=tmp_path / "run", **options())
    (said,) = errors(done.stderr)
    assert "(rank 1)" in said
    assert "holds no shards" in said
