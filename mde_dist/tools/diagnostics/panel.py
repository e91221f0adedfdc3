"""Every rank is asked, no rank can make the others hang, and the answers become one row of a table.

A check is a function that looks at this rank's machine. What it finds, or why it failed, goes to all ranks as JSON; so
all of them know the same afterwards, and go on to the next check together.
"""

import socket
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from accelerate import Accelerator

from mde_dist.data.dataset import DamagedSample
from mde_dist.distributed.process_group import gather_json
from mde_dist.utils.errors import UserError

Result = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Row:
    """Result of one check."""

    check: str
    result: Result
    found: str
    advice: str = ""


@dataclass(frozen=True)
class RankAnswer:
    """Answer of one rank."""

    value: Any = None
    """Value of JSON's types; None where it failed."""
    error: str = ""
    """Error in words; empty where it succeeded."""
    advice: str = ""
    """Advice about that error."""


class RankSurvey:
    """The ranks, and the rows that they filled so far."""

    def __init__(self, accelerator: Accelerator, say: Callable[[str], None]):
        """`say` takes a word on what is looked at, on the main process."""
        self.accelerator, self.rows = accelerator, list[Row]()
        self.rank, self.world = accelerator.process_index, accelerator.num_processes
        # ranks of a node follow one another: its lowest one names it, where two nodes may have one host name
        found = gather_json(accelerator, [socket.gethostname(), self.rank - accelerator.local_process_index])
        self.hosts: list[str] = [host for host, _ in found]
        self.nodes: list[int] = [node for _, node in found]
        """The lowest rank of each rank's node."""
        self._say = say if accelerator.is_main_process else lambda word: None

    @property
    def beside(self) -> list[int]:
        """The ranks of this rank's node."""
        return self.of_node(self.nodes[self.rank])

    def of_node(self, node: int) -> list[int]:
        return [rank for rank, other in enumerate(self.nodes) if other == node]

    def begin(self, word: str) -> None:
        self._say(word)

    def add(self, row: Row) -> None:
        self.rows.append(row)

    def query_ranks(self, check: Callable[[], Any], advice: str, limit: float | None = None) -> list[RankAnswer]:
        """Call `check` on each rank -> the answers by rank. `limit`: seconds after which a rank that has not answered
        has failed.

        `advice` is for failures that bring none of their own.
        """
        mine = _guarded(check, advice) if limit is None else _within(limit, check, advice)
        return [RankAnswer(**answer) for answer in gather_json(self.accelerator, asdict(mine))]

    def failed(self, check: str, answers: Sequence[RankAnswer]) -> bool:
        """Add a row where some rank has failed; returns whether one has."""
        bad = {rank: answer for rank, answer in enumerate(answers) if answer.error}
        if bad:
            found = self.differing({rank: answer.error for rank, answer in bad.items()})
            self.add(Row(check, "fail", found, "\n".join(dict.fromkeys(answer.advice for answer in bad.values()))))
        return bool(bad)

    def differing(self, texts: dict[int, str]) -> str:
        """A text per rank (or for some of them) as one: each text once, naming its ranks unless it is that of all."""
        groups: dict[str, list[int]] = {}
        for rank, text in texts.items():
            groups.setdefault(text, []).append(rank)
        if len(groups) == 1 and len(texts) == self.world:
            return next(iter(groups))
        return "\n".join(f"{self.named(ranks)}: {text}" for text, ranks in groups.items())

    def named(self, ranks: Sequence[int]) -> str:
        """`rank 3 (host)`, `ranks 0-3, 6 (host, other host)`."""
        hosts = ", ".join(dict.fromkeys(self.hosts[rank] for rank in ranks))
        return f"rank{'s' if len(ranks) > 1 else ''} {_ranges(ranks)} ({hosts})"


def format_bytes(size: float) -> str:
    """Bytes as people read them; powers of ten, as disks are sold."""
    for unit in ("bytes", "KB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def _ranges(numbers: Iterable[int]) -> str:
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and number == spans[-1][-1] + 1:
            spans[-1][1:] = [number]
        else:
            spans.append([number])
    return ", ".join("-".join(map(str, span)) for span in spans)


def _guarded(check: Callable[[], Any], advice: str) -> RankAnswer:
    try:
        return RankAnswer(check())
    except (UserError, DamagedSample) as error:
        # messages end with what to do, behind the last semicolon
        what, mark, todo = str(error).rpartition("; ")
        return RankAnswer(error=what, advice=todo) if mark else RankAnswer(error=todo, advice=advice)
    except Exception as error:  # whatever it is, the others are waiting for an answer
        return RankAnswer(error=" ".join(f"{type(error).__name__}: {error}".split())[:400], advice=advice)


def _within(seconds: float, check: Callable[[], Any], advice: str) -> RankAnswer:
    """Call it in a thread, which is left behind where a read hangs in the system: nothing can call it back."""
    answers: list[RankAnswer] = []
    thread = threading.Thread(target=lambda: answers.append(_guarded(check, advice)), name="look", daemon=True)
    thread.start()
    thread.join(seconds)
    silent = RankAnswer(error=f"no answer within {seconds:.0f} s", advice="see whether its disk or server is well")
    return answers[0] if answers else silent
