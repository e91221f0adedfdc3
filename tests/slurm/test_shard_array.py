"""slurm/shard.sbatch on a real SLURM: an array that packs, and a last job that publishes and verifies."""

import pytest
from cluster import ROOT
from commands import run
from trees import contents

OPTIONS = {"layout": "rooms", "limit": 8, "size": "24x32", "samples-per-shard": 3}


def flat(**options):
    return [text for name, value in options.items() for text in (f"--{name}", str(value))]


@pytest.mark.long
def test_an_array_packs_byte_for_byte_what_one_process_packs(cluster, tmp_path):
    alone, array = tmp_path / "alone", tmp_path / "array"
    done = run("shard", output=alone, workers=2, **OPTIONS)
    assert done.returncode == 0, done.stderr
    # tasks need not begin at 0, and there are more of them than a split has shards
    options = ["--array=3-6", "--cpus-per-task=1", f"--output={tmp_path}/%a.log"]
    first = cluster.submit("slurm/shard.sbatch", *flat(output=array, **OPTIONS), sbatch=options)
    cluster.wait(lambda: not cluster.client("squeue", "-h").strip(), 120)
    said = "".join(path.read_text() for path in sorted(tmp_path.glob("*.log")))
    assert said.count("without --part they are published") == 4, said
    last = int(said.split("Submitted batch job ")[1].split()[0])
    log = ROOT / f"slurm-{last}.log"
    assert "all whole" in log.read_text()
    log.unlink()
    assert (cluster.state(first), cluster.state(last)) == ("COMPLETED", "COMPLETED")
    assert contents(array) == contents(alone)


def test_a_part_that_fails_publishes_nothing(cluster, tmp_path):
    array = tmp_path / "array"
    options = ["--array=0-1", "--cpus-per-task=1", f"--output={tmp_path}/%a.log"]
    arguments = ["--source", tmp_path / "nowhere", "--output", array]
    cluster.submit("slurm/shard.sbatch", *arguments, sbatch=options)
    cluster.wait(lambda: not cluster.client("squeue", "-h").strip(), 60)  # the last job is gone with what it waits for
    assert "no such folder" in (tmp_path / "0.log").read_text()
    assert not array.exists()
