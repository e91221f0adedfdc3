"""A node's cache of shards, filled from a real server by threads and processes, some of which are killed."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from commands import environment
from gaps import gaps
from servers import Fault, FileServer

from mde_dist.data.manifest import FileInfo as Wanted
from mde_dist.data.storage.cache import Cache
from mde_dist.data.storage.remote import Cancelled, NotThere, Remote, ServerUnavailable, open_remote
from mde_dist.utils.errors import UserError

MIB = 2**20
SIZES = {"a.tar": MIB, "b.tar": MIB + 1, "c.tar": 700_000, "d.tar": 300_000}
FOREVER = threading.Event()  # never set


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FileServer]:
    (tmp_path / "served").mkdir()
    for name, size in SIZES.items():
        (tmp_path / "served" / name).write_bytes(random.Random(name).randbytes(size))
    with FileServer(tmp_path / "served") as server:
        yield server


@pytest.fixture
def remote(server: FileServer) -> Remote:
    return open_remote(server.url)


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache", 100 * MIB, patience=0.5)


def wanted(server: FileServer, name: str) -> Wanted:
    content = (server.directory / name).read_bytes()
    return Wanted(name, len(content), hashlib.sha256(content).hexdigest())


def content_of(server: FileServer, name: str) -> bytes:
    return (server.directory / name).read_bytes()


def part_of(cache: Cache, want: Wanted) -> Path:
    return cache.directory / f"{want.sha256}.part"


def held(cache: Cache) -> list[str]:
    """What is in the cache, but for its lock."""
    return sorted(path.name for path in cache.directory.iterdir() if path.name != ".lock")


def total(cache: Cache) -> int:
    """Bytes of whole files."""
    size = 0
    for path in cache.directory.glob("?" * 64):
        with contextlib.suppress(FileNotFoundError):
            size += path.stat().st_size
    return size


FETCH = """
import sys, threading
from pathlib import Path
from mde_dist.data.storage.cache import Cache
from mde_dist.data.manifest import FileInfo as Wanted
from mde_dist.data.storage.remote import open_remote
directory, url, *files = sys.argv[1:]
cache, remote = Cache(Path(directory), 100 * 2**20), open_remote(url)
for file in files:
    name, size, sha256 = file.split(":")
    print(cache.fetch(remote, Wanted(name, int(size), sha256), threading.Event()).name, flush=True)
