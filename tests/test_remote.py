"""Files from real servers on loopback: HTTP that misbehaves in every way we know, and S3 by moto."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
from servers import Fault, FileServer

from mde_dist.data.storage import remote as remote_module
from mde_dist.data.storage.remote import (
    Cancelled,
    NotThere,
    RangeError,
    Remote,
    RetryableError,
    RetryPolicy,
    ServerUnavailable,
    open_remote,
    read_whole,
    with_retries,
)
from mde_dist.utils.errors import UserError
from mde_dist.utils.urls import is_remote

CONTENT = bytes(range(256)) * 4096  # 1 MiB


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FileServer]:
    (tmp_path / "served/shards").mkdir(parents=True)
    (tmp_path / "served/shards/a.tar").write_bytes(CONTENT)
    with FileServer(tmp_path / "served") as server:
        yield server


def shards(server: FileServer, timeout: float = 10.0) -> Remote:
    return open_remote(f"{server.url}/shards", timeout)


def all_of(remote: Remote, start: int = 0, name: str = "a.tar", patience: float = 5.0) -> bytes:
    return b"".join(with_retries(remote, name, start, RetryPolicy(remote, name, patience, threading.Event())))


def asking(remote: Remote, closing: threading.Event, patience: float = 40.0) -> Iterator[bytes]:
    return with_retries(remote, "a.tar", 0, RetryPolicy(remote, "a.tar", patience, closing))


def closed_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


# ---- what a location may be


@pytest.mark.parametrize(
    ("location", "remote"),
    [
        ("https://host/a", True),
        ("s3://bucket", True),
        ("gs://bucket", True),
        ("file:///a", True),
        ("/data/rooms", False),
        ("C:/data", False),
        ("data/a://b", False),
        ("pipe:curl http://host", False),
    ],
)
def test_a_remote_location_begins_with_a_scheme(location: str, remote: bool) -> None:
    assert is_remote(location) == remote


@pytest.mark.parametrize(
    ("location", "what"),
    [
        ("gs://bucket/a", "gs://bucket/a: cannot be read from; give a directory or http://, https://, s3://"),
        ("file:///etc", "file:///etc: cannot be read from"),
        ("http://", "http://: names no host"),
        ("https:///a", "https:///a: names no host"),
        ("http://:80/a", "names no host"),
        ("http://host:port/a", "http://host:port/a: not a URL"),
        ("http://[::1/a", "not a URL"),
        ("s3://", "s3://: names no bucket"),
        ("s3:///a", "s3:///a: names no bucket"),
    ],
)
def test_a_location_that_cannot_be_read_from_is_refused_in_one_line(location: str, what: str) -> None:
    with pytest.raises(UserError) as error:
        open_remote(location)
    assert str(error.value).startswith(what) or what in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("location", ["http://me:secret@host/a", "s3://me:secret@bucket/a", "ftp://me:secret@host?k=1"])
def test_a_password_in_a_location_is_refused_and_not_shown(location: str) -> None:
    with pytest.raises(UserError) as error:
        open_remote(location)
    assert "secret" not in str(error.value)


@pytest.mark.parametrize(
    ("location", "name", "url"),
    [
        ("http://host:81/a/", "b c#?.tar", "http://host:81/a/b%20c%23%3F.tar"),
        ("https://host", "b.tar", "https://host/b.tar"),
        ("https://host/my data/%41#fragment", "b.tar", "https://host/my%20data/%41/b.tar"),
        ("https://host/a?key=secret", "b.tar", "https://host/a/b.tar"),  # for messages: no key in them
    ],
)
def test_the_url_of_a_file_is_the_location_and_its_quoted_name(location: str, name: str, url: str) -> None:
    assert open_remote(location).url(name) == url


def test_a_locations_query_is_sent_with_every_file_and_its_fragment_is_not(server: FileServer) -> None:
    remote = open_remote(f"{server.url}/shards/?key=a b&x=%41#part")
    assert b"".join(remote.read("a.tar")) == CONTENT
    assert server.targets == ["/shards/a.tar?key=a%20b&x=%41"]


# ---- reading


@pytest.mark.parametrize("start", [0, 1, 1000, len(CONTENT) - 1])
def test_a_file_is_read_from_any_byte_on(server: FileServer, start: int) -> None:
    assert b"".join(shards(server).read("a.tar", start)) == CONTENT[start:]
    assert server.ranges["shards/a.tar"] == [f"bytes={start}-" if start else None]
    assert server.sent["shards/a.tar"] == len(CONTENT) - start


def test_chunks_are_of_at_most_1_mib(server: FileServer) -> None:
    server.fail(Fault(content=CONTENT * 5))
    assert max(len(chunk) for chunk in shards(server).read("a.tar")) <= 2**20


def test_a_server_that_ignores_ranges_gives_the_same_bytes(server: FileServer) -> None:
    server.fail(Fault(ranges=False))
    assert b"".join(shards(server).read("a.tar", 70_001)) == CONTENT[70_001:]


@pytest.mark.parametrize("start", [0, 5])
def test_a_body_of_no_announced_length_ends_with_the_connection(server: FileServer, start: int) -> None:
    server.fail(Fault(length=False, ranges=False))
    assert b"".join(shards(server).read("a.tar", start)) == CONTENT[start:]


@pytest.mark.parametrize("start", [len(CONTENT), len(CONTENT) + 7])
def test_going_on_past_the_end_is_told_from_other_failures(server: FileServer, start: int) -> None:
    with pytest.raises(RangeError):
        next(shards(server).read("a.tar", start))


@pytest.mark.parametrize("claim", ["bytes 6-1048575/1048576", "bytes */1048576", "nonsense"])
def test_a_part_that_begins_elsewhere_is_not_taken(server: FileServer, claim: str) -> None:
    server.fail(Fault(content_range=claim))
    with pytest.raises(RetryableError, match="asked for bytes from 5 on"):
        next(shards(server).read("a.tar", 5))


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410, 418])
def test_a_refusal_is_not_asked_again_and_is_one_line(server: FileServer, status: int) -> None:
    server.fail(Fault(status=status))
    with pytest.raises(NotThere) as error:
        all_of(shards(server))
    assert str(error.value).startswith(f"{server.url}/shards/a.tar: the server says {status} ")
    assert "\n" not in str(error.value)
    assert server.requests["shards/a.tar"] == 1


def test_an_answer_without_a_file_is_not_taken_for_an_empty_one(server: FileServer) -> None:
    server.fail(Fault(status=204))
    with pytest.raises(NotThere, match="204"):
        all_of(shards(server))


FAILURES = {
    "reset": Fault(reset=True),
    "cut in the middle": Fault(cut=300_000),
    "cut at the end": Fault(cut=len(CONTENT) - 1),
    **{str(status): Fault(status=status) for status in (408, 429, 500, 503)},
}


@pytest.mark.parametrize("fault", FAILURES.values(), ids=FAILURES)
def test_a_failure_that_may_pass_is_temporary_and_asked_again(server: FileServer, fault: Fault) -> None:
    server.fail(fault, times=2)
    with pytest.raises(RetryableError):
        list(shards(server).read("a.tar"))
    assert all_of(shards(server)) == CONTENT
    assert server.requests["shards/a.tar"] == 3


def test_a_silent_server_is_a_temporary_failure_after_the_time_out(server: FileServer) -> None:
    server.fail(Fault(stall=True))
    with pytest.raises(RetryableError, match="timed out"):
        list(shards(server, timeout=0.3).read("a.tar"))


def test_after_a_cut_only_the_rest_is_asked_for(server: FileServer) -> None:
    server.fail(Fault(cut=300_000), times=1)
    server.fail(Fault(cut=500_000), times=1)
    assert all_of(shards(server)) == CONTENT
    assert server.ranges["shards/a.tar"] == [None, "bytes=300000-", "bytes=800000-"]
    assert server.sent["shards/a.tar"] == len(CONTENT)


def test_after_a_cut_a_server_without_ranges_is_read_to_the_same_end(server: FileServer) -> None:
    server.fail(Fault(cut=300_000, ranges=False), times=1)
    server.fail(Fault(ranges=False))
    assert all_of(shards(server)) == CONTENT


def test_a_server_that_always_brings_something_new_is_never_given_up(server: FileServer) -> None:
    """Four cuts, with a pause of about 0.25 s after each: more than the patience of 0.6 s altogether."""
    server.fail(Fault(cut=len(CONTENT) // 4 - 1))
    assert all_of(shards(server), patience=0.6) == CONTENT


@pytest.mark.parametrize("patience", [0.0, 0.6])
def test_a_server_that_is_away_is_given_up_with_one_line(patience: float) -> None:
    url = f"http://127.0.0.1:{closed_port()}/shards"
    begun = time.monotonic()
    with pytest.raises(ServerUnavailable) as error:
        all_of(open_remote(url), patience=patience)
    assert patience <= time.monotonic() - begun < patience + 5
    assert str(error.value).startswith(f"{url}/a.tar: no new byte for")
    assert "Connection refused" in str(error.value)
    assert "\n" not in str(error.value)


def test_bytes_that_are_not_new_do_not_count_as_progress(server: FileServer) -> None:
    server.fail(Fault(cut=1000, ranges=False))
    with pytest.raises(ServerUnavailable, match=r"no new byte for .*cut"):
        all_of(shards(server), patience=0.8)


def test_the_pauses_between_tries_grow(server: FileServer) -> None:
    """0.25 and 0.5 s, give or take a fifth, and a last try when the patience ends."""
    server.fail(Fault(status=503))
    with pytest.raises(ServerUnavailable, match="503 Service Unavailable"):
        all_of(shards(server), patience=0.9)
    assert 3 <= server.requests["shards/a.tar"] <= 5


def test_a_server_that_was_given_up_is_not_waited_for_again_for_the_next_file(server: FileServer) -> None:
    """Else the loop would wait once more for what the prefetching has waited for already. The patience is more than the
    second for which a busy machine may hold this process between the two."""
    remote = shards(server)
    server.fail(Fault(status=503))
    with pytest.raises(ServerUnavailable):
        all_of(remote, patience=2.5)
    asked = server.requests.total()
    with pytest.raises(ServerUnavailable):
        all_of(remote, name="b.tar", patience=2.5)
    assert server.requests.total() == asked + 1
    server.behave()
    assert all_of(remote, patience=2.5) == CONTENT
    assert remote.silent_since is None


def test_a_pause_in_which_the_process_is_held_is_no_time_in_which_nobody_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(remote_module, "time", SimpleNamespace(monotonic=lambda: now))

    class Held(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            nonlocal now
            now += (timeout or 0) + 3
            return False

    remote = open_remote("http://127.0.0.1/shards")
    first = RetryPolicy(remote, "a.tar", 2.5, Held())
    first.pause(RetryableError("away"))
    with pytest.raises(ServerUnavailable):
        first.pause(RetryableError("away"))
    with pytest.raises(ServerUnavailable):
        RetryPolicy(remote, "b.tar", 2.5, Held()).pause(RetryableError("away"))
    now += 3  # but here nobody does
    RetryPolicy(remote, "c.tar", 2.5, Held()).pause(RetryableError("away"))


def test_a_file_that_alone_fails_is_given_up_although_others_come(server: FileServer) -> None:
    remote = shards(server)
    server.fail(Fault(status=500), path="shards/bad.tar")
    with ThreadPoolExecutor(1) as thread:
        bad = thread.submit(all_of, remote, 0, "bad.tar", 1.0)
        while not bad.done():
            assert all_of(remote) == CONTENT
    with pytest.raises(ServerUnavailable, match=r"bad\.tar"):
        bad.result()


def test_closing_ends_the_wait_for_the_next_try_within_a_second(server: FileServer) -> None:
    closing = threading.Event()
    server.fail(Fault(status=503))
    with ThreadPoolExecutor(1) as thread:
        reading = thread.submit(list, asking(shards(server), closing))
        while server.requests["shards/a.tar"] < 4:  # it now waits for about two seconds
            time.sleep(0.01)
        begun = time.monotonic()
        closing.set()
        with pytest.raises(Cancelled):
            reading.result(10)
        assert time.monotonic() - begun < 1


def test_closing_ends_a_slow_download(server: FileServer) -> None:
    closing = threading.Event()
    server.fail(Fault(rate=100_000))
    chunks = asking(shards(server), closing)
    next(chunks)
    closing.set()
    with pytest.raises(Cancelled):
        next(chunks)


def test_nothing_is_asked_of_the_server_after_closing(server: FileServer) -> None:
    closing = threading.Event()
    closing.set()
    with pytest.raises(Cancelled):
        list(asking(shards(server), closing))
    assert not server.requests


# ---- redirects


def test_a_redirect_within_the_scheme_is_followed_with_its_range(server: FileServer) -> None:
    server.fail(Fault(redirect="/shards/a.tar?token=1"), path="old/a.tar")
    assert all_of(open_remote(f"{server.url}/old"), start=1000) == CONTENT[1000:]
    assert server.ranges["shards/a.tar"] == ["bytes=1000-"]


@pytest.mark.parametrize("target", ["https://127.0.0.1/b.tar", "ftp://127.0.0.1/b.tar", "file:///etc/passwd"])
def test_a_redirect_to_another_scheme_is_refused_and_names_both_urls(server: FileServer, target: str) -> None:
    server.fail(Fault(redirect=target))
    with pytest.raises(NotThere) as error:
        all_of(shards(server))
    assert f"{server.url}/shards/a.tar" in str(error.value)
    assert target in str(error.value)
    assert ("give the https URL" in str(error.value)) == target.startswith("https")
    assert server.requests["shards/a.tar"] == 1


def test_a_circle_of_redirects_ends_in_one_line(server: FileServer) -> None:
    server.fail(Fault(redirect="/shards/a.tar"))
    with pytest.raises(NotThere, match="infinite loop") as error:
        all_of(shards(server))
    assert "\n" not in str(error.value)


# ---- https


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl to make a certificate with")
def test_https_is_read_where_the_certificate_is_trusted_and_refused_at_once_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate = tmp_path / "certificate.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 1 -subj /CN=127.0.0.1"
    command += f" -addext subjectAltName=IP:127.0.0.1 -keyout {certificate} -out {tmp_path / 'public.pem'}"
    subprocess.run(command.split(), check=True, capture_output=True)
    with certificate.open("ab") as file:
        file.write((tmp_path / "public.pem").read_bytes())
    (tmp_path / "a.tar").write_bytes(CONTENT)
    with FileServer(tmp_path, certificate) as server:
        with pytest.raises(NotThere, match=rf"^{server.url}/a.tar: .*self.signed certificate.*SSL_CERT_FILE"):
            all_of(open_remote(server.url))
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "public.pem"))
        assert all_of(open_remote(server.url), start=5) == CONTENT[5:]
        server.fail(Fault(redirect="http://127.0.0.1/a.tar"))
        with pytest.raises(NotThere, match=r"sent on to http://127.0.0.1/a.tar; only https is followed"):
            all_of(open_remote(server.url))


# ---- small files


def test_a_small_file_is_read_whole_up_to_its_limit(server: FileServer) -> None:
    assert read_whole(shards(server), "a.tar", len(CONTENT)) == CONTENT
    with pytest.raises(UserError, match=f"more than {len(CONTENT) - 1} bytes"):
        read_whole(shards(server), "a.tar", len(CONTENT) - 1)


def test_a_small_file_that_is_replaced_between_two_tries_is_not_mixed(server: FileServer) -> None:
    server.fail(Fault(content=b"old" * 1000, cut=1000), times=1)
    server.fail(Fault(content=b"new" * 1000), times=1)
    assert read_whole(shards(server), "a.tar", 10_000) == b"new" * 1000


def test_a_small_file_of_a_server_that_is_away_is_given_up() -> None:
    with pytest.raises(ServerUnavailable):
        read_whole(open_remote(f"http://127.0.0.1:{closed_port()}"), "manifest.json", 1000, patience=0.3)


def test_a_server_that_trickles_is_given_up_and_spoken_of(
    server: FileServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(remote_module, "_SAY_AFTER", 0.1)
    server.fail(Fault(rate=30))
    for read in (
        lambda: read_whole(shards(server), "a.tar", 10**7, patience=0.6),
        lambda: all_of(shards(server), patience=0.6),
    ):
        begun = time.monotonic()
        with pytest.raises(ServerUnavailable, match=rf"^{server.url}/shards/a.tar: \d+ bytes in 1 s; check the server"):
            read()
        assert 0.5 < time.monotonic() - begun < 5
    said = capsys.readouterr().out.splitlines()
    assert said and all(f"waiting for {server.url}/shards/a.tar: " in line for line in said)


def test_a_server_that_is_slow_but_of_use_is_waited_for(server: FileServer) -> None:
    (server.directory / "shards/small").write_bytes(CONTENT[:16_000])
    server.fail(Fault(rate=16_000))
    assert read_whole(shards(server), "small", 10**7, patience=0.5) == CONTENT[:16_000]


def test_what_every_try_brings_anew_is_no_news(server: FileServer) -> None:
    server.fail(Fault(cut=100_000))
    with pytest.raises(ServerUnavailable):
        read_whole(shards(server), "a.tar", 10**7, patience=0.6)


# ---- S3


@pytest.fixture(scope="module")
def moto_url() -> Iterator[str]:
    """S3 with a bucket that holds rooms/a.tar (1 MiB), rooms/big.tar (20 MiB, more than two pieces) and rooms/empty."""
    pytest.importorskip("s3fs")
    moto, boto3 = pytest.importorskip("moto.server"), pytest.importorskip("boto3")
    server = moto.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    url = "http://{}:{}".format(*server.get_host_and_port())
    client = boto3.client("s3", "us-east-1", endpoint_url=url, aws_access_key_id="a", aws_secret_access_key="b")
    client.create_bucket(Bucket="depth")
    for name, content in {"a.tar": CONTENT, "big.tar": CONTENT * 20, "empty": b""}.items():
        client.put_object(Bucket="depth", Key=f"rooms/{name}", Body=content)
    yield url
    server.stop()


@pytest.fixture
def aws(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    pytest.importorskip("s3fs")
    settings = {
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": str(tmp_path / "none"),
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "none"),
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


@pytest.fixture
def bucket(moto_url: str, aws: pytest.MonkeyPatch) -> str:
    aws.setenv("AWS_ENDPOINT_URL", moto_url)
    return "s3://depth/rooms"


def test_an_object_is_read_from_any_byte_on(bucket: str) -> None:
    remote = open_remote(f"{bucket}/")
    assert remote.url("a.tar") == "s3://depth/rooms/a.tar"
    assert all_of(remote, name="a.tar") == CONTENT
    assert all_of(remote, 1000, name="a.tar") == CONTENT[1000:]
    assert all_of(remote, len(CONTENT), name="a.tar") == b""
    assert all_of(remote, name="empty") == b""
    with pytest.raises(RangeError):
        all_of(remote, len(CONTENT) + 1, name="a.tar")


def test_an_object_of_several_pieces_is_whole_in_chunks_of_at_most_1_mib(bucket: str) -> None:
    chunks = list(open_remote(bucket).read("big.tar", 5))
    assert b"".join(chunks) == (CONTENT * 20)[5:]
    assert max(map(len, chunks)) <= 2**20


def test_a_small_object_is_read_whole(bucket: str) -> None:
    assert read_whole(open_remote(bucket), "a.tar", len(CONTENT)) == CONTENT


@pytest.mark.parametrize("location", ["s3://depth/rooms", "s3://depth", "s3://another/rooms"])
def test_a_missing_object_folder_or_bucket_is_not_asked_again(bucket: str, location: str) -> None:
    with pytest.raises(NotThere) as error:
        all_of(open_remote(location), name="rooms" if location == "s3://depth" else "b.tar")
    assert str(error.value).startswith(f"{location}/")
    assert "\n" not in str(error.value)


def test_missing_credentials_are_named(bucket: str, aws: pytest.MonkeyPatch) -> None:
    aws.delenv("AWS_ACCESS_KEY_ID")
    aws.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(NotThere, match="no AWS credentials; a public bucket takes FSSPEC_S3_ANON=true"):
        all_of(open_remote(bucket))


@pytest.mark.parametrize(("status", "kind"), [(403, NotThere), (400, NotThere), (503, RetryableError)])
def test_s3_answers_are_judged_as_those_of_http(
    server: FileServer, aws: pytest.MonkeyPatch, status: int, kind: type[Exception]
) -> None:
    aws.setenv("AWS_ENDPOINT_URL", server.url)
    server.fail(Fault(status=status))
    with pytest.raises(kind):
        next(open_remote("s3://shards").read("a.tar"))
    assert server.requests["shards/a.tar"] == 1  # the library's own tries would only take away from ours


@pytest.mark.parametrize("fault", [Fault(reset=True), Fault(stall=True)], ids=["reset", "silent"])
def test_an_s3_server_that_fails_to_answer_is_a_temporary_failure(
    server: FileServer, aws: pytest.MonkeyPatch, fault: Fault
) -> None:
    aws.setenv("AWS_ENDPOINT_URL", server.url)
    server.fail(fault)
    with pytest.raises(RetryableError):
        next(open_remote("s3://shards", timeout=0.5).read("a.tar"))


def test_an_object_that_is_cut_goes_on_with_its_last_piece(server: FileServer, aws: pytest.MonkeyPatch) -> None:
    """The plain file server, which speaks enough of S3 for one object."""
    (server.directory / "shards/big.tar").write_bytes(CONTENT * 9)
    aws.setenv("AWS_ENDPOINT_URL", server.url)
    server.fail(Fault(), times=2)  # its size, and the first 8 MiB
    server.fail(Fault(cut=1000), times=1)
    assert all_of(open_remote("s3://shards"), name="big.tar") == CONTENT * 9
    first, second = f"bytes=0-{2**23 - 1}", f"bytes={2**23}-{9 * 2**20 - 1}"
    assert server.ranges["shards/big.tar"] == [None, first, second, None, second]


def test_an_s3_server_that_is_away_is_given_up(aws: pytest.MonkeyPatch) -> None:
    aws.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{closed_port()}")
    with pytest.raises(ServerUnavailable, match=r"^s3://shards/a.tar: no new byte for"):
        all_of(open_remote("s3://shards"), patience=0.5)


def test_an_endpoint_that_makes_no_sense_is_one_line(aws: pytest.MonkeyPatch) -> None:
    aws.setenv("AWS_ENDPOINT_URL", "nonsense")
    with pytest.raises(NotThere, match="check the AWS settings"):
        all_of(open_remote("s3://shards"))


def test_an_interpreter_ends_while_a_thread_waits_for_a_silent_s3_server(
    server: FileServer, aws: pytest.MonkeyPatch
) -> None:
    aws.setenv("AWS_ENDPOINT_URL", server.url)
    server.fail(Fault(stall=True))
    program = (
        "import sys, threading, time\n"
        "from mde_dist.data.storage.remote import open_remote\n"
        "remote = open_remote('s3://shards', timeout=300)\n"
        "threading.Thread(target=lambda: list(remote.read('a.tar')), daemon=True).start()\n"
        "sys.stdin.readline()\n"
    )
    child = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE)
    while not server.requests["shards/a.tar"]:
        time.sleep(0.01)
    child.communicate(b"end\n", timeout=20)
    assert child.returncode == 0


def test_s3_without_its_library_says_what_to_install() -> None:
    program = (
        "import sys\n"
        "sys.modules['s3fs'] = None\n"
        "from mde_dist.data.storage.remote import UserError, open_remote\n"
        "try:\n"
        "    open_remote('s3://bucket/a')\n"
        "except UserError as error:\n"
        "    print(error)\n"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("s3://bucket/a: s3:// needs s3fs")
    assert run.stdout.endswith("pip install 'mde_dist[s3]'\n")
    assert run.stdout.count("\n") == 1
