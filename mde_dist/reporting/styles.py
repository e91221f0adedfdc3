"""The looks of a run among several: a colour for light and one for dark paper, a kind of line and a kind of dot each.

The colours are of the family of Okabe and Ito, told apart by colour-blind eyes, darker or lighter where they would
have less than 3:1 against the paper.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Style:
    light: str
    """Colour on light paper."""
    dark: str
    """Colour on dark paper."""
    dash: tuple[float, ...]
    """Lengths of line and gap, pixels; none = a whole line."""
    dot: str
    """A path around 0, 0 for SVG."""
    marker: str
    """The same for matplotlib."""


_COLORS = (
    ("#0067a5", "#5cb8f0"),
    ("#c04a00", "#ff9150"),
    ("#00785a", "#35c99d"),
    ("#a33e79", "#ea9dca"),
    ("#7d6000", "#e3c13a"),
    ("#4f4db3", "#aaa9ff"),
    ("#44505c", "#b9c4cf"),
)
_DASHES: tuple[tuple[float, ...], ...] = ((), (6, 3), (2, 2.5), (9, 3, 2, 3))
_DOTS = (
    ("M-3.2 0a3.2 3.2 0 1 0 6.4 0a3.2 3.2 0 1 0 -6.4 0z", "o"),
    ("M-2.9 -2.9h5.8v5.8h-5.8z", "s"),
    ("M0 -3.9l3.7 6.6h-7.4z", "^"),
    ("M0 -4.1l4.1 4.1l-4.1 4.1l-4.1 -4.1z", "D"),
    ("M0 3.9l3.7 -6.6h-7.4z", "v"),
)


def style(run: int) -> Style:
    """Style of the run at an index of the page; the parts come back after different numbers of runs."""
    return Style(*_COLORS[run % len(_COLORS)], _DASHES[run % len(_DASHES)], *_DOTS[run % len(_DOTS)])
