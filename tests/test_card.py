"""The model card of a real run: true, valid for the hub's own library, and safe whatever the files say."""

import html
import json
import re
import shutil
import tomllib

import numpy as np
import pytest
import torch
import yaml
from commands import small
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from warm import warm_run, without_pictures

from mde_dist.data.manifest import NAME
from mde_dist.evaluation.metrics import PROTOCOLS
from mde_dist.inference.model_card import write_card
from mde_dist.inference.origin import find_origin
from mde_dist.inference.predictor import open_predictor
from mde_dist.models.config import ModelConfig
from mde_dist.models.depth_model import create_pretrained_model
from mde_dist.models.weights import EMA, MODEL, OPTIMIZER, read_model, serialize_model
from mde_dist.packing.rooms import render_room
from mde_dist.training.checkpoint import save_checkpoint
from mde_dist.utils.errors import UserError
from mde_dist.utils.io import sha256_of
from mde_dist.utils.markdown import block, code, plain, row

HOSTILE = "a`b``c|d'e\"f: {g} [h](i) & \u2028 \x1b[1m\n---\nlicense: mit\n# <script>alert(1)</script></code></details>"
METRICS = PROTOCOLS["eigen"].metrics


@pytest.fixture(scope="module")
def trained(room_shards, scratch):
    """A training of 24 samples, evaluated after 12 and after 24."""
    run = scratch("runs") / "tiny"
    options = small(data_shards=room_shards, train_total_samples=24, train_evaluate_every=12)
    done = warm_run("train", before=without_pictures, run=run, **options)
    assert done.returncode == 0, done.stderr
    return run


@pytest.fixture
def run(trained, tmp_path):
    """The same run with files of its own to change; the large ones are links."""
    copy = tmp_path / "run"
    shutil.copytree(trained, copy, ignore=shutil.ignore_patterns("checkpoints", "logs", "panels", "*.safetensors"))
    for name in ("checkpoints", MODEL):
        (copy / name).symlink_to(trained / name)
    return copy


def body(folder):
    """The card without its front matter."""
    return ModelCard.load(folder / "README.md").text


def as_html(text):
    return MarkdownIt("commonmark", {"html": True}).enable("table").render(text)


def change(path, **values):
    """Set entries of a JSON file; `a__b` is entry b of entry a."""
    record = json.loads(path.read_text())
    for name, value in values.items():
        *sections, last = name.split("__")
        inner = record
        for section in sections:
            inner = inner[section]
        inner[last] = value
    path.unlink()  # it may be a link
    path.write_text(json.dumps(record))


def test_the_card_tells_what_the_run_found(run, room_shards):
    assert write_card(run) == run / "README.md"
    card = ModelCard.load(run / "README.md")
    front = card.data.to_dict()
    assert (front["library_name"], front["pipeline_tag"]) == ("mde_dist", "depth-estimation")
    assert {"safetensors", "tiny"} <= set(card.data.tags) and "onnx" not in card.data.tags
    assert card.data.datasets is None  # rendered rooms are no data set of the hub
    assert card.data.license is None
    assert card.data.model_name == "run"
    record = json.loads((run / "evaluations" / "last.json").read_text())
    assert record["predictor"]["samples"] == 24
    found = {result.metric_type: result for result in card.data.eval_results}
    scores = {name: value for name, value in record["results"]["model"]["eigen"].items() if name != "images"}
    assert {name: result.metric_value for name, result in found.items()} == pytest.approx(scores, abs=5.1e-7)
    for result in found.values():
        assert result.dataset_type == "mde_dist_rooms" and result.dataset_split == "test"
        assert re.search(r"\(eigen protocol, 8 images, fingerprint [0-9a-f]{12}\)", result.metric_name)
    baselines = [r for r in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "baseline" in r]
    assert len(baselines) == 2
    shown = [*(scores[name] for name in ("abs_rel", "delta1")), *(r["abs_rel"] for r in baselines)]
    assert all(f" {value:.4f} |" in card.text for value in shown)
    model = create_pretrained_model(ModelConfig(encoder="tiny"), seed=0)
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    manifest = json.loads(next(run.glob("checkpoints/*/state.json")).read_text())["identity"]["manifest"]
    for said in ("samples seen: 24", f"{millions:.1f} million", "30 pairs of the embedded sample", "32x32", manifest):
        assert said in card.text, said
    assert f"shards = {json.dumps(str(room_shards))}" in card.text
    assert "photographs are foreign to it" in card.text


