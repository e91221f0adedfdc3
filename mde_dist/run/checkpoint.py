"""Checkpoints: safetensors and JSON in a directory that is whole or not there; the newest whole one wins.

RUN/checkpoints/step-00001234/model.safetensors      weights, with what rebuilds the model in the metadata
                              optimizer.safetensors  moments by parameter name
                              ema.safetensors        the moving average of the weights, where there is one
                              state.json             samples_seen, config, manifest hash, best, sizes and sha256
"""

import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save

from .. import __version__
from ..errors import UserError
from ..files import sync_directory, write_atomic
from .state import State, read_state

FORMAT, VERSION = "mde_dist.checkpoint", 2
MODEL, OPTIMIZER, EMA, STATE = "model.safetensors", "optimizer.safetensors", "ema.safetensors", "state.json"
_LARGEST_STATE = 2**24  # bytes of a state.json

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint as read back."""

    path: Path
    state: State
    config: Mapping[str, Any]
    """`section.field` -> value that it was made with."""
    identity: Mapping[str, Any]
    """What its run is a function of."""
    tensors: Mapping[str, Tensors]
    """File name -> name -> tensor."""


def host_copy(tensors: Tensors) -> dict[str, torch.Tensor]:
    """A copy in host memory that training does not change any more: all that saving makes the loop wait for."""
    return {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }


def model_bytes(tensors: Tensors, metadata: Mapping[str, Any]) -> bytes:
    """A model's weights and buffers as safetensors; `metadata` (JSON) is what rebuilds it."""
    # one entry of metadata only: safetensors writes several in random order, and equal models should be equal files
    return save(dict(tensors), {"mde_dist": json.dumps({"version": __version__, **metadata})})


def versions() -> dict[str, Any]:
    """What made a checkpoint."""
    return {"versions": {"mde_dist": __version__, "torch": torch.__version__}}


def read_model(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """(metadata, tensors) of a model.safetensors of ours. Raises UserError."""
    try:
        with safe_open(path, "pt") as file:
            metadata = json.loads((file.metadata() or {})["mde_dist"])
            _check_metadata(metadata)
            return metadata, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; a run keeps its weights as RUN/{MODEL}") from None
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: not a whole safetensors file ({error})") from None
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
        raise UserError(f"{path}: a safetensors file, but not a model of mde_dist (no metadata of its)") from None


def _check_metadata(metadata: Mapping[str, Any]) -> None:
    """What a model.safetensors may say of itself. Raises AttributeError, KeyError, TypeError or ValueError."""
    config = metadata["config"]
    for name in ("data.shards", "data.eval_shards", "data.train_split", "data.eval_split", "data.cache"):
        if not isinstance(config.get(name), str | None):
            raise ValueError(f"{name} is no text")
    height, width = metadata["size"]
    if {type(height), type(width)} != {int} or not (0 < height <= 8192 and 0 < width <= 8192):
        raise ValueError("an impossible size")


def save_checkpoint(
    directory: Path, files: Mapping[str, bytes], record: Mapping[str, Any], keep: int, best: int | None
) -> Path:
    """Write `directory`/step-… with `files` and `record`, then drop all but the newest `keep` and the step `best`.

    `record`: the fields of State, and config and identity as in Checkpoint.

    Raises UserError where the disk does not take it; the checkpoints before stay as they are.
    """
    step = record["step"]
    # one of this step, saved before an evaluation that was cut off, stays until the new one stands
    attempts = sum(_step(path) == step for path in _by_age(directory))
    target = directory / (f"step-{step:08d}" + (f".{attempts}" if attempts else ""))
    temporary = directory / f".{target.name}.tmp"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        for name, data in files.items():
            write_atomic(temporary / name, data)
        sums = {name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()}
        whole = {"format": FORMAT, "version": VERSION, **record, "files": sums}
        write_atomic(temporary / STATE, json.dumps(whole, indent=1) + "\n")
        temporary.rename(target)
        sync_directory(directory)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)  # on a full disk every byte counts
        raise UserError(f"cannot write the checkpoint {target}: {error.strerror}; the earlier ones are whole") from None
    _prune(directory, keep, best)
    return target


