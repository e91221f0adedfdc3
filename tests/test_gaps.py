"""The shim of gaps.py: calls fail where the rules say so, and nowhere else."""

import errno
import subprocess
import sys

from commands import environment
from gaps import gaps

CALLS = """
import fcntl, os, shutil, sys
from multiprocessing.shared_memory import SharedMemory

def code(action):
    try:
        action()
    except OSError as error:
        return error.errno
    return 0

def sync(path):
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)

os.chdir(sys.argv[1])
with open("made", "w+") as file:
    print(*map(code, [
        lambda: sync("."), lambda: sync("made"), lambda: fcntl.flock(file, fcntl.LOCK_EX),
        lambda: fcntl.lockf(file, fcntl.LOCK_EX), lambda: os.mkdir("folder"), lambda: os.symlink("made", "link"),
        lambda: os.rename("made", "named"), lambda: os.link("named", "other"), lambda: open("named").close(),
        lambda: open("named", "a").close(), lambda: SharedMemory("mde-dist-gaps", create=True, size=9).unlink(),
    ]))
"""


def test_calls_fail_below_the_path_and_nowhere_else(tmp_path):
    def codes(folder: str, *rules: str) -> list[int]:
        (tmp_path / folder).mkdir()
        command = [sys.executable, "-c", CALLS, str(tmp_path / folder)]
        done = subprocess.run(command, env=environment(**gaps(*rules)), capture_output=True, text=True, check=True)
        return [int(code) for code in done.stdout.split()]

    at = tmp_path / "with a gap"
    rules = [f"{gap}:{at}" for gap in ("fsync-dir:EINVAL", "flock:ENOLCK", "fcntl:EIO", "symlink:EPERM", "link:EPERM")]
    rules += [f"open-write:EROFS:{at}/named", "open:ENOENT:/dev/shm"]
    got = codes("with a gap", *rules)
    assert got[:4] == [errno.EINVAL, 0, errno.ENOLCK, errno.EIO]
    assert got[4:] == [0, errno.EPERM, 0, errno.EPERM, 0, errno.EROFS, errno.ENOENT]
    assert codes("with a gap or two", *rules) == [0] * 10 + [errno.ENOENT]
