"""Markdown of what files say, in which nothing of it is markup, whatever it holds."""

import re


def plain(value: object, most: int = 200) -> str:
    """Format a value in one line of at most `most` characters, without line breaks and control characters."""
    shown = " ".join("".join(c if c.isprintable() else " " for c in str(value)).split())
    return shown if len(shown) <= most else shown[: most - 1] + "…"


def code(value: object) -> str:
    """Format a value as a code span."""
    shown = plain(value) or " "
    fence = "`" * (1 + _longest_run(shown))
    space = " " if shown.startswith("`") or shown.endswith("`") else ""
    return f"{fence}{space}{shown}{space}{fence}"


def block(text: str, language: str) -> str:
    """Format text as a block of code; `text` ends in a line break."""
    fence = "`" * max(3, 1 + _longest_run(text))
    return f"{fence}{language}\n{text}{fence}\n"


def row(*cells: str) -> str:
    """A row of a table."""
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"


def _longest_run(text: str) -> int:
    """Length of the longest run of backticks."""
    return max(map(len, re.findall("`+", text)), default=0)
