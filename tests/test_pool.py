"""Worker processes: their results and errors, and that they need neither /dev/shm nor a folder for temporary files."""

import os
import signal
import subprocess
import sys

import pytest
from commands import environment
from gaps import gaps

from mde_dist.packing.pool import WorkerLost, count, run_jobs

JOBS = """
import os
from mde_dist.packing.pool import run_jobs
if __name__ == "__main__":
    found = run_jobs(os.path.join, [("a", str(n)) for n in range(5)], 2, lambda done, total: None, 5)
    print(sorted(found))
"""


def work(number: int) -> int:
    count(number)
    if number == 13:
        raise ValueError("unlucky")
    if number == 99:
        os.kill(os.getpid(), signal.SIGKILL)
    return number * number


@pytest.mark.parametrize("workers", [1, 3])
def test_every_job_is_done_once_and_all_samples_are_counted(workers):
    told = []
    jobs = [(number,) for number in range(10)]
    found = run_jobs(work, jobs, workers, lambda done, total: told.append((done, total)), 45)
    assert sorted(found) == [number * number for number in range(10)]
    assert told == sorted(told) and told[-1] == (45, 45)


def test_what_a_job_raises_is_raised_and_a_worker_that_is_killed_is_no_silence():
    with pytest.raises(ValueError, match="unlucky") as raised:
        list(run_jobs(work, [(1,), (13,), (2,)], 2, lambda done, total: None, 3))
    assert any("in work" in note for note in raised.value.__notes__)  # where in the worker
    with pytest.raises(WorkerLost):
        list(run_jobs(work, [(99,), (1,)], 2, lambda done, total: None, 2))


@pytest.mark.parametrize("error", ["ENOENT", "EROFS", "ENOSPC"])
def test_workers_need_neither_shared_memory_nor_a_folder_for_sockets(path_on_disk, error):
    """Sockets need a short path, a folder that can be written, and a file system that takes them."""
    long = path_on_disk / ("folder" * 20)
    long.mkdir()
    (path_on_disk / "jobs.py").write_text(JOBS)
    env = environment(TMPDIR=str(long), **gaps(f"open:{error}:/dev/shm"))
    done = subprocess.run(
        [sys.executable, "jobs.py"], cwd=path_on_disk, env=env, capture_output=True, text=True, timeout=60
    )
    assert done.stdout == str([f"a/{n}" for n in range(5)]) + "\n", done.stderr
