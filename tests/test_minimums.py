"""The minimum versions of pyproject.toml, as `.ci/minimums` reads them."""

import tomllib
from pathlib import Path

from packaging.requirements import Requirement

from mde_dist.inference.export_formats import OLDEST_TORCH

PROJECT = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]


def test_every_dependency_states_one_minimum_wherever_it_is_named():
    groups = {"": PROJECT["dependencies"], **PROJECT["optional-dependencies"]}
    stated: dict[str, set[str]] = {}
    for group, lines in groups.items():
        for need in map(Requirement, lines):
            if need.name == PROJECT["name"]:  # all of another group
                continue
            (bound,) = need.specifier
            assert bound.operator == ">=", f"{group}: {need}"
            stated.setdefault(need.name, set()).add(bound.version)
    assert stated.pop("torch") == {"2.5", OLDEST_TORCH}  # to train, and to export
    assert stated.pop("torchvision") == {"0.20", "0.24"}  # of these torches
    assert {name for name, bounds in stated.items() if len(bounds) > 1} == set()
