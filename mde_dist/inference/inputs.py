"""Files, folders and videos as they are named on the command line -> frames to predict, each with a name of its own."""

from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from itertools import groupby, repeat
from pathlib import Path

import numpy as np

from mde_dist.data.images import IMAGE_SUFFIXES
from mde_dist.inference.images import Unreadable, is_depth_map, open_image
from mde_dist.inference.prefetch import in_order, threads
from mde_dist.inference.video import VIDEO_SUFFIXES, VideoFrame, count_frames, import_av, read_video
from mde_dist.utils.errors import UserError
from mde_dist.utils.folders import list_below
from mde_dist.utils.io import natural_order, was_folder


@dataclass(frozen=True)
class Frame:
    """An image to predict."""

    name: Path
    """Name of its results below the output, without their endings."""
    image: np.ndarray
    """RGB uint8 (height, width, 3)."""
    stray_bytes: bool = False
    """True for a JPEG with stray bytes, see `decode_jpeg`."""


@dataclass(frozen=True)
class ReadError:
    """An image, a frame or a video that could not be read."""

    what: str
    """A line that names it and says why."""


@dataclass(frozen=True)
class Inputs:
    """Files to predict; nothing is read yet."""

    entries: tuple[tuple[Path, Path], ...]
    """(file, its name below the output without suffix), in the order in which they were named; of folders in natural
    order."""
    notes: tuple[str, ...]
    """Lines about what was left out of folders."""

    @property
    def videos(self) -> list[Path]:
        return [file for file, _ in self.entries if is_video(file)]

    def expected(self, every: int) -> int:
        """Number of frames to expect, as far as the heads of videos tell."""
        videos = self.videos
        return len(self.entries) - len(videos) + sum(count_frames(video, every) for video in videos)

    def frames(self, every: int, pool: Executor, ahead: int) -> Generator[Frame | ReadError, None, None]:
        """Yield all frames in order, read by `pool` up to `ahead` in advance. Close the generator when it is left
        early.

        `every`: of videos one of so many frames.
        """
        for video, entries in groupby(self.entries, key=lambda entry: is_video(entry[0])):
            if not video:
                yield from in_order((partial(_read, *entry) for entry in entries), pool, ahead)
                continue
            for file, name in entries:
                with threads(1) as reader:  # a video's frames come one after the other
                    frames = _read_frames(file, name, every)
                    for frame in in_order(repeat(partial(next, frames, None)), reader, ahead):
                        if frame is None:
                            break
                        yield frame


def is_video(file: Path) -> bool:
    return file.suffix.lower() in VIDEO_SUFFIXES


def find_inputs(paths: Sequence[Path], output: Path) -> Inputs:
    """Look what there is. Raises UserError where something is missing, or two results would have one name."""
    if not paths:
        raise UserError("name what is to be predicted: images, folders of them, or videos")
    found: dict[Path, Path] = {}
    notes = []
    for path in paths:
        if path.is_dir():
            pairs, left_out = _in_folder(path, output)
            notes += left_out
        elif path.is_file():
            pairs = [(path, Path(path.stem))]
        else:
            raise UserError(f"{path}: no such file or folder")
        for file, name in pairs:
            if name in found:
                raise UserError(f"{file} and {found[name]} would both be written as {name}; predict them one by one")
            found[name] = file
    if not found:
        raise UserError(f"no image in {', '.join(map(str, paths))} ({', '.join(IMAGE_SUFFIXES)})")
    inputs = Inputs(tuple((file, name) for name, file in found.items()), tuple(notes))
    _check_videos(inputs, found)
    return inputs


def _in_folder(folder: Path, output: Path) -> tuple[list[tuple[Path, Path]], list[str]]:
    """(file, name) of each image in a folder, in natural order, and lines about what was left out. Raises UserError.

    What is there by name and cannot be read is among them: reading it says why.
    """
    if output.resolve() == folder.resolve():
        raise UserError(
            f"--output {output} is the folder of the images; name another one, where results are by themselves"
        )
    below = list_below(folder, without=output)
    if folder in below.closed:
        raise UserError(f"{folder} cannot be listed; open it to this user")
    images, hidden = (
        [path for path in paths if path.suffix.lower() in IMAGE_SUFFIXES] for paths in (below.files, below.left_behind)
    )
    hidden = [path for path in hidden if not path.name.startswith("._")]  # macOS's notes on files are none
    depth = [path for path in images if is_depth_map(path)]
    notes = _left_out(folder, "depth maps (16-bit grey PNG)", "that they are read as images", depth)
    videos = [path for path in below.files if is_video(path)]
    notes += _left_out(folder, "videos", "that their frames are predicted", videos)
    notes += _left_out(folder, "hidden images", "that they are predicted", hidden)
    unread = [*below.closed, *filter(was_folder, below.files)]
    taken = sorted({*images, *unread} - {*depth}, key=lambda path: natural_order(path.relative_to(folder).as_posix()))
    return [(path, path.relative_to(folder).with_suffix("")) for path in taken], notes


def _left_out(folder: Path, what: str, purpose: str, files: Sequence[Path]) -> list[str]:
    return [f"left out in {folder}: {len(files):,} {what}; name them one by one so {purpose}"] if files else []


def _check_videos(inputs: Inputs, found: dict[Path, Path]) -> None:
    """Each video has a folder of results for itself, and somebody who reads it. Raises UserError."""
    for file, name in inputs.entries:
        if is_video(file):
            import_av(file)
            inside = next((other for other in found if name in other.parents), None)
            if inside:
                raise UserError(f"{found[inside]} would be written among the frames of {file}; predict them one by one")


def _read(file: Path, name: Path) -> Frame | ReadError:
    try:
        return Frame(name, *open_image(file))
    except Unreadable as error:
        return ReadError(str(error))


def _read_frames(file: Path, name: Path, every: int) -> Iterator[Frame | ReadError]:
    for found in read_video(file, every):
        if isinstance(found, VideoFrame):
            yield Frame(name / f"{found.number:06d}", found.image)
        else:
            yield ReadError(found)
