"""The names beside the points of a plot, by geometry."""

import math
import random

import pytest
from matplotlib.figure import Figure

from mpd_rounds.report.labels import Box, Name, places, write_names

AREA = Box(0, 620, 0, 380)


def scattered(seed, count):
    """Points of a plot, some of them close to each other."""
    chance = random.Random(seed)
    names: list[Name] = []
    for _ in range(count):
        x, y = chance.uniform(30, 590), chance.uniform(30, 350)
        if names and chance.random() < 0.4:
            x, y = names[-1].x + chance.uniform(-14, 14), names[-1].y + chance.uniform(-14, 14)
        names.append(Name(x, y, chance.uniform(20, 130), 13, chance.random() < 0.5))
    return names


@pytest.mark.parametrize("seed", range(60))
def test_each_name_is_seen_to_be_that_of_its_point(seed):
    names = scattered(seed, 8)
    found = places(names, AREA)
    for index, (name, place) in enumerate(zip(names, found, strict=True)):
        box = place.box
        assert (box.right - box.left, box.top - box.bottom) == pytest.approx((name.width, 13))
        assert AREA.left <= box.left < box.right <= AREA.right
        assert AREA.bottom <= box.bottom < box.top <= AREA.top
        for other in found[:index]:
            assert not box.meets(other.box)
        for other in names:
            assert box.distance(other.x, other.y) >= 4
            if other is not name and not place.has_line:
                assert box.distance(name.x, name.y) < box.distance(other.x, other.y)
        if place.has_line:
            x, y = box.nearest(name.x, name.y)
            parts = [i / 50 for i in range(50)]
            way = [(name.x + i * (x - name.x), name.y + i * (y - name.y)) for i in parts]
            for other in found[:index]:
                assert all(other.box.distance(*at) > 0 for at in way)


def test_two_points_that_are_close_do_not_swap_their_names():
    names = [Name(100, 100, 60, 13), Name(103, 112, 60, 13)]
    first, second = places(names, AREA)
    for place, own, other in ((first, *names), (second, *reversed(names))):
        nearer = place.box.distance(own.x, own.y) < place.box.distance(other.x, other.y)
        assert nearer or place.has_line


def test_where_there_is_no_room_a_name_still_stands_somewhere():
    crowd = [Name(50 + i, 50, 90, 13) for i in range(30)]
    assert len(places(crowd, Box(0, 100, 0, 100))) == 30
    (alone,) = places([Name(50, 50, 200, 13)], Box(0, 100, 0, 100))
    assert alone.box.right - alone.box.left == 200


def test_names_are_written_where_they_were_placed():
    figure = Figure(figsize=(6, 4), layout="constrained", dpi=72)
    axes = figure.add_subplot()
    points = [("one", 1.0, 1.0), ("two", 1.02, 1.03), ("three", 3.0, 2.0)]
    for _, x, y in points:
        axes.plot(x, y, "o")
    axes.margins(0.2)
    write_names(axes, [(*point, "#000000", False) for point in points], "#ffffff")
    figure.draw_without_rendering()
    texts = {text.get_text(): text.get_window_extent() for text in axes.texts}
    assert texts.keys() == {"one", "two", "three"}
    assert not texts["one"].overlaps(texts["two"])
    for name, x, y in points:
        px, py = axes.transData.transform((x, y))
        box = texts[name]
        near = min(max(px, box.x0), box.x1), min(max(py, box.y0), box.y1)
        has_line = any(line.get_linewidth() == 0.8 for line in axes.lines)
        assert math.dist(near, (px, py)) < (80 if has_line else 20)
