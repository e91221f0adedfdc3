"""Records of an evaluation: what tells them apart, and whether two differ by more than chance."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mde_dist import evaluate
from mde_dist.evaluation.compare import compare, differences
from mde_dist.evaluation.metrics import METRICS, PROTOCOLS, score, summarise
from mde_dist.evaluation.results import (
    GroundTruth,
    hash_ground_truth,
    read_record,
    short_hash,
    target_hashes,
    to_json,
    write_csv,
    write_json,
)
from mde_dist.utils.errors import UserError

IMAGES, SIZE = 30, (12, 16)


def ground_truth_of(depth, keys=None):
    keys = keys or [f"image-{number}" for number in range(len(depth))]
    sha256 = hash_ground_truth(keys, SIZE, target_hashes(depth, depth))
    return GroundTruth("here", "test", SIZE, "0" * 64, keys, ["scene"] * len(keys), sha256)


def depths(seed=0, images=IMAGES):
    """Millimetres."""
    return torch.from_numpy(np.random.default_rng(seed).integers(500, 9000, (images, *SIZE))).double()


def record(prediction, depth, names=("eigen", "densedepth"), keys=None, **about):
    protocols = [PROTOCOLS[name] for name in names]
    rows = [score(prediction, depth, protocol, 1000) for protocol in protocols]
    return to_json({"model": rows}, protocols, ground_truth_of(depth, keys), {"path": "model", **about}, [])


def noisy(depth, seed, spread):
    return depth * torch.from_numpy(np.random.default_rng(seed).lognormal(0, spread, (len(depth), 1, 1)))


def written(tmp_path, **records):
    paths = []
    for name, content in records.items():
        write_json(tmp_path / f"{name}.json", content)
        paths.append(tmp_path / f"{name}.json")
    return paths


@pytest.mark.parametrize("name", PROTOCOLS)
def test_intervals_are_those_of_resampling_one_image_after_the_other(name):
    """Against resamples that are drawn as lists of images, by a random generator of their own."""
    depth = depths()
    a, b = (record(noisy(depth, seed, spread), depth, [name]) for seed, spread in ((1, 0.2), (2, 0.3)))
    protocol, random, drawn = PROTOCOLS[name], np.random.default_rng(7), []
    first, second = (score(noisy(depth, seed, spread), depth, protocol, 1000) for seed, spread in ((1, 0.2), (2, 0.3)))
    for _ in range(1000):
        chosen = torch.from_numpy(random.integers(0, IMAGES, IMAGES))
        means = [summarise(rows[chosen], protocol).metrics for rows in (first, second)]
        drawn.append([means[1][metric] - means[0][metric] for metric in protocol.metrics])
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
    whole = [summarise(rows, protocol).metrics for rows in (first, second)]
    for k, found in enumerate(differences(a, b, protocol, seed=0)):
        assert found.metric == protocol.metrics[k]
        assert found.first == pytest.approx(whole[0][found.metric], rel=1e-12)
        assert found.second == pytest.approx(whole[1][found.metric], rel=1e-12)
        spread = high[k] - low[k]
        assert found.low == pytest.approx(low[k], abs=0.15 * spread + 1e-9)
        assert found.high == pytest.approx(high[k], abs=0.15 * spread + 1e-9)


def test_the_interval_of_a_mean_is_the_textbook_one():
    """Of 2000 images the bootstrap of a mean is normal: +- 1.96 standard errors."""
    depth = depths(3, 2000)
    a, b = (record(noisy(depth, seed, 0.2), depth, ["full"]) for seed in (1, 2))
    terms = [np.array(one["images"]["terms"]["full"]["abs_rel"]) for one in (a, b)]
    difference = terms[1] - terms[0]
    error = 1.96 * difference.std() / np.sqrt(len(difference))
    found = differences(a, b, PROTOCOLS["full"], seed=0)[0]
    assert found.low == pytest.approx(difference.mean() - error, abs=0.1 * error)
    assert found.high == pytest.approx(difference.mean() + error, abs=0.1 * error)


def test_verdicts(tmp_path, capsys):
    depth = depths()
    good, bad, other = (noisy(depth, seed, spread) for seed, spread in ((1, 0.05), (2, 0.6), (3, 0.05)))
    paths = written(tmp_path, a=record(good, depth), b=record(bad, depth), c=record(other, depth))
    for first, second, verdict in ((0, 1, "A is better"), (1, 0, "B is better")):
        found = compare(paths[first], paths[second])
        assert set(found) == {"eigen", "densedepth"}
        for one in found["eigen"]:
            if one.metric in ("abs_rel", "rmse", "delta1"):  # errors and accuracies, each in its direction
                assert one.verdict == verdict, one
    assert {one.verdict for one in compare(paths[0], paths[0])["eigen"]} == {"not clear"}
    assert next(one for one in compare(paths[0], paths[2])["eigen"] if one.metric == "abs_rel").verdict == ("not clear")
    said = capsys.readouterr().out
    assert short_hash(record(good, depth)["fingerprints"]["eigen"]) in said
    assert "10,000 bootstrap resamples" in said


def test_the_order_of_the_images_does_not_matter(tmp_path):
    depth = depths()
    keys = [f"image-{number}" for number in range(IMAGES)]
    order = np.random.default_rng(0).permutation(IMAGES)
    a, b = record(noisy(depth, 1, 0.2), depth, keys=keys), record(noisy(depth, 2, 0.3), depth, keys=keys)
    shuffled = record(noisy(depth, 2, 0.3)[order], depth[order], keys=[keys[place] for place in order])
    assert shuffled["fingerprints"] == b["fingerprints"]
    for name in ("eigen", "densedepth"):
        for one, other in zip(*(differences(a, x, PROTOCOLS[name], 0) for x in (b, shuffled)), strict=True):
            assert (one.low, one.high) == pytest.approx((other.low, other.high), rel=1e-9)


def other_truth(depth):
    changed = depth.clone()
    changed[3, 2, 1] += 1
    return changed


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda a, depth: record(depth, other_truth(depth)), "the ground truth differs"),
        (lambda a, depth: record(depth, depth, keys=[f"x{k}" for k in range(IMAGES)]), "the ground truth differs"),
        (lambda a, depth: record(depth[:20], depth[:20]), "30 images against 20, the ground truth differs"),
        (lambda a, depth: record(depth, depth, ["full"]), "only one of them has the protocol"),
        (lambda a, depth: edited(a, "definitions", 9), "defined otherwise .*9.*score both with the same version"),
        (lambda a, depth: of_0_1(a), "defined otherwise .*mde_dist 0.1.0.*score both with the same version"),
        (lambda a, depth: edited(a, "protocol", {"name": "eigen", "clamp": [0, 8]}), "the protocol's numbers differ"),
    ],
)
def test_results_of_different_fingerprints_are_not_compared(tmp_path, capsys, change, words):
    depth = depths()
    a = record(depth * 1.1, depth, ["eigen"])
    paths = written(tmp_path, a=a, b=change(json.loads(json.dumps(a)), depth))
    with pytest.raises(UserError, match=words) as error:
        evaluate.main(["--compare", *map(str, paths)])
    assert "cannot be compared" in str(error.value)
    assert "\n" not in str(error.value)


def of_0_1(a):
    """As mde_dist 0.1 wrote it."""
    for mark in a["fingerprints"].values():
        del mark["definitions"]
        mark["version"] = "0.1.0"
    return a


def test_results_of_another_release_are_compared(tmp_path):
    """The package's version is no part of a fingerprint, and two results of 0.1 have the same definitions."""
    depth = depths()
    a, b = (record(noisy(depth, seed, 0.2), depth, ["eigen"]) for seed in (1, 2))
    assert set(compare(*written(tmp_path, a=a, b=json.loads(json.dumps(b)) | {"made_by": "mde_dist 7.0"}))) == {"eigen"}
    assert set(compare(*written(tmp_path, a=of_0_1(a), b=of_0_1(b)))) == {"eigen"}


