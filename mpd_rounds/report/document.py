"""The content of a report as blocks (tables, plots, tiles …), and numbers as text.

Texts in blocks are data, such as prompts and names; the templates escape them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from mpd_rounds.report.examples import Example


@dataclass(frozen=True)
class Block:
    @property
    def kind(self) -> str:
        """The name by which the templates know the block."""
        return type(self).__name__.lower()


@dataclass(frozen=True)
class Paragraph(Block):
    text: str


@dataclass(frozen=True)
class Code(Block):
    text: str
    language: str


@dataclass(frozen=True)
class Notice(Block):
    """A warning above the results."""

    title: str
    lines: list[str]


@dataclass(frozen=True)
class Tile:
    """One of the main results: `value` is shown large, `label` above it, `detail` below."""

    label: str
    value: str
    detail: str


@dataclass(frozen=True)
class Tiles(Block):
    tiles: list[Tile]


@dataclass(frozen=True)
class Bar:
    """A table cell: `text` next to a bar of the length `share` (0 to 1)."""

    text: str
    share: float

    @property
    def width(self) -> str:
        return f"{100 * min(max(self.share, 0.0), 1.0):.1f}%"


@dataclass(frozen=True)
class Table(Block):
    """The first `left` columns are text, the others numbers. `note` says how to read the table."""

    caption: str
    head: list[str]
    rows: Sequence[Sequence[str | Bar]]
    left: int = 1
    note: str = ""


@dataclass(frozen=True)
class Plot:
    """An SVG element; `alt` says in words what it shows."""

    svg: str
    alt: str


@dataclass(frozen=True)
class Plots(Block):
    """Plots next to each other, on the HTML page alone."""

    plots: list[Plot]
    caption: str


@dataclass(frozen=True)
class Examples(Block):
    """Traces to read, on the HTML page alone; `intro` says how they were chosen."""

    title: str
    intro: str
    examples: list[Example]


@dataclass(frozen=True)
class Section:
    """`level` is the level of its heading, from 2; `anchor` is unique on the page."""

    anchor: str
    title: str
    blocks: list[Block]
    level: int = 2


@dataclass(frozen=True)
class Document:
    title: str
    subtitle: str
    sections: list[Section] = field(default_factory=list)


# -- numbers as text ----------------------------------------------------------------------------

_MINUS, NONE = "\N{MINUS SIGN}", "\N{EN DASH}"


def percent(value: float | None, interval: list[float] | None = None, decimals: int = 1) -> str:
    """Return a share as 12.3% [10.1, 14.5]."""
    if value is None:
        return NONE
    text = f"{100 * value:.{decimals}f}%".replace("-", _MINUS)
    return text + bounds(interval, " [{:.1f}, {:.1f}]")


def points(value: float | None, interval: list[float] | None) -> str:
    """Return a difference of shares in percentage points, with its sign."""
    if value is None:
        return NONE
    return f"{100 * value:+.1f}".replace("-", _MINUS) + bounds(interval, " [{:+.1f}, {:+.1f}]")


def number(value: float | None) -> str:
    """Return a count or a mean, with one decimal below 1,000."""
    if value is None:
        return NONE
    return f"{value:,.1f}" if abs(value) < 1000 else f"{value:,.0f}"


def bounds(interval: list[float] | None, form: str) -> str:
    """Return an interval of shares, in hundredths, formatted by `form`; "" for None."""
    if interval is None:
        return ""
    return form.format(*(100 * bound for bound in interval)).replace("-", _MINUS)
