"""Signals to a process that is on its way out."""

import signal
import subprocess
import sys

PROGRAM = """
import os, signal
from mde_dist.distributed.signals import PreemptionHandler

try:
    with PreemptionHandler().install():
        {inside}
except RuntimeError:
    pass
os.kill(os.getpid(), signal.SIGTERM)
print("said")
"""


def end(inside: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(inside=inside)], capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout


def test_a_launcher_that_ends_a_rank_which_has_failed_does_not_cut_what_it_says():
    assert end("raise RuntimeError") == (0, "said\n")


def test_after_a_stop_a_second_signal_changes_nothing():
    assert end("os.kill(os.getpid(), signal.SIGTERM)") == (0, "said\n")


def test_a_signal_after_all_went_well_ends_the_process():
    assert end("pass") == (-signal.SIGTERM, "")
