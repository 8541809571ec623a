"""The plots of a report, as SVG for the HTML page.

Colours become CSS variables, and text stays text in the page's font, so that a plot follows the
page: light, dark, or on paper. Labels are data: they are never read as mathematics, and markup in
them is escaped.
"""

import hashlib
import io
import itertools
import math
import re
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter, ScalarFormatter, StrMethodFormatter

from mpd_rounds.report.labels import write_names
from mpd_rounds.report.queries import Histogram, LengthCounts

# Placeholders that the page replaces by its own colours. Each is used for nothing else.
INK, MUTED, GRID, PAPER = "#1a1d21", "#5c636b", "#d9dde2", "#fefefe"
BASE_COLOUR, ACCENT = "#7d8590", "#1f5fa8"
SERIES = ("#1f5fa8", "#b4531a", "#2c7a4b", "#7546a3", "#a8274f", "#0f7681")
VARIABLES = {
    INK: "--ink",
    MUTED: "--muted",
    GRID: "--line",
    PAPER: "--paper",
    BASE_COLOUR: "--base",
    **{colour: f"--series-{i}" for i, colour in enumerate(SERIES)},
}
MOST_POINTS = 300
BASELINE = "baseline "  # how the names of baselines begin
_SETTINGS = {
    "svg.fonttype": "none",
    "svg.hashsalt": "mpd-report",
    "text.parse_math": False,
    "axes.unicode_minus": True,
    "font.family": "DejaVu Sans",
    "font.size": 11,
    "axes.titlesize": 12.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.titlecolor": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "text.color": INK,
    "figure.facecolor": "none",
    "figure.dpi": 72,
    "lines.solid_capstyle": "round",
}


# Sizes of a plot that stands alone, and of one among others, in pixels.
_WIDE, _NARROW = (620, 380), (360, 300)


@dataclass(frozen=True)
class Point:
    """A model on an evaluation set, with the bounds of its 95% intervals."""

    label: str
    tokens: float
    tokens_bounds: tuple[float, float]
    accuracy: float
    accuracy_bounds: tuple[float, float]


def _draw(width: float, height: float, draw: Any) -> str:
    """Return an SVG of `width` by `height` pixels. `draw` gets the figure."""
    with matplotlib.rc_context(_SETTINGS):
        figure = Figure(figsize=(width / 72, height / 72), layout="constrained")
        draw(figure)
        buffer = io.StringIO()
        metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", metadata=metadata)
    return _for_the_page(buffer.getvalue())


def _for_the_page(svg: str) -> str:
    """Return the `svg` element alone, with the page's colours and font. A hash of its content is
    put before its identifiers, because several plots share one page."""
    svg = svg[svg.index("<svg") :].strip()
    # A style would be the page's too.
    left_out = r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->"
    svg = re.sub(left_out, "", svg, flags=re.DOTALL)
    width, height = re.findall(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)[0]
    opening = f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
    svg = opening + svg[svg.index(">") + 1 :]
    own = hashlib.sha256(svg.encode()).hexdigest()[:8]
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{own}-", svg)
    svg = re.sub(r"font: ([^;\"]*?)([\d.]+px) [^;\"]+", r"font: \1\2 var(--sans)", svg)
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    return svg


def _counts(axis: Any) -> None:
    axis.set_major_locator(MaxNLocator(5, integer=True))
    axis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))


def pareto(title: str, lines: dict[str, list[Point]], wide: bool) -> str:
    """Return a plot of accuracy against mean tokens, with intervals. Each line of points is a run;
    its first point is the base."""
    size = _WIDE if wide else _NARROW

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        axes.grid(True)
        named: list[tuple[str, Point, str]] = []
        for (label, points), colour in zip(lines.items(), itertools.cycle(SERIES), strict=False):
            x, y = [p.tokens for p in points], [p.accuracy for p in points]
            axes.plot(x, y, color=colour, linewidth=1.2, alpha=0.5, zorder=2)
            for index, point in enumerate(points):
                is_base = point.label == "base"
                shade = BASE_COLOUR if is_base and len(lines) == 1 else colour
                _cross(axes, point, shade, hollow=is_base)
                if len(lines) == 1 or index == len(points) - 1:
                    name = point.label if len(lines) == 1 else label
                    named.append((name, point, MUTED if is_base else shade))
        _finish(axes, title, named)

    return _draw(*size, draw)


