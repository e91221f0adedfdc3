"""The cluster that the tests of a file share, and a place for the logs of their jobs."""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import DAEMONS, Cluster


@pytest.fixture(scope="session")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    missing = [name for name in DAEMONS if not (shutil.which(name) or Path(f"/usr/sbin/{name}").is_file())]
    if missing:
        pytest.skip(f"no SLURM here: {', '.join(missing)} is not installed")
    if os.getuid():
        pytest.skip("starting a SLURM takes root")
    with contextlib.ExitStack() as opened:
        try:
            running = opened.enter_context(Cluster(tmp_path_factory.mktemp("slurm")))
        except (AssertionError, OSError, subprocess.SubprocessError) as error:
            pytest.skip(f"a SLURM is installed, but does not start on this machine: {str(error)[-2000:]}")
        yield running
