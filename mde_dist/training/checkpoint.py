"""Checkpoints: safetensors and JSON in a directory that is whole or not there; the newest whole one wins.

RUN/checkpoints/step-00001234/model.safetensors      weights, with what rebuilds the model in the metadata
                              optimizer.safetensors  moments by parameter name
                              ema.safetensors        the moving average of the weights, where there is one
                              state.json             samples_seen, config, manifest hash, best, sizes and sha256,
                                                     its own sha256 included
"""

import hashlib
import itertools
import json
import re
import shutil
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load

from mde_dist import __version__
from mde_dist.models.weights import (
    EMA,
    FORMAT,
    MODEL,
    OPTIMIZER,
    STATE,
    VERSION,
    Tensors,
    check_bytes,
    read_model,
    read_state_file,
)
from mde_dist.training.state import State, read_state
from mde_dist.utils.console import say, say_once
from mde_dist.utils.errors import UserError
from mde_dist.utils.io import UNSEALED, sealed, sync_directory, write_atomic
from mde_dist.utils.paths import local_path
from mde_dist.utils.urls import is_remote

_DAMAGE = (OSError, ValueError, KeyError, TypeError, SafetensorError, RecursionError)
"""Errors of reading a checkpoint, which may hold anything."""


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint as read back."""

    path: Path
    state: State
    config: Mapping[str, Any]
    """`section.field` -> value that it was made with."""
    identity: Mapping[str, Any]
    """Fields of the config that determine its run."""
    tensors: Mapping[str, Tensors]
    """File name -> name -> tensor."""


def to_cpu(tensors: Tensors) -> dict[str, torch.Tensor]:
    """A copy in host memory that training does not change any more: all that saving makes the loop wait for."""
    return {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }


def versions() -> dict[str, Any]:
    """Versions of the software that writes a checkpoint."""
    return {"versions": {"mde_dist": __version__, "torch": torch.__version__}}


def save_checkpoint(
    directory: Path,
    files: Mapping[str, bytes],
    record: Mapping[str, Any],
    keep: int,
    best: int | None,
    warn: Callable[[str], None] = say,
) -> Path:
    """Write `directory`/step-… with `files` and `record`, then drop all but the newest `keep` and the step `best`.

    `record`: the fields of State, and config and identity as in Checkpoint. `warn` takes a line on what could not be
    dropped: the next call tries it again.

    Raises UserError where the disk does not take it; the checkpoints before stay as they are.
    """
    step = record["step"]
    # one of this step, saved before an evaluation that was cut off, stays until the new one stands
    attempts = sum(_step(path) == step for path in _by_age(directory))
    target = directory / (f"step-{step:08d}" + (f".{attempts}" if attempts else ""))
    temporary = None
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for left in directory.glob(".step-*.tmp"):  # by a writer that died
            with suppress(OSError):
                _remove(left)
        temporary = _out_of_sight(target)
        temporary.mkdir()
        for name, data in files.items():
            write_atomic(temporary / name, data)
        sums = {name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()}
        whole = {"format": FORMAT, "version": VERSION, "sha256": UNSEALED, **record, "files": sums}
        write_atomic(temporary / STATE, sealed(json.dumps(whole, indent=1).encode() + b"\n"))
        temporary.rename(target)
        sync_directory(directory)
    except OSError as error:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)  # on a full disk every byte counts
        raise UserError(f"cannot write the checkpoint {target}: {error.strerror}; the earlier ones are whole") from None
    problems = list(_prune(directory, keep, best))
    if problems:
        warn(problems[0])
    return target


def _prune(directory: Path, keep: int, best: int | None) -> Iterator[str]:
    """Remove all but the newest `keep` and the step `best`, and what was left of earlier ones.

    Yields a line about each that cannot be removed: a file of it may be open on NFS. It takes another name first, so
    that nobody takes half of it for a whole one.
    """
    kept: set[int] = set()
    gone = list(directory.glob(".step-*.tmp"))
    for path in _by_age(directory):
        if _step(path) in kept or (len(kept) >= keep and _step(path) != best):
            gone.append(path)
        else:
            kept.add(_step(path))
    for path in gone:
        try:
            if not path.name.startswith("."):
                path = path.rename(_out_of_sight(path))
            _remove(path)
        except OSError as error:
            yield f"the old checkpoint {path} cannot be removed ({error.strerror}); the next one tries it again"


def _remove(path: Path) -> None:
    """Remove a checkpoint; of one that was moved to another disk the link only, for it was moved to be kept."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path)


def _out_of_sight(path: Path) -> Path:
    """A name beside a checkpoint that is none of a checkpoint, and free."""
    names = (path.with_name(f".{path.name}-{number}.tmp") for number in itertools.count(1))
    return next(name for name in names if not name.exists())


def load_newest(directory: Path) -> Iterator[Checkpoint | str]:
    """Yields a line about each broken checkpoint, newest first, then the newest whole one, if any."""
    for path in _by_age(directory):
        try:
            yield load_checkpoint(path)
            return
        except UserError as error:
            yield f"{error}; looking at the one before"


