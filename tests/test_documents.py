"""Documents: the code they show runs; the options, links and paths they name exist."""

import ast
import re
from pathlib import Path

import numpy as np
import pytest

from mde_dist.packing.pack import PackConfig, pack
from mde_dist.packing.rooms import render_room
from mde_dist.packing.sources import rooms

ROOT = Path(__file__).parent.parent
GUIDES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "launch/README.md", "shards/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
"""Documents that tell a user what to type."""
DOCUMENTS = [*GUIDES, *sorted((ROOT / "benchmarks").glob("*.md"))]


def headings(document: Path) -> set[str]:
    """Anchors of a Markdown file, as GitHub names them."""
    titles = re.findall(r"^#+ (.*)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_the_lines_that_read_shards_with_plain_webdataset_work(tmp_path, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "shards/README.md").read_text(), re.DOTALL)
    (code,) = [block for block in blocks if "webdataset" in block]
    options = PackConfig(samples_per_shard=1)
    pack(rooms({"train": 1, "test": 2}), tmp_path / "shards/rooms", options, 1, lambda done, total: None)
    monkeypatch.chdir(tmp_path)
    seen: dict = {}
    exec(code, seen)  # the block loops over the shards and leaves the last pair behind
    image, metres = render_room(1_000_001)
    assert seen["image"].size == (320, 240)
    assert np.abs(np.asarray(seen["image"]).astype(float) - image).mean() < 3
    assert np.abs(seen["depth"] - metres).max() <= 0.00051


def test_every_option_that_the_documents_name_exists(capsys):
    from mde_dist import ablate, bench, evaluate, export, predict, report, shard, train

    known = set()
    for word in ("loader", "step", "train", "scaling"):
        with pytest.raises(SystemExit):
            bench.main([word, "--help"])
        known |= set(re.findall(r"--[a-z][a-z0-9.-]*", capsys.readouterr().out))
    for command in (ablate, evaluate, export, predict, report, shard, train):
        with pytest.raises(SystemExit):
            command.main(["--help"])
        known |= set(re.findall(r"--[a-z][a-z0-9.-]*", capsys.readouterr().out))
    known |= {"--config", "--multi_gpu", "--num_machines", "--num_processes", "--main_process_port", "--same_network"}
    known |= {"--section.field", "--mixed_precision", "--dynamo_backend", "--config_file", "--help"}
    known |= {"--standalone", "--nproc-per-node"}  # of torchrun
    known |= {"--user", "--tmpfs", "--shm-size"}  # of docker
    # of sbatch and scancel
    known |= {"--array", "--nodes", "--gpus-per-node", "--cpus-per-task", "--signal", "--batch"}
    known |= {"--dist", "--check"}  # of pytest-xdist and ruff
    known = {name.replace("_", "-") for name in known}
    for document in GUIDES:
        for option in re.findall(r"(?<![\w-])--[a-z][a-z0-9._-]*", document.read_text()):
            assert option.rstrip(".").replace("_", "-") in known, (document, option)


def test_docstrings_begin_with_a_verb_or_a_noun():
    """A reader meets the verb or the noun first: no "What", no noun clause whose head stands elsewhere."""
    headless = re.compile(r"(What|Whether|Where|How|Why|Which|Who|Of|All that)\b")
    found = []
    for path in sorted((ROOT / "mde_dist").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            match node:  # also those of attributes, which follow an assignment
                case ast.Expr(value=ast.Constant(value=str(text))) if headless.match(text.lstrip()):
                    found.append(f"{path.relative_to(ROOT)}:{node.lineno}: {text.lstrip().splitlines()[0]}")
    assert not found, "\n".join(found)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_relative_links_lead_somewhere(document):
    for link in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = document.parent / name if name else document
        assert target.exists(), (document, link)
        assert not anchor or anchor in headings(target), (document, link)


def test_files_that_the_guides_name_exist():
    tests = {path.name for path in (ROOT / "tests").rglob("*.py")}
    top = "mde_dist|configs|launch|slurm|benchmarks|docs"
    for document in GUIDES:
        text = document.read_text()
        for path in re.findall(rf"(?<![\w./-])((?:{top})/(?!test_)[\w./-]*\w)", text):
            assert (ROOT / path).exists(), (document, path)
        for name in re.findall(r"\btest_\w+\.py\b", text):
            assert name in tests, (document, name)
    folders = "data|packing|models|training|evaluation|inference|reporting|distributed|tools|utils"
    for document in (ROOT / "docs/architecture.md", ROOT / "docs/extending.md"):
        for path in re.findall(rf"`((?:{folders})/[\w./]*)`", document.read_text()):
            assert (ROOT / "mde_dist" / path).exists(), (document, path)


def test_the_file_tree_of_the_readme_is_whole():
    (block,) = re.findall(r"```\n(mde_dist/ .*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    lines = re.findall(r"^( *)([\w.]+/?) ", block, re.MULTILINE)
    package = {name.rstrip("/") for indent, name in lines if indent}
    here = {path.name for path in (ROOT / "mde_dist").iterdir() if not path.name.startswith("_")}
    assert package == here
    assert all((ROOT / name).is_dir() for indent, name in lines if not indent)
