"""File systems with gaps: processes under which chosen system calls fail below chosen paths.

    subprocess.run(command, env=environment(**gaps(f"fsync-dir:EINVAL:{tmp_path}", f"flock:ENOLCK:{tmp_path}")))

A rule is `call:ERRNO:path`: the call ends with that error at the path and at all below it. The calls:

    open, open-write (to write or to make), open-new (with O_EXCL); of shm_open and sem_open, too, below /dev/shm
    fsync, fsync-dir (of a directory), flock, fcntl (locks), write, ftruncate, fallocate, mmap
    mkdir, rmdir, unlink, symlink, rename and link (either end)

Real processes, started anew: a library is loaded in front of libc, so Python, PyTorch and HDF5 all go through it.
"""

import atexit
import errno
import functools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from commands import environment


def gaps(*rules: str) -> dict[str, str]:
    """The variables of the environment under which a process has these gaps. Skips where there is no C compiler."""
    lines = []
    for rule in rules:
        call, error, path = rule.split(":", 2)
        lines.append(f"{call}:{getattr(errno, error)}:{path.rstrip('/')}")
    preloaded = f"{_library()}:{os.environ.get('LD_PRELOAD', '')}".rstrip(":")
    return {"GAPS": "\n".join(lines), "LD_PRELOAD": preloaded}


@functools.cache
def _library() -> Path:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler for a file system with gaps")
    folder = Path(tempfile.mkdtemp(prefix="gaps-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    library = folder / "gaps.so"
    source = Path(__file__).with_suffix(".c")
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    return library


def run_with_gaps(function: Callable[..., None], rules: Sequence[str], *arguments: object) -> str:
    """Call a function of a test file, with arguments as text, in a process with gaps -> what it says on stderr.

    It fails where the function raises.
    """
    name = f"{function.__module__}.{function.__name__}"
    line = f"import sys, {function.__module__}; {name}(*sys.argv[1:])"
    env = environment(**gaps(*rules))
    env["PYTHONPATH"] = f"{Path(__file__).parent}:{env.get('PYTHONPATH', '')}"
    command = [sys.executable, "-c", line, *map(str, arguments)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stderr
