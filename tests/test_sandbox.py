"""All that a user does, as a user without a name and a home, on a root that cannot be written, without /dev/shm."""

import json
import subprocess
import sys

import pytest
from commands import SMALL
from sandbox import bare_environment, sandboxed, skip_without
from trees import contents, folder, packed

from mde_dist.packing.pack import PackConfig

CHAIN = """
import getpass, importlib, json, os, runpy, sys
if __name__ == "__main__":
    commands = json.load(sys.stdin)
    for module in ("mde_dist.train", *(words[0] for words in commands)):
        importlib.import_module(module)
    from mde_dist.tools.diagnostics import data, machine, step
    data.SECONDS = step.SECONDS = 0.1
    print(getpass.getuser(), *machine.look_at_scratch(8), sep="\\n", file=sys.stderr, flush=True)
    for number, (module, *words) in enumerate(commands):
        if os.fork() == 0:
            for handle, name in ((1, "out"), (2, "err")):
                os.dup2(os.open(f"{os.environ['WORK']}/{number}.{name}", os.O_CREAT | os.O_WRONLY), handle)
            if "--output" in words[2:]:
                os.environ["TMPDIR"] = os.environ["WORK"]
            sys.argv = [module, *words]
            sys.modules.pop(module, None)
            runpy.run_module(module, run_name="__main__", alter_sys=True)
            sys.exit()
        print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""
"""Commands one after another, each in a process forked from one that has imported everything."""


@pytest.mark.parametrize("launched", [False, pytest.param(True, marks=pytest.mark.long)])
def test_every_command_works_in_a_container_without_a_writable_root(path_on_disk, launched):
    """Only pictures need a folder for temporary files."""
    skip_without()
    work = path_on_disk / "work"
    tree = folder(work / "tree", count=6, size=(48, 64))
    shape = "--cpu --num_machines 1 --num_processes 1 --num_cpu_threads_per_process 1 --mixed_precision no"
    launcher = ["accelerate.commands.launch", *shape.split(), "--dynamo_backend", "no", "-m"]
    training = [word for name, value in SMALL.items() for word in (f"--{name}", str(value))]
    training += ["--data.shards", f"{work}/shards", "--data.eval-split", "train", "--train.batch-size", "6"]
    run = ["--run", f"{work}/run"]
    chain = [
        ["mde_dist.shard", "--source", f"{tree}", "--output", f"{work}/shards", "--samples-per-shard", "2"],
        ["mde_dist.doctor", *training, *run],
        [*(launcher if launched else []), "mde_dist.train", *training, *run],
        ["mde_dist.evaluate", *run, "--json", f"{work}/scores.json"],
        ["mde_dist.predict", *run, f"{tree}/images", "--output", f"{work}/depth"],
    ]
    (work / "chain.py").write_text(CHAIN)
    line = [*sandboxed(work, shm=""), sys.executable, str(work / "chain.py")]
    env = bare_environment(WORK=str(work), COLUMNS="400")
    done = subprocess.run(line, input=json.dumps(chain), cwd="/", env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    out, err = ([(work / f"{n}.{name}").read_text() for n in range(len(chain))] for name in ("out", "err"))
    assert done.stdout.split() == ["0"] * len(chain), (done.stderr, out, err)
    assert (
        len(done.stderr.splitlines()) == 4 and "--shm-size" in done.stderr
    )  # name; what a node of 8 GPUs has and lacks
    packed(tree, path_on_disk / "alone", PackConfig(samples_per_shard=2))
    assert contents(work / "shards") == contents(path_on_disk / "alone")
    (scratch,) = (line for line in out[1].splitlines() if line.startswith("│ scratch"))
    assert "warn" in scratch and "TMPDIR" in scratch and "/dev/shm" in scratch
    assert "after that: matplotlib cannot be loaded" in out[2] and "TMPDIR" in out[2]
    assert {path.name for path in (work / "depth").iterdir()} >= {"0000_depth.png", "0005_depth.png"}
    assert not any(err)
    assert not list(work.glob("*~*"))