def _prune(directory: Path, keep: int, best: int | None) -> None:
    """Remove all but the newest `keep` and the step `best`, and what writers left that died. Raises UserError."""
    kept: set[int] = set()
    gone = list(directory.glob(".step-*.tmp"))
    for path in _by_age(directory):
        if _step(path) in kept or (len(kept) >= keep and _step(path) != best):
            gone.append(path)
        else:
            kept.add(_step(path))
    for path in gone:
        try:
            shutil.rmtree(path)
        except OSError as error:
            raise UserError(f"the old checkpoint {path} cannot be removed: {error.strerror}") from None


def load_newest(directory: Path) -> Iterator[Checkpoint | str]:
    """Yields a line about each broken checkpoint, newest first, then the newest whole one, if any."""
    for path in _by_age(directory):
        try:
            yield load_checkpoint(path)
            return
        except UserError as error:
            yield f"{error}; looking at the one before"


def newest_checkpoint(directory: Path) -> Checkpoint:
    """The newest whole one in a directory of checkpoints. Raises UserError where there is none."""
    found = [item for item in load_newest(directory) if isinstance(item, Checkpoint)]
    if not found:
        raise UserError(f"{directory}: no whole checkpoint in it")
    return found[0]


def load_checkpoint(path: Path) -> Checkpoint:
    """Read one checkpoint and check every byte. Raises UserError."""
    try:
        record = read_state_file(path)
        tensors = {name: load(_read_whole(path / name, about)) for name, about in record["files"].items()}
        if not {MODEL, OPTIMIZER} <= tensors.keys() <= {MODEL, OPTIMIZER, EMA}:
            raise ValueError(f"it should name {MODEL} and {OPTIMIZER}")
        return Checkpoint(path, read_state(record), record["config"], record["identity"], tensors)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError, RecursionError) as error:
        raise UserError(f"{path} is not whole ({' '.join(str(error).split())[:200]})") from None


def read_state_file(path: Path) -> dict[str, Any]:
    """state.json with the parts that are needed, of the types that are needed. Raises OSError, ValueError, KeyError."""
    if (path / STATE).stat().st_size > _LARGEST_STATE:
        raise ValueError(f"{STATE} is too large")
    record = json.loads((path / STATE).read_bytes())
    if not isinstance(record, dict) or (record["format"], record["version"]) != (FORMAT, VERSION):
        raise ValueError(f"{STATE} is not of format {FORMAT} {VERSION}")
    if record["step"] != _step(path):
        raise ValueError(f"{STATE} is of another step")
    for name in ("config", "identity", "files"):
        if not isinstance(record[name], dict):
            raise ValueError(f"{name} is no table")
    return record


def _read_whole(path: Path, about: Mapping[str, Any]) -> bytes:
    """The file that `about` describes. Raises OSError, ValueError, KeyError."""
    if path.name not in (MODEL, OPTIMIZER, EMA):
        raise ValueError(f"{path.name!r} has no place in a checkpoint")
    if path.stat().st_size != about["bytes"]:
        raise ValueError(f"{path.name} has another size than was written")
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != about["sha256"]:
        raise ValueError(f"{path.name} is not the file that was written")
    return data


def _by_age(directory: Path) -> list[Path]:
    """Checkpoint directories, newest first."""
    found = directory.iterdir() if directory.is_dir() else ()
    names = (path for path in found if re.fullmatch(r"step-\d{8,}(\.\d+)?", path.name))
    return sorted(names, key=lambda path: [int(part) for part in path.name[5:].split(".")], reverse=True)


def _step(path: Path) -> int:
    return int(path.name[5:].split(".")[0])


def find_model(run: Path | None, checkpoint: Path | None) -> Path:
    """The weights that `--run DIR` (its newest checkpoint) or `--checkpoint FILE` (or its folder) names.

    Raises UserError.
    """
    if checkpoint is not None and run is None:
        return checkpoint / MODEL if checkpoint.is_dir() else checkpoint
    if run is None or checkpoint is not None:
        raise UserError("name what to use: either --run DIR or --checkpoint FILE.safetensors")
    # the average is what was evaluated, where there is one
    models = (path / name for path in _by_age(run / "checkpoints") for name in (EMA, MODEL))
    found = next((model for model in models if model.is_file()), None)
    if found is None:
        raise UserError(f"--run {run}: no checkpoint in it; is it a run directory?")
    return found
