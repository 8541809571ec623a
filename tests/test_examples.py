"""The examples run as shipped, and student = teacher gives no loss."""

import math
import re
import subprocess
import sys

import pytest
from conftest import ROOT, STUDENT, TEACHER, environment
from transformers import AutoModelForCausalLM


def losses_of(*arguments, example="minimal_mpd", launcher=()):
    """The loss of each step, from the example's output."""
    done = subprocess.run(
        [sys.executable, *launcher, f"examples/{example}.py", *map(str, arguments)],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    return [float(loss) for loss in re.findall(r"loss ([\d.]+) nats", done.stdout)]


@pytest.mark.slow
def test_the_minimal_example_learns():
    first, *_, last = losses_of()
    assert math.isfinite(first)
    assert 0 < last < first


@pytest.mark.slow
def test_a_student_that_is_its_own_teacher_has_no_loss():
    settings = ["--score-context", "problem", "--steps", 1, "--student", TEACHER]
    assert losses_of(*settings) == [0.0]
    (loss,) = losses_of(*settings[:-2])
    assert loss > 1e-3


@pytest.mark.slow
def test_the_loss_in_other_trainers(round_dir, tmp_path):
    """It learns, and a step has one mean over its tokens, however its rows are divided: into
    batches, among processes, by transformers' Trainer or TRL's."""

    def losses(name, rows, batches, *launcher, steps=2):
        told = ["--student", STUDENT, "--round", round_dir, "--out", tmp_path / name]
        told += ["--batch-size", rows, "--accumulation", batches, "--learning-rate", 1e-3]
        return losses_of(*told, "--steps", steps, example=name, launcher=launcher)

    first, *_, last = losses("transformers_trainer", 4, 4, steps=6)
    assert 0 < last < 0.8 * first
    two = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    assert losses("transformers_trainer", 4, 2, *two)[0] == pytest.approx(first, rel=1e-4)
    assert losses("trl_trainer", 16, 1)[0] == pytest.approx(first, rel=1e-4)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "trl_trainer")
