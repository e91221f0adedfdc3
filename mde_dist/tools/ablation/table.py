"""The file that says which trainings there are -> their configs, each of them checked before anything is trained.

base = "strong.toml"          # optional: a config file, relative to the table; where every row begins
seeds = [0, 1, 2]             # train.seed of each training of a row
[common]                      # values of all rows, as in a config file
train.total_samples = 12000
[rows.strong]                 # the first row is the reference that the others are compared with
[rows."no EMA"]
optim.ema_samples = 0
[rows.seed]
base = "seed.toml"            # optional: a row may begin elsewhere; common still holds over it
"""

import dataclasses
import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mde_dist.evaluation.results import EVALUATIONS
from mde_dist.models.weights import MODEL
from mde_dist.training.config import RESUMABLE_FIELDS, Config, validate, with_whole_paths
from mde_dist.utils.cli import arguments_of, flatten, parse
from mde_dist.utils.errors import UserError
from mde_dist.utils.io import decode_text
from mde_dist.utils.paths import as_typed, expanded

PROG = "python -m mde_dist.train"
FIXED = {
    "run": "the command chooses the run directories",
    "debug": "an ablation trains to the end",
    "debug_from": "an ablation trains to the end",
    "train.seed": "the list `seeds` of the table has them",
    "train.evaluate_every": "there is one evaluation, at the end",
}
"""Fields that a table may not set, and why; a base may, and is overruled."""
_BESIDE = RESUMABLE_FIELDS - {"data.shards", "train.total_samples", "train.batch_size", "train.grad_comm_dtype"} | {
    "train.evaluate_every"
}
"""Fields of which a table does not tell."""
_LEARNED_FROM = {"data.shards", "data.eval_shards", "train.total_samples", "train.batch_size"}
"""May change when a run goes on, but not within a table."""
_SAME = ("evaluate.protocol", "evaluate.limit", "data.eval_split")


@dataclass(frozen=True)
class Training:
    """A row with a seed."""

    row: str
    seed: int
    config: Config

    @property
    def name(self) -> str:
        return f"{self.row}, seed {self.seed}"

    @property
    def finished(self) -> bool:
        """True once its model is published and scored."""
        return (self.config.run / MODEL).is_file() and self.scores.is_file()

    @property
    def scores(self) -> Path:
        """File of every image's scores, once it is finished."""
        return self.config.run / EVALUATIONS / "last.json"


@dataclass(frozen=True)
class Table:
    rows: dict[str, dict[int, Training]]
    """Trainings by row, in the file's order, the reference first; then by seed, the same ones in each row."""

    @property
    def trainings(self) -> list[Training]:
        """Trainings in order: all rows with the first seed, then all with the second, so that an early table has every
        row."""
        return [row[seed] for seed in self.rows[self.reference] for row in self.rows.values()]

    @property
    def reference(self) -> str:
        return next(iter(self.rows))

    def changes(self, row: str) -> dict[str, Any]:
        """Field -> plain value, of all in which a row differs from the reference and that change what is learned."""
        first, other = (dict(flatten(next(iter(self.rows[name].values())).config)) for name in (self.reference, row))
        return {n: _plain(value) for n, value in other.items() if n not in _BESIDE and first[n] != value}


def describe_changes(changes: Mapping[str, Any]) -> list[str]:
    return [f"{name} = {_shown(value)}" for name, value in changes.items()]


def check_begun(training: Training) -> None:
    """Raises UserError where its directory holds a training of another config."""
    file = training.config.run / "config.toml"
    if not file.is_file():
        return
    before = dict(flatten(with_whole_paths(parse(Config, ["--config", as_typed(file)], PROG))))
    for name, value in flatten(with_whole_paths(training.config)):
        if name not in RESUMABLE_FIELDS - _LEARNED_FROM and before[name] != value:
            raise UserError(
                f"row {training.row!r}, seed {training.seed}: {training.config.run} holds a training with {name} = "
                f"{_shown(before[name])}, the table says {_shown(value)}; choose another --output, or name the row anew"
            )


