"""Two results of `evaluate --json`: whether they can be compared, and whether they differ by more than chance."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from mde_dist.evaluation.bootstrap import LEVEL, NOTE, RESAMPLES, interval, means, resamples
from mde_dist.evaluation.metrics import HIGHER_IS_BETTER, PROTOCOLS, Protocol
from mde_dist.evaluation.results import check_same_images, load_rows, read_record, short_hash
from mde_dist.utils.console import open_console, say
from mde_dist.utils.errors import UserError


@dataclass(frozen=True)
class Difference:
    """One metric of two results over the same images."""

    metric: str
    first: float
    second: float
    low: float
    """Lower end of the bootstrap interval of second - first."""
    high: float

    @property
    def verdict(self) -> str:
        if self.low <= 0 <= self.high:
            return "not clear"
        return "B is better" if (self.low > 0) == (self.metric in HIGHER_IS_BETTER) else "A is better"


def compare(first: Path, second: Path, seed: int = 0) -> dict[str, list[Difference]]:
    """Print and return the differences by protocol. Raises UserError where no fingerprint is the same."""
    a, b = read_record(first), read_record(second)
    found: dict[str, list[Difference]] = {}
    reasons: dict[str, list[str]] = {}
    for name in {**a["fingerprints"], **b["fingerprints"]}:
        ours, other = (record["fingerprints"].get(name) for record in (a, b))
        if other != ours:
            reasons.setdefault(why_not(ours, other), []).append(name)
            continue
        check_same_images(load_rows(a, name), load_rows(b, name), (str(first), str(second)))
        found[name] = differences(a, b, PROTOCOLS[name], seed)
        show(found[name], f"protocol {name}, {ours['images']} images, fingerprint {short_hash(ours)}")
    say(f"A: {_who(a)} ({first})")
    say(f"B: {_who(b)} ({second})")
    refused = [f"{reason} ({', '.join(names)})" for reason, names in reasons.items()]
    if not found:
        raise UserError(f"{first} and {second} cannot be compared: {'; '.join(refused) or 'no protocol in common'}")
    for reason in refused:
        say(f"not compared: {reason}")
    say(f"intervals: {LEVEL:.0%} of {RESAMPLES:,} bootstrap resamples of the images (seed {seed}); {NOTE}")
    return found


def why_not(fingerprint: Mapping[str, Any] | None, other: Mapping[str, Any] | None) -> str:
    """Reasons why two fingerprints differ."""
    if fingerprint is None or other is None:
        return "only one of them has the protocol"
    words = {
        "images": f"{fingerprint.get('images')} images against {other.get('images')}",
        "ground_truth": "the ground truth differs (other images, other depth maps, or another size)",
        "protocol": "the protocol's numbers differ",
    }
    found = [text for name, text in words.items() if fingerprint.get(name) != other.get(name)]
    if _definitions(fingerprint) != _definitions(other):
        found.append(
            f"the metrics are defined otherwise ({_definitions(fingerprint)} and {_definitions(other)}); score both "
            "with the same version of mde_dist"
        )
    return ", ".join(found) or "their fingerprints differ"


def _definitions(fingerprint: Mapping[str, Any]) -> str:
    """The version of the metrics' definitions, in words. In records of mde_dist 0.1 it is that of the package."""
    if "definitions" in fingerprint:
        return f"version {fingerprint['definitions']}"
    return f"version 1, of mde_dist {fingerprint.get('version')}"


def differences(a: Mapping[str, Any], b: Mapping[str, Any], protocol: Protocol, seed: int) -> list[Difference]:
    """Every metric of a protocol, with the bootstrap interval of the difference over images, in pairs.

    Both records must have the same fingerprint, hence the same images, in whatever order.
    """
    (keys, first), (others, second) = load_rows(a, protocol.name), load_rows(b, protocol.name)
    row_of = {key: row for row, key in enumerate(others)}
    second = second[[row_of[key] for key in keys]]
    scored = first[:, 0] > 0
    first, second = first[scored], second[scored]
    found = [means(rows, np.ones((1, len(first))), protocol)[0] for rows in (first, second)]
    drawn = (means(second, d, protocol) - means(first, d, protocol) for d in resamples(len(first), seed))
    ends = interval(np.concatenate(list(drawn)))
    return [
        Difference(metric, *(float(values[k]) for values in (*found, *ends)))
        for k, metric in enumerate(protocol.metrics)
    ]


def show(found: list[Difference], title: str) -> None:
    say(title)
    table = Table()
    for name in ("", "A", "B", "B - A", f"{LEVEL:.0%} interval", ""):
        table.add_column(name, justify="right" if name else "left")
    for one in found:
        numbers = (f"{one.first:.4f}", f"{one.second:.4f}", f"{one.second - one.first:+.4f}")
        table.add_row(one.metric, *numbers, f"{one.low:+.4f}, {one.high:+.4f}", one.verdict)
    open_console().print(table)


def _who(record: Mapping[str, Any]) -> str:
    predictor = record["predictor"]
    return f"{predictor.get('path')}{', with flip averaging' if predictor.get('flip') else ''}"
