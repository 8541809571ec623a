"""`mpd-gen compare --serve`: both models answer their rollouts' prompts again, in real engines."""

import json
import shutil

import pytest
from conftest import TEACHER, rollout_arguments, rows, run

from mpd_data.inspect.serving import show


@pytest.fixture(scope="module")
def runs(round_dir, prompts, tmp_path_factory):
    """A run with a base and a new model, whose answers are cut off after eight tokens."""
    folder = tmp_path_factory.mktemp("run")
    shutil.copytree(round_dir, folder / "eval" / "base")
    short = rollout_arguments(prompts, folder / "eval" / "new", **{"--max-tokens": 8})
    run("mpd-gen", *short)
    steps = [("round 1: train", 600.0), ("round 1: evaluate test", 9000.0)]
    lines = [{"label": label, "command": [label], "seconds": s} for label, s in steps]
    (folder / "finished.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.mark.slow
def test_what_is_served_are_the_rollouts(runs):
    sides = [runs / "eval" / name for name in ("base", "new")]
    served = json.loads(run("mpd-gen", "compare", *sides, "--serve", 16, "--json").stdout)["served"]
    for name, side in zip(("base", "new"), sides, strict=True):
        # The same seeds give the same answers, so their lengths are those of the rollouts.
        mean = rows(side)["num_completion_tokens"].mean()
        assert served[name]["tokens per answer"] == pytest.approx(mean)
        assert 0 < served[name]["seconds to an answer, median"] <= served[name]["95%"]
    base, new = (served[name]["requests per hour"] for name in ("base", "new"))
    assert new > base
    # Evaluations are no part of what a run costs.
    assert served["run_seconds"] == 600
    assert served["paid_after"] == pytest.approx(600 / (3600 / base - 3600 / new), rel=0.01)
    assert f"saved after {served['paid_after']:,} requests" in show(served)


@pytest.mark.slow
def test_rollouts_of_no_run_have_no_cost(round_dir, tmp_path):
    alone = shutil.copytree(round_dir, tmp_path / "a" / "b")
    said = run("mpd-gen", "compare", alone, alone, "--serve", 64).stdout
    assert "served on this machine" in said
    assert "The run took" not in said


def test_another_model_in_its_place_is_refused(runs, tmp_path):
    other = shutil.copytree(runs / "eval" / "new", tmp_path / "a" / "other")
    record = json.loads((other / "run.json").read_text())
    record["stages"]["rollouts"]["details"]["config"]["model"] = str(TEACHER)
    (other / "run.json").write_text(json.dumps(record))
    done = run("mpd-gen", "compare", other, other, "--serve", 4, code=1)
    assert "not the model any more that" in done.stderr
    (other / "run.json").unlink()
    done = run("mpd-gen", "compare", other, other, "--serve", 4, code=1)
    assert "no run.json" in done.stderr


def test_a_token_budget_is_not_served(runs, tmp_path):
    budget = shutil.copytree(runs / "eval" / "new", tmp_path / "a" / "budget")
    record = json.loads((budget / "run.json").read_text())
    record["stages"]["rollouts"]["details"]["config"]["token_budget"] = 5
    (budget / "run.json").write_text(json.dumps(record))
    done = run("mpd-gen", "compare", budget, budget, "--serve", 4, code=1)
    assert "sampled with --token-budget" in done.stderr
