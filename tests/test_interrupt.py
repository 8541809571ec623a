"""An interrupt that Python loses, since it came in a place that no exception leaves."""

import pytest
from conftest import MODULES, STUDENT, python, rollout_arguments

# A scheduler's signal while an object is being deleted, in the middle of imports.
PROGRAM = """
import os, signal, sys
from importlib import import_module

class Dying:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)

told = False

def hook(event, arguments):
    global told
    if not told and event == "import" and arguments[0] == "{module}":
        told = True
        Dying()

program = import_module("{program}")
sys.addaudithook(hook)
program.main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("program, module", [("mpd-gen", "vllm"), ("mpd-train", "mpd_train.loop")])
def test_an_interrupt_that_got_lost_is_not_forgotten(round_dir, prompts, tmp_path, program, module):
    out = tmp_path / "out"
    arguments = rollout_arguments(prompts, out)
    if program == "mpd-train":
        arguments = ["--shards", round_dir, "--student", STUDENT, "--out", out]
    text = PROGRAM.format(program=MODULES[program], module=module)
    done = python(text, *arguments, code=130)
    assert "Exception ignored in: <function Dying.__del__" in done.stderr
    assert "run the same command again" in done.stderr
    assert not list(out.glob("rollouts/*.parquet"))
    assert not (out / "model").exists()
