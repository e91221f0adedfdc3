"""The recipes and tables that come with the repository are what they say they are."""

from pathlib import Path

import pytest

from mde_dist.tools.ablation.table import read_table
from mde_dist.training.config import as_json, read_config

ROOT = Path(__file__).parent.parent
SCRATCH = {"model.weights", "optim.lr", "optim.warmup_samples", "optim.ema_samples"}
"""What a start from scratch on few pairs needs otherwise."""
SHORT = SCRATCH | {"augment.color", "augment.crop", "augment.cut_depth", "optim.weight_decay", "optim.base_batch_size"}
"""And a few epochs, in which nothing is learned by heart."""


def config(path: str) -> dict:
    return as_json(read_config(["--config", str(ROOT / path)]))


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.toml")), ids=lambda path: path.stem)
def test_every_recipe_can_be_read(path):
    config(str(path))


@pytest.mark.parametrize(("name", "otherwise"), [("gpu", SCRATCH), ("small", SHORT)])
def test_what_was_measured_is_the_strong_recipe(name, otherwise):
    """In all that the tables are about."""
    strong, measured = config("configs/strong.toml"), config(f"benchmarks/accuracy/{name}.toml")
    sections = ("augment.", "model.", "loss.", "optim.", "evaluate.")
    assert {name for name in strong if name.startswith(sections) and strong[name] != measured[name]} <= otherwise


@pytest.mark.parametrize("name", ["choose", "longer", "test", "gpu-choose", "gpu-test"])
def test_every_row_of_a_table_is_another_recipe(name, tmp_path):
    table = read_table(ROOT / f"benchmarks/accuracy/{name}.toml", tmp_path)
    changes = [str(table.changes(row)) for row in table.rows]
    assert changes[0] == "{}" and len(set(changes)) == len(changes)