def edited(a, name, value):
    a["fingerprints"]["eigen"][name] = value
    return a


def test_what_can_be_compared_is_and_the_rest_is_named(tmp_path, capsys):
    depth = depths()
    paths = written(tmp_path, a=record(depth, depth, ["eigen", "full"]), b=record(depth * 1.3, depth, ["full", "lsq"]))
    assert set(compare(*paths)) == {"full"}
    assert "not compared: only one of them has the protocol (eigen, lsq)" in capsys.readouterr().out


def renamed(a, name):
    a["images"]["keys"][3] = "another"
    return a


def fewer_pixels(a, name):
    a["images"]["terms"][name]["pixels"][3] -= 1
    return a


def cut(a, name):
    images = a["images"]
    images["keys"].pop()
    images["terms"] = {name: {term: values[:-1] for term, values in images["terms"][name].items()}}
    return a


@pytest.mark.parametrize("change", [renamed, fewer_pixels, cut])
@pytest.mark.parametrize("changed", [0, 1])
def test_a_fingerprint_that_does_not_tell_of_its_images_is_one_line(tmp_path, change, changed):
    """Neither a traceback nor a comparison of some of them: files that were edited, cut or put together by hand."""
    depth = depths()
    records = [record(depth * factor, depth, ["full"]) for factor in (1.1, 1.2)]
    records[changed] = change(json.loads(json.dumps(records[changed])), "full")
    with pytest.raises(UserError, match="images") as error:
        compare(*written(tmp_path, a=records[0], b=records[1]))
    assert "\n" not in str(error.value)


