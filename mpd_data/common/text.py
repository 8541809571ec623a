"""Format plain-text tables and histograms, and JSON.

Cells are data: control characters are escaped, and no markup is interpreted.
"""

import json
import math
import sys
from itertools import accumulate
from typing import Any

_COLUMNS = 80
_NARROWEST_BAR, _WIDEST_BAR = 9, 40
_EIGHTHS = ("", "▏", "▎", "▍", "▌", "▋", "▊", "▉")


def plain(value: Any) -> str:
    """Return a cell's text: numbers rounded, None as a dash, control characters escaped."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) < 10 else f"{value:,.1f}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in str(value))


def plain_lines(text: str) -> str:
    """Return text for a terminal: line breaks stay, other control characters are escaped."""
    return "\n".join(plain(line) for line in text.split("\n"))


def json_text(value: Any) -> str:
    """Return what a --json option prints. A number that is not finite is null, as JSON requires:
    a damaged cell makes such a mean."""
    return json.dumps(_finite(value), indent=2, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def format_table(rows: list[dict[str, Any]], most_columns: int = sys.maxsize) -> str:
    """Return rows with the same keys as aligned columns, numbers aligned to the right. A table with
    more than `most_columns` letters in a line becomes a block of lines for each row."""
    columns = []
    for name in rows[0]:
        values = [row[name] for row in rows]
        head, *cells = (plain(value) for value in (name, *values))
        width = max(map(len, (head, *cells)))
        is_number = all(isinstance(value, int | float | None) for value in values)
        lines = [head, "-" * width, *cells]
        columns.append([x.rjust(width) if is_number else x.ljust(width) for x in lines])
    table = ["  ".join(line).rstrip() for line in zip(*columns, strict=True)]
    if max(map(len, table)) <= most_columns:
        return "\n".join(table)
    return "\n\n".join(_block(row, most_columns) for row in rows)


def _block(row: dict[str, Any], most_columns: int) -> str:
    """Return a row as its first value and, indented, the names and values of the others."""
    first, *others = row.items()
    lines = [plain(first[1])]
    for name, value in others:
        if value is None:
            continue
        cell = f"{plain(name)}: {plain(value)}"
        if len(lines) > 1 and len(lines[-1]) + 3 + len(cell) <= most_columns:
            lines[-1] += f"   {cell}"
        else:
            lines.append(f"  {cell}")
    return "\n".join(lines)


def format_histogram(rows: list[dict[str, Any]]) -> str:
    """Return `stats.trace_lengths` as bars, one line per bin. Folders are side by side, as many as
    fit 80 columns, and the others below; all have one scale. `*` marks the bin of the median."""
    folders = list(dict.fromkeys(row["folder"] for row in rows))
    bins = [row for row in rows if row["folder"] == folders[0]]
    labels = ["tokens"] + [
        f"{row['from']:,}+" if row["below"] is None else f"{row['from']:,}-{row['below'] - 1:,}"
        for row in bins
    ]
    margin = max(map(len, labels))
    # A column is two spaces, the share, the mark and the bar.
    fit = (_COLUMNS - margin) // (7 + _NARROWEST_BAR)
    blocks = -(-len(folders) // fit)
    fit = -(-len(folders) // blocks)
    width = min((_COLUMNS - margin) // fit - 7, _WIDEST_BAR)
    tallest = max(row["share"] for row in rows)
    by_folder = {name: [row for row in rows if row["folder"] == name] for name in folders}
    columns = [_bars(name, its_bins, width, tallest) for name, its_bins in by_folder.items()]
    lines = []
    for first in range(0, len(columns), fit):
        block = zip(labels, *columns[first : first + fit], strict=True)
        lines += ["  ".join([label.rjust(margin), *cells]).rstrip() for label, *cells in block]
        lines.append("")
    return "\n".join([*lines, "fraction of the samples; * marks the bin of the median"])


def _bars(folder: str, bins: list[dict[str, Any]], width: int, tallest: float) -> list[str]:
    """Return a folder's column of the histogram: its name, then share, mark and bar of each bin."""
    name = plain(folder)
    # The end of a path tells folders apart.
    cells = [name if len(name) <= width + 5 else f"…{name[-(width + 4) :]}"]
    reached = list(accumulate(row["samples"] for row in bins))
    median = next(i for i, samples in enumerate(reached) if samples > reached[-1] // 2)
    for index, row in enumerate(bins):
        share = "<1%" if row["share"] < 0.005 else f"{row['share']:.0%}"
        share = share if row["samples"] else ""
        eighths = max(round(8 * width * row["share"] / tallest), row["samples"] > 0)
        bar = "█" * (eighths // 8) + _EIGHTHS[eighths % 8]
        cells.append(f"{share:>4}{'*' if index == median else ' '}{bar}")
    return [cell.ljust(width + 5) for cell in cells]
