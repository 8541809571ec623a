"""What is free, and what is beyond it: on figures made by hand."""

import numpy as np
import polars as pl
import pytest

from mpd_data.inspect.compare import paired
from mpd_data.inspect.frontier import frontier, is_beyond, verdict


def against(saved, gained, problems=100):
    """Paired differences from a free point: estimate, low and high of tokens saved, and of
    accuracy."""
    return {
        "token_reduction": saved[0],
        "token_reduction_interval": list(saved[1:]) or None,
        "accuracy_difference": gained[0],
        "accuracy_difference_interval": list(gained[1:]) or None,
        "problems": problems,
        "beyond": False,
    }


def test_the_frontier_is_what_nothing_dominates():
    points = {
        "base": (300, 0.50), "concise": (200, 0.49), "as long": (200, 0.40), "worse": (250, 0.45),
        "calculation": (90, 0.20), "equal": (300, 0.50), "longer": (400, 0.49),
    }  # fmt: skip
    assert frontier(points) == ["calculation", "concise", "base"]


@pytest.mark.parametrize(
    "saved, gained, expected",
    [
        ((0.3, 0.2, 0.4), (0.0, -0.01, 0.01), True),  # shorter, and as accurate
        ((0.3, 0.2, 0.4), (0.0, -0.03, 0.03), False),  # it may have lost three points
        ((0.1, -0.1, 0.3), (0.0, -0.01, 0.01), False),  # it may be longer
        ((-0.5, -0.6, -0.4), (0.2, 0.1, 0.3), True),  # longer, and right more often
        ((0.3, 0.2, 0.4), (-0.05, -0.07, -0.03), False),
        ((0.3,), (0.1,), False),  # of one problem
    ],
)
def test_beyond_needs_the_intervals(saved, gained, expected):
    assert is_beyond(against(saved, gained)) == expected


def test_intervals_of_many_problems_are_95_percent_of_a_normal_distribution():
    rng = np.random.default_rng(0)
    sides = [
        pl.DataFrame({"accuracy": rng.random(500), "tokens": rng.uniform(50, 150, 500)})
        for _ in range(2)
    ]
    found = paired(*sides)
    low, high = found["accuracy_difference_interval"]
    error = (sides[1]["accuracy"] - sides[0]["accuracy"]).std() / 500**0.5
    assert (high - low) / 2 == pytest.approx(1.96 * error, rel=0.05)
    assert (high + low) / 2 == pytest.approx(found["accuracy_difference"], abs=0.2 * error)


def test_the_verdict_names_the_strongest_point():
    base = against((0.6, 0.5, 0.7), (0.01, -0.01, 0.03))
    concise = against((0.38, 0.35, 0.41), (0.01, -0.008, 0.029))
    terse = against((-0.9, -1.0, -0.8), (0.3, 0.2, 0.4))
    points = {"base": base, "baseline concise": concise, "baseline terse": terse}
    for one in points.values():
        one["beyond"] = True
    # terse is shorter, but far less accurate than the round: concise is its rival.
    assert verdict("round 1", points) == (
        "round 1 is beyond all that is free: it uses 38% [35, 41] fewer tokens than the baseline"
        " concise; its accuracy differs by +1.0 points [-0.8, +2.9]."
    )
    concise["beyond"] = terse["beyond"] = False
    concise |= against((-0.1, -0.2, 0.02), (0.0, -0.02, 0.02), problems=12)
    assert verdict("round 1", points) == (
        "round 1 is not shown to be beyond what is free: it uses 10% [-2, 20] more tokens than"
        " the baseline concise; its accuracy differs by +0.0 points [-2.0, +2.0], nor is it beyond"
        " baseline terse. Only 12 problems: intervals of fewer than 30 problems are too narrow to"
        " rely on."
    )
    # All free points are less accurate: the most accurate is the rival.
    alone = {"base": against((-0.1, -0.2, 0.0), (0.1, 0.05, 0.15)), "baseline terse": terse}
    for one in alone.values():
        one["beyond"] = True
    assert "than the base;" in verdict("round 1", alone)