def test_the_fingerprint_holds_all_that_decides():
    depth = depths()
    marks = record(depth, depth)["fingerprints"]
    assert marks["eigen"]["protocol"]["crop"] == [45, 471, 41, 601]
    assert marks["eigen"]["protocol"]["clamp"] == [1e-3, 10.0]
    assert marks["densedepth"]["protocol"]["valid"] == [0.0, None]  # JSON has no infinity
    assert marks["eigen"]["images"] == IMAGES
    assert short_hash(marks["eigen"]) != short_hash(marks["densedepth"])


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 65535), st.integers(0, IMAGES - 1), st.integers(0, SIZE[0] - 1), st.integers(0, SIZE[1] - 1))
def test_a_truth_that_differs_in_one_pixel_is_another(value, image, row, column):
    depth = depths()
    changed = depth.clone()
    changed[image, row, column] = value
    same = bool((changed == depth).all())
    assert (ground_truth_of(changed).sha256 == ground_truth_of(depth).sha256) == same


def test_a_record_comes_back_as_it_was_written(tmp_path):
    depth = depths()
    depth[4] = 0
    content = record(noisy(depth, 1, 0.2), depth, list(PROTOCOLS))
    (path,) = written(tmp_path, a=content)
    assert read_record(path) == content
    assert content["unscored"]["eigen"] == ["image-4"]
    assert content["results"]["model"]["eigen"]["images"] == IMAGES - 1
    assert compare(path, path)["eigen"][0].first == content["results"]["model"]["eigen"]["abs_rel"]


def test_nothing_that_could_be_scored_is_one_line():
    with pytest.raises(UserError, match="protocol eigen: none of the 30 images has a pixel to score"):
        record(depths(), torch.zeros_like(depths()), ["eigen"])


def test_the_table_of_images_has_a_row_each(tmp_path):
    depth = depths()
    depth[4] = 0
    protocols = [PROTOCOLS["eigen"], PROTOCOLS["blog"]]
    rows = [score(noisy(depth, 1, 0.2), depth, protocol, 1000) for protocol in protocols]
    write_csv(tmp_path / "images.csv", protocols, rows, ground_truth_of(depth))
    lines = [line.split(",") for line in (tmp_path / "images.csv").read_text().splitlines()]
    head = ["key", "scene", "eigen_pixels", *(f"eigen_{m}" for m in METRICS)]
    assert lines[0] == [*head, "blog_pixels", "blog_abs_rel", "blog_delta1"]
    assert len(lines) == 1 + IMAGES
    assert lines[5] == ["image-4", "scene", "0", *[""] * 9, "0", "", ""]
    assert float(lines[1][3]) == rows[0][0, 1].item()
    assert lines[1][12] == str(SIZE[0] * SIZE[1])


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: "[1, 2]",
        lambda text: "{}",
        lambda text: text.replace('"version": 1', '"version": 7'),
        lambda text: text.replace('"eigen"', '"eigne"'),
        lambda text: text.replace('"pixels"', '"pixel"'),
        lambda text: text.replace('"image-3"', '"image-4"'),
        lambda text: text.replace('"image-3",', ""),
        lambda text: text.replace('"pixels": [', '"pixels": [1e999, '),
        lambda text: "[" * 100_000,
        lambda text: text.replace('"predictor"', '"predicted"'),
        lambda text: json.dumps(json.loads(text) | {"fingerprints": {"eigen": "abc"}}),
        lambda text: json.dumps(json.loads(text) | {"predictor": 3}),
    ],
)
def test_files_that_are_no_results_are_one_line(tmp_path, damage):
    depth = depths()
    (path,) = written(tmp_path, a=record(depth, depth))
    (tmp_path / "b.json").write_text(damage(path.read_text()))
    with pytest.raises(UserError) as error:
        compare(path, tmp_path / "b.json")
    assert "b.json is no result of evaluate --json" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_file_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"nothing\.json: No such file"):
        compare(tmp_path / "nothing.json", tmp_path / "nothing.json")
