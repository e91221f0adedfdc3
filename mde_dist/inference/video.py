"""Videos -> frames, with PyAV (FFmpeg's libraries), which is imported only where there is a video."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mde_dist.data.manifest import MAX_SIDE
from mde_dist.utils.errors import UserError

VIDEO_SUFFIXES = (".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".mts", ".m2ts", ".ts", ".wmv")
_SLACK = 0.25  # seconds by which a whole video may end before its head says


@dataclass(frozen=True)
class VideoFrame:
    """A frame of a video."""

    number: int
    """Number from 0, counting all frames."""
    image: np.ndarray
    """RGB uint8 (height, width, 3), upright."""


def import_av(path: Path) -> Any:
    """PyAV, for a video. Raises UserError where it is not installed."""
    try:
        import av
    except ImportError:
        raise UserError(f"{path} is a video, and PyAV is not installed: pip install 'mde_dist[video]'") from None
    return av


def count_frames(path: Path, every: int) -> int:
    """Number of frames that a video seems to have, one of `every` counted; 1 where it cannot be opened."""
    av = import_av(path)
    try:
        with av.open(str(path)) as container:
            video = container.streams.video[0]
            seconds = _seconds(container, video) or 0.0
            frames = video.frames or round(seconds * float(video.average_rate or 0))
    except (av.FFmpegError, OSError, IndexError):
        return 1  # said when it is read
    return max(1, -(-frames // every))


def read_video(path: Path, every: int) -> Iterator[VideoFrame | str]:
    """One of `every` frames, beginning with the first; in between a line about each frame that is damaged.

    The last thing may be a line about the whole: it cannot be opened, has no frames, or ends too early.
    """
    av = import_av(path)
    frames, frame = 0, None
    try:
        with av.open(str(path)) as container:
            video = container.streams.video[0]
            if max(video.height, video.width) > MAX_SIDE:
                yield f"{path} is not a readable video (it claims {video.height}x{video.width} pixels)"
                return
            end = _seconds(container, video)
            for frame in _decode(
                av, container, video
            ):  # in one thread: with several, damage takes whole frames with it
                if frames % every == 0:
                    whole = frame is not None and not frame.is_corrupt
                    yield VideoFrame(frames, _upright(frame)) if whole else f"{path}, frame {frames}: damaged"
                frames += 1
            reached = _end_of(frame, video)
    except (av.FFmpegError, OSError) as error:
        yield f"{path} is not a readable video ({error.strerror or error})"
        return
    except IndexError:
        yield f"{path} has no frames: there is no video in it"
        return
    if frames == 0:
        yield f"{path} has no frames"
    elif end is not None and reached is not None and reached < end - _SLACK:
        yield f"{path} ends after {reached:.1f} of {end:.1f} seconds: it is cut off, and {frames} frames are left of it"


def _decode(av: Any, container: Any, video: Any) -> Iterator[Any]:
    """Frames in the order in which they are shown; None for one that does not decode."""
    for packet in container.demux(video):
        try:
            yield from packet.decode()
        except av.InvalidDataError:
            yield None


def _upright(frame: Any) -> np.ndarray:
    """RGB uint8 (height, width, 3), turned as the camera was held."""
    image = frame.to_ndarray(format="rgb24")
    return np.ascontiguousarray(np.rot90(image, round(frame.rotation / 90) % 4))


def _seconds(container: Any, video: Any) -> float | None:
    """Length of a video as it says itself, seconds; None where it does not say."""
    if video.duration and video.time_base:
        return float(video.duration * video.time_base)
    if container.duration and len(container.streams) == 1:  # with sound beside it, that may be the sound's
        return container.duration / 1e6
    return None


def _end_of(frame: Any, video: Any) -> float | None:
    """Seconds from the beginning of a video to the end of a frame; None where nothing says."""
    if frame is None or frame.pts is None or not video.time_base:
        return None
    return float((frame.pts - (video.start_time or 0) + (frame.duration or 0)) * video.time_base)
