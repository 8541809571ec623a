"""What a report says, in blocks, apart from how it is drawn; and their Markdown.

Whatever a block holds is data: prompts, traces and names are escaped where they are written out.
"""

import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from mpd_rounds.report.examples import Example


@dataclass(frozen=True)
class Paragraph:
    text: str


@dataclass(frozen=True)
class Code:
    text: str
    language: str


@dataclass(frozen=True)
class Notice:
    """Something that the reader must know before the figures."""

    title: str
    lines: list[str]


@dataclass(frozen=True)
class Tile:
    """One of the few figures that matter: `value` large, `label` above, `detail` below."""

    label: str
    value: str
    detail: str


@dataclass(frozen=True)
class Tiles:
    tiles: list[Tile]


@dataclass(frozen=True)
class Bar:
    """A cell with a bar of the length `share`, between 0 and 1."""

    text: str
    share: float


@dataclass(frozen=True)
class Table:
    """`rows` under `head`; the first `left` columns are text, the others figures. `caption` names
    it, `note` says how to read it."""

    caption: str
    head: list[str]
    rows: Sequence[Sequence[str | Bar]]
    left: int = 1
    note: str = ""


@dataclass(frozen=True)
class Figure:
    """A plot; `alt` says in words what it shows, for those who do not see it."""

    svg: str
    alt: str


@dataclass(frozen=True)
class Figures:
    figures: list[Figure]
    caption: str


@dataclass(frozen=True)
class Examples:
    """Traces to read, on the page alone; `intro` says how they were chosen."""

    title: str
    intro: str
    examples: list[Example]


Block = Paragraph | Code | Notice | Tiles | Table | Figures | Examples


@dataclass(frozen=True)
class Section:
    """`level` is that of its heading, from 2; `anchor` is unique on the page."""

    anchor: str
    title: str
    blocks: list[Block]
    level: int = 2


@dataclass(frozen=True)
class Document:
    title: str
    subtitle: str
    sections: list[Section] = field(default_factory=list)


# -- figures as text ----------------------------------------------------------------------------

_MINUS, NONE = "\N{MINUS SIGN}", "\N{EN DASH}"


def percent(value: float | None, interval: list[float] | None = None, decimals: int = 1) -> str:
    """A share, as 12.3% [10.1, 14.5]."""
    if value is None:
        return NONE
    return f"{100 * value:.{decimals}f}%{bounds(interval, ' [{:.1f}, {:.1f}]')}".replace(
        "-", _MINUS
    )


def points(value: float | None, interval: list[float] | None) -> str:
    """A difference of shares in points, with its sign."""
    if value is None:
        return NONE
    return f"{100 * value:+.1f}{bounds(interval, ' [{:+.1f}, {:+.1f}]')}".replace("-", _MINUS)


def number(value: float | None) -> str:
    """A count or a mean: one decimal below 1,000."""
    if value is None:
        return NONE
    return f"{value:,.1f}" if abs(value) < 1000 else f"{value:,.0f}"


def bounds(interval: list[float] | None, form: str) -> str:
    """An interval of shares in `form`, in hundredths; nothing where there is none."""
    said = "" if interval is None else form.format(*(100 * bound for bound in interval))
    return said.replace("-", _MINUS)


# -- text -----------------------------------------------------------------------------------------


def readable(text: str) -> str:
    """`text` with its line breaks and spaces; other control characters, and those that turn the
    direction of writing or cannot be seen, as escapes."""
    text = text.replace("\r\n", "\n").replace("\t", "    ")
    return "".join(
        c if c == "\n" or c.isprintable() or unicodedata.category(c) == "Zs" else _escape(c)
        for c in text
    )


def _escape(character: str) -> str:
    return f"\\x{ord(character):02x}"


# What Markdown, or HTML in it, would make something of.
_SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|!~$&])")


def _inline(text: str) -> str:
    """Text as a line of Markdown that shows it as it is."""
    return _SPECIAL.sub(r"\\\1", " ".join(readable(text).split("\n")))


def markdown(document: Document) -> str:
    """The document without plots and traces."""
    head = [f"# {_inline(document.title)}", _inline(document.subtitle)]
    return "\n\n".join([*head, *_sections(document.sections)]) + "\n"


def _sections(sections: list[Section]) -> Iterator[str]:
    for section in sections:
        parts = [part for block in section.blocks for part in _block(block)]
        if parts:
            yield f"{'#' * section.level} {_inline(section.title)}"
            yield from parts


def _block(block: Block) -> Iterator[str]:
    match block:
        case Paragraph(text):
            yield _inline(text)
        case Code(text, language):
            longest = max((len(run) for run in re.findall("`+", text)), default=0)
            fence = "`" * max(3, longest + 1)
            yield f"{fence}{language}\n{readable(text)}\n{fence}"
        case Notice(title, lines):
            yield "\n".join([f"> **{_inline(title)}**", ">", *(f"> * {_inline(x)}" for x in lines)])
        case Tiles(tiles):
            yield "\n".join(
                f"* {_inline(t.label)}: **{_inline(t.value)}** {_inline(t.detail)}".rstrip()
                for t in tiles
            )
        case Table():
            yield f"**{_inline(block.caption)}**"
            marks = "|".join("---" if i < block.left else "---:" for i in range(len(block.head)))
            cells = [block.head, *([_cell_text(cell) for cell in row] for row in block.rows)]
            head, *rows = (f"| {' | '.join(map(_inline, line))} |" for line in cells)
            yield "\n".join([head, f"|{marks}|", *rows])
            if block.note:
                yield _inline(block.note)
        case Figures() | Examples():
            return


def _cell_text(cell: str | Bar) -> str:
    return cell.text if isinstance(cell, Bar) else cell
