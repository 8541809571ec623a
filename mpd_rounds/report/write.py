"""Writes a report: report.html, report.md and data_card.md."""

from dataclasses import replace
from pathlib import Path

from mpd_data.common.errors import ConfigError
from mpd_data.common.files import atomic_file
from mpd_rounds.report.document import Document, markdown
from mpd_rounds.report.page import html_page
from mpd_rounds.report.run import open_runs
from mpd_rounds.report.sections import several, single


def write_report(paths: list[Path], out: Path | None = None) -> list[Path]:
    """The files written for the runs at `paths`; into RUN/report, or `out`.

    Raises ConfigError for what is no run, and for several without `out`; DataError for files that
    are damaged.
    """
    if out is None:
        if len(paths) > 1:
            raise ConfigError(
                "--out is needed for several runs: their report lies in none of them."
            )
        out = paths[0] / "report"
    runs = open_runs(paths)
    document = single(runs[0]) if len(runs) == 1 else several(runs)
    files = {"report.html": html_page(document), "report.md": markdown(document)}
    cards = [s for s in document.sections if s.anchor.endswith("data-card")]
    if cards:
        named = [
            replace(card, title=f"Shards of {run.label}", level=2)
            for card, run in zip(cards, runs, strict=True)
        ]
        files["data_card.md"] = markdown(Document("Data card", document.subtitle, named))
    out.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        with atomic_file(out / name, errors="backslashreplace") as file:
            file.write(text)
    return [out / name for name in files]