def frontier(
    title: str, free: list[Point], line: list[str], models: list[Point], wide: bool
) -> str:
    """Return a plot of accuracy against mean tokens: the `free` points, hollow, of which the base
    is the first, with a line through those named in `line`, from the shortest; and `models`."""
    size = _WIDE if wide else _NARROW
    colour, own = SERIES[1], SERIES[0]

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        axes.grid(True)
        by_name = {point.label: point for point in free}
        x, y = zip(*((by_name[n].tokens, by_name[n].accuracy) for n in line), strict=True)
        axes.plot(x, y, color=colour, linewidth=1.6, linestyle=(0, (4, 2)), zorder=2)
        way = [free[0], *models]
        x, y = zip(*((point.tokens, point.accuracy) for point in way), strict=True)
        axes.plot(x, y, color=own, linewidth=1.2, alpha=0.5, zorder=2)
        named: list[tuple[str, Point, str]] = []
        for point in models:
            _cross(axes, point, own, hollow=False)
            named.append((point.label, point, own))
        for index, point in enumerate(free):
            _cross(axes, point, BASE_COLOUR if index == 0 else colour, hollow=True)
            shade = MUTED if index == 0 else colour
            named.append((point.label.removeprefix(BASELINE), point, shade))
        _finish(axes, title, named)

    return _draw(*size, draw)


def _finish(axes: Any, title: str, named: list[tuple[str, Point, str]]) -> None:
    """Write the title, the axes' labels and the names of points. The frontier rises through the
    baselines, so there is more room below them."""
    axes.margins(x=0.16, y=0.14)
    axes.set_title(title)
    axes.set_xlabel("mean tokens per trace")
    axes.set_ylabel("accuracy")
    _counts(axes.xaxis)
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0 if high - low > 0.06 else 1))
    write_names(
        axes,
        [
            (text, point.tokens, point.accuracy, colour, point.label.startswith(BASELINE))
            for text, point, colour in named
        ],
        PAPER,
    )


def _cross(axes: Any, point: Point, colour: str, hollow: bool) -> None:
    thin = {"color": colour, "linewidth": 1.4, "alpha": 0.55, "zorder": 3}
    axes.hlines(point.accuracy, *point.tokens_bounds, **thin)
    axes.vlines(point.tokens, *point.accuracy_bounds, **thin)
    fill = PAPER if hollow else colour
    axes.plot(point.tokens, point.accuracy, marker="o", markersize=6.5, color=colour,
              markerfacecolor=fill, markeredgewidth=1.6, zorder=4)  # fmt: skip


def lengths(title: str, panels: dict[str, dict[str, tuple[LengthCounts, Histogram]]]) -> str:
    """Return distributions of trace lengths in panels, one above the other on one axis. The first
    of two in a panel is grey. Lines mark mean and median, a triangle the 95th percentile."""
    rows = len(panels)

    def draw(figure: Any) -> None:
        grid = figure.subplots(rows, 1, sharex=True, sharey=True, squeeze=False)[:, 0]
        top = max(max(h.shares) for panel in panels.values() for _, h in panel.values())
        for index, (axes, (label, panel)) in enumerate(zip(grid, panels.items(), strict=True)):
            alone = len(panel) == 1
            for place, (name, (counts, histogram)) in enumerate(panel.items()):
                grey = label == "base" if alone else place == 0
                colour = BASE_COLOUR if grey else ACCENT
                axes.stairs(histogram.shares, histogram.edges, fill=True, color=colour, alpha=0.22)
                axes.stairs(histogram.shares, histogram.edges, color=colour, linewidth=1.3)
                median, p95 = counts.quantile(0.5), counts.quantile(0.95)
                for x, dashes in ((counts.mean, "solid"), (median, (0, (2, 2)))):
                    axes.vlines(x, 0, 1.12 * top, color=colour, linewidth=1.3, linestyle=dashes)
                x = min(p95, histogram.edges[-1])
                axes.plot(x, 0, marker="^", color=colour, markersize=6, clip_on=False, zorder=5)
                text = "" if alone else f"{name}: "
                text += f"mean {counts.mean_text} · median {median:,} · 95% ≤ {p95:,}"
                shade = MUTED if grey else colour
                axes.text(0.995, 0.97 - 0.2 * place, text, transform=axes.transAxes, ha="right",
                          va="top", color=shade, fontsize=10)  # fmt: skip
            axes.set_ylabel(label, rotation=0, ha="right", va="center", color=INK)
            axes.set_ylim(0, (1.3 + 0.2 * len(panel)) * top)
            axes.set_yticks([])
            axes.spines["left"].set_visible(False)
            axes.tick_params(axis="x", length=3 if index == rows - 1 else 0)
        grid[0].set_title(title)
        grid[-1].set_xlabel("tokens per trace (the last bin holds all longer ones)")
        _counts(grid[-1].xaxis)

    return _draw(440, 66 + (74 + 14 * max(map(len, panels.values()))) * rows, draw)


