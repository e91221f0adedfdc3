"""Progress of a run: everything that changes in the loop besides model, average and optimizer."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any


@dataclass
class State:
    """Saved with every checkpoint, as JSON."""

    samples_seen: int = 0
    """Position in the stream: samples of all finished steps, over all ranks."""
    step: int = 0
    evaluated: int = 0
    """samples_seen at the last evaluation."""
    replaced: int = 0
    """Samples so far that were damaged, and replaced by others."""
    skipped: int = 0
    """Batches so far that were skipped because loss or gradient was not finite."""
    best: dict[str, Any] = field(default_factory=dict)
    """`abs_rel`, `samples` and `step` of the best evaluation."""

    def crossed(self, every: int, before: int) -> bool:
        """Say whether a multiple of `every` samples was passed since `before`."""
        return self.samples_seen // every > before // every


def read_state(record: Mapping[str, Any]) -> State:
    """The state in a state.json, which may hold anything. Raises ValueError or KeyError."""
    counts = {item.name: record[item.name] for item in fields(State) if item.name != "best"}
    for name, value in counts.items():
        if type(value) is not int or not 0 <= value < 2**62:
            raise ValueError(f"{name} is no count: {str(value)[:40]!r}")
    if counts["evaluated"] > counts["samples_seen"]:
        raise ValueError("evaluated past the samples seen")
    best = record["best"]
    if not isinstance(best, dict) or (best and set(best) != {"abs_rel", "samples", "step"}):
        raise ValueError("best is not abs_rel, samples and step")
    for name, value in best.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"best.{name} is no number")
    return State(**counts, best=best)
