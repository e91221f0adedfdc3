"""The text of a list -> rows of columns, as scripts, spreadsheets and pandas write them.

Encoding, separator, heading and index column are found by what is in the text, and by which files are there.
"""

import csv
import re
from collections.abc import Callable, Sequence

from mde_dist.data.images import IMAGE_SUFFIXES
from mde_dist.utils.io import decode_text

Row = list[str]
There = Callable[[str], bool]
"""True for a path at which a file is found."""

_SUFFIXES = (*IMAGE_SUFFIXES, ".h5")
_FIRST = 8  # rows by which the separator is told
_BY_BLANKS = re.compile(r'"([^"]*)"|\S+')
_BEHIND_SUFFIXES = re.compile(rf'"([^"]*)"|\S.*?(?:{"|".join(map(re.escape, _SUFFIXES))})(?!\S)|\S+', re.IGNORECASE)


def read_rows(data: bytes, there: There) -> list[tuple[int, Row]]:
    """-> (number of the line, its columns), without headings, comments and an index; paths with '/'.

    Raises UnicodeError or csv.Error.
    """
    lines = re.split(r"\r\n|\r|\n", decode_text(data).replace("\\", "/"))
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    telling = [line for _, line in numbered if not line.startswith("#")] or [line for _, line in numbered]
    split = _separator(telling[: _FIRST + 1], there)
    rows = [(number, row) for number, line in numbered if any(row := split(line))]
    rows = [(number, row) for number, row in rows if not row[0].startswith("#") or there(row[0])]
    if rows and _is_heading([row for _, row in rows[:2]], there):
        rows = rows[1:]
    indexed = _is_indexed([row for _, row in rows[:_FIRST]], there)
    return [(number, row[indexed:]) for number, row in rows]


def _separator(lines: Sequence[str], there: There) -> Callable[[str], Row]:
    """The way to split these lines that gives most files that are there, or else most names that look like files.

    Where lines are separated by blanks, a name may have some too: a column ends behind the suffix of an image.
    """

    def found(split: Callable[[str], Row]) -> tuple[int, int, int]:
        rows = [row for line in lines if any(row := split(line))]
        columns = [column for row in rows for column in row[_is_indexed(rows[1:], there) :][:2]]
        return sum(map(there, columns)), sum(map(_looks_like_file, columns)), len(columns)

    return max(_WAYS, key=found)


def _by(separator: str) -> Callable[[str], Row]:
    def split(line: str) -> Row:
        row = [column.strip() for column in next(csv.reader([line], delimiter=separator, skipinitialspace=True))]
        while row and not row[-1]:
            row.pop()
        return row

    return split


def _by_pattern(pattern: re.Pattern[str]) -> Callable[[str], Row]:
    return lambda line: [found[0] if found[1] is None else found[1] for found in pattern.finditer(line)]


_WAYS = (*map(_by, "\t;,"), _by_pattern(_BEHIND_SUFFIXES), _by_pattern(_BY_BLANKS))


def _looks_like_file(column: str) -> bool:
    return column.lower().endswith(_SUFFIXES)


def _is_heading(rows: Sequence[Row], there: There) -> bool:
    """True where the first row names columns: none of its own is a file, while one below it is."""
    first, below = rows[0], rows[1:]
    if any(_looks_like_file(column) or there(column) for column in first):
        return False
    return any(map(_looks_like_file, below[0])) if below else not any("." in c or "/" in c for c in first)


def _is_indexed(rows: Sequence[Row], there: There) -> bool:
    """True where the first column numbers the rows, and files stand behind it."""
    numbers = bool(rows) and all(len(row) > 1 and row[0].isdecimal() and _looks_like_file(row[1]) for row in rows)
    return numbers and not any(there(row[0]) for row in rows)