def read_table(path: Path, output: Path) -> Table:
    """Raises UserError, naming the row, where a training would be refused for its config."""
    content = _read(path)
    seeds, rows, common = content.get("seeds", [0]), content.get("rows"), content.get("common", {})
    if not (isinstance(seeds, list) and seeds and all(type(seed) is int and seed >= 0 for seed in seeds)):
        raise UserError(f"{path}: seeds = {seeds}: must be a list of whole numbers from 0 on, for example [0, 1, 2]")
    if len(set(seeds)) < len(seeds):
        raise UserError(f"{path}: seeds = {seeds}: one stands there twice")
    if not (isinstance(rows, dict) and rows and isinstance(common, dict)):
        raise UserError(f"{path}: has no rows; write [rows.NAME] for each, and below it the fields that it changes")
    unknown = set(content) - {"base", "seeds", "common", "rows"}
    if unknown:
        raise UserError(f"{path}: {', '.join(sorted(unknown))}: a table has base, seeds, [common] and [rows.NAME] only")
    slugs: dict[str, str] = {}
    found: dict[str, dict[int, Training]] = {}
    for name, values in rows.items():
        other = slugs.setdefault(_slug(name), name)
        if other != name or not _slug(name):
            raise UserError(f"{path}: row {name!r}: its directory would be {_slug(name)!r}, as that of {other!r}")
        if not isinstance(values, dict):
            raise UserError(f"{path}: rows.{name} = {values}: must be a section, [rows.{name}]")
        try:
            config = _config(path, content.get("base"), common, values)
            found[name] = {seed: _training(name, seed, config, output) for seed in seeds}
        except UserError as error:
            raise UserError(f"{path}: row {name!r}: {error}") from None
    table = Table(found)
    _refuse_incomparable(path, table)
    return table


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(decode_text(path.read_bytes()))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not TOML: {error}") from None


def _config(path: Path, base: str | None, common: dict[str, Any], row: dict[str, Any]) -> Config:
    values = {name: value for name, value in row.items() if name != "base"}
    for name in (*_names(common), *_names(values)):
        if name in FIXED:
            raise UserError(f"{name} cannot be set in a table: {FIXED[name]}")
    arguments = list(arguments_of(_merged(common, values)))
    base = row.get("base", base)
    start = [] if base is None else ["--config", as_typed(path.parent / expanded(str(base)))]
    return parse(Config, [*start, *arguments], PROG)


def _training(row: str, seed: int, config: Config, output: Path) -> Training:
    train = dataclasses.replace(config.train, seed=seed, evaluate_every=config.train.total_samples)
    run = output / _slug(row) / f"seed-{seed}"
    config = dataclasses.replace(config, run=run, train=train, debug=False, debug_from=None)
    return Training(row, seed, validate(config))


def _refuse_incomparable(path: Path, table: Table) -> None:
    first = dict(flatten(table.trainings[0].config))
    for row, trainings in table.rows.items():
        values = dict(flatten(next(iter(trainings.values())).config))
        for name in _SAME:
            if values[name] != first[name]:
                raise UserError(
                    f"{path}: row {row!r}: {name} = {values[name]}, but {first[name]} in {table.reference!r}: rows can "
                    "be compared on the same evaluation only; set it in [common]"
                )


def _names(values: dict[str, Any], prefix: str = "") -> list[str]:
    names = []
    for key, value in values.items():
        name = f"{prefix}{key.replace('-', '_')}"
        names += _names(value, f"{name}.") if isinstance(value, dict) else [name]
    return names


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Merge two tables section by section, where `above` wins; keys with - are those with _."""
    result = {key.replace("-", "_"): value for key, value in below.items()}
    for key, value in above.items():
        name = key.replace("-", "_")
        before = result.get(name)
        result[name] = _merged(before, value) if isinstance(before, dict) and isinstance(value, dict) else value
    return result


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _plain(value: Any) -> Any:
    """Convert a value to JSON's types."""
    return json.loads(json.dumps(value, default=str))


def _shown(value: Any) -> str:
    if isinstance(value, tuple | list):
        return ("x" if all(isinstance(item, int) for item in value) else ", ").join(map(str, value))
    return str(value)
