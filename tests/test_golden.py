"""The trainer reproduces recorded curves, unless a change alters its numbers on purpose."""

import json

import pytest
from golden import FOLDER, RUNS, curve


@pytest.mark.parametrize("name", RUNS)
def test_the_curve_is_the_one_on_record(name, tmp_path):
    expected = json.loads((FOLDER / "curves.json").read_text(encoding="utf-8"))[name]
    steps = curve(name, tmp_path / "run")
    assert len(steps) == len(expected)
    for step, (now, then) in enumerate(zip(steps, expected, strict=True), start=1):
        # Another CPU rounds differently, and the differences add up over the steps.
        assert now == pytest.approx(then, rel=1e-3, abs=1e-6), f"step {step}"
