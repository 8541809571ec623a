"""The example runs as shipped, and student = teacher gives it no loss."""

import math
import re
import subprocess
import sys

from conftest import ROOT, TEACHER, environment


def losses_of(*arguments):
    """The loss of each step, from the example's output."""
    done = subprocess.run(
        [sys.executable, "examples/minimal_mpd.py", *map(str, arguments)],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    return [float(loss) for loss in re.findall(r"loss ([\d.]+) nats", done.stdout)]


def test_the_minimal_example_learns():
    first, *_, last = losses_of()
    assert math.isfinite(first)
    assert 0 < last < first


def test_a_student_that_is_its_own_teacher_has_no_loss():
    settings = ["--score-context", "problem", "--steps", 1, "--student", TEACHER]
    assert losses_of(*settings) == [0.0]
    (loss,) = losses_of(*settings[:-2])
    assert loss > 1e-3
