"""Plain-text tables. Cells are data: control characters in them are shown, never sent to the
terminal, and no markup is interpreted."""

from typing import Any


def plain(value: Any) -> str:
    """A cell's text: numbers rounded for people, None as a dash, control characters escaped."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) < 10 else f"{value:,.1f}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in str(value))


def plain_lines(text: str) -> str:
    """Text for a terminal: its line breaks stay, other control characters are escaped."""
    return "\n".join(plain(line) for line in text.split("\n"))


def format_table(rows: list[dict[str, Any]]) -> str:
    """Rows with the same keys as aligned columns, numbers to the right."""
    header = list(rows[0])
    cells = [[plain(row[name]) for name in header] for row in rows]
    widths = [max(len(line[i]) for line in [header, *cells]) for i in range(len(header))]
    right = [
        all(isinstance(row[name], int | float) or row[name] is None for row in rows)
        for name in header
    ]
    lines = [
        "  ".join(
            text.rjust(width) if to_right else text.ljust(width)
            for text, width, to_right in zip(line, widths, right, strict=True)
        ).rstrip()
        for line in [header, *cells]
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)
