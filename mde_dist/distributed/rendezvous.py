"""Comparison of ranks as soon as they have met, over the store that they met by: it needs nothing of their devices.

What one rank alone has seen until then (a config that is not there on its node, a GPU that does not answer), the others
would wait for in their first collective.
"""

import json
import os
import socket
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any

from torch import distributed
from torch.distributed.distributed_c10d import _get_default_store

from mde_dist.utils.errors import OtherRankError, RankError, UserError

_LEAVE = timedelta(seconds=10)  # for which a rank that has failed waits for the others, which have yet to hear of it
_NAMED = 3  # settings that differ


def compare_ranks(error: Exception | None, device: str, settings: Mapping[str, Any]) -> None:
    """End all ranks where one has failed, or where they are not alike. Called by every rank, once it has joined.

    `error`: why this rank has failed; `device`: the type of its device; `settings`: values of JSON's types that have to
    be the same. The first rank that has failed raises its error, the others OtherRankError; where they differ, all
    raise UserError.
    """
    store, rank, world = _get_default_store(), distributed.get_rank(), distributed.get_world_size()
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # a launcher that starts them anew may keep its store
    told, heard = ([f"mde_dist/{attempt}/{word}/{number}" for number in range(world)] for word in ("told", "heard"))
    mine = {"failed": error is not None, "device": device, "host": socket.gethostname(), "settings": settings}
    store.set(told[rank], json.dumps(mine, default=str))
    try:
        _compare([json.loads(text) for text in store.multi_get(told)], error, rank)
    except UserError:
        store.set(heard[rank], "")
        with suppress(RuntimeError):
            store.wait(heard, _LEAVE)  # the store may go with rank 0
        raise


def raise_first(error: Exception | None, rank: int, first: int) -> None:
    """Raise what this `rank` has to say where rank `first` is the first one that has failed: its `error`, or nothing.

    An error that nobody expects becomes a RankError, and is its cause.
    """
    if error is None or rank != first:
        raise OtherRankError(f"rank {first} stopped the run")
    if not isinstance(error, UserError):
        raise RankError(f"{type(error).__name__}: {error}") from error
    raise RankError(str(error)) if rank else error


def _compare(ranks: Sequence[Mapping[str, Any]], error: Exception | None, rank: int) -> None:
    failed = [number for number, other in enumerate(ranks) if other["failed"]]
    if failed:
        raise_first(error, rank, failed[0])
    first = ranks[0]
    for number, other in enumerate(ranks):
        where = f"rank {number} ({other['host']})"
        if other["device"] != first["device"]:
            raise UserError(
                f"{where} has {other['device']} to compute on, rank 0 ({first['host']}) {first['device']}; see whether "
                "every node has its GPUs (nvidia-smi) and a torch that uses them"
            )
        names = [name for name, value in first["settings"].items() if other["settings"].get(name) != value]
        if names:
            values = (f"{name} is {other['settings'].get(name)}, not {first['settings'][name]}" for name in names)
            more = f" and {len(names) - _NAMED} more" if names[_NAMED:] else ""
            raise UserError(
                f"{where} was told otherwise than rank 0: {', '.join(list(values)[:_NAMED])}{more}; start all with the "
                "same options, and the same file for --config"
            )
