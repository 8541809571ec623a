"""Programs of the tests are forks of one process, or each would take 15 seconds to import."""

import pytest
from conftest import command, environment, finish, invoke, rollout_arguments

from mpd_data.cli import cli


@pytest.fixture(scope="module")
def after_an_engine(prompts, tmp_path_factory, nursery):
    """Run an engine in this process, which leaves variables to the programs that follow."""
    few = {"-n": 1, "--num-prompts": 1, "--max-tokens": 4}
    invoke(cli, *rollout_arguments(prompts, tmp_path_factory.mktemp("engine") / "out", **few))


def test_what_an_engine_left_behind_is_no_reason_for_a_fresh_python(after_an_engine):
    finish(command("mpd-gen", "--version"), env=environment() | {"MPD_NURSERY_STRICT": "1"})


def test_what_imports_read_is_a_reason(after_an_engine):
    changed = {"MPD_NURSERY_STRICT": "1", "HF_HUB_OFFLINE": "0"}
    done = finish(command("mpd-gen", "--version"), code=1, env=environment() | changed)
    assert "HF_HUB_OFFLINE" in done.stderr
