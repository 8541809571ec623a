"""Programs of the tests are forks of one process, or each would take 15 seconds to import."""

import pytest
from conftest import ROOT, command, environment, finish, python

STRICT = {"MPD_NURSERY_STRICT": "1"}


@pytest.mark.slow
def test_what_an_engine_left_behind_is_no_reason_for_a_fresh_python(prompts, tmp_path):
    source = """
        import sys
        from pathlib import Path
        sys.path.insert(0, sys.argv[1])
        from conftest import command, environment, finish, invoke, rollout_arguments
        from mpd_data.cli import cli

        finish(command("mpd-gen", "--version"))  # starts the nursery
        few = {"-n": 1, "--num-prompts": 1, "--max-tokens": 4}
        invoke(cli, *rollout_arguments(Path(sys.argv[2]), Path(sys.argv[3]), **few))
        finish(command("mpd-gen", "--version"), env=environment())
    """
    python(
        source, str(ROOT / "tests"), str(prompts), str(tmp_path / "out"), env=environment() | STRICT
    )


def test_what_imports_read_is_a_reason():
    changed = STRICT | {"HF_HUB_OFFLINE": "0"}
    done = finish(command("mpd-gen", "--version"), code=1, env=environment() | changed)
    assert "HF_HUB_OFFLINE" in done.stderr