"""


def fetching_process(
    cache: Cache, server: FileServer, *wants: Wanted, env: dict[str, str] | None = None
) -> subprocess.Popen[str]:
    files = [f"{want.name}:{want.bytes}:{want.sha256}" for want in wants]
    command = [sys.executable, "-c", FETCH, str(cache.directory), server.url, *files]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env, text=True)


def wait_for_size(path: Path, size: int) -> None:
    deadline = time.monotonic() + 20
    while not (path.exists() and path.stat().st_size >= size):
        assert time.monotonic() < deadline, f"{path} does not grow"
        time.sleep(0.005)


# ---- one file


def test_a_file_is_downloaded_once_and_found_from_then_on(cache: Cache, server: FileServer, remote: Remote) -> None:
    want = wanted(server, "a.tar")
    assert cache.find(want) is None
    path = cache.fetch(remote, want, FOREVER)
    assert path == cache.directory / want.sha256
    assert path.read_bytes() == content_of(server, "a.tar")
    assert held(cache) == [want.sha256]
    assert cache.find(want) == cache.fetch(remote, want, FOREVER) == path
    assert server.requests["a.tar"] == 1


def test_another_cache_object_finds_what_is_there(cache: Cache, server: FileServer, remote: Remote) -> None:
    path = cache.fetch(remote, wanted(server, "a.tar"), FOREVER)
    assert Cache(cache.directory, 100 * MIB).find(wanted(server, "a.tar")) == path


def test_the_same_content_under_another_name_is_there_already(cache: Cache, server: FileServer, remote: Remote) -> None:
    want = wanted(server, "a.tar")
    cache.fetch(remote, want, FOREVER)
    cache.fetch(remote, Wanted("of another run.tar", want.bytes, want.sha256), FOREVER)
    assert set(server.requests) == {"a.tar"}


def test_an_empty_file_is_fetched_too(cache: Cache, server: FileServer, remote: Remote) -> None:
    (server.directory / "empty").touch()
    assert cache.fetch(remote, wanted(server, "empty"), FOREVER).read_bytes() == b""


def test_a_cut_download_goes_on_where_it_was_cut(cache: Cache, server: FileServer, remote: Remote) -> None:
    server.fail(Fault(cut=400_000), times=1)
    want = wanted(server, "a.tar")
    assert cache.fetch(remote, want, FOREVER).read_bytes() == content_of(server, "a.tar")
    assert server.ranges["a.tar"] == [None, "bytes=400000-"]
    assert server.sent["a.tar"] == want.bytes


@pytest.mark.parametrize("ranges", [True, False], ids=["ranges", "no ranges"])
def test_a_part_that_is_there_is_resumed(cache: Cache, server: FileServer, remote: Remote, ranges: bool) -> None:
    server.fail(Fault(ranges=ranges))
    want, content = wanted(server, "a.tar"), content_of(server, "a.tar")
    part_of(cache, want).write_bytes(content[:600_000])
    assert cache.fetch(remote, want, FOREVER).read_bytes() == content
    assert server.ranges["a.tar"] == ["bytes=600000-"]
    assert server.sent["a.tar"] == (want.bytes - 600_000 if ranges else want.bytes)
    assert held(cache) == [want.sha256]


def test_a_part_that_is_complete_needs_no_server(cache: Cache, server: FileServer, remote: Remote) -> None:
    want, content = wanted(server, "a.tar"), content_of(server, "a.tar")
    part_of(cache, want).write_bytes(content)
    assert cache.fetch(remote, want, FOREVER).read_bytes() == content
    assert not server.requests


@pytest.mark.parametrize(
    "part", [b"x" * 600_000, b"x" * MIB, b"x" * (MIB + 1)], ids=["shorter", "of its size", "longer"]
)
def test_a_part_that_is_no_start_of_the_file_is_dropped(
    cache: Cache, server: FileServer, remote: Remote, part: bytes
) -> None:
    want = wanted(server, "a.tar")
    part_of(cache, want).write_bytes(part)
    assert cache.fetch(remote, want, FOREVER).read_bytes() == content_of(server, "a.tar")
    assert server.ranges["a.tar"][-1] is None


def test_a_download_that_arrives_damaged_is_made_once_more(cache: Cache, server: FileServer, remote: Remote) -> None:
    server.fail(Fault(content=b"x" * MIB), times=1)
    assert cache.fetch(remote, wanted(server, "a.tar"), FOREVER).read_bytes() == content_of(server, "a.tar")
    assert server.ranges["a.tar"] == [None, None]


@pytest.mark.parametrize("size", [0, 1000, MIB, 5 * MIB])
@pytest.mark.parametrize("part", [0, 2000])
def test_a_file_that_was_changed_on_the_server_is_named_in_one_line(
    cache: Cache, server: FileServer, remote: Remote, size: int, part: int
) -> None:
    want = wanted(server, "a.tar")
    part_of(cache, want).write_bytes(content_of(server, "a.tar")[:part])
    changed = random.Random(1).randbytes(size)
    server.fail(Fault(content=changed))
    with pytest.raises(UserError) as error:
        cache.fetch(remote, want, FOREVER)
    found = hashlib.sha256(changed[: want.bytes]).hexdigest()
    assert str(error.value) == (
        f"{server.url}/a.tar is not the file that the manifest names (sha256 {found}, expected {want.sha256}): "
        "it was changed or damaged on the server"
    )
    assert cache.find(want) is None
    assert server.requests["a.tar"] == 2
    server.behave()
    assert cache.fetch(remote, want, FOREVER).read_bytes() == content_of(server, "a.tar")


def test_no_more_than_the_stated_size_is_ever_written(cache: Cache, server: FileServer, remote: Remote) -> None:
    """In a process that may write no larger file."""
    want = wanted(server, "a.tar")
    server.fail(Fault(content=content_of(server, "a.tar") + b"more" * 10_000_000, length=False))
    limit = f"import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, ({want.bytes}, {want.bytes}))\n"
    command = [sys.executable, "-c", limit + FETCH, str(cache.directory), server.url]
    run = subprocess.run([*command, f"a.tar:{want.bytes}:{want.sha256}"], capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (0, f"{want.sha256}\n"), run.stderr
    assert cache.find(want) is not None


def test_a_whole_file_that_was_cut_is_fetched_again(cache: Cache, server: FileServer, remote: Remote) -> None:
    want = wanted(server, "a.tar")
    os.truncate(cache.fetch(remote, want, FOREVER), 1000)
    assert cache.find(want) is None
    assert cache.fetch(remote, want, FOREVER).read_bytes() == content_of(server, "a.tar")
    assert server.requests["a.tar"] == 2


# ---- a copy that is damaged


def test_a_damaged_copy_is_fetched_anew_beside_those_who_read_it(
    cache: Cache, server: FileServer, remote: Remote
) -> None:
    want, content = wanted(server, "a.tar"), content_of(server, "a.tar")
    path = cache.fetch(remote, want, FOREVER)
    cache.renew(remote, want, FOREVER)
    assert server.requests["a.tar"] == 1  # it was whole
    damaged = content[:1000] + b"x" * 1000 + content[2000:]
    path.write_bytes(damaged)
    with path.open("rb") as reader, ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda _: cache.renew(remote, want, FOREVER), range(8)))
        assert reader.read() == damaged
    assert path.read_bytes() == content
    assert server.requests["a.tar"] == 2  # once for all
    assert held(cache) == [want.sha256]


def test_a_copy_that_is_gone_is_fetched_and_one_of_a_server_that_changed_is_an_error(
    cache: Cache, server: FileServer, remote: Remote, capsys: pytest.CaptureFixture[str]
) -> None:
    want = wanted(server, "a.tar")
    cache.renew(remote, want, FOREVER)
    assert capsys.readouterr().out == ""
    path = cache.fetch(remote, want, FOREVER)
    path.write_bytes(b"x" * want.bytes)
    server.fail(Fault(content=b"y" * want.bytes))
    with pytest.raises(UserError, match="changed or damaged on the server"):
        cache.renew(remote, want, FOREVER)
    assert "is a damaged copy of" in capsys.readouterr().out
    assert cache.find(want) is None  # nobody reads the damaged one again


def test_what_cannot_be_evicted_ends_no_download(
    tmp_path: Path, server: FileServer, remote: Remote, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As another user's file in a directory with the sticky bit; the next one makes room."""
    cache = Cache(tmp_path / "cache", SIZES["c.tar"] + SIZES["d.tar"] + 200_000)
    c, d, b = (wanted(server, name) for name in ("c.tar", "d.tar", "b.tar"))
    stays, goes = (cache.fetch(remote, want, FOREVER) for want in (c, d))
    real = Path.unlink

    def unlink(self: Path, missing_ok: bool = False) -> None:
        if self == stays:
            raise PermissionError(1, "Operation not permitted")
        real(self, missing_ok)

    monkeypatch.setattr(Path, "unlink", unlink)
    assert cache.fetch(remote, b, FOREVER).is_file()
    assert stays.is_file() and not goes.exists()


