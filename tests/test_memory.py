"""The memory that `mpd-train --dry-run` plans with is what a training takes."""

import json
import os
import sys

import pytest
import torch
from conftest import ROOT, STUDENT, environment, finish, python

from mpd_train.config import TrainConfig
from mpd_train.dryrun.memory import MemoryPlan

MAKE = "import sys, pathlib, benchmarks.memory as m; f = pathlib.Path(sys.argv[1]);"
MAKE += "m.make_model(f / 'student', 128, 4); m.make_model(f / 'teacher', 512, 6)"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    python(MAKE, folder, env=within())
    return folder


def within():
    # So that glibc gives freed memory back at once: what is alive is measured, not what it keeps.
    return environment() | {"PYTHONPATH": str(ROOT), "MALLOC_MMAP_THRESHOLD_": "65536"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        "cached",
        "cached, compiled",
        "cached, gradient checkpointing",
        "cached, adapters",
        "cached, eager attention",
        "teacher in the process",
    ],
)
def test_the_plan_is_within_15_percent_of_the_peak(models, case):
    words = [sys.executable, ROOT / "benchmarks" / "memory.py", case, models]
    said = finish(words, env=within())
    found = json.loads(said.stdout.splitlines()[-1])
    assert found["planned"] == pytest.approx(found["measured"], rel=0.15)


def test_what_does_not_fit_is_said_with_what_to_change(tmp_path):
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    config = TrainConfig(shards=[tmp_path], student=str(STUDENT), out=tmp_path)
    cpu = torch.device("cpu")
    assert MemoryPlan(there // 4, there // 4, 0, there // 4, 0).advice(config, cpu) == []
    (said,) = MemoryPlan(there // 4, there // 2, there // 8, there // 4, 0).advice(config, cpu)
    for way in ("--gradient-checkpointing", "--pack-length", "--lora-r 64", "top K in place"):
        assert way in said
    small = TrainConfig(
        shards=[tmp_path], student=str(STUDENT), out=tmp_path, gradient_checkpointing=True,
        lora={"lora_r": 8},
    )  # fmt: skip
    (said,) = MemoryPlan(there, 0, 0, 0, 0).advice(small, cpu)
    assert said.endswith("Give more devices (torchrun).")
