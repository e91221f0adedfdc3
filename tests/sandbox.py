"""Run a command as in a container of `docker run --read-only --user 54321`: a user without a name and a home, a root
that cannot be written but for one folder, no temporary directory, a small /dev/shm. For root on Linux."""

import os
import shlex
import subprocess
import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import pytest
from commands import environment

USER = 54321
_ROOT = Path(__file__).parents[1]
_NOT_KEPT = ("HOME", "USER", "LOGNAME", "TMPDIR", "TEMP", "TMP", "XDG_", "HF_", "TORCH_HOME", "TORCHINDUCTOR_", "MPL")
_DEVICES = ("null", "zero", "full", "random", "urandom", "tty", "pts", "ptmx")


@cache
def refused() -> str:
    """Why no sandbox can be made here; empty where one can."""
    if sys.platform != "linux" or os.geteuid():
        return "only root on Linux may make a sandbox"
    line = "command -v setpriv >&2 && unshare -m mount -t tmpfs tmpfs /mnt"
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True)
    return f"no sandbox can be made here ({done.stderr.strip()})" if done.returncode else ""


def skip_without() -> None:
    if refused():
        pytest.skip(refused())


def sandboxed(work: Path, shm: str = "64k") -> list[str]:
    """The words before a command that put it into a sandbox; `work`: the folder that it may write, given to it.

    `shm`: the size of /dev/shm as mount takes it, "ro" for one that cannot be written, "" for none.
    """
    os.chown(work, USER, USER)
    become = f"exec setpriv --reuid {USER} --regid {USER} --clear-groups --no-new-privs"
    lines = ["set -e", *_mounts(work), *_shared_memory(shm), "mount -o remount,bind,ro /"]
    lines += ['cd "$(pwd)"', f'{become} "$@"']  # what was entered before is the folder below the mounts
    return ["unshare", "--mount", "--propagation", "private", "sh", "-c", "\n".join(lines), "sandbox"]


def bare_environment(**changes: str) -> dict[str, str]:
    """Environment of a user without a name in a container: no home, and a temporary directory that is not there."""
    kept = {name: value for name, value in environment().items() if not name.startswith(_NOT_KEPT)}
    return kept | {"TMPDIR": "/nonexistent", "PYTHONPATH": str(_ROOT)} | changes


def _mounts(work: Path) -> Iterable[str]:
    """Cover what only root may enter, and what everybody may write; keep the interpreter, the code and `work` in it."""
    needed = sorted({Path(p).resolve() for p in (work, _ROOT, sys.prefix, sys.base_prefix)})
    covers = {Path("/tmp"), Path("/var/tmp")}
    covers |= {up for path in needed for up in path.parents if not up.stat().st_mode & 1}
    inside = [path for path in needed if covers & set(path.parents)]
    stash = {path: f"/mnt/{number}" for number, path in enumerate(inside)}
    yield "mount -t tmpfs tmpfs /mnt"
    for path, aside in stash.items():
        yield f"mkdir {aside}; mount --bind {shlex.quote(str(path))} {aside}"
    outermost = [cover for cover in sorted(covers) if not covers & set(cover.parents)]
    for cover in outermost:
        yield f"mount -t tmpfs -o mode=755 tmpfs {shlex.quote(str(cover))}"
    for path, aside in stash.items():
        yield f"mkdir -p {shlex.quote(str(path))}; mount --move {aside} {shlex.quote(str(path))}"
    if work.resolve() not in inside:
        yield f"mount --bind {shlex.quote(str(work))} {shlex.quote(str(work))}"
    for path in [*outermost, *(path for path in inside if path != work.resolve())]:
        yield f"mount -o remount,bind,ro {shlex.quote(str(path))}"
    yield "umount /mnt"


def _shared_memory(shm: str) -> Iterable[str]:
    if shm:
        size = "64k" if shm == "ro" else shm
        yield f"mount -t tmpfs -o size={size},mode=1777 tmpfs /dev/shm"
        if shm == "ro":
            yield "mount -o remount,ro /dev/shm"
        return
    yield "mount -t tmpfs tmpfs /mnt"
    for name in _DEVICES:
        yield f"[ -d /dev/{name} ] && mkdir /mnt/{name} || touch /mnt/{name}; mount --bind /dev/{name} /mnt/{name}"
    yield "ln -s /proc/self/fd /mnt/fd; mount --move /mnt /dev"
