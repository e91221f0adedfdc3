"""A real SLURM on this machine: one slurmctld, and a slurmd per node, started by hand in a temporary directory."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
DAEMONS = ("munged", "slurmctld", "slurmd")
CLIENT_SECONDS = 30  # srun and others wait for ever for a daemon that is gone

CONF = """
ClusterName=mde
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={root}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool.%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
KillWait=15
SlurmdTimeout={silence}
SlurmctldTimeout=30
MailProg=/bin/true
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
SchedulerParameters=sched_interval=2,bf_interval=2,default_queue_depth=20
MinJobAge=3600
{nodes}
PartitionName=low Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


class Cluster:
    """Two nodes of four CPUs each, on one host. Use it in a `with`."""

    def __init__(self, root: Path, nodes: Sequence[str] = ("node1", "node2"), silence: int = 10):
        """`silence`: seconds after which a node that does not answer is down."""
        self.root, self.nodes = root, tuple(nodes)
        self._silence = silence
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self._env = os.environ | {"SLURM_CONF": str(root / "slurm.conf")}

    def __enter__(self) -> Cluster:
        try:
            self._configure()
            self._start_munge()
            self._daemon("slurmctld", "-D", "-i")
            for node in self.nodes:
                self.start_node(node)
            self.wait(lambda: self.client("sinfo", "-h", "-N", "-p", "low", "-o", "%T").split() == ["idle"] * 2, 30)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for name in reversed(self._daemons):
            self._daemons[name].kill()
            self._daemons[name].wait()
        with contextlib.suppress(FileNotFoundError, subprocess.SubprocessError):
            subprocess.run(["pkill", "-KILL", "-f", f"slurmstepd.*{self.root.name}"], check=False, timeout=10)

    def _configure(self) -> None:
        host = socket.gethostname().split(".")[0]
        ports = [_free_port() for _ in range(1 + len(self.nodes))]
        nodes = "\n".join(
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=4 RealMemory=4000 State=UNKNOWN"
            for node, port in zip(self.nodes, ports[1:], strict=True)
        )
        for folder in ("state", *(f"spool.{node}" for node in self.nodes)):
            (self.root / folder).mkdir(parents=True)
        text = CONF.format(host=host, port=ports[0], root=self.root, silence=self._silence, nodes=nodes)
        (self.root / "slurm.conf").write_text(text)

    def _start_munge(self) -> None:
        key = self.root / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        self.root.chmod(0o755)
        files = {"key-file": key, "socket": self.root / "munge.socket", "pid-file": self.root / "munge.pid"}
        files |= {"log-file": self.root / "munge.log", "seed-file": self.root / "munge.seed"}
        self._daemon("munged", "--foreground", "--force", *(f"--{name}={path}" for name, path in files.items()))
        self.wait((self.root / "munge.socket").exists, 10)

    def start_node(self, node: str) -> None:
        self._daemon("slurmd", "-D", "-N", node, name=node)

    def kill_node(self, node: str) -> None:
        """As a node that loses its power: the daemon, and all that runs there, at once."""
        self._daemons[node].kill()
        self._daemons.pop(node).wait()
        for process in _processes():
            environ = _environ(process)
            if environ.get("SLURMD_NODENAME") == node and environ.get("SLURM_CONF") == self._env["SLURM_CONF"]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, 9)

    def _daemon(self, program: str, *arguments: str, name: str | None = None) -> None:
        with (self.root / f"{name or program}.out").open("ab") as log:
            line = [shutil.which(program) or f"/usr/sbin/{program}", *arguments]
            self._daemons[name or program] = subprocess.Popen(line, stdout=log, stderr=log, env=self._env)

    def client(self, *line: str, **changes: str) -> str:
        """The output of a client command; raises CalledProcessError with what it said."""
        done = subprocess.run(
            line, env=self._env | changes, capture_output=True, text=True, timeout=CLIENT_SECONDS, cwd=ROOT
        )
        if done.returncode:
            raise subprocess.CalledProcessError(done.returncode, line, done.stdout, done.stderr)
        return done.stdout

    def submit(self, script: str, *arguments: object, sbatch: Sequence[str] = (), **environment: str) -> int:
        """`sbatch` as a user gives it in the repository -> the job's number."""
        tools = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        said = self.client("sbatch", "--parsable", *sbatch, script, *map(str, arguments), PATH=tools, **environment)
        return int(said.strip().split(";")[0])

    def job(self, number: int) -> dict[str, str]:
        """What `scontrol show job` says, by field."""
        said = self.client("scontrol", "show", "--oneliner", "job", str(number)).splitlines()[0]
        return dict(re.findall(r"(\w+)=(\S*)", said))

    def state(self, number: int) -> str:
        return self.job(number)["JobState"]

    def restarts(self, number: int) -> int:
        return int(self.job(number)["Restarts"])

    def runs(self, module: str, number: int) -> bool:
        """Whether a process of a job runs `python -m module`."""
        found = (process for process in _processes() if module in _command(process))
        return any(_environ(process).get("SLURM_JOB_ID") == str(number) for process in found)

    def wait_for_end(self, number: int, seconds: float) -> str:
        """Until a job has come to rest -> its state."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED")
        self.wait(lambda: self.state(number) in ended, seconds)
        return self.state(number)

    def wait(self, condition: Callable[[], object], seconds: float) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"waited in vain; {self.logs()}"
            time.sleep(0.1)

    def logs(self) -> str:
        """The last lines of the daemons."""
        files = sorted(self.root.glob("*.log")) + sorted(self.root.glob("*.out"))
        return "\n".join(f"--- {file.name}\n" + "\n".join(file.read_text().splitlines()[-15:]) for file in files)


def _processes() -> Iterator[int]:
    return (int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit())


def _environ(process: int) -> dict[str, str]:
    return dict(item.split("=", 1) for item in _strings(process, "environ") if "=" in item)


def _command(process: int) -> list[str]:
    return _strings(process, "cmdline")


def _strings(process: int, file: str) -> list[str]:
    """What a file of /proc holds; nothing where the process has ended."""
    try:
        return Path(f"/proc/{process}/{file}").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]