def newest_checkpoint(directory: Path) -> Checkpoint:
    """The newest whole one in a directory; those that are not are named on stderr. Raises UserError without any."""
    for item in load_newest(directory):
        if isinstance(item, Checkpoint):
            return item
        say_once(item, sys.stderr)
    raise UserError(f"{directory}: no whole checkpoint in it")


def load_checkpoint(path: Path) -> Checkpoint:
    """Read one checkpoint and check every byte. Raises UserError."""
    try:
        record = _read_record(path)
        tensors = {name: load(_read_whole(path / name, about)) for name, about in record["files"].items()}
        if not {MODEL, OPTIMIZER} <= tensors.keys() <= {MODEL, OPTIMIZER, EMA}:
            raise ValueError(f"it should name {MODEL} and {OPTIMIZER}")
        return Checkpoint(path, read_state(record), record["config"], record["identity"], tensors)
    except _DAMAGE as error:
        raise _not_whole(path, error) from None


def newest_record(run: Path) -> dict[str, Any]:
    """state.json of the newest checkpoint of a run that has a whole one; empty where none has."""
    for path in _by_age(run / "checkpoints"):
        try:
            return _read_record(path)
        except _DAMAGE:
            continue
    return {}


def open_model(run: Path | None, checkpoint: Path | None) -> tuple[Path, dict[str, Any], dict[str, torch.Tensor]]:
    """(path, metadata, tensors) of the weights that `--run DIR` or `--checkpoint FILE` (or its folder) names.

    Of a run it is the newest checkpoint that is whole; those that are not are named on stderr. Raises UserError.
    """
    if checkpoint is not None and run is None:
        path = checkpoint / MODEL if checkpoint.is_dir() else checkpoint
        return _opened(path)
    if run is None or checkpoint is not None:
        raise UserError("name what to use: either --run DIR or --checkpoint FILE.safetensors")
    folders = _by_age(run / "checkpoints")
    for folder in folders:
        try:
            return _opened(_scored(folder))
        except UserError as error:
            say_once(f"{error}; looking at the one before", sys.stderr)
    if folders:
        raise UserError(f"--run {run}: none of its {len(folders)} checkpoints is whole")
    raise UserError(f"--run {run}: no checkpoint in it; is it a run directory?")


def run_of(weights: Path) -> Path | None:
    """The run directory that weights lie in, as they were published or in a checkpoint."""
    return next((path for path in weights.absolute().parents[:3] if (path / "checkpoints").is_dir()), None)


def _opened(weights: Path) -> tuple[Path, dict[str, Any], dict[str, torch.Tensor]]:
    """See `open_model`. Weights name their shards as they were typed; where those are relative, their run knows
    from which folder, and is asked."""
    metadata, tensors = read_model(weights)
    config, run = metadata["config"], run_of(weights)
    for name in ("shards", "eval_shards"):
        typed = config.get(f"data.{name}")
        if run and typed and not is_remote(typed) and not Path(typed).is_absolute():
            with suppress(OSError, ValueError, KeyError, TypeError, UserError):
                noted = local_path(tomllib.loads((run / "config.toml").read_text("utf-8"))["data"][name])
                config = config | {f"data.{name}": str(noted) if noted.is_dir() else typed}
    return weights, metadata | {"config": config}, tensors


def _scored(folder: Path) -> Path:
    """The weights of a checkpoint that were evaluated: the average, where there is one. Raises UserError."""
    try:
        return folder / (EMA if EMA in _read_record(folder)["files"] else MODEL)
    except _DAMAGE as error:
        raise _not_whole(folder, error) from None


def _read_record(path: Path) -> dict[str, Any]:
    """state.json of the checkpoint in a folder of its name. Raises what _DAMAGE holds."""
    record = read_state_file(path)
    if record["step"] != _step(path):
        raise ValueError(f"{STATE} is of another step")
    return record


def _read_whole(path: Path, about: Mapping[str, Any]) -> bytes:
    """The file that `about` describes. Raises OSError, ValueError, KeyError."""
    if path.name not in (MODEL, OPTIMIZER, EMA):
        raise ValueError(f"{path.name!r} has no place in a checkpoint")
    data = path.read_bytes()
    check_bytes(path.name, data, about)
    return data


def _not_whole(path: Path, error: Exception) -> UserError:
    return UserError(f"{path} is not whole ({' '.join(str(error).split())[:200]})")


def _by_age(directory: Path) -> list[Path]:
    """Checkpoint directories, newest first."""
    found = directory.iterdir() if directory.is_dir() else ()
    names = (path for path in found if re.fullmatch(r"step-\d{8,}(\.\d+)?", path.name))
    return sorted(names, key=lambda path: [int(part) for part in path.name[5:].split(".")], reverse=True)


def _step(path: Path) -> int:
    return int(path.name[5:].split(".")[0])
