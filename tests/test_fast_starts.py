"""`--help`, the config and wrong options are answered before the libraries that compute are imported."""

import json
import subprocess
import sys
import textwrap

from commands import environment

COMMANDS = ("train", "evaluate", "predict", "export", "doctor", "report", "ablate", "bench", "shard", "config")
HEAVY = ("torch", "torchvision", "accelerate", "matplotlib", "webdataset")


def test_questions_and_wrong_options_are_answered_without_torch(tmp_path):
    """All in one process, each command as `python -m` executes it: what one imports, it imports for all."""
    script = textwrap.dedent(f"""
        import contextlib, io, json, runpy, sys
        asked = [(name, *words) for name in {COMMANDS} for words in (["--help"], ["--no-such-option", "3"])]
        for name, *words in [*asked, ("config",), ("config", "train.batch_size")]:
            sys.argv = [f"mde_dist.{{name}}", *words]
            out, err, code = io.StringIO(), io.StringIO(), 0
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                try:
                    runpy.run_module(f"mde_dist.{{name}}", run_name="__main__", alter_sys=True)
                except SystemExit as stop:
                    code = stop.code or 0
            heavy = [module for module in {HEAVY} if module in sys.modules]
            print(json.dumps([name, words, code, out.getvalue(), err.getvalue(), heavy]))
    """)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment(), cwd=tmp_path, check=True
    )
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == 2 * len(COMMANDS) + 2
    for name, words, code, out, err, heavy in found:
        assert not heavy, (name, words, heavy)
        if words[:1] == ["--no-such-option"]:
            assert (code, out) == (2, ""), name
            assert err.startswith("error: ") and err.count("\n") == 1, err
        else:
            assert (code, err) == (0, "") and out, (name, words, err)
    assert found[-1][3] == "24\n"
    assert found[-2][3].startswith("run = ")