# ---- mistakes


@pytest.mark.parametrize("sha256", ["", "../../etc/passwd", "g" * 64, "A" * 64, "0" * 63, "0" * 65, "0" * 64 + "\n"])
def test_a_hash_that_is_none_is_no_file_name(cache: Cache, server: FileServer, remote: Remote, sha256: str) -> None:
    want = Wanted("a.tar", MIB, sha256)
    with pytest.raises(UserError, match=r"^a.tar: .* is no SHA-256"):
        cache.find(want)
    with pytest.raises(UserError, match=r"^a.tar: .* is no SHA-256"):
        cache.fetch(remote, want, FOREVER)
    assert held(cache) == []
    assert not server.requests


def test_a_directory_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError) as error:
        Cache(tmp_path / "file/cache", MIB)
    assert str(error.value).startswith(f"cannot write the cache {tmp_path}/file/cache: Not a directory")
    assert "\n" not in str(error.value)


def test_a_disk_that_takes_no_more_is_one_line_and_what_it_took_is_resumed(
    cache: Cache, server: FileServer, remote: Remote
) -> None:
    """Stood in for by a limit on the size of files, in a process of its own."""
    want = wanted(server, "a.tar")
    limit = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))\n"
    command = [sys.executable, "-c", limit + FETCH, str(cache.directory), server.url]
    run = subprocess.run([*command, f"a.tar:{want.bytes}:{want.sha256}"], capture_output=True, text=True)
    assert run.returncode == 1
    assert run.stderr.splitlines()[-1] == (
        f"mde_dist.utils.errors.RankError: cannot write the cache {cache.directory}: File too large; "
        "free space there, or name another directory with data.cache"
    )
    cache.fetch(remote, want, FOREVER)
    assert server.ranges["a.tar"] == [None, "bytes=500000-"]