def curves(title: str, rounds: dict[str, dict[str, list[tuple[int, float]]]]) -> str:
    """Return a plot of the trainings, rounds one after another. `rounds` has the series of each
    round (name -> points of step and value); each series has its colour."""
    names = dict.fromkeys(name for series in rounds.values() for name in series)
    colours = dict(zip(names, itertools.cycle(SERIES), strict=False))

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        axes.grid(True, axis="y")
        start = 0
        for label, series in rounds.items():
            steps = max(step for points in series.values() for step, _ in points)
            for name, points in series.items():
                x, y = thinned(points)
                marker = "o" if len(points) <= 40 else None
                axes.plot(start + x, y, color=colours[name], linewidth=1.5, marker=marker,
                          markersize=2.6)  # fmt: skip
            if len(rounds) > 1:
                if start:
                    axes.axvline(start + 0.5, color=MUTED, linewidth=0.8, linestyle=(0, (3, 3)))
                middle, place = start + 0.5 + steps / 2, axes.get_xaxis_transform()
                axes.text(middle, 1.0, label, transform=place, ha="center", va="bottom",
                          color=MUTED, fontsize=10)  # fmt: skip
            start += steps
        if len(names) > 1:
            for name, colour in colours.items():
                axes.plot([], [], color=colour, linewidth=2.5, label=name)
            axes.legend(frameon=False, fontsize=10, loc="best", handlelength=1.2, borderaxespad=0.2,
                        labelcolor=INK)  # fmt: skip
        axes.set_title(title, pad=20 if len(rounds) > 1 else 10)
        axes.set_xlabel("optimiser step")
        axes.set_xlim(0.5 if start < 40 else 0, start + 0.5)
        _counts(axes.xaxis)
        _numbers(axes.yaxis, max(abs(bound) for bound in axes.get_ylim()))

    return _draw(350, 235, draw)


def _numbers(axis: Any, largest: float) -> None:
    """Write tick labels in full. Matplotlib would move a common offset to a corner."""
    axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    if largest >= 1000:
        axis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    elif largest < 1e-3:
        axis.set_major_formatter(StrMethodFormatter("{x:.2g}"))
    else:
        axis.set_major_formatter(ScalarFormatter(useOffset=False))


def thinned(points: list[tuple[int, float]]) -> tuple[Any, Any]:
    """Return the steps and values of a series, at most MOST_POINTS of each: means of neighbouring
    points. Values that are not finite are gaps."""
    steps = np.array([step for step, _ in points], dtype=float)
    values = np.array([v if math.isfinite(v) else np.nan for _, v in points], dtype=float)
    if len(points) <= MOST_POINTS:
        return steps, values
    edges = np.linspace(0, len(points), MOST_POINTS + 1).astype(int)
    sizes = np.diff(edges)
    return np.add.reduceat(steps, edges[:-1]) / sizes, np.add.reduceat(values, edges[:-1]) / sizes
