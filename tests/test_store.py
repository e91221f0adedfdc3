"""Shards by any address: a directory, an HTTP server and S3 give the same samples, and the same training."""

import json
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from commands import learned, small, wait_for
from servers import Fault, FileServer
from warm import warm_run, warm_start, without_pictures

from mde_dist.data.config import CacheOptions
from mde_dist.data.dataset import DamagedSample
from mde_dist.data.shards import ShardDataset, open_split
from mde_dist.utils.errors import UserError
from mde_dist.utils.io import sha256_of


@pytest.fixture
def bucket(room_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The rooms in a bucket of a real S3 server, which the environment names."""
    pytest.importorskip("s3fs")
    moto, boto3 = pytest.importorskip("moto.server"), pytest.importorskip("boto3")
    server = moto.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    url = "http://{}:{}".format(*server.get_host_and_port())
    settings = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_DEFAULT_REGION": "us-east-1"}
    nothing = str(tmp_path / "none")
    settings |= {"AWS_CONFIG_FILE": nothing, "AWS_SHARED_CREDENTIALS_FILE": nothing, "AWS_ENDPOINT_URL": url}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    client = boto3.client("s3", endpoint_url=url)
    client.create_bucket(Bucket="depth")
    for path in room_shards.iterdir():
        client.upload_file(str(path), "depth", f"sets/rooms/{path.name}")
    yield "s3://depth/sets/rooms"
    server.stop()


def contents(shards: ShardDataset) -> list[tuple[str, bytes, bytes]]:
    image, depth = np.empty((*shards.size, 3), np.uint8), np.empty(shards.size, np.uint16)
    found = []
    for sample in range(len(shards)):
        shards.read_into(sample, image, depth)
        found.append((shards.key(sample), image.tobytes(), depth.tobytes()))
    return found


def test_a_server_gives_what_the_directory_gives(room_shards, tmp_path):
    options = CacheOptions(tmp_path / "cache", 10**8)
    with FileServer(room_shards.parent) as server:
        place = f"{server.url}/{room_shards.name}"
        for split in ("train", "test"):
            with open_split(room_shards, split) as local, open_split(place, split, options) as remote:
                assert contents(remote) == contents(local)
                assert (remote.mean_map() == local.mean_map()).all()
                assert remote.manifest.sha256 == local.manifest.sha256
                assert remote.file_of(0) == f"{place}/{split}-000000.tar"
        assert set(server.requests.values()) == {1, 2}  # the manifest once for each split


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def test_damaged_copies_in_the_cache_are_fetched_anew_and_nothing_counts_as_damaged(room_shards, tmp_path, capsys):
    options = CacheOptions(tmp_path / "cache", 10**8)
    with open_split(room_shards, "test") as local, FileServer(room_shards) as server:
        expected, mean = contents(local), local.mean_map()
        with open_split(server.url, "test", options) as remote:
            assert contents(remote) == expected
            remote.mean_map()
            for path in options.directory.glob("?" * 64):
                flip(path, path.stat().st_size // 2)
            info = local.info.shards[0]
            flip(options.directory / info.sha256, 700)  # in the first depth map, of a file that is open
            assert contents(remote) == expected
        with open_split(server.url, "test", options) as remote:  # the next run
            assert contents(remote) == expected
            assert (remote.mean_map() == mean).all()
        assert set(server.requests.values()) == {2}
        said = capsys.readouterr().out.splitlines()
        assert len(said) == 3 and all("damaged copy" in line for line in said)


def test_a_sample_that_was_packed_damaged_is_damaged_from_a_cache_too(room_shards, tmp_path):
    """As everywhere: the substitute must not depend on where a file lies, nor may it be fetched again and again."""
    served = shutil.copytree(room_shards, tmp_path / "served")
    manifest = json.loads((served / "manifest.json").read_text())
    (shard,) = manifest["splits"]["test"]["shards"]
    flip(served / shard["name"], 700)
    shard["sha256"] = sha256_of(served / shard["name"])
    (served / "manifest.json").write_text(json.dumps(manifest))
    image, depth = np.empty((48, 64, 3), np.uint8), np.empty((48, 64), np.uint16)
    with FileServer(served) as server:
        for place in (served, server.url):
            with open_split(place, "test", CacheOptions(tmp_path / "cache", 10**8)) as shards:
                for _ in range(2):
                    with pytest.raises(DamagedSample, match="fails its checksum"):
                        shards.read_into(0, image, depth)
                shards.read_into(1, image, depth)
        assert set(server.requests.values()) == {1}


@pytest.mark.slow
@pytest.mark.parametrize("fault", [Fault(rate=1), Fault(stall=True)], ids=["trickles", "is silent"])
def test_a_signal_ends_the_wait_for_a_server_while_the_run_opens(room_shards, tmp_path, fault):
    given = small(data_cache=tmp_path / "cache")
    with FileServer(room_shards) as server:
        server.fail(fault)
        with warm_start("train", run=tmp_path / "run", **given, **{"data.shards": server.url}) as process:
            wait_for(lambda: server.requests["manifest.json"], process)
            process.terminate()
            assert process.wait(8) == 128 + signal.SIGTERM, process.output()  # it would be 10 s for a silent one
        assert "stopped by a signal while the shards were opened" in process.output()
    assert not (tmp_path / "run").exists()


def test_s3_gives_what_the_directory_gives(bucket, room_shards, tmp_path):
    options = CacheOptions(tmp_path / "cache", 10**8)
    with open_split(room_shards, "train") as local, open_split(bucket, "train", options) as remote:
        assert contents(remote) == contents(local)


@pytest.mark.slow
def test_training_from_s3_learns_the_same(bucket, room_shards, tmp_path):
    for name, place in (("local", room_shards), ("s3", bucket)):
        given = small(data_shards=place, data_cache=tmp_path / "cache", train_total_samples=24)
        done = warm_run("train", before=without_pictures, run=tmp_path / name, **given)
        assert done.returncode == 0, done.stderr
    assert learned(tmp_path / "s3") == learned(tmp_path / "local")


def test_a_query_that_holds_a_key_is_in_no_message(room_shards, tmp_path):
    options = CacheOptions(tmp_path / "cache", 10**8, patience=0.5)
    with FileServer(room_shards) as server, open_split(f"{server.url}/?token=secret", "train", options) as shards:
        assert "secret" not in shards.manifest.location + shards.file_of(3) + shards.advice
        assert "secret" in server.targets[0]
        server.fail(Fault(status=403))
        with pytest.raises(UserError) as error:
            contents(shards)
    assert "secret" not in str(error.value)
    assert "train-000000.tar" in str(error.value)


def test_a_file_that_a_cache_lost_in_mid_run_is_fetched_again(room_shards, tmp_path):
    options = CacheOptions(tmp_path / "cache", 10**8)
    with FileServer(room_shards) as server, open_split(server.url, "train", options) as shards:
        expected = contents(shards)
        shards.close()
        with open_split(server.url, "train", options) as again:
            for path in options.directory.iterdir():
                if len(path.name) == 64:
                    path.unlink()
            assert contents(again) == expected
        assert server.requests["train-000002.tar"] == 2


@pytest.mark.parametrize(
    "place", ["pipe:cat /etc/passwd", "${HOME}", "~", "file:///etc", "ftp://127.0.0.1/rooms", "gs://b/x"]
)
def test_other_addresses_are_not_followed(place, tmp_path, monkeypatch):
    """No shell, no expansion: what is no http, https or s3 is the name of a directory, or refused."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        open_split(place, "train", CacheOptions(tmp_path / "cache"))
    said = str(error.value)
    assert place in said
    assert "holds no shards" in said or "cannot be read from" in said
