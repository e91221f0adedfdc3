"""Start the commands in real processes, forked from a helper that has imported everything: no five seconds per process.

From its first line on a command does what it does in `commands.py`; what precedes it differs. There is no launcher: a
rank gets the environment that torchrun would give it, and nobody ends the others when one fails. Interpreter and
libraries have read their environment (PYTHONPATH, OMP_NUM_THREADS, ...) when the helper started, and all processes of a
session share one hash seed. Tests of what precedes a command, and of launchers, belong to `commands.py`.

    done = warm_run("train", processes=2, run=directory, **small(data_shards=shards))
    assert done.returncode == 0, done.stderr

    with warm_start("train", processes=2, before=partial(break_at, step=3), run=directory, **options) as process:
        wait_for(lambda: (directory / "checkpoints").is_dir(), process)
        process.ranks[1].kill()
        process.wait(60)
"""

import atexit
import faulthandler
import gc
import importlib
import io
import itertools
import os
import pickle
import pkgutil
import random
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from commands import environment

import mde_dist

COMMANDS = [f"mde_dist.{name}" for name in ("train", "evaluate", "predict", "report", "shard")]


# --- what a test uses ---


def warm_run(
    module: str | Path,
    *arguments: Any,
    processes: int = 1,
    env: dict[str, str] | None = None,
    cwd: Path | None = None,
    before: Callable[[], object] | None = None,
    timeout: float = 300,
    **options: Any,
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, see `warm_start`; output captured as text, of all ranks in their order."""
    start = warm_start(module, *arguments, processes=processes, env=env, cwd=cwd, before=before, **options)
    with start as process:
        code = process.wait(timeout)
        return subprocess.CompletedProcess(process.args, code, process.read("out"), process.read("err"))


def warm_start(
    module: str | Path,
    *arguments: Any,
    processes: int = 1,
    env: dict[str, str] | None = None,
    cwd: Path | None = None,
    before: Callable[[], object] | None = None,
    **options: Any,
) -> "Warm":
    """Start `python -m mde_dist.MODULE`, or a script by its path, with options; on one rank or several.

    `before` is called in each process before the command is executed: a function of a module below tests/, or a
    functools.partial of one, which may read RANK in os.environ. The modules of mde_dist are loaded by then, but for the
    command itself: what it imports by name it takes as `before` left it; what another module imported by name has to be
    patched there.
    """
    args = [*map(str, arguments), *(text for name, value in options.items() for text in (f"--{name}", str(value)))]
    request = {
        "module": module if isinstance(module, Path) else f"mde_dist.{module}",
        "args": args,
        "cwd": str(cwd or Path.cwd()),
        "before": pickle.dumps(before),
        "path": sys.path,  # where the module of `before` is found
    }
    given = environment() if env is None else env
    return Warm(["warm", str(module), *args], [request | {"env": e} for e in rank_environments(given, processes)])


class Rank:
    """A process of a command; it answers as subprocess.Popen does."""

    def __init__(self, request: dict[str, Any]):
        self.pid, self._number, self._files = zygote().fork(request)

    @property
    def returncode(self) -> int | None:
        return zygote().exit_code(self._number)

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float = 300) -> int:
        end = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > end:
                raise TimeoutError(f"process {self.pid} is still at work after {timeout} s")
            time.sleep(0.005)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def read(self, stream: str) -> str:
        """What it has written so far to `out` or `err`."""
        return Path(f"{self._files}.{stream}").read_text(errors="replace")


class Warm:
    """A command at work on its ranks. As a context manager it leaves no process behind."""

    def __init__(self, args: list[str], requests: list[dict[str, Any]]):
        self.args = args
        self.ranks = [Rank(request) for request in requests]

    def __enter__(self) -> "Warm":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    @property
    def returncode(self) -> int | None:
        """None until all ranks have ended; then the exit status farthest from 0: a death by a signal is negative."""
        codes = [rank.poll() for rank in self.ranks]
        return None if None in codes else max((code for code in codes if code is not None), key=abs)

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float = 300) -> int:
        """The exit status. A rank that is still at work after `timeout` seconds is killed and shows where it was."""
        end = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > end:
                self.send_signal(signal.SIGRTMIN)  # see `become`
                time.sleep(1)
                self.kill()
                raise TimeoutError(f"still at work after {timeout} s: {' '.join(self.args)}\n{self.output()}")
            time.sleep(0.005)
        return code

    def communicate(self, timeout: float = 300) -> tuple[str, str]:
        """Wait for the end -> all output, and nothing: stderr is in it, as with `commands.start`."""
        self.wait(timeout)
        return self.output(), ""

    def read(self, stream: str) -> str:
        """What all ranks have written so far to `out` or `err`."""
        return "".join(rank.read(stream) for rank in self.ranks)

    def output(self, rank: int | None = None) -> str:
        """All that one rank, or all of them in their order, have written so far."""
        ranks = self.ranks if rank is None else [self.ranks[rank]]
        return "".join(one.read("out") + one.read("err") for one in ranks)

    @property
    def stdout(self) -> io.StringIO:
        """For `commands.wait_for`."""
        return io.StringIO(self.output())

    def send_signal(self, number: int) -> None:
        for rank in self.ranks:
            rank.send_signal(number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Kill all ranks and whatever they have started, at once."""
        for rank in self.ranks:
            kill_session(rank.pid)
        with suppress(TimeoutError):
            for rank in self.ranks:
                rank.wait(10)


def rank_environments(env: dict[str, str], processes: int) -> list[dict[str, str]]:
    """What torchrun would give to each rank; a lone process gets nothing of it."""
    if processes == 1:
        return [env]
    world = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    world |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    return [env | world | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


def free_port() -> int:
    """A port that rank 0 can listen on: below those that systems give away by themselves in the meantime."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def without_pictures() -> None:
    """A `before` for trainings whose pictures nobody looks at: drawing them takes half of a small training's time."""
    from mde_dist.reporting import report

    assert report.draw_report
    report.draw_report = lambda run: []


# --- this process's side of the helper ---


class Zygote:
    """The helper process. It ends, and all processes with it, when this process does or closes the connection."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        env = environment() | {"OPENBLAS_NUM_THREADS": "1"}  # or NumPy starts threads, and a fork does not copy them
        # a session of its own: Ctrl-C in the terminal is for pytest
        line = [sys.executable, __file__, str(theirs.fileno())]
        self._process = subprocess.Popen(
            line,
            pass_fds=[theirs.fileno()],
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
        theirs.close()
        self._connection = Connection(ours.detach())
        self._codes: dict[int, int] = {}
        atexit.register(self.close)

    def fork(self, request: dict[str, Any]) -> tuple[int, int, str]:
        """-> process id, our number for it, and where its output goes: a path that `.out` and `.err` are added to."""
        self._connection.send(request)
        while (message := self._receive())[0] != "forked":
            pass
        return message[1:]

    def exit_code(self, number: int) -> int | None:
        while self._connection.poll():
            self._receive()
        return self._codes.get(number)

    def _receive(self) -> tuple[Any, ...]:
        try:
            message = self._connection.recv()
        except (EOFError, ConnectionError):
            raise RuntimeError("the helper process of tests/warm.py has died") from None
        if message[0] == "ended":
            self._codes[message[1]] = message[2]
        return message

    def close(self) -> None:
        self._connection.close()
        self._process.wait()


_zygotes: list[Zygote] = []


def zygote() -> Zygote:
    """The helper of this session, started by the first who needs it."""
    if not _zygotes:
        _zygotes.append(Zygote())
    return _zygotes[0]


# --- the helper process, and the processes that it forks ---


def serve(connection: Connection) -> dict[str, Any]:
    """Fork a process for every request and say how each ends, until the other side is gone.

    Returns in the forked processes only, with their request: so they end as any Python process does, at the end of
    their main module. There are no threads, and nothing is computed here, or the forked ones could hang in a library.
    """
    for module in COMMANDS:
        importlib.import_module(module)
    for found in pkgutil.walk_packages(mde_dist.__path__, "mde_dist."):  # what commands import late
        if not found.name.startswith("mde_dist.tools.benchmarking."):
            importlib.import_module(found.name)
    gc.freeze()  # what is there stays; or every process would tidy it all up at its end, for a second
    if Path("/proc/self/task").is_dir():
        assert len(list(Path("/proc/self/task").iterdir())) == 1, "an import has started a thread"
    folder, running = Path(tempfile.mkdtemp(prefix="warm-")), dict[int, int]()
    with suppress(EOFError, ConnectionError):
        for number in itertools.count():
            while not select.select([connection], [], [], 0.01 if running else None)[0]:
                report_ended(running, connection)
            request = connection.recv()
            pid = fork(connection, folder / str(number))
            if pid == 0:
                return request
            running[pid] = number
            connection.send(("forked", pid, number, str(folder / str(number))))
    for pid in running:
        kill_session(pid)
    shutil.rmtree(folder)
    os._exit(0)


def fork(connection: Connection, files: Path) -> int:
    """-> the process id; 0 in the new process, which has a session and output files of its own, and no `connection`."""
    with files.with_suffix(".out").open("ab") as out, files.with_suffix(".err").open("ab") as err:
        pid = os.fork()
        if pid == 0:
            os.setsid()
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            connection.close()
    while pid and os.getsid(pid) != pid:  # so that its process group is there to be signalled
        time.sleep(0.0005)
    return pid


def report_ended(running: dict[int, int], connection: Connection) -> None:
    """Take leave of the processes that have ended, and say how."""
    for pid in list(running):
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            connection.send(("ended", running.pop(pid), os.waitstatus_to_exitcode(status)))


def become(request: dict[str, Any]) -> None:
    """Make this forked process what a freshly started one would be, and execute the command."""
    faulthandler.register(signal.SIGRTMIN)  # writes the stacks of all threads to stderr
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    module = request["module"]
    sys.argv = [str(module), *request["args"]]
    sys.path[0] = str(module.parent) if isinstance(module, Path) else request["cwd"]
    sys.path += [place for place in request["path"] if place not in sys.path]
    before = pickle.loads(request["before"])
    if before is not None:
        before()
    if isinstance(module, Path):
        runpy.run_path(str(module), run_name="__main__")
    else:
        sys.modules.pop(module, None)  # it is executed anew, as `python -m` does
        runpy.run_module(module, run_name="__main__", alter_sys=True)


def kill_session(pid: int) -> None:
    """End a process and those that it has started."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


if __name__ == "__main__":
    become(serve(Connection(int(sys.argv[1]))))
