"""TensorBoard, Weights & Biases and what else accelerate knows, for a run that is stopped and goes on: one log each."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.tracking import filter_trackers

from mde_dist.training.config import Config, as_json
from mde_dist.utils.console import say
from mde_dist.utils.errors import UserError

PROJECT = "mde_dist"
FOLDER = "trackers"
"""Folder of a run directory that trackers write to."""


class Trackers:
    """The trackers of a run, from `open_trackers`. One that fails is spoken of once; training goes on."""

    def __init__(self, accelerator: Accelerator):
        self._accelerator = accelerator
        self._failed: set[str] = set()

    def __bool__(self) -> bool:
        """Say whether this rank has any tracker."""
        return bool(self._accelerator.trackers) and self._accelerator.is_main_process

    def log(self, samples_seen: int, prefix: str, values: Mapping[str, Any]) -> None:
        """Log numbers at a sample of the stream, as `prefix`/name; what is no number is left out."""
        numbers = {f"{prefix}/{k}": v for k, v in values.items() if isinstance(v, int | float)}
        self._each("log", numbers, samples_seen)

    def show(self, samples_seen: int, images: Mapping[str, np.ndarray]) -> None:
        """Named pictures, RGB uint8 (height, width, 3), where the tracker takes any."""
        self._each("log_images", {name: image[None] for name, image in images.items()}, samples_seen)

    def finish(self) -> None:
        self._each("finish")

    def _each(self, method: str, values: Mapping[str, Any] | None = None, samples_seen: int | None = None) -> None:
        for tracker in self._accelerator.trackers if self else ():
            given = () if values is None else (values, samples_seen)
            more = {"dataformats": "NHWC"} if (tracker.name, method) == ("tensorboard", "log_images") else {}
            try:
                getattr(tracker, method, lambda *given: None)(*given, **more)
            except Exception as error:  # of any library; a log is no reason to lose a training
                if tracker.name not in self._failed:
                    self._failed.add(tracker.name)
                    why = " ".join(str(error).split())[:200]
                    say(f"warning: {tracker.name}: {type(error).__name__}: {why}; training goes on")


@contextmanager
def open_trackers(
    accelerator: Accelerator,
    names: Sequence[str],
    run: Path,
    run_id: str,
    config: Mapping[str, Any],
    samples_seen: int,
) -> Iterator[Trackers]:
    """Start the named trackers on the main process. Raises UserError.

    `run_id`: the same whenever this run goes on; `samples_seen`: where it does, so that what was logged behind that
    place by a run that was cut off does not stand there twice.
    """
    missing = [name for name in names if name not in map(str, filter_trackers(list(names), run))]
    if missing:
        raise UserError(f"--log-with {missing[0]}: not installed; pip install {missing[0]}, or leave it out")
    if names and accelerator.is_main_process:
        accelerator.project_configuration.set_directories(str(run / FOLDER))
        accelerator.log_with = filter_trackers(list(names), run)
        options = {
            "tensorboard": {"purge_step": samples_seen + 1},
            "wandb": {"id": run_id, "name": run.name, "resume": "allow", "dir": str(run / FOLDER)},
        }
        values = {k: v if isinstance(v, int | float | str) else str(v) for k, v in config.items()}
        try:
            (run / FOLDER).mkdir(exist_ok=True)
            accelerator.init_trackers(PROJECT, None if samples_seen else values, options)
        except Exception as error:  # of any library
            raise UserError(f"--log-with {' '.join(names)}: {type(error).__name__}: {error}") from None
    trackers = Trackers(accelerator)
    try:
        yield trackers
    finally:
        trackers.finish()


def run_id_of(config: Config, this_run: Mapping[str, Any]) -> str:
    """A name for trackers that stays as long as the run: a field that a later version adds does not change it."""
    defaults = as_json(Config())
    told = {name: value for name, value in this_run.items() if name not in defaults or value != defaults[name]}
    return hashlib.sha256(json.dumps([str(config.run.resolve()), told]).encode()).hexdigest()[:16]