def test_three_lines_of_the_card_load_the_model(run, monkeypatch):
    write_card(run)
    (usage,) = re.findall("```python\n(.*?)```", body(run), re.DOTALL)
    assert len(usage.splitlines()) == 3
    monkeypatch.chdir(run)
    image, _ = render_room(3, (60, 90))
    names = {"image": image}
    exec(usage, names)
    assert names["depth"].dtype == np.float32 and names["depth"].shape == (60, 90)
    exact = open_predictor(run / MODEL, torch.device("cpu"))(image)
    assert np.abs(names["depth"] - exact).max() < 0.1  # on a GPU it is bfloat16


def test_weights_in_a_folder_of_their_own_are_described_without_a_run(trained, tmp_path):
    shutil.copyfile(trained / MODEL, tmp_path / MODEL)
    write_card(tmp_path, name="lonely")
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.eval_results is None and "model-index" not in card.data.to_dict()
    assert "# `lonely`" in card.text and "No evaluation of these weights" in card.text
    assert "samples seen" not in card.text


def test_a_card_shows_only_what_was_measured_of_these_very_weights(trained, run, tmp_path):
    """Of the weights after 12 samples, the evaluation after 24 says nothing."""
    (older,) = (
        path for path in trained.glob("checkpoints/*") if '"samples_seen": 12' in (path / "state.json").read_text()
    )
    folder = tmp_path / "older"
    folder.mkdir()
    shutil.copyfile(older / MODEL, folder / MODEL)
    (run / "evaluations" / "best.json").unlink()
    write_card(folder, run)
    assert "samples seen: 12" in body(folder) and "No evaluation of these weights" in body(folder)
    shutil.copyfile(run / "evaluations" / "last.json", run / "evaluations" / "best.json")
    change(run / "evaluations" / "best.json", predictor__samples=12)
    write_card(folder, run)
    assert "fingerprint" in body(folder)


def test_beside_an_average_the_weights_themselves_were_not_scored(trained, run, tmp_path):
    averaged = tmp_path / "averaged"
    state = json.loads(next(trained.glob("checkpoints/*/state.json")).read_text())
    files = {
        name: serialize_model({"weight": torch.full((4,), value)}, {}) for name, value in ((MODEL, 1.0), (EMA, 2.0))
    }
    record = {name: state[name] for name in ("config", "identity", "versions")} | {"step": 2, "samples_seen": 24}
    save_checkpoint(averaged / "checkpoints", {**files, OPTIMIZER: b""}, record, 2, None)
    shutil.copytree(run / "evaluations", averaged / "evaluations")
    for name, scores in ((MODEL, 0), (EMA, 1)):
        origin = find_origin(averaged / "checkpoints" / "step-00000002" / name, averaged)
        assert origin.samples == 24 and len(origin.scores) == scores
    (tmp_path / "other").write_bytes(serialize_model({"weight": torch.full((4,), 3.0)}, {}))
    assert find_origin(tmp_path / "other", averaged).samples is None


def test_a_published_model_is_recognised_whatever_it_says_of_itself(trained, run):
    (run / MODEL).unlink()
    data = (trained / MODEL).read_bytes()
    (run / MODEL).write_bytes(data.replace(b"data.threads", b"data.threadz"))
    assert (run / MODEL).read_bytes() != data
    assert find_origin(run / MODEL, run).samples == 24


def make_run(folder, trained, config, identity, **evaluation):
    """A run as the trained one, that says something else of itself."""
    metadata, tensors = read_model(trained / MODEL)
    weights = serialize_model(tensors, metadata | {"config": metadata["config"] | config})
    state = json.loads(next(trained.glob("checkpoints/*2/state.json")).read_text())
    record = {name: state[name] for name in ("step", "samples_seen", "config", "versions")}
    record["identity"] = state["identity"] | identity
    save_checkpoint(folder / "checkpoints", {MODEL: weights, OPTIMIZER: b""}, record, 2, None)
    (folder / MODEL).write_bytes(weights)
    shutil.copytree(trained / "evaluations", folder / "evaluations")
    change(folder / "evaluations" / "last.json", **evaluation)


@pytest.mark.parametrize(
    ("layout", "nyu"), [("densedepth", True), ("marigold", True), ("folder", False), ("tars", False)]
)
def test_nyu_depth_v2_is_named_where_the_shards_say_so_and_nowhere_else(trained, room_shards, tmp_path, layout, nyu):
    shards, run = tmp_path / "shards", tmp_path / "run"
    shards.mkdir()
    manifest = json.loads((room_shards / NAME).read_text())
    manifest["source"]["layout"] = layout
    (shards / NAME).write_text(json.dumps(manifest))
    sha256, place = sha256_of(shards / NAME), str(shards)
    truth = {"ground_truth__place": place, "ground_truth__manifest": sha256}
    make_run(run, trained, {"data.shards": place}, {"manifest": sha256}, **truth)
    write_card(run)
    card = ModelCard.load(run / "README.md")
    assert card.data.datasets == (["nyu_depth_v2"] if nyu else None)
    assert {result.dataset_name for result in card.data.eval_results} == {
        "NYU Depth v2" if nyu else f"shards {sha256[:12]}"
    }
    assert ("NYU" in card.text) == nyu
    assert "pairs: " in card.text and "sample" in card.text
    (shards / NAME).write_text(json.dumps(manifest) + " ")  # other shards by now: they say nothing of this model
    write_card(run)
    assert ModelCard.load(run / "README.md").data.datasets is None and "pairs: " not in body(run)


