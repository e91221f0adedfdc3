"""Weights on the disk: safetensors files of which every byte is checked as they are read.

A file in a checkpoint is held against the sha256 in the state.json beside it. A model that lies elsewhere (published,
exported, copied) carries its sha256 in its own metadata; that of an older version has none, and is read unchecked.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from mde_dist import __version__
from mde_dist.utils.errors import UserError
from mde_dist.utils.io import UNSEALED, is_sealed, sealed
from mde_dist.utils.renamed import with_new_names
from mde_dist.utils.urls import public_url

FORMAT, VERSION = "mde_dist.checkpoint", 2
MODEL, OPTIMIZER, EMA, STATE = "model.safetensors", "optimizer.safetensors", "ema.safetensors", "state.json"
_LARGEST_STATE = 2**24  # bytes of a state.json

Tensors = Mapping[str, torch.Tensor]


def serialize_model(tensors: Tensors, metadata: Mapping[str, Any]) -> bytes:
    """A model's weights and buffers as safetensors; `metadata` (JSON) is what rebuilds it."""
    # one entry of metadata only: safetensors writes several in random order, and equal models should be equal files
    about = {"sha256": UNSEALED, "version": __version__, **metadata}
    return sealed(save(dict(tensors), {"mde_dist": json.dumps(about)}))


def hash_tensors(tensors: Tensors) -> str:
    """sha256 of names and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_model(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """(metadata, tensors) of a model.safetensors of ours. Raises UserError."""
    text, tensors = _read(path)
    try:
        metadata = json.loads(text)
        metadata["config"] = _as_of_today(metadata["config"])
        _check_metadata(metadata)
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
        raise UserError(f"{path}: a safetensors file, but not a model of mde_dist (no metadata of its)") from None
    metadata.pop("sha256", None)
    return metadata, tensors


def read_tensors(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """(config, tensors) of any safetensors file; one of ours is checked, others have no config. Raises UserError."""
    text, tensors = _read(path)
    try:
        return _as_of_today(json.loads(text)["config"]), tensors
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
        return {}, tensors


def read_state_file(folder: Path) -> dict[str, Any]:
    """state.json of a checkpoint with the parts that are needed, of the types that are needed.

    Raises OSError, ValueError, KeyError, TypeError or RecursionError.
    """
    if (folder / STATE).stat().st_size > _LARGEST_STATE:
        raise ValueError(f"{STATE} is too large")
    data = (folder / STATE).read_bytes()
    record = json.loads(data)
    if not isinstance(record, dict) or record["format"] != FORMAT:
        raise ValueError(f"{STATE} is not of format {FORMAT}")
    if record["version"] != VERSION:
        raise ValueError(f"{STATE} has version {record['version']!r:.20}, and this is mde_dist for version {VERSION}")
    if not is_sealed(data, record.get("sha256")):
        raise ValueError(f"{STATE} is not the file that was written")
    for name in ("config", "identity", "files"):
        if not isinstance(record[name], dict):
            raise ValueError(f"{name} is no table")
    return record | {name: _as_of_today(record[name]) for name in ("config", "identity")}


def check_bytes(name: str, data: bytes, about: Mapping[str, Any]) -> None:
    """Raises ValueError where `data` is not what state.json says `about` a file, KeyError where it says too little."""
    if len(data) != about["bytes"]:
        raise ValueError(f"{name} has another size than was written")
    if hashlib.sha256(data).hexdigest() != about["sha256"]:
        raise ValueError(f"{name} is not the file that was written")


def _read(path: Path) -> tuple[str, dict[str, torch.Tensor]]:
    """Read a safetensors file -> our metadata in it, empty where it is not ours, and its tensors. Raises UserError."""
    try:
        data = path.read_bytes()
        recorded = _recorded(path)
        if recorded is not None:
            check_bytes(path.name, data, recorded)
        tensors = load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        text = header.get("__metadata__", {}).get("mde_dist", "")
        if recorded is None and not is_sealed(data, _seal(text)):
            raise ValueError("its sha256 is not the one that it was written with")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; a run keeps its weights as RUN/{MODEL}") from None
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: not a whole safetensors file ({error})") from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}); use another copy of it, or another checkpoint") from None
    return text, tensors


def _seal(text: str) -> object:
    try:
        return json.loads(text)["sha256"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return None


def _recorded(path: Path) -> Mapping[str, Any] | None:
    """Find the record of a file in the state.json beside it; None where the file lies in no checkpoint.

    Raises OSError, ValueError, KeyError, TypeError or RecursionError where there is a state.json of ours, not whole.
    """
    state = path.with_name(STATE)
    if not state.is_file() or FORMAT.encode() not in state.read_bytes()[:1000]:
        return None
    return read_state_file(path.parent)["files"][path.name]


def _check_metadata(metadata: Mapping[str, Any]) -> None:
    """Check the metadata of a model.safetensors. Raises AttributeError, KeyError, TypeError or ValueError."""
    config = metadata["config"]
    for name in ("data.shards", "data.eval_shards", "data.train_split", "data.eval_split", "data.cache"):
        if not isinstance(config.get(name), str | None):
            raise ValueError(f"{name} is no text")
    height, width = metadata["size"]
    if {type(height), type(width)} != {int} or not (0 < height <= 8192 and 0 < width <= 8192):
        raise ValueError("an impossible size")


def _as_of_today(config: dict[str, Any]) -> dict[str, Any]:
    """A config that an older version stored: signed URLs as they were given, fields by other names."""
    return {k: public_url(v) if isinstance(v, str) else v for k, v in with_new_names(config).items()}
