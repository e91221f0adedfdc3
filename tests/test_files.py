"""Files that are whole or not there, on a real disk and on a full one."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mde_dist.utils.io import atomic_file, sha256_of, sync_directory, write_atomic


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_a_new_file_appears_under_its_name_only_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    with atomic_file(path) as file:
        file.write(b"first half, ")
        file.flush()
        assert not path.exists()
        assert len(names(tmp_path)) == 1  # the temporary, in the same directory and so on the same disk
        file.write(b"second half")
    assert path.read_bytes() == b"first half, second half"
    assert names(tmp_path) == ["a.bin"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_the_old_content_stays_when_the_block_raises(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "a.bin"
    write_atomic(path, b"old")
    with pytest.raises(error), atomic_file(path) as file:
        file.write(b"new" * 100_000)
        raise error
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["a.bin"]


def test_no_file_is_left_when_the_first_writing_fails(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="on purpose"), atomic_file(tmp_path / "a.bin"):
        raise ValueError("on purpose")
    assert names(tmp_path) == []


def test_while_it_is_written_readers_see_the_old_file_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    write_atomic(path, b"old")
    with path.open("rb") as reader:
        with atomic_file(path) as file:
            file.write(b"new")
            file.flush()
            assert path.read_bytes() == b"old"
        assert reader.read() == b"old"  # one who had it open before
    assert path.read_bytes() == b"new"


def test_text_is_written_as_utf8_and_bytes_as_they_are(tmp_path: Path) -> None:
    write_atomic(tmp_path / "text", "Küche\n")
    write_atomic(tmp_path / "bytes", b"\r\n\x00\xff")
    assert (tmp_path / "text").read_bytes() == b"K\xc3\xbcche\n"
    assert (tmp_path / "bytes").read_bytes() == b"\r\n\x00\xff"


def test_a_directory_that_is_not_there_raises_and_makes_nothing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_atomic(tmp_path / "nowhere/a.bin", b"x")
    with pytest.raises(FileNotFoundError):
        sync_directory(tmp_path / "nowhere")
    assert names(tmp_path) == []


def test_a_name_that_is_a_directory_raises_and_leaves_no_temporary(tmp_path: Path) -> None:
    (tmp_path / "taken/inside").mkdir(parents=True)
    with pytest.raises(OSError, match="irectory"):
        write_atomic(tmp_path / "taken", b"x")
    assert names(tmp_path) == ["taken"]


def test_a_full_disk_leaves_the_old_file_and_no_temporary(tmp_path: Path) -> None:
    """Stood in for by a limit on the size of files, in a process of its own."""
    write_atomic(tmp_path / "a.bin", b"old")
    program = (
        "import resource, signal, sys\n"
        "from pathlib import Path\n"
        "from mde_dist.utils.io import write_atomic\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))\n"
        "try:\n"
        "    write_atomic(Path(sys.argv[1]), b'new' * 100_000)\n"
        "except OSError as error:\n"
        "    print(error.strerror)\n"
    )
    run = subprocess.run([sys.executable, "-c", program, str(tmp_path / "a.bin")], capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr) == (0, "File too large\n", "")
    assert (tmp_path / "a.bin").read_bytes() == b"old"
    assert names(tmp_path) == ["a.bin"]


def test_a_killed_writer_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    write_atomic(path, b"old")
    program = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from mde_dist.utils.io import atomic_file\n"
        "with atomic_file(Path(sys.argv[1])) as file:\n"
        "    file.write(b'new' * 100_000)\n"
        "    file.flush()\n"
        "    print('written', flush=True)\n"
        "    time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        assert run.stdout.readline() == "written\n"
        os.kill(run.pid, signal.SIGKILL)
        run.wait()
    assert path.read_bytes() == b"old"
    write_atomic(path, b"newer")  # what it left is in nobody's way
    assert path.read_bytes() == b"newer"


def _write_often(path: Path, letter: str) -> None:
    for _ in range(40):
        write_atomic(path, letter * 100_000)


def test_two_processes_that_write_one_file_never_mix(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    write_atomic(path, "a" * 100_000)
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_write_often, args=(path, letter)) for letter in "ab"]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        seen = path.read_text()
        assert len(seen) == 100_000
        assert len(set(seen)) == 1
        time.sleep(0.001)
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert names(tmp_path) == ["a.bin"]


def test_sha256_of_a_file_larger_than_a_read(tmp_path: Path) -> None:
    data = bytes(range(256)) * 5000 + b"end"
    (tmp_path / "a.bin").write_bytes(data)
    assert sha256_of(tmp_path / "a.bin") == hashlib.sha256(data).hexdigest()
