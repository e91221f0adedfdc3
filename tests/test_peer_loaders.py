"""Other loaders are measured beside ours only where they deliver the same; one that does not is named."""

import argparse
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from mde_dist.data.shards import open_split
from mde_dist.utils.errors import UserError

PEERS = Path(__file__).parents[1] / "benchmarks/peers"
SCRIPTS = PEERS / "loaders"
sys.path.insert(0, str(PEERS))
import compare  # noqa: E402
from pairs import Truth, take_pairs  # noqa: E402

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


@pytest.mark.parametrize("name", ["pil", "torchvision", "webdataset", "mde_dist"])
def test_those_that_are_always_there_deliver_the_pairs_of_the_shards(
    name, split, room_shards, tmp_path, scripts_on_path
):
    pairs = take_pairs(split, str(room_shards), "train", 12, tmp_path)
    script = runpy.run_path(str(SCRIPTS / f"with_{name}.py"))
    prepare = script.get("prepare") or (script.get("plain_files") or script["tar_shards"]).prepare
    prepare(pairs, tmp_path / "out")
    import harness

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
def test_what_is_not_in_the_shards_is_noticed(change, word, split, tmp_path, scripts_on_path):
    import harness

    images, depth = np.empty((12, 48, 64, 3), np.uint8), np.empty((12, 48, 64), np.uint16)
    order = np.random.default_rng(0).permutation(12)
    for place, sample in enumerate(order):
        split.read_into(int(sample), images[place], depth[place])
    stream = iter([change(images, depth.astype(np.float32) / np.float32(1000))])
    harness.prove(stream, 12, tmp_path / "proof.npz")
    assert word in Truth(split, 12).complaint(tmp_path / "proof.npz")[0]


def test_an_unshuffled_loader_is_noticed(split, tmp_path, scripts_on_path):
    import harness

    images, depth = np.empty((12, 48, 64, 3), np.uint8), np.empty((12, 48, 64), np.uint16)
    for sample in range(12):
        split.read_into(sample, images[sample], depth[sample])
    harness.prove(iter([(images, depth.astype(np.float32) / np.float32(1000))]), 12, tmp_path / "proof.npz")
    assert "not shuffled" in Truth(split, 12).complaint(tmp_path / "proof.npz")[0]


def test_each_has_its_row_measured_or_with_the_reason_why_not(room_shards, split, tmp_path, monkeypatch):
    scripts = tmp_path / "scripts"
    scripts.mkdir()
    shutil.copy(SCRIPTS / "harness.py", scripts)
    changes = {"ours": "depth /= 1000", "wrong": "depth /= 1001", "torn": "raise ValueError('no such thing')"}
    for name, change in changes.items():
        (scripts / f"with_{name}.py").write_text(FAKE.replace("CHANGE", change))
    monkeypatch.setattr(compare, "SCRIPTS", scripts)
    monkeypatch.setattr(compare, "OWN", (compare.Peer("ours", "mde_dist", "PNG", threads=True),))
    fakes = [compare.Peer(name, name, "PNG", threads=True) for name in ("wrong", "torn")]
    monkeypatch.setattr(compare, "PEERS", (*fakes, compare.Peer("away", "away", "raw", "ffcv")))
    chosen = f"--shards {room_shards} --pairs 12 --batch 4 --cores 1 --seconds 0.1 --rounds 1".split()
    rows, counts = compare.compare(compare.parse_options(chosen), split, tmp_path / "work")
    found = {row["what"]: row for row in rows}
    assert counts == [1]
    assert found["mde_dist"]["rate_1"] > 0
    assert found["mde_dist"]["ahead_1"] == 1
    assert "depth is not that of the shards in metres in 12 of 12" in found["wrong"]["note"]
    assert found["torn"]["note"] == "failed: ValueError: no such thing"
    assert found["away"]["note"] == "not installed; --python ffcv=INTERPRETER"
    assert [found[name].get("rate_1") for name in ("wrong", "torn", "away")] == [None] * 3
    with pytest.raises(UserError, match="holds other pairs"):
        compare.compare(
            argparse.Namespace(**vars(compare.parse_options(chosen)) | {"pairs": 8}), split, tmp_path / "work"
        )


def test_every_loader_has_its_script():
    assert all(peer.script.is_file() for peer in compare.OWN + compare.PEERS)


@pytest.mark.parametrize("text", ["ffcv", "what=/bin/sh", "ffcv=/no/such/python"])
def test_an_interpreter_that_is_none_is_one_line(text):
    with pytest.raises(UserError, match="write NAME=INTERPRETER") as error:
        compare.chosen_interpreters([text])
    assert "\n" not in str(error.value)
