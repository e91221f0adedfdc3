"""Exclusive right to write into an output that is being packed: for one command alone, or for the parts of a job array
side by side.

The locks and the records of the parts lie in the work folder and go with it when the shards are published.
"""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from mde_dist.data.manifest import PACKING
from mde_dist.utils.errors import UserError
from mde_dist.utils.io import write_atomic
from mde_dist.utils.locks import locked
from mde_dist.utils.publish import is_free, take_back, work_folder

Part = tuple[int, int]
"""K of N, from 0."""


@contextmanager
def claimed(output: Path, about: Mapping[str, Any], part: Part | None) -> Iterator[dict[Part, str]]:
    """Hold the work folder of an output -> the parts that were packed into it, by their names.

    `about`: the options, by name, as JSON takes them. A publication that was cut off is taken back. Raises UserError
    where another command is at work at it, where a part was packed with other options, or where the output is there
    meanwhile; and OSError.
    """
    with work_folder(output, PACKING) as partial, ExitStack() as locks:
        for each in [part] if part is not None else _records(partial):
            taken = f"--output {output}: its part {_name(each)} is being packed"
            locks.enter_context(locked(partial / f".{_file(each)}.lock", taken))
        taken = f"--output {output}: another packing into it is at work"
        locks.enter_context(locked(partial / ".lock", taken, shared=part is not None))
        take_back(partial, output)
        refuse_full(output)
        _refuse_differing(partial, about, part)
        if part is not None:
            record = partial / _file(part)
            write_atomic(record, json.dumps(about, indent=1) + "\n")
            try:
                _refuse_differing(partial, about, part)  # another one may have begun at the same moment
            except UserError:
                record.unlink()
                raise
        yield {found: _name(found) for found in _records(partial)}


def refuse_full(output: Path) -> None:
    """Raises UserError where an output is there that shards would have to be mixed with."""
    if not is_free(output, output / PACKING):
        raise UserError(f"--output {output} is there already and not empty; choose another, or remove it first")


def _refuse_differing(partial: Path, about: Mapping[str, Any], part: Part | None) -> None:
    """Raises UserError where another part than this one was packed with other options."""
    for other, path in _records(partial).items():
        if other == part:
            continue
        try:
            then = dict(json.loads(path.read_bytes()))
        except (ValueError, TypeError):
            raise UserError(f"{path} is damaged; pack part {_name(other)} again") from None
        changed = [
            f"{name} = {_shown(then.get(name))}, not {_shown(about.get(name))}"
            for name in {**then, **about}
            if then.get(name) != about.get(name)
        ]
        if changed:
            raise UserError(
                f"part {_name(other)} was packed with {' and '.join(changed)}; give all parts the same options and "
                f"source, or remove {partial} to begin anew"
            )


def _records(partial: Path) -> dict[Part, Path]:
    """Find the record of each part that was begun: the options with which it is packed."""
    files = sorted(partial.iterdir()) if partial.is_dir() else []
    names = ((re.fullmatch(r"part-(\d+)-of-(\d+)\.json", path.name), path) for path in files)
    return {(int(found[1]), int(found[2])): path for found, path in names if found}


def _file(part: Part) -> str:
    return f"part-{part[0]}-of-{part[1]}.json"


def _name(part: Part) -> str:
    return f"{part[0]}/{part[1]}"


def _shown(value: Any) -> str:
    return "x".join(map(str, value)) if isinstance(value, list) else str(value)