def test_a_file_that_is_not_there_is_not_asked_again(cache: Cache, server: FileServer, remote: Remote) -> None:
    with pytest.raises(NotThere, match="404"):
        cache.fetch(remote, Wanted("e.tar", 5, "0" * 64), FOREVER)
    assert server.requests["e.tar"] == 1


def test_a_server_that_goes_away_in_mid_file_is_given_up_and_resumed_later(
    cache: Cache, server: FileServer, remote: Remote
) -> None:
    want = wanted(server, "a.tar")
    server.fail(Fault(cut=300_000), times=1)
    server.fail(Fault(status=503))
    with pytest.raises(ServerUnavailable, match=f"^{server.url}/a.tar: no new byte for"):
        cache.fetch(remote, want, FOREVER)
    assert part_of(cache, want).stat().st_size == 300_000
    server.behave()
    cache.fetch(remote, want, FOREVER)
    assert server.ranges["a.tar"][-1] == "bytes=300000-"
    assert server.sent["a.tar"] == want.bytes


# ---- several at once


def test_threads_that_want_the_same_files_download_each_once(cache: Cache, server: FileServer, remote: Remote) -> None:
    server.fail(Fault(rate=2 * MIB))
    wants = [wanted(server, name) for name in SIZES] * 6
    random.Random(0).shuffle(wants)
    with ThreadPoolExecutor(len(wants)) as threads:
        paths = list(threads.map(lambda want: cache.fetch(remote, want, FOREVER), wants))
    assert [path.read_bytes() for path in paths] == [content_of(server, want.name) for want in wants]
    assert server.requests == dict.fromkeys(SIZES, 1)
    assert server.sent == SIZES
    assert held(cache) == sorted(wanted(server, name).sha256 for name in SIZES)


def test_processes_that_want_the_same_files_download_each_once(cache: Cache, server: FileServer) -> None:
    server.fail(Fault(rate=2 * MIB))
    wants = [wanted(server, name) for name in SIZES]
    orders = [wants, wants, wants[::-1], wants[2:] + wants[:2]]
    processes = [fetching_process(cache, server, *order) for order in orders]
    for process, order in zip(processes, orders, strict=True):
        output, _ = process.communicate(timeout=30)
        assert process.returncode == 0
        assert output.split() == [want.sha256 for want in order]
    assert server.requests == dict.fromkeys(SIZES, 1)
    assert server.sent == SIZES
    for want in wants:
        assert (cache.directory / want.sha256).read_bytes() == content_of(server, want.name)
    assert held(cache) == sorted(want.sha256 for want in wants)


def test_a_killed_download_is_resumed_by_the_one_who_waits_for_it(
    cache: Cache, server: FileServer, remote: Remote
) -> None:
    want = wanted(server, "a.tar")
    server.fail(Fault(rate=MIB / 2), times=1)
    process = fetching_process(cache, server, want)
    wait_for_size(part_of(cache, want), 200_000)
    with ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(cache.fetch, remote, want, FOREVER)
        time.sleep(0.2)
        assert server.requests["a.tar"] == 1  # it waits, as the other one is alive
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert waiting.result(20).read_bytes() == content_of(server, "a.tar")
    first, second = server.ranges["a.tar"]
    assert first is None
    assert second is not None
    assert 200_000 <= int(second.removeprefix("bytes=").removesuffix("-")) < MIB


