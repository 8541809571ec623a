"""Write a report: report.html, report.md and data_card.md, rendered by Jinja2 templates."""

import re
import unicodedata
from dataclasses import replace
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from mpd_data.common.errors import ConfigError
from mpd_data.common.files import atomic_file
from mpd_rounds.report.document import Document
from mpd_rounds.report.run import open_runs
from mpd_rounds.report.sections import several, single

# Characters that Markdown, or HTML within it, would interpret.
_SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|!~$&])")


def write_report(paths: list[Path], out: Path | None = None) -> list[Path]:
    """Write the report of the runs at `paths` to `out` (default: RUN/report); return its files.

    Raise ConfigError for a path that is no run, and for several runs without `out`; DataError for
    damaged files.
    """
    if out is None:
        if len(paths) > 1:
            raise ConfigError("--out is needed to compare several runs: name a folder for it.")
        out = paths[0] / "report"
    runs = open_runs(paths)
    document = single(runs[0]) if len(runs) == 1 else several(runs)
    texts = {name: render(document, name) for name in ("report.html", "report.md")}
    cards = [section for section in document.sections if section.anchor.endswith("data-card")]
    if cards:
        sections = [
            replace(section, title=f"Shards of {run.label}", level=2)
            for section, run in zip(cards, runs, strict=True)
        ]
        card = Document("Data card", document.subtitle, sections)
        texts["data_card.md"] = render(card, "report.md")
    out.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        with atomic_file(out / name, errors="backslashreplace") as file:
            file.write(text)
    return [out / name for name in texts]


def render(document: Document, name: str) -> str:
    """Return a document as "report.html" or "report.md"."""
    environment = Environment(
        loader=PackageLoader("mpd_rounds", "report"),
        autoescape=name.endswith(".html"),
        undefined=StrictUndefined,
        finalize=_printable,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"text": markdown_text, "fenced": fenced}
    return environment.get_template(f"{name}.j2").render(document=document)


def _printable(value: Any) -> Any:
    """Apply `printable` to each text that a template inserts; Markup is left as it is."""
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def printable(text: str) -> str:
    """Return `text` with control characters, and those that are invisible or turn the direction of
    writing, as escapes such as \\x1b. Line breaks and spaces stay, a tab becomes four spaces."""
    text = text.replace("\r\n", "\n").replace("\t", "    ")
    return "".join(
        c if c == "\n" or c.isprintable() or unicodedata.category(c) == "Zs" else f"\\x{ord(c):02x}"
        for c in text
    )


def markdown_text(text: str) -> str:
    """Return `text` as part of one line of Markdown that shows it unchanged."""
    return _SPECIAL.sub(r"\\\1", printable(text).replace("\n", " "))


def fenced(code: str, language: str) -> str:
    """Return `code` between fences that are longer than any run of backticks in it."""
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", code))])
    return f"{fence}{language}\n{printable(code)}\n{fence}"