def test_nothing_that_files_say_becomes_markup(trained, tmp_path):
    run = tmp_path / "run '\": {}<b> `"
    hostile = {
        "data.shards": HOSTILE,
        "data.train_split": HOSTILE,
        "model.weights": HOSTILE,
        f"x{HOSTILE}": 1,
        "y": HOSTILE,
    }
    truth = {"ground_truth__place": HOSTILE, "ground_truth__split": HOSTILE, "ground_truth__manifest": HOSTILE}
    make_run(run, trained, hostile, {"manifest": HOSTILE}, **truth)
    change(run / "evaluations" / "last.json", results__model__eigen__abs_rel=0.5)
    scores = {**json.loads((run / "evaluations" / "last.json").read_text())["results"]["model"]["eigen"], "images": 8}
    lines = [{"samples": 0, "baseline": HOSTILE, "evaluation": "eigen", **scores}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_card(run)
    card = ModelCard.load(run / "README.md")
    text = (run / "README.md").read_text()
    assert set(yaml.safe_load(text.split("\n---\n")[0])) == {"library_name", "pipeline_tag", "tags", "model-index"}
    assert card.data.license is None and len(card.data.eval_results) == len(METRICS)
    shown = as_html(card.text)
    tags = {tag.lower() for tag in re.findall(r"<\s*/?\s*([a-zA-Z0-9]+)", shown)}
    assert tags == set(
        ["h1", "h2", "p", "ul", "li", "code", "pre", "details", "summary", "table", "thead", "tbody", "tr", "th", "td"]
    )
    assert (shown.count("<h1>"), shown.count("<h2>"), shown.count("<details>"), shown.count("</details>")) == (
        1,
        4,
        1,
        1,
    )
    assert shown.count("<td") == len(METRICS) * 3  # metric, model, baseline: no cell was split
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in shown  # shown as it is
    toml = re.search(r"\n(`{3,})toml\n(.*?)\n\1\n", card.text, re.DOTALL)[2]
    assert tomllib.loads(toml)["data"]["shards"] == HOSTILE


@pytest.mark.parametrize("damage", ["evaluation", "scores", "metrics", "state", "size"])
def test_damage_in_the_run_does_not_keep_the_card_from_being_written(run, trained, damage):
    last = run / "evaluations" / "last.json"
    if damage == "evaluation":
        last.write_text("{")
    elif damage == "scores":
        change(last, results__model__eigen__abs_rel="0.1 or so")
    elif damage == "metrics":
        (run / "metrics.jsonl").write_bytes(b"\xff\n[]\n")
    elif damage == "state":
        (run / "checkpoints").unlink()
        (run / "checkpoints" / "step-00000002").mkdir(parents=True)
        (run / "checkpoints" / "step-00000002" / MODEL).symlink_to(trained / MODEL)
        (run / "checkpoints" / "step-00000002" / "state.json").write_text("[]")
    else:
        (run / "evaluations" / "last.json").write_text("0" * 1000)
    (run / "evaluations" / "best.json").unlink()
    write_card(run)
    assert ("No evaluation of these weights" in body(run)) == (damage != "metrics")


def test_without_weights_there_is_no_card(tmp_path):
    with pytest.raises(UserError, match=f"{MODEL}: no such file"):
        write_card(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["a", "`", "``a`", "a|b", "<b>", "", "\x00\ud800\u2029", "\\`", "&lt;", " `` "])
def test_code_spans_rows_and_blocks_show_any_text_as_it_is(text):
    shown = html.escape(plain(text) or " ", quote=True).replace("&#x27;", "'")
    assert as_html(f"so: {code(text)}, yes\n") == f"<p>so: <code>{shown}</code>, yes</p>\n"
    table = as_html("\n".join([row(code(text), "x"), row("---", "---"), row("1", code(text))]) + "\n")
    assert table.count(f"<code>{shown}</code>") == 2 and table.count("<td>") == 2
    assert as_html(block(f"{text}x\n", "toml")).startswith('<pre><code class="language-toml">')
    assert len(plain("x" * 1000)) == 200