def test_where_no_file_can_be_locked_one_downloads_and_the_next_goes_on_when_it_is_killed(
    cache: Cache, server: FileServer
) -> None:
    env = environment(**gaps(f"flock:ENOLCK:{cache.directory}", f"fsync-dir:EINVAL:{cache.directory}"))
    want = wanted(server, "a.tar")
    server.fail(Fault(rate=MIB / 8), times=1)
    first = fetching_process(cache, server, want, env=env)
    wait_for_size(part_of(cache, want), 200_000)
    others = [fetching_process(cache, server, want, env=env) for _ in range(2)]
    time.sleep(0.5)
    assert server.requests["a.tar"] == 1
    first.kill()
    first.communicate()
    for other in others:
        assert other.communicate(timeout=30)[0].split() == [want.sha256]
    begun, resumed = server.ranges["a.tar"]
    assert begun is None
    assert resumed is not None
    assert held(cache) == [want.sha256]
    assert (cache.directory / want.sha256).read_bytes() == content_of(server, "a.tar")


def test_a_failed_download_is_tried_by_the_next_one_in_line(cache: Cache, server: FileServer, remote: Remote) -> None:
    want = wanted(server, "a.tar")
    server.fail(Fault(stall=True, status=404), times=1)
    with ThreadPoolExecutor(2) as threads:
        fetches = [threads.submit(cache.fetch, remote, want, FOREVER) for _ in range(2)]
        time.sleep(0.3)
        server.release.set()
        outcomes = [fetch.exception(20) for fetch in fetches]
    assert sorted(type(outcome).__name__ for outcome in outcomes) == ["NoneType", "NotThere"]


@pytest.mark.parametrize("what", ["another download", "the cache's lock"])
def test_closing_ends_the_wait_for_a_lock_within_a_second(
    cache: Cache, server: FileServer, remote: Remote, what: str
) -> None:
    want, closing = wanted(server, "a.tar"), threading.Event()
    lock = part_of(cache, want) if what == "another download" else cache.directory / ".lock"
    with lock.open("ab") as holder, ThreadPoolExecutor(1) as thread:
        fcntl.flock(holder, fcntl.LOCK_EX)
        fetch = thread.submit(cache.fetch, remote, want, closing)
        time.sleep(0.3)
        assert not fetch.done()
        assert not server.requests
        begun = time.monotonic()
        closing.set()
        with pytest.raises(Cancelled):
            fetch.result(20)
        assert time.monotonic() - begun < 1


def test_a_closed_download_leaves_its_part_to_the_next(cache: Cache, server: FileServer, remote: Remote) -> None:
    want, closing = wanted(server, "a.tar"), threading.Event()
    server.fail(Fault(rate=MIB / 2), times=1)
    with ThreadPoolExecutor(1) as thread:
        fetch = thread.submit(cache.fetch, remote, want, closing)
        wait_for_size(part_of(cache, want), 100_000)
        closing.set()
        with pytest.raises(Cancelled):
            fetch.result(20)
    size = part_of(cache, want).stat().st_size
    assert cache.fetch(remote, want, FOREVER).read_bytes() == content_of(server, "a.tar")
    assert server.ranges["a.tar"] == [None, f"bytes={size}-"]


# ---- the limit


def test_the_least_recently_used_file_goes_first(tmp_path: Path, server: FileServer, remote: Remote) -> None:
    cache = Cache(tmp_path / "cache", SIZES["a.tar"] + SIZES["c.tar"] + SIZES["d.tar"])
    a, b, c, d = (wanted(server, name) for name in SIZES)
    for want in (a, c, d):
        cache.fetch(remote, want, FOREVER)
    assert held(cache) == sorted(want.sha256 for want in (a, c, d))  # they fit exactly
    cache.find(a)  # in use: the oldest is now c
    cache.fetch(remote, d, FOREVER)  # in use as well
    (server.directory / "tiny").write_bytes(b"1")
    cache.fetch(remote, wanted(server, "tiny"), FOREVER)
    assert held(cache) == sorted(want.sha256 for want in (a, d, wanted(server, "tiny")))
    cache.fetch(remote, b, FOREVER)
    assert held(cache) == sorted(want.sha256 for want in (b, d, wanted(server, "tiny")))


