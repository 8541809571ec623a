"""A document as one HTML page: no script, nothing fetched, every text escaped.

The content policy in its head forbids both to the browser as well.
"""

from collections.abc import Iterator
from html import escape
from importlib.resources import files

from mpd_rounds.report.document import (
    Bar,
    Block,
    Code,
    Document,
    Examples,
    Figures,
    Notice,
    Paragraph,
    Section,
    Table,
    Tiles,
    readable,
)
from mpd_rounds.report.examples import Example, Part, Trace

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
_MARK = {"removed": "del", "added": "ins"}


def html_page(document: Document) -> str:
    style = files("pipelines.report").joinpath("style.css").read_text(encoding="utf-8")
    contents = [section for section in document.sections if section.level == 2]
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            '<meta name="color-scheme" content="light dark">',
            f"<title>{_text(document.title)}</title>",
            f"<style>\n{style}</style>",
            "</head>",
            "<body>",
            "<header>",
            f"<h1>{_text(document.title)}</h1>",
            f'<p class="subtitle">{_text(document.subtitle)}</p>',
            "</header>",
            '<nav aria-label="Contents"><ul>',
            *(f'<li><a href="#{s.anchor}">{_text(s.title)}</a></li>' for s in contents[1:]),
            "</ul></nav>",
            "<main>",
            *(line for section in document.sections for line in _section(section)),
            "</main>",
            "</body>",
            "</html>",
            "",
        ]
    )


def _text(text: str) -> str:
    return escape(readable(text))


def _section(section: Section) -> Iterator[str]:
    tag = f"h{section.level}"
    yield f'<section id="{section.anchor}" aria-labelledby="{section.anchor}-title">'
    yield f'<{tag} id="{section.anchor}-title">{_text(section.title)}</{tag}>'
    for block in section.blocks:
        yield from _block(block, section.level + 1)
    yield "</section>"


def _block(block: Block, level: int) -> Iterator[str]:
    match block:
        case Paragraph(text):
            yield f"<p>{_text(text)}</p>"
        case Code(text, _):
            yield f'<pre class="scroll" tabindex="0"><code>{_text(text)}</code></pre>'
        case Notice(title, lines):
            yield f'<div class="notice"><p><strong>{_text(title)}</strong></p><ul>'
            yield from (f"<li>{_text(line)}</li>" for line in lines)
            yield "</ul></div>"
        case Tiles(tiles):
            yield '<dl class="tiles">'
            for tile in tiles:
                yield f'<div><dt>{_text(tile.label)}</dt><dd class="value">{_text(tile.value)}</dd>'
                yield f'<dd class="detail">{_text(tile.detail)}</dd></div>'
            yield "</dl>"
        case Table():
            yield from _table(block)
        case Figures(figures, caption):
            yield f'<figure><div class="plots plots-{min(len(figures), 3)}">'
            for figure in figures:
                opening = f'<svg role="img" aria-label="{_text(figure.alt)}"'
                yield figure.svg.replace("<svg", opening, 1)
            yield f"</div><figcaption>{_text(caption)}</figcaption></figure>"
        case Examples(title, intro, examples):
            yield f"<h{level}>{_text(title)}</h{level}>"
            if intro:
                yield f'<p class="intro">{_text(intro)}</p>'
            for number, example in enumerate(examples, start=1):
                yield from _example(example, number, level + 1)


def _table(table: Table) -> Iterator[str]:
    yield f'<div class="scroll" role="region" tabindex="0" aria-label="{_text(table.caption)}">'
    yield f"<table><caption>{_text(table.caption)}</caption>"
    head = (
        f'<th scope="col"{_side(table, i)}>{_text(name)}</th>' for i, name in enumerate(table.head)
    )
    yield f"<thead><tr>{''.join(head)}</tr></thead><tbody>"
    for row in table.rows:
        cells = []
        for i, cell in enumerate(row):
            tag = 'th scope="row"' if i == 0 else "td"
            cells.append(f"<{tag}{_side(table, i)}>{_cell(cell)}</{tag[:2]}>")
        yield f"<tr>{''.join(cells)}</tr>"
    yield "</tbody></table></div>"
    if table.note:
        yield f'<p class="note">{_text(table.note)}</p>'


def _side(table: Table, column: int) -> str:
    return "" if column < table.left else ' class="figure"'


def _cell(cell: str | Bar) -> str:
    if isinstance(cell, str):
        return _text(cell)
    width = 100 * min(max(cell.share, 0.0), 1.0)
    return (
        f'<span class="bar" aria-hidden="true"><span style="width:{width:.1f}%"></span></span>'
        f'<span class="count">{_text(cell.text)}</span>'
    )


def _example(example: Example, number: int, level: int) -> Iterator[str]:
    gold = "" if example.gold is None else f' <span class="gold">{_text(example.gold)}</span>'
    yield f'<article class="example"><h{level}>Problem {number}</h{level}>'
    yield f'<p class="problem">{_text(example.problem)}{gold}</p>'
    yield f'<div class="traces traces-{len(example.traces)}">'
    for trace in example.traces:
        yield from _trace(trace)
    yield "</div></article>"


def _trace(trace: Trace) -> Iterator[str]:
    facts = list(trace.facts)
    verdict = {True: "right", False: "wrong", None: ""}[trace.is_correct]
    said = f' <span class="{verdict}">{verdict}</span>' if verdict else ""
    yield f'<div class="trace"><p class="trace-title"><strong>{_text(trace.title)}</strong>{said}'
    yield f'<span class="facts">{_text(" · ".join(facts))}</span></p>'
    yield f'<div class="trace-text">{"".join(map(_part, trace.parts))}</div></div>'


def _part(part: Part) -> str:
    tag = _MARK.get(part.kind)
    return _text(part.text) if tag is None else f"<{tag}>{_text(part.text)}</{tag}>"
