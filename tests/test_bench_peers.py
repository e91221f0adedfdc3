"""Other loaders are measured beside ours only where they deliver the same; one that does not is named."""

import json
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from mde_dist.data.shards import open_split
from mde_dist.tools.benchmarking import peer_scripts, peers
from mde_dist.tools.benchmarking.peer_loaders import harness
from mde_dist.tools.benchmarking.peer_pairs import Truth, take_pairs
from mde_dist.tools.benchmarking.peer_scripts import PEERS, Peer
from mde_dist.training.config import validate
from mde_dist.utils.cli import parse
from mde_dist.utils.errors import UserError

SCRIPTS = Path(harness.__file__).parent

FAKE = """
import harness, itertools, numpy as np
from PIL import Image

def prepare(pairs, out):
    out.mkdir()
    (out / "pairs").write_text(str(pairs))

def batches(out, batch, workers):
    from pathlib import Path
    files = harness.files(Path((out / "pairs").read_text()))
    numbers = iter(harness.Shuffled(len(files)))
    while True:
        some = [files[number] for number in itertools.islice(numbers, batch)]
        images = np.stack([np.array(Image.open(image)) for image, _ in some])
        depth = np.stack([np.array(Image.open(depth)) for _, depth in some]).astype(np.float32)
        CHANGE
        yield images, depth

harness.main(prepare, batches, ("numpy",))
"""


@pytest.fixture
def split(room_shards):
    with open_split(room_shards, "train") as shards:
        yield shards


@pytest.fixture
def scripts_on_path(monkeypatch):
    """The scripts of that folder import one another by their plain names."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(SCRIPTS))
    yield
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and Path(sys.modules[name].__file__).parent == SCRIPTS:
            del sys.modules[name]


def options(shards, *arguments):
    found = validate(parse(peers.Options, ["--data.shards", str(shards), *map(str, arguments)], "bench peers"))
    found.check()
    return found


@pytest.mark.parametrize("name", ["pil", "torchvision", "webdataset"])
def test_those_that_are_always_there_deliver_the_pairs_of_the_shards(name, split, tmp_path, scripts_on_path):
    pairs = take_pairs(split, 12, tmp_path)
    script = runpy.run_path(str(SCRIPTS / f"with_{name}.py"))
    prepare = script.get("prepare") or (script.get("plain_files") or script["tar_shards"]).prepare
    prepare(pairs, tmp_path / "out")
    harness.prove(script["batches"](tmp_path / "out", 4, 0), 12, tmp_path / "proof.npz")
    complaint, known = Truth(split, 12).complaint(tmp_path / "proof.npz")
    assert complaint == ""
    assert known["image_max_difference"] == 0
    assert known["layout"] == ("channels first" if name == "torchvision" else "")


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda images, depth: (images, depth * np.float32(1.0001)), "not that of the shards in metres"),
        (lambda images, depth: (images[..., ::-1], depth), "levels of 255"),
        (lambda images, depth: (images.astype(np.float32), depth), "float32"),
        (lambda images, depth: (images, depth.astype(np.float64)), "float64"),
        (lambda images, depth: (np.roll(images, 1, axis=0), depth), "levels of 255"),
        (lambda images, depth: (images[:1].repeat(12, 0), depth[:1].repeat(12, 0)), "1 different samples"),
    ],
)
def test_what_is_not_in_the_shards_is_noticed(change, word, split, tmp_path):
    images, depth = np.empty((12, 48, 64, 3), np.uint8), np.empty((12, 48, 64), np.uint16)
    order = np.random.default_rng(0).permutation(12)
    for place, sample in enumerate(order):
        split.read_into(int(sample), images[place], depth[place])
    stream = iter([change(images, depth.astype(np.float32) / np.float32(1000))])
    harness.prove(stream, 12, tmp_path / "proof.npz")
    assert word in Truth(split, 12).complaint(tmp_path / "proof.npz")[0]


def test_an_unshuffled_loader_is_noticed(split, tmp_path):
    images, depth = np.empty((12, 48, 64, 3), np.uint8), np.empty((12, 48, 64), np.uint16)
    for sample in range(12):
        split.read_into(sample, images[sample], depth[sample])
    harness.prove(iter([(images, depth.astype(np.float32) / np.float32(1000))]), 12, tmp_path / "proof.npz")
    assert "not shuffled" in Truth(split, 12).complaint(tmp_path / "proof.npz")[0]


def test_each_has_its_row_measured_or_with_the_reason_why_not(room_shards, tmp_path, monkeypatch):
    scripts = tmp_path / "scripts"
    scripts.mkdir()
    shutil.copy(SCRIPTS / "harness.py", scripts)
    changes = {"right": "depth /= 1000", "wrong": "depth /= 1001", "torn": "raise ValueError('no such thing')"}
    for name, change in changes.items():
        (scripts / f"with_{name}.py").write_text(FAKE.replace("CHANGE", change))
    monkeypatch.setattr(peer_scripts, "_SCRIPTS", scripts)
    fakes = [Peer(name, name, "PNG", threads=True) for name in changes]
    monkeypatch.setattr(peers, "PEERS", (*fakes, Peer("away", "away", "raw", "ffcv")))
    count = min(2, len(peers.cores_at_hand()))
    chosen = f"--work {tmp_path / 'work'} --pairs 12 --batch 4 --cores {count} --seconds 0.1 --rounds 1"
    result = peers.bench(options(room_shards, *chosen.split()))
    rows = {row["what"]: row for row in json.loads(json.dumps(result.as_json()))["peers"]}
    assert rows["right"][f"rate_{count}"] > 0
    ours = rows[peers.OURS][f"rate_{count}"]
    assert rows["right"][f"ahead_{count}"] == pytest.approx(ours / rows["right"][f"rate_{count}"])
    assert "depth is not that of the shards in metres in 12 of 12" in rows["wrong"]["note"]
    assert rows["torn"]["note"] == "failed: ValueError: no such thing"
    assert rows["away"]["note"] == "not installed; --python ffcv=INTERPRETER"
    assert [rows[name].get(f"rate_{count}") for name in ("wrong", "torn", "away")] == [None] * 3
    assert "right with depth PNG, the best other" in result.limit
    with pytest.raises(UserError, match="holds other pairs"):
        peers.bench(options(room_shards, *chosen.replace("--pairs 12", "--pairs 8").split()))


def test_every_loader_has_its_script():
    assert all(peer.script.is_file() for peer in PEERS)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--python", "ffcv"], "write NAME=INTERPRETER"),
        (["--python", "what=/bin/sh"], "NAME is one of pil, torchvision, webdataset, streaming, litdata, dali, ffcv"),
        (["--python", "ffcv=/no/such/python"], "/no/such/python is no program"),
        (["--only", "grain"], "only = grain"),
        (["--pairs", "4"], "at least a batch"),
        (["--cores", "0"], "numbers from 1 on"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(arguments, words, room_shards):
    with pytest.raises(UserError, match=words) as error:
        options(room_shards, *arguments)
    assert "\n" not in str(error.value)
