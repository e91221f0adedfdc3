"""Folders that come to hold a whole set of files, or none of it for whoever asks for its last file first.

The files are made in a hidden folder inside, and renamed out of it. Inside, because the folder may be a mounted volume:
beside it is another disk, which may be too small or read-only, and a mount point cannot be replaced.
"""

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from mde_dist.utils.folders import list_folder
from mde_dist.utils.io import sync_directory, write_atomic, writing
from mde_dist.utils.locks import locked

_LIST = "publishing.json"
"""In the hidden folder, from the first rename until the set is whole: the names of its files."""


def is_free(output: Path, work: Path) -> bool:
    """True where a set may be published in `output`: it is not there, or nobody has put anything into it.

    The files of a publication from `work` that was cut off do not count. Raises UserError.
    """
    if not output.is_dir():
        return not output.exists()
    with writing(f"--output {output}"):
        found = list_folder(output)
    return {*found.files, *found.folders} <= set(_listed(work)[:-1])


@contextmanager
def work_folder(output: Path, name: str) -> Iterator[Path]:
    """A hidden folder in `output`; both are made, and removed again if they are empty in the end. Raises OSError."""
    made, work = not output.exists(), output / name
    work.mkdir(parents=True, exist_ok=True)
    try:
        yield work
    finally:
        for folder in [work, output] if made else [work]:
            with suppress(OSError):  # not empty, or not there
                folder.rmdir()


@contextmanager
def whole_folder(path: Path, files: Sequence[str], name: str) -> Iterator[Path]:
    """A folder to make files in, which move to `path` when the block ends well, and vanish otherwise. Raises UserError.

    The last one of `files` comes last. They are made in a hidden folder `name`; what a killed process has left there is
    replaced.
    """
    taken = f"--output {path}: another export into it is at work"
    with writing(path), work_folder(path, name) as work, locked(work / ".lock", taken):
        try:
            take_back(work, path)
            yield work
            publish(work, path, files)
        finally:
            with suppress(OSError):  # then the next export does so
                take_back(work, path)
                shutil.rmtree(work)


def publish(work: Path, output: Path, names: Sequence[str]) -> None:
    """Rename files of the hidden folder `work` into `output`, the last one of `names` last; then drop `work`.

    Cut off before the last rename, the set is not there for those who ask for its last file first, and `take_back`
    makes as if nothing had been renamed. Raises OSError.
    """
    write_atomic(work / _LIST, json.dumps(names))
    for name in names[:-1]:
        (work / name).rename(output / name)
    sync_directory(output)
    (work / names[-1]).rename(output / names[-1])
    sync_directory(output)
    with suppress(OSError):  # it may not be ours to read
        sync_directory(output.absolute().parent)
    shutil.rmtree(work, ignore_errors=True)


def take_back(work: Path, output: Path) -> None:
    """Bring the files of a publication that was cut off back into `work`, unless the set is whole. Raises OSError.

    Several processes may do so at the same time.
    """
    names = _listed(work)
    if not names or (output / names[-1]).exists():
        return
    for name in names:
        if not (work / name).exists():  # else the one in the output is somebody else's
            with suppress(FileNotFoundError):
                (output / name).rename(work / name)
    sync_directory(work)
    (work / _LIST).unlink(missing_ok=True)


def _listed(work: Path) -> list[str]:
    """The files of a publication that was cut off; none where none was."""
    try:
        names = json.loads((work / _LIST).read_bytes())
    except (OSError, ValueError):
        return []
    return [Path(str(name)).name for name in names] if isinstance(names, list) else []
