"""A change that should not alter the trainer's numbers reproduces these curves."""

import json

import pytest
from golden import FOLDER, RUNS, curve


@pytest.mark.parametrize("name", RUNS)
def test_the_curve_is_the_one_on_record(name, tmp_path):
    expected = json.loads((FOLDER / "curves.json").read_text(encoding="utf-8"))[name]
    found = curve(name, tmp_path / "run")
    assert len(found) == len(expected)
    for step, (now, then) in enumerate(zip(found, expected, strict=True), start=1):
        # Another CPU rounds differently, and steps add up.
        assert now == pytest.approx(then, rel=1e-3, abs=1e-6), f"step {step}"