def test_an_evicted_file_that_is_open_stays_readable_and_is_fetched_again(
    tmp_path: Path, server: FileServer, remote: Remote
) -> None:
    cache = Cache(tmp_path / "cache", 1_200_000)
    a, b = wanted(server, "a.tar"), wanted(server, "b.tar")
    with cache.fetch(remote, a, FOREVER).open("rb") as file:
        cache.fetch(remote, b, FOREVER)
        assert cache.find(a) is None
        assert file.read() == content_of(server, "a.tar")
    assert cache.fetch(remote, a, FOREVER).read_bytes() == content_of(server, "a.tar")
    assert cache.find(b) is None


def test_a_file_larger_than_the_limit_is_refused_and_evicts_nothing(
    tmp_path: Path, server: FileServer, remote: Remote
) -> None:
    cache = Cache(tmp_path / "cache", SIZES["a.tar"])
    a = wanted(server, "a.tar")
    cache.fetch(remote, a, FOREVER)
    with pytest.raises(UserError, match=rf"b.tar: {MIB + 1} bytes do not fit in a cache of {MIB}; raise data.cache_gb"):
        cache.fetch(remote, wanted(server, "b.tar"), FOREVER)
    assert held(cache) == [a.sha256]


def test_parts_that_nobody_downloads_make_room_and_others_do_not(
    tmp_path: Path, server: FileServer, remote: Remote
) -> None:
    cache = Cache(tmp_path / "cache", SIZES["b.tar"])
    given_up, going_on = (part_of(cache, wanted(server, name)) for name in ("c.tar", "d.tar"))
    given_up.write_bytes(b"x" * 600_000)
    going_on.write_bytes(b"x" * 200_000)
    with going_on.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        cache.fetch(remote, wanted(server, "a.tar"), FOREVER)
    assert held(cache) == sorted([wanted(server, "a.tar").sha256, going_on.name])


def test_files_that_are_not_the_caches_are_left_alone(tmp_path: Path, server: FileServer, remote: Remote) -> None:
    cache = Cache(tmp_path / "cache", SIZES["a.tar"])
    (cache.directory / "notes.txt").write_bytes(b"x" * 2 * MIB)
    cache.fetch(remote, wanted(server, "a.tar"), FOREVER)
    cache.fetch(remote, wanted(server, "d.tar"), FOREVER)
    assert held(cache) == sorted([wanted(server, "d.tar").sha256, "notes.txt"])


def test_whole_files_never_exceed_the_limit_while_many_download(
    tmp_path: Path, server: FileServer, remote: Remote
) -> None:
    names = [f"{number}.bin" for number in range(24)]
    for name in names:
        (server.directory / name).write_bytes(random.Random(name).randbytes(100_000))
    server.fail(Fault(rate=2 * MIB))
    cache = Cache(tmp_path / "cache", 350_000)
    largest, done = 0, threading.Event()

    def watch() -> None:
        nonlocal largest
        while not done.is_set():
            largest = max(largest, total(cache))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        with ThreadPoolExecutor(8) as threads:
            list(threads.map(lambda name: cache.fetch(remote, wanted(server, name), FOREVER), names))
    finally:
        done.set()
        watcher.join()
    assert 0 < largest <= 350_000
    assert total(cache) == 300_000


def test_those_who_wait_for_a_download_lose_patience_with_the_one_who_downloads(
    server: FileServer, tmp_path: Path
) -> None:
    """Not one after another: a server that stays away ends all ranks of a node at once."""
    server.fail(Fault(status=503))
    caches = [Cache(tmp_path / "cache", 10 * MIB, patience=1.5) for _ in range(4)]
    want = wanted(server, "a.tar")
    with ThreadPoolExecutor(4) as threads:  # each with a Remote of its own, as ranks have
        fetches = [threads.submit(cache.fetch, open_remote(server.url), want, FOREVER) for cache in caches]
        for fetch in fetches:
            with pytest.raises(ServerUnavailable):
                fetch.result(30)
    assert server.requests["a.tar"] <= 10  # the first one asks 4 or 5 times in its 1.5 s, the others once
