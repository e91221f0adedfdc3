"""One training on two hosts: two network namespaces joined by a cable, with a launcher on each, as a user starts it."""

import contextlib
import os
import re
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from commands import environment, files_below, learned, small, wait_for
from safetensors.torch import load_file
from warm import warm_run

from mde_dist.training.checkpoint import load_checkpoint

pytestmark = pytest.mark.distributed

LAUNCHER = Path(__file__).parents[2] / "launch/several_nodes.sh"
CABLE = "cable"  # what both hosts call their end of it
PATIENCE = 60  # seconds for both hosts to end once something is lost: 5 of silence, 10 of grace, the launchers' own


def ip(arguments: str) -> str:
    return subprocess.run(["ip", *arguments.split()], check=True, capture_output=True, text=True).stdout


@dataclass
class Host:
    """A network namespace with one end of the cable: to all that runs in it, a machine of its own."""

    name: str
    address: str

    def connect(self) -> None:
        ip(f"-n {self.name} link set {CABLE} up")

    def disconnect(self) -> None:
        """Nobody is told: what is sent from now on comes to nothing, as with a switch that fails."""
        ip(f"-n {self.name} link set {CABLE} down")

    def processes(self) -> list[psutil.Process]:
        return [psutil.Process(int(pid)) for pid in ip(f"netns pids {self.name}").split()]

    def kill_all(self) -> None:
        for process in self.processes():
            process.kill()

    def remove(self) -> None:
        self.kill_all()
        ip(f"netns del {self.name}")  # its end of the cable goes with it, and with that the other end


@pytest.fixture(scope="module")
def network() -> Iterator[list[Host]]:
    unique = secrets.token_hex(4)
    hosts = [Host(f"mde-{unique}-{number}", f"10.77.0.{number + 1}") for number in range(2)]
    with contextlib.ExitStack() as removed:
        try:
            for host in hosts:
                ip(f"netns add {host.name}")
                removed.callback(host.remove)
            ip(f"link add {CABLE} netns {hosts[0].name} type veth peer name {CABLE} netns {hosts[1].name}")
            for host in hosts:
                ip(f"-n {host.name} address add {host.address}/24 dev {CABLE}")
                ip(f"-n {host.name} link set lo up")
                host.connect()
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"no network namespaces here, which take root on Linux: {getattr(error, 'stderr', error)}")
        yield hosts


@pytest.fixture
def hosts(network) -> Iterator[list[Host]]:
    """Both hosts; what a failed test leaves on them does not meet the next one."""
    yield network
    for host in network:
        host.kill_all()
        host.connect()


def launch(hosts: list[Host], directory: Path, **options) -> list[subprocess.Popen[str]]:
    """The command that a user gives on each host: two ranks there, four in all."""
    flags = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    # gloo would take the address that the machine's name stands for, and that is on neither of these hosts
    tools = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = environment(PATH=tools, PORT="29511", GLOO_SOCKET_IFNAME=CABLE)
    launchers = []
    for rank, host in enumerate(hosts):
        start = ["ip", "netns", "exec", host.name, LAUNCHER, "2", str(rank), hosts[0].address, "2"]
        line = [*start, "--run", directory, *flags]
        launchers.append(subprocess.Popen(line, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    return launchers


def finish(launchers: list[subprocess.Popen[str]], seconds: float) -> list[str]:
    """Wait until both launchers and all that holds their terminals have ended -> what was shown there."""
    end = time.monotonic() + seconds
    return [launcher.communicate(timeout=max(0, end - time.monotonic()))[0] for launcher in launchers]


def complete(hosts: list[Host], directory: Path, **options) -> list[str]:
    launchers = launch(hosts, directory, **options)
    outputs = finish(launchers, 300)
    assert [launcher.returncode for launcher in launchers] == [0, 0], "\n".join(outputs)
    return outputs


def launch_to_first_checkpoint(hosts: list[Host], directory: Path, **options) -> list[subprocess.Popen[str]]:
    launchers = launch(hosts, directory, **options)
    wait_for(lambda: (directory / "checkpoints/step-00000001").is_dir(), launchers[0])
    return launchers


def said_to_be_lost(output: str, directory: Path) -> set[int]:
    """The ranks that the one line names which says why a host has ended; it has to name one of their logs as well."""
    said = [line for line in output.splitlines() if line.startswith("error")]
    assert len(said) == 1, output
    names, log = re.fullmatch(r"error \(rank \d\): ranks? ([\d, ]+) (?:is|are|has) .*?log: (\S+);.*", said[0]).groups()
    ranks = {int(name) for name in names.split(", ")}
    assert Path(log) in {directory / f"logs/rank-{rank}.log" for rank in ranks}
    assert Path(log).is_file()
    return ranks


def check_cut_short(directory: Path) -> None:
    """The run has not come to its end, and what it leaves is whole."""
    assert not (directory / "model.safetensors").exists(), "the end came before the loss"
    checkpoints = list((directory / "checkpoints").glob("step-*"))
    assert checkpoints
    for path in checkpoints:
        load_checkpoint(path)  # or it raises


@pytest.fixture(scope="module")
def options(room_shards):
    return small(data_shards=room_shards, train_total_samples=48, train_heartbeat_timeout=5)


@pytest.fixture(scope="module")
def one_host(network, options, scratch):
    """What four ranks on one host leave behind; made only where there are two hosts to compare with it."""
    directory = scratch("one") / "run"
    done = warm_run("train", processes=4, run=directory, **options)
    assert done.returncode == 0, done.stderr
    return directory


def check_end(outputs: list[str], directory: Path, one_host: Path) -> None:
    """One run, the same bits as on one host, and one set of files."""
    first, second = outputs
    assert "3 per rank x 4 ranks" in first
    assert first.count("model.safetensors\n") == 1
    assert not re.search("samples|made: ", second), "the summary has to appear once"
    assert files_below(directory) == files_below(one_host)
    assert {f"logs/rank-{rank}.log" for rank in range(4)} <= files_below(directory)
    assert learned(directory) == learned(one_host)
    one, other = load_file(directory / "model.safetensors"), load_file(one_host / "model.safetensors")
    assert all(one[name].equal(other[name]) for name in one)


@pytest.mark.long
def test_a_cut_cable_ends_both_hosts_and_the_run_goes_on_to_the_bits_of_one_host(hosts, options, one_host, tmp_path):
    directory = tmp_path / "run"
    launchers = launch_to_first_checkpoint(hosts, directory, **options)
    hosts[1].disconnect()
    first, second = finish(launchers, PATIENCE)
    assert all(launcher.returncode > 0 for launcher in launchers)
    assert said_to_be_lost(first, directory) == {2, 3}
    assert said_to_be_lost(second, directory) == {0}  # of rank 1 nobody has told it anything
    assert not hosts[0].processes() + hosts[1].processes()
    check_cut_short(directory)
    hosts[1].connect()
    outputs = complete(hosts, directory, **options)
    assert "resumed at sample" in outputs[0]
    check_end(outputs, directory, one_host)


@pytest.mark.long
def test_a_host_that_dies_ends_the_other_one_with_one_line(hosts, options, tmp_path):
    """The first one: it holds rank 0, and the launchers' meeting place."""
    directory = tmp_path / "run"
    launchers = launch_to_first_checkpoint(hosts, directory, **options)
    hosts[0].kill_all()
    _, second = finish(launchers, PATIENCE)
    assert launchers[1].returncode > 0
    assert 0 in said_to_be_lost(second, directory) <= {0, 1}
    assert not hosts[0].processes() + hosts[1].processes()
    check_cut_short(directory)
