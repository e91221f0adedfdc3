"""Checkpoints: safetensors and JSON in a directory that is whole or not there; the newest whole one wins.

RUN/checkpoints/step-00001234/model.safetensors      weights, with what rebuilds the model in the metadata
                              optimizer.safetensors  moments by parameter name
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
from torch import nn

from .. import __version__
from ..errors import UserError
from ..files import sync_directory, write_atomic

FORMAT = "mde_dist.checkpoint"
MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint as read back."""

    path: Path
    state: Mapping[str, Any]
    model: Mapping[str, torch.Tensor]
    optimizer: Mapping[str, torch.Tensor]


def model_bytes(model: nn.Module, metadata: Mapping[str, Any]) -> bytes:
    """The model's weights and buffers as safetensors; `metadata` (JSON) is what rebuilds it."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    return save(tensors, {"format": "pt", "mde_dist": json.dumps({"version": __version__, **metadata})})


def versions() -> dict[str, Any]:
    """What made a checkpoint."""
    return {"versions": {"mde_dist": __version__, "torch": torch.__version__}}


def read_model(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """(metadata, tensors) of a model.safetensors of ours. Raises UserError."""
    try:
        with safe_open(path, "pt") as file:
            metadata = json.loads((file.metadata() or {})["mde_dist"])
            return metadata, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; a run keeps its weights as RUN/{MODEL}") from None
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: not a whole safetensors file ({error})") from None
    except (KeyError, ValueError):
        raise UserError(f"{path}: a safetensors file, but not a model of mde_dist (no metadata of its)") from None


def save_checkpoint(
    directory: Path, step: int, files: Mapping[str, bytes], state: Mapping[str, Any], keep: int, best: int | None
) -> Path:
    """Write `directory`/step-… with `files` and `state`, then drop all but the newest `keep` and the step `best`.

    Raises UserError where the disk does not take it; the checkpoints before stay as they are.
    """
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
        record = {"format": FORMAT, "version": 1, "step": step, **state, "files": sums}
        write_atomic(temporary / STATE, json.dumps(record, indent=1) + "\n")
        temporary.rename(target)
        sync_directory(directory)
    except OSError as error:
        raise UserError(f"cannot write the checkpoint {target}: {error.strerror}; the earlier ones are whole") from None
    kept: set[int] = set()
    for path in _by_age(directory):
        if _step(path) in kept or (len(kept) >= keep and _step(path) != best):
            shutil.rmtree(path)
        else:
            kept.add(_step(path))
    return target


def load_newest(directory: Path) -> Iterator[Checkpoint | str]:
    """Yields a line about each broken checkpoint, newest first, then the newest whole one, if any."""
    for path in _by_age(directory):
        try:
            yield load_checkpoint(path)
            return
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            yield f"{path} is not whole ({error}); looking at the one before"


def load_checkpoint(path: Path) -> Checkpoint:
    """Read one checkpoint and check every byte. Raises OSError, ValueError, KeyError, TypeError, SafetensorError."""
    state = json.loads((path / STATE).read_bytes())
    if state["format"] != FORMAT or state["version"] != 1:
        raise ValueError(f"format {state['format']} {state['version']}")
    tensors = {}
    for name in (MODEL, OPTIMIZER):
        data = (path / name).read_bytes()
        if hashlib.sha256(data).hexdigest() != state["files"][name]["sha256"]:
            raise ValueError(f"{name} is not the file that was written")
        tensors[name] = load(data)
    return Checkpoint(path, state, tensors[MODEL], tensors[OPTIMIZER])


def _by_age(directory: Path) -> list[Path]:
    """Checkpoint directories, newest first."""
    found = directory.iterdir() if directory.is_dir() else ()
    names = (path for path in found if re.fullmatch(r"step-\d{8,}(\.\d+)?", path.name))
    return sorted(names, key=lambda path: [int(part) for part in path.name[5:].split(".")], reverse=True)


def _step(path: Path) -> int:
    return int(path.name[5:].split(".")[0])


def find_model(run: Path | None, checkpoint: Path | None) -> Path:
    """The weights that `--run DIR` (its newest checkpoint) or `--checkpoint FILE` names. Raises UserError."""
    if checkpoint is not None and run is None:
        return checkpoint
    if run is None or checkpoint is not None:
        raise UserError("name what to use: either --run DIR or --checkpoint FILE.safetensors")
    models = (path / MODEL for path in _by_age(run / "checkpoints"))
    found = next((model for model in models if model.is_file()), None)
    if found is None:
        raise UserError(f"--run {run}: no checkpoint in it; is it a run directory?")
    return found
