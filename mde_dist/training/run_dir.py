"""The run directory: who may write it, what is in it, where to go on.

RUN/config.toml      the resolved config, which --config reads back
RUN/metrics.jsonl    a line per log interval and per evaluation
RUN/checkpoints/     see checkpoint.py
RUN/evaluations/     last.json and best.json, as `evaluate --json` writes them
RUN/panels/          see snapshots.py
RUN/trackers/        what --log-with tensorboard and others write
RUN/model.safetensors  the last weights, once training has ended
RUN/PREEMPTED        there while a run that a signal stopped waits to be continued
RUN/logs/            the output of each rank, see distributed/rank_log.py
RUN/failed/          the state before a batch whose loss or gradient was not finite, to look at with --debug-from
"""

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

from mde_dist import __version__
from mde_dist.models.weights import MODEL
from mde_dist.training.checkpoint import Checkpoint, load_newest, save_checkpoint
from mde_dist.utils.console import say
from mde_dist.utils.errors import UserError
from mde_dist.utils.folders import is_empty
from mde_dist.utils.io import refuse_dead_links, write_atomic, writing
from mde_dist.utils.locks import locked

PREEMPTED = "PREEMPTED"


class RunDirectory:
    """Use it in a `with`: it is locked meanwhile. Only the process with `is_main` (rank 0) locks and writes."""

    def __init__(
        self,
        path: Path,
        identity: Mapping[str, Any],
        toml: str,
        is_main: bool,
        defaults: Mapping[str, Any] = MappingProxyType({}),
    ):
        """`identity`: what makes this run this run, by name; a checkpoint of another one is refused. `defaults`: of all
        fields of the config, for those that an older version did not have."""
        self.path, self._identity, self._toml, self._is_main = path, dict(identity), toml, is_main
        self._defaults = defaults
        self._lock = contextlib.ExitStack()
        self._warned = False

    def __enter__(self) -> "RunDirectory":
        if self._is_main:
            with writing(f"--run {self.path}"):
                self._claim()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._lock.close()

    def resume(self, tell: Callable[[str], None] = say) -> Checkpoint | None:
        """The newest whole checkpoint. Raises UserError where it is of another run, or where none of some is whole."""
        found, broken = None, 0
        for item in load_newest(self.path / "checkpoints"):
            if isinstance(item, Checkpoint):
                found = item
            else:
                broken += 1
                if self._is_main:
                    tell(item)
        if found is None and broken:
            raise UserError(
                f"--run {self.path}: none of its {broken} checkpoints is whole; put one back that is, or choose "
                "another --run to begin anew"
            )
        if found is None:
            return None
        self._refuse_unknown(found)
        known = {name: value for name, value in found.identity.items() if name in self._identity}
        before = {name: self._defaults.get(name) for name in self._identity} | known
        changed = differences(before, self._identity)
        if changed:
            raise UserError(
                f"--run {self.path} holds a run of another config: {'; '.join(changed)}; choose another --run for this "
                "one, or give the options of that run to continue it"
            )
        return found

    def note_change(
        self, checkpoint: Checkpoint, values: Mapping[str, Any], then: str = "", tell: Callable[[str], None] = say
    ) -> None:
        """Say which of these config values the checkpoint was made with others of: they may change, but they matter.
        `then`: what follows from it."""
        before = {name: checkpoint.config.get(name, self._defaults.get(name)) for name in values}
        for change in differences(before, values) if self._is_main else ():
            tell(f"note: {change} from sample {checkpoint.state.samples_seen} on{then}")

    def refuse_less(self, checkpoint: Checkpoint, samples: int) -> None:
        """Raises UserError where `train.total_samples` was lowered to less than the checkpoint has seen."""
        seen, before = checkpoint.state.samples_seen, checkpoint.config.get("train.total_samples", samples)
        if samples < seen and samples != before:
            raise UserError(
                f"train.total_samples = {samples}: the run in {self.path} has seen {seen} already; give at least as "
                "many, or choose another --run"
            )

    def start(self) -> None:
        """Note the config; a run that goes on is not preempted any more."""
        if self._is_main:
            with writing(f"--run {self.path}"):
                write_atomic(self.path / "config.toml", self._toml)
                (self.path / PREEMPTED).unlink(missing_ok=True)

    def save(self, files: Mapping[str, bytes], record: Mapping[str, Any], keep: int, best: int | None) -> Path:
        """Write a checkpoint; see `save_checkpoint`."""
        return self._save("checkpoints", files, record, keep, best)

    def save_failed(self, files: Mapping[str, bytes], record: Mapping[str, Any]) -> Path:
        """Write down the state before a step that failed, where no run goes on from."""
        return self._save("failed", files, record, 1, None)

    def _save(
        self, name: str, files: Mapping[str, bytes], record: Mapping[str, Any], keep: int, best: int | None
    ) -> Path:
        whole = {**record, "identity": self._identity}
        return save_checkpoint(self.path / name, files, whole, keep, best, warn=self._warn_once)

    def _warn_once(self, text: str) -> None:
        if not self._warned:
            say(f"warning: {text}")
        self._warned = True

    def _refuse_unknown(self, checkpoint: Checkpoint) -> None:
        """Raises UserError where a newer version made it, with fields that nobody here can obey."""
        unknown = [name for name in checkpoint.identity if name not in {**self._defaults, **self._identity}]
        if unknown:
            raise UserError(
                f"--run {self.path} holds a run of another version of mde_dist: {unknown[0]} was "
                f"{checkpoint.identity[unknown[0]]}, which this one ({__version__}) does not know; go on with that "
                "version, or choose another --run"
            )

    def mark_preempted(self, text: str) -> None:
        """Leave a sign for job scripts: this run wants to be continued."""
        if self._is_main:
            with writing(self.path / PREEMPTED, "the checkpoint stands; the same command goes on from it"):
                write_atomic(self.path / PREEMPTED, text + "\n")

    def export_final_model(self, data: bytes) -> Path:
        """Put the final weights where predict expects them."""
        with writing(self.path / MODEL, "the checkpoint stands; the same command tries again"):
            write_atomic(self.path / MODEL, data)
        return self.path / MODEL

    def refuse_foreign(self) -> None:
        """Raises UserError where the directory holds something, and no run, or stands for what is not there."""
        refuse_dead_links([self.path, self.path / "checkpoints"])
        known = {"config.toml", "metrics.jsonl", "checkpoints", ".lock"}
        if self.path.is_dir():
            names = {path.name for path in self.path.iterdir()}
            if not names & known and not is_empty(self.path):
                raise UserError(f"--run {self.path}: is not empty and not a run directory; choose another")

    def _claim(self) -> None:
        self.refuse_foreign()
        taken = f"--run {self.path}: another training is at work in it"
        self._lock.enter_context(locked(self.path / ".lock", taken))
        for left in [*self.path.glob(".*.tmp"), *self.path.glob("*/.*.tmp")]:  # by a process that died while it wrote
            if left.is_file():  # a checkpoint's goes when the next one stands
                with contextlib.suppress(OSError):
                    left.unlink()


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Describe each field on which two identities differ."""
    names = [name for name in {**before, **now} if not _same(name, before.get(name), now.get(name))]
    return [f"{name} was {before.get(name)}, is {now.get(name)}" for name in names]


def _same(name: str, before: Any, now: Any) -> bool:
    """Compare two values of a field. A file may be named from another folder than it was, so that only what both names
    end with counts."""
    if name == "model.weights" and isinstance(before, str) and isinstance(now, str):
        ends = [[part for part in Path(path).parts if part != ".."][::-1] for path in (before, now)]
        return all(one == other for one, other in zip(*ends, strict=False))
    return before == now
