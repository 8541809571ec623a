"""Names beside the points of a plot, so that it is clear whose each name is.

A name covers no point and no other name. Beside its point it is nearer to it than to any other
point; further away a thin line leads to it.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

_MARKER = 6.0  # half the size of a marker, in pixels
_GAP = 9.0  # between the middle of a point and a name beside it, in pixels
_STEP = 15.0  # by which a name moves away


class Box(NamedTuple):
    """A rectangle in pixels, y upwards."""

    left: float
    right: float
    bottom: float
    top: float

    def meets(self, other: "Box") -> bool:
        return (
            self.left < other.right and other.left < self.right
            and self.bottom < other.top and other.bottom < self.top
        )  # fmt: skip

    def nearest(self, x: float, y: float) -> tuple[float, float]:
        """Return the point of the box that is nearest to (x, y)."""
        return min(max(x, self.left), self.right), min(max(y, self.bottom), self.top)

    def distance(self, x: float, y: float) -> float:
        return math.dist(self.nearest(x, y), (x, y))


@dataclass(frozen=True)
class Name:
    """A text of `width` by `height` pixels for the point at (x, y). `below`: it stands rather
    below its point than above."""

    x: float
    y: float
    width: float
    height: float
    below: bool = False


@dataclass(frozen=True)
class Place:
    """Where a name stands, and whether a line leads to its point."""

    box: Box
    has_line: bool


def places(names: Sequence[Name], area: Box) -> list[Place]:
    """Return a place inside `area` for each name, in their order. Where there is no room, a name
    stands where it meets the fewest others."""
    markers = [Box(n.x - _MARKER, n.x + _MARKER, n.y - _MARKER, n.y + _MARKER) for n in names]
    placed: list[Place] = []
    for name in names:
        taken = [*markers, *(place.box for place in placed)]
        found = []
        for candidate in _candidates(name):
            box = candidate.box
            if (
                box.left < area.left or box.right > area.right
                or box.bottom < area.bottom or box.top > area.top
            ):  # fmt: skip
                continue
            faults = sum(map(box.meets, taken))
            if candidate.has_line:
                # Markers that cover the point cover the beginning of each line from it.
                rest = [one for one in taken if one.distance(name.x, name.y) > 0]
                faults += sum(_crosses(name, box, one) for one in rest)
            else:
                own = box.distance(name.x, name.y)
                faults += any(box.distance(n.x, n.y) <= own for n in names if n is not name)
            found.append((faults, candidate))
            if not faults:
                break
        # A name that is wider than the plot has no place inside.
        best = min(found, key=lambda each: each[0], default=(0, next(_candidates(name))))
        placed.append(best[1])
    return placed


def _candidates(name: Name) -> Iterator[Place]:
    """Yield where a name may stand, the nearest places first."""
    for away, aside in itertools.product(range(6), (0, 2, 6)):
        if aside and not away:
            continue
        high = name.y + 0.5 * _GAP + _STEP * away
        low = name.y - 0.5 * _GAP - name.height - _STEP * away
        for bottom in (low, high) if name.below else (high, low):
            for left in (
                name.x + _GAP + _STEP * aside,
                name.x - _GAP - _STEP * aside - name.width,
            ):
                box = Box(left, left + name.width, bottom, bottom + name.height)
                yield Place(box, has_line=away > 0)


def _crosses(name: Name, box: Box, other: Box) -> bool:
    """Return whether the line from the point of a name to its `box` meets `other`."""
    x, y = box.nearest(name.x, name.y)
    steps = max(int(math.dist((x, y), (name.x, name.y))), 1)
    between = [
        (name.x + (x - name.x) * i / steps, name.y + (y - name.y) * i / steps) for i in range(steps)
    ]
    return any(other.distance(*each) == 0 for each in between)


def write_names(
    axes: Any, named: Sequence[tuple[str, float, float, str, bool]], behind: str
) -> None:
    """Write the names of points, given as text, x, y, colour and whether it stands rather below.
    Call it when the plot has all else. `behind`: the colour of the paper."""
    figure = axes.figure
    figure.draw_without_rendering()
    area = Box(axes.bbox.x0, axes.bbox.x1, axes.bbox.y0, axes.bbox.y1)
    texts = [
        axes.annotate(
            text, (x, y), xytext=(0, 0), textcoords="offset pixels", ha="left", va="bottom",
            color=colour, fontweight="bold", zorder=5, annotation_clip=False,
            bbox={"facecolor": behind, "edgecolor": "none", "pad": 0.5, "alpha": 0.75},
        )
        for text, x, y, colour, _ in named
    ]  # fmt: skip
    names = []
    for text, (_, x, y, _, below) in zip(texts, named, strict=True):
        extent = text.get_window_extent()
        across, up = axes.transData.transform((x, y))
        names.append(Name(across, up, extent.width, extent.height, below))
    for text, name, place, (_, x, y, colour, _) in zip(
        texts, names, places(names, area), named, strict=True
    ):
        text.set_position((place.box.left - name.x, place.box.bottom - name.y))
        if place.has_line:
            end = axes.transData.inverted().transform(place.box.nearest(name.x, name.y))
            axes.plot(
                (x, end[0]), (y, end[1]), color=colour, linewidth=0.8, alpha=0.7, zorder=2.5,
                scalex=False, scaley=False,
            )  # fmt: skip
