"""The recipes and tables that come with the repository are what they say they are."""

from pathlib import Path

import pytest

from mde_dist.ablation.table import read_table
from mde_dist.config import as_json, read_config

ROOT = Path(__file__).parent.parent
SHORT = {"augment.crop", "model.weights", "optim.lr", "optim.lr_batch", "optim.warmup", "optim.ema"}
"""What a few epochs on a few pairs from scratch need otherwise."""


def config(path: str) -> dict:
    return as_json(read_config(["--config", str(ROOT / path)]))


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.toml")), ids=lambda path: path.stem)
def test_every_recipe_can_be_read(path):
    config(str(path))


def test_the_small_recipe_is_the_strong_one():
    """In all that the ablation is about."""
    strong, small = config("configs/strong.toml"), config("benchmarks/accuracy/small.toml")
    sections = ("augment.", "model.", "loss.", "optim.", "evaluate.")
    differ = {name for name in strong if name.startswith(sections) and strong[name] != small[name]}
    assert differ <= SHORT


@pytest.mark.parametrize("name", ["choose", "longer", "test"])
def test_every_row_of_a_table_is_another_recipe(name, tmp_path):
    table = read_table(ROOT / f"benchmarks/accuracy/{name}.toml", tmp_path)
    changes = [str(table.changes(row)) for row in table.rows]
    assert changes[0] == "{}" and len(set(changes)) == len(changes)
