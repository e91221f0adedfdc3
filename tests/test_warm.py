"""The forked processes of the tests are what freshly started ones would be; what they prove rests on it."""

import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import psutil
import pytest
from commands import environment, wait_for
from warm import warm_run, warm_start

SCRIPT = """
import os, sys, torch
from mde_dist.distributed.process_group import all_reduce_sum, init_distributed
with init_distributed(cpu_threads=2) as accelerator:
    rank = accelerator.process_index
    product = (torch.ones(64, 64) @ torch.ones(64, 64))[0, 0]
    print(f"rank {rank}", float(all_reduce_sum(accelerator, product * (rank + 1))))
print(" ".join(sorted(name for name in os.environ if name.startswith(("MASTER", "TORCHELASTIC", "ACCELERATE")))))
sys.exit(40 + rank)
"""


@pytest.fixture
def script(tmp_path):
    def write(text: str) -> Path:
        path = tmp_path / "script.py"
        path.write_text(text)
        return path

    return write


def break_environment(variable: str) -> None:
    os.environ[variable] = "broken on rank " + os.environ["RANK"]


@pytest.mark.distributed
def test_two_ranks_reduce_over_gloo_and_each_ends_with_its_own_status(script):
    done = warm_run(script(SCRIPT), processes=2)
    assert done.returncode == 41, done.stderr
    assert done.stdout == "rank 0 192.0\nMASTER_ADDR MASTER_PORT\nrank 1 192.0\nMASTER_ADDR MASTER_PORT\n"
    assert done.stderr == ""


def test_a_process_gets_arguments_environment_directory_and_what_is_done_before(script, tmp_path):
    path = script("import os, sys; print(sys.argv[1:], os.environ['MINE'], os.getcwd(), sys.path[0], __name__)")
    before = partial(break_environment, variable="MINE")
    done = warm_run(path, "a", 3, env={"RANK": "7"}, cwd=Path("/"), before=before, option=tmp_path)
    assert done.stdout == f"['a', '3', '--option', '{tmp_path}'] broken on rank 7 / {tmp_path} __main__\n", done.stderr
    assert "RANK" not in environment()


@pytest.mark.parametrize(
    ("end", "code", "words"),
    [
        ("raise SystemExit('in words')", 1, "in words\n"),
        ("raise KeyError('lost')", 1, "KeyError: 'lost'\n"),
        ("raise KeyboardInterrupt", -signal.SIGINT, "KeyboardInterrupt\n"),
        ("import atexit, sys; atexit.register(print, 'last words', file=sys.stderr)", 0, "last words\n"),
        ("import os; os.kill(os.getpid(), 9)", -signal.SIGKILL, ""),
        ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", -signal.SIGTERM, ""),
    ],
)
def test_a_process_ends_as_python_does(script, end, code, words):
    done = warm_run(script(end))
    assert done.returncode == code
    assert done.stderr.endswith(words)


def test_a_killed_rank_is_known_and_the_others_are_left_to_the_test(script):
    with warm_start(script("import time; print('here', flush=True); time.sleep(100)"), processes=2) as process:
        wait_for(lambda: process.output().count("here") == 2, process)
        process.ranks[1].kill()
        assert process.ranks[1].wait(10) == -signal.SIGKILL
        assert process.ranks[0].poll() is None
        assert process.poll() is None
        process.ranks[0].send_signal(signal.SIGINT)
        assert process.wait(10) == -signal.SIGKILL
        assert process.ranks[0].returncode == -signal.SIGINT
        assert "KeyboardInterrupt" in process.output(0)


def test_a_process_that_hangs_shows_where(script):
    with warm_start(script("import time\nprint('here', flush=True)\ntime.sleep(100)")) as process:
        wait_for(process.output, process)
        with pytest.raises(TimeoutError, match=r"script\.py\", line 3"):
            process.wait(0)


def test_a_mistake_is_the_one_line_of_the_real_command(tmp_path):
    """No warning of runpy, no traceback of the helper."""
    done = warm_run("shard", "--layout", "kitti", output=tmp_path / "shards")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


def test_all_end_with_a_test_session_that_is_killed(tmp_path):
    program = "import sys, time; from pathlib import Path; from warm import warm_start; "
    program += "process = warm_start(Path(sys.argv[1])); print(process.ranks[0].pid, flush=True); time.sleep(100)"
    sleeper = tmp_path / "sleep.py"
    sleeper.write_text("import time; time.sleep(100)")
    env = environment(PYTHONPATH=os.pathsep.join(sys.path))
    with subprocess.Popen([sys.executable, "-c", program, sleeper], env=env, stdout=subprocess.PIPE, text=True) as run:
        rank = psutil.Process(int(run.stdout.readline()))
        helper = rank.parent()
        run.kill()
    _, alive = psutil.wait_procs([rank, helper], timeout=20)
    assert not alive
