"""Calls that fail where the rules of gaps.py say so, and nowhere else; and the way to a model where some do."""

import errno
import json
import subprocess
import sys

from commands import environment, run, small
from gaps import gaps
from trees import bts

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


def test_calls_fail_below_the_path_and_nowhere_else(path_on_disk):
    def codes(folder: str, *rules: str) -> list[int]:
        (path_on_disk / folder).mkdir()
        command = [sys.executable, "-c", CALLS, str(path_on_disk / folder)]
        done = subprocess.run(command, env=environment(**gaps(*rules)), capture_output=True, text=True, check=True)
        return [int(code) for code in done.stdout.split()]

    at = path_on_disk / "with a gap"
    rules = [f"{gap}:{at}" for gap in ("fsync-dir:EINVAL", "flock:ENOLCK", "fcntl:EIO", "symlink:EPERM", "link:EPERM")]
    rules += [f"open-write:EROFS:{at}/named", "open:ENOENT:/dev/shm"]
    got = codes("with a gap", *rules)
    assert got[:4] == [errno.EINVAL, 0, errno.ENOLCK, errno.EIO]
    assert got[4:] == [0, errno.EPERM, 0, errno.EPERM, 0, errno.EROFS, errno.ENOENT]
    assert codes("with a gap or two", *rules) == [0] * 10 + [errno.ENOENT]


def test_a_data_set_is_packed_and_trained_on_where_nothing_is_flushed_or_locked(tmp_path):
    bts(tmp_path / "tree")
    env = environment(**gaps(*(f"{gap}:{tmp_path}" for gap in ("fsync-dir:EINVAL", "flock:ENOLCK", "fcntl:ENOLCK"))))
    shards = tmp_path / "shards"
    options = {"source": tmp_path / "tree", "output": shards, "size": "32x32", "workers": 2, "samples-per-shard": 2}
    packed = run("shard", **options, env=env)
    short = {"train_total_samples": 12, "train_evaluate_every": 12, "data_shards": shards}
    trained = run("train", run=tmp_path / "run", **small(**short), env=env)
    for done in (packed, trained):
        assert done.returncode == 0, done.stderr
        assert (done.stderr.count("power cut"), done.stderr.count("no locks")) == (1, 1), done.stderr
    assert json.loads((tmp_path / "run/checkpoints/step-00000001/state.json").read_bytes())["samples_seen"] == 12
    assert (tmp_path / "run/model.safetensors").is_file()
    assert not list(tmp_path.rglob("*.held*"))
