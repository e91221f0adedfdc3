"""Processes whose launcher is killed end by themselves, whatever they are at; nothing else ends them."""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from commands import environment

RANK = """
import os, time
from pathlib import Path
from mde_dist.utils.cli import run_command
from mde_dist.distributed.launcher import watched_launcher

def rank(argv):
    me = os.environ["RANK"]
    Path(me + ".here").touch()
    while me == "1" and not Path("killed").exists():  # as if it imported: it cannot look before
        time.sleep(0.01)
    with watched_launcher():
        Path(me + ".watching").touch()
        time.sleep(600)

run_command(rank)
"""
ADOPTS = """
import ctypes, os, subprocess, sys
if os.fork():
    os._exit(0)  # so that no ancestor is a test, which has loaded torch as launchers have
assert ctypes.CDLL(None).prctl(36, 1, 0, 0, 0) == 0  # PR_SET_CHILD_SUBREAPER: as an init, it adopts orphans
launcher = subprocess.Popen(sys.argv[1:])
print(launcher.pid, flush=True)
try:
    while True:
        os.wait()
except ChildProcessError:
    pass
"""
STORE = """
import time
from mde_dist.distributed import launcher
launcher._NO_STORE = 0.2
with launcher.watched_launcher() as joined:
    if {joined}:
        joined.set()
    time.sleep({seconds})
"""

pytestmark = pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "prctl"), reason="needs /proc and adopted orphans")


def wait(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def ended(process: psutil.Process) -> bool:
    """Also where its adopter does not ask how."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_ranks_end_whether_their_launcher_is_killed_before_or_after_they_can_look(tmp_path):
    """An init that adopts them is not taken for a launcher, nor is a shell in between."""
    (tmp_path / "rank.py").write_text(RANK)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    line = [sys.executable, "-c", ADOPTS, *torchrun, "sh", "-c", f"{sys.executable} rank.py; exit $?"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    adopter = subprocess.Popen(line, cwd=tmp_path, env=environment(), text=True, **pipes)
    assert adopter.stdout is not None
    launcher = psutil.Process(int(adopter.stdout.readline()))
    started = []
    try:
        wait(lambda: (tmp_path / "0.watching").exists() and (tmp_path / "1.here").exists())
        time.sleep(0.7)  # a look comes in between, and finds all well
        started = launcher.children(recursive=True)
        ranks = [process for process in started if process.cmdline()[-1] == "rank.py"]
        assert len(ranks) == 2 and all(rank.is_running() for rank in ranks)
        launcher.kill()
        (tmp_path / "killed").touch()
        _, said = adopter.communicate(timeout=20)  # which ends when nobody holds its pipes any more
    finally:
        for process in (launcher, *started):
            with suppress(psutil.NoSuchProcess):
                process.kill()
    assert "rank 0: the process that started this one" in said
    assert not (tmp_path / "1.watching").exists()


@pytest.mark.parametrize("joined", [False, True])
def test_a_rendezvous_whose_host_is_dead_is_waited_for_until_joined_only(joined):
    with socket.socket() as held:  # bound and not listening: it refuses, and no other process can take the port
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
        store = {"TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        env = environment(MDE_DIST_PARENT=str(os.getpid()), **store)
        program = STORE.format(joined=joined, seconds=2 if joined else 60)
        done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, timeout=50)
    assert done.returncode == (0 if joined else -signal.SIGTERM)
    assert ("127.0.0.1" in done.stderr) != joined


def test_packing_processes_end_with_the_one_that_started_them(tmp_path):
    program = (
        "import sys, time; from mde_dist.packing.pool import run_jobs\n"
        "if __name__ == '__main__':\n"
        "    list(run_jobs(time.sleep, [(600,), (600,)], 2, lambda done, total: None, 2))\n"
    )
    Path(tmp_path, "pack.py").write_text(program)
    process = subprocess.Popen([sys.executable, "pack.py"], cwd=tmp_path, env=environment())
    try:
        parent = psutil.Process(process.pid)
        wait(lambda: len(parent.children(recursive=True)) == 4)  # two helpers of multiprocessing, two workers
        time.sleep(0.2)
        others = parent.children(recursive=True)
    finally:
        process.kill()
    process.wait()
    try:
        wait(lambda: all(ended(other) for other in others), 10)
    finally:
        for left in others:
            with suppress(psutil.NoSuchProcess):
                left.kill()
