"""The gate: its error rates by simulation, its decisions on made rounds, and a real pipeline."""

import json
import re
import shutil
from statistics import NormalDist

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, invoke, run, small_pocket

from mpd_data.common.errors import ConfigError
from mpd_data.inspect.frontier import judge
from mpd_data.store.schema import METADATA_KEY, ROLLOUT_SCHEMA, SCHEMA_VERSION
from mpd_rounds import cli
from mpd_rounds.report.cli import cli as report
from mpd_rounds.run import gate
from mpd_rounds.run.layout import Plan
from mpd_rounds.run.steps import Gate, load_pipeline
from mpd_rounds.study.study import Planner, load_study

LOOKS, ALPHA = 3, 0.05


def differences(rng, base, chances, samples):
    """Return each problem's difference of simulated rounds from simulated bases."""
    return rng.binomial(samples, chances) / samples - base


@pytest.mark.parametrize("problems, samples, mean", [(300, 4, 0.8), (600, 2, 0.93), (120, 4, 0.6)])
@pytest.mark.parametrize("is_lost_whole", [False, True], ids=["a little each", "some altogether"])
def test_a_loss_of_the_margin_passes_no_look_too_often(problems, samples, mean, is_lost_whole):
    """Three students in a row lose just the margin, each compared with the same base."""
    rng, margin, runs = np.random.default_rng(0), 0.05, 4000
    chances = rng.beta(mean, 1 - mean, (runs, problems))
    base = rng.binomial(samples, chances) / samples
    accepted, refused = np.zeros(runs, bool), np.zeros(runs, bool)
    for _ in range(LOOKS):
        if is_lost_whole:
            now = np.where(rng.random(chances.shape) < margin / mean, 0, chances)
        else:
            now = chances * (1 - margin / mean)
        sums = differences(rng, base, now, samples)
        low, high = gate.bounds(sums, np.ones(problems), ALPHA / LOOKS)
        accepted |= low > -margin
        refused |= high < -margin
    allowed = ALPHA + 2.5 * (ALPHA * (1 - ALPHA) / runs) ** 0.5
    assert 0.002 < accepted.mean() < allowed
    assert refused.mean() < allowed


def test_as_many_problems_as_needed_accept_four_of_five_equal_students():
    rng, margin, samples, level = np.random.default_rng(1), 0.03, 4, ALPHA / LOOKS
    chances = rng.beta(0.7, 0.3, 200_000)
    variance = (2 * chances * (1 - chances)).mean() / samples
    needed = gate.problems_needed(variance, margin, level)
    chosen = rng.choice(chances, (3000, needed))
    sums = differences(rng, rng.binomial(samples, chosen) / samples, chosen, samples)
    low, _ = gate.bounds(sums, np.ones(needed), level)
    assert (low > -margin).mean() == pytest.approx(gate.POWER, abs=0.03)
    assert gate.spread(sums[0], np.ones(needed)) == pytest.approx(variance, rel=0.3)
    # Problems that never change need as many as the two that are added allow.
    quantiles = NormalDist().inv_cdf(1 - level) + NormalDist().inv_cdf(gate.POWER)
    assert gate.problems_needed(0, margin, level) == pytest.approx(
        quantiles * 2**0.5 / margin - 2, abs=1
    )


def test_a_problem_that_one_half_chose_counts_as_half():
    shares = np.array(100 * [1.0, 0.5])
    whole = np.ones(150)
    for difference in (-0.4, 0.3):
        some = gate.bounds(difference * shares, shares, 0.05)
        all_ = gate.bounds(difference * whole, whole, 0.05)
        assert np.allclose(some, all_, atol=1e-3)
        assert gate.spread(difference * shares, shares) == pytest.approx(0, abs=1e-12)


# -- decisions on made rounds ----------------------------------------------------------------------

PIPELINE = """
name = "made"
student = "STUDENT"
teacher = "t"
rounds = 3
[rollouts]
prompts = ["p.jsonl"]
[gate]
margin = 0.1
[[evaluation]]
name = "test"
rollouts = { prompts = ["p.jsonl"], answer_column = "a", num_samples = 4 }
[[baseline]]
kind = "concise"
"""


def make(folder, chances, tokens=100, samples=4, seed=0):
    """Write an evaluation: a problem for each of `chances`, at which each sample is right; None: it
    has no gold answer."""
    rng = np.random.default_rng(seed)
    rows = []
    for i, chance in enumerate(chances):
        right = rng.random(samples) < (chance or 0)
        for j in range(samples):
            row = dict.fromkeys(ROLLOUT_SCHEMA.names)
            row |= {"row_id": f"{i}-{j}", "prompt_id": f"p{i:03}", "round": 0, "sample_idx": j}
            row |= {
                "num_completion_tokens": tokens,
                "is_correct": None if chance is None else bool(right[j]),
            }
            rows.append(row | {"finish_reason": "stop"})
    metadata = {METADATA_KEY: json.dumps({"schema_version": SCHEMA_VERSION})}
    schema = pa.schema([field.with_nullable(True) for field in ROLLOUT_SCHEMA], metadata)
    (folder / "rollouts").mkdir(parents=True)
    pq.write_table(
        pa.Table.from_pylist(rows, schema=schema), folder / "rollouts/part-00000.parquet"
    )


EASY, HARD = [1.0, 0.75, 1.0, 1.0], [0.25, 0.5]
BASE = 40 * (EASY + HARD)


@pytest.fixture
def plan(tmp_path):
    path = tmp_path / "made.toml"
    path.write_text(PIPELINE)
    plan = Plan(load_pipeline(path, ()), tmp_path / "out")
    make(plan.evaluation(0, "test"), BASE)
    return plan


def decided(plan, chances, round_=1, **changed):
    folder = plan.evaluation(round_, "test")
    shutil.rmtree(folder, ignore_errors=True)
    make(folder, chances, tokens=50, seed=round_)
    return gate.decide(plan, plan.pipeline.gate.model_copy(update=changed), round_)


def test_a_round_is_accepted_refused_or_undecided(plan):
    same = decided(plan, BASE)
    assert (same.outcome, same.goes_on, same.level) == ("accepted", True, pytest.approx(0.05 / 3))
    assert same.token_reduction == 0.5
    whole, hard = same.findings
    assert whole.problems == 240 and abs(whole.difference) < 0.05
    assert (whole.margin, hard.margin) == (0.1, pytest.approx(0.1 * 3**0.5))
    # Hard by the samples that did not choose it: an equal student neither gains nor loses there.
    assert 80 <= hard.problems <= 160
    assert abs(hard.difference) < 0.07

    # Lost on the hard problems alone: a fifth of the mean, within the margin of all of them.
    lost = decided(plan, 40 * [*EASY, 0.0, 0.0], margin=0.3, hard_margin=0.1)
    assert [finding.outcome for finding in lost.findings] == ["accepted", "refused"]
    assert (lost.outcome, lost.goes_on) == ("refused", False)
    assert "on the hard third more than 10.0 points" in lost.why and "all problems" not in lost.why
    assert decided(plan, [0.0] * 240, undecided="continue").goes_on is False

    unsure = decided(plan, BASE, margin=0.001)
    assert (unsure.outcome, unsure.goes_on) == ("undecided", False)
    needed = max(finding.needed for finding in unsure.findings)
    assert needed > 240 and f"{needed:,} problems accept 80%" in unsure.why
    assert decided(plan, BASE, margin=0.001, undecided="continue").goes_on is True
    # One level for each planned look.
    assert whole.low < decided(plan, BASE, alpha=0.3).findings[0].low


def test_problems_without_gold_answers_are_left_out(plan):
    whole = decided(plan, BASE)
    shutil.rmtree(plan.evaluation(0, "test"))
    make(plan.evaluation(0, "test"), [*BASE, None, None])
    found = decided(plan, [*BASE, None, None])
    assert (found.problems, whole.problems) == (242, 240)
    assert [f.problems for f in found.findings] == [f.problems for f in whole.findings]
    assert [f.difference for f in found.findings] == [f.difference for f in whole.findings]
    shutil.rmtree(plan.evaluation(0, "test"))
    make(plan.evaluation(0, "test"), [None] * 5)
    with pytest.raises(ConfigError, match="needs problems with gold answers"):
        decided(plan, [None] * 5)


def test_problems_of_many_looks_are_the_same(plan):
    make(plan.evaluation(1, "test"), BASE[:-1])
    with pytest.raises(ConfigError, match="share 239"):
        gate.decide(plan, Gate(), 1)


def test_the_variance_of_an_equal_student_is_had_from_the_base(plan):
    """Rates of four samples are nearer to 0 and 1 than the chances behind them."""
    chances = np.random.default_rng(5).uniform(0.2, 0.8, 3000)
    shutil.rmtree(plan.evaluation(0, "test"))
    make(plan.evaluation(0, "test"), chances)
    variance = (2 * chances * (1 - chances)).mean() / 4
    expected = gate.problems_needed(variance, 0.1, 0.05 / 3)
    said = gate.size_note(plan, plan.pipeline.gate, 3000, 4, is_measured=True)
    found = int(re.search(r"10.0 points needs (\d+) problems", said)[1])
    assert found == pytest.approx(expected, rel=0.03)


def test_beyond_all_is_beyond_each(plan, tmp_path):
    free = {"base": plan.evaluation(0, "test"), "concise": tmp_path / "concise"}
    make(free["concise"], BASE, tokens=60, seed=1)
    make(tmp_path / "round1", BASE, tokens=80, seed=2)
    (model,) = judge(free, {"round 1": tmp_path / "round1"})["models"].values()
    assert [one["beyond"] for one in model["against"].values()] == [True, False]
    assert model["beyond"] is False


def test_the_summary_is_of_the_round_to_take(plan):
    rounds = [decided(plan, BASE, 1), decided(plan, [0.0] * 240, 2)]
    make(plan.out / "eval" / "baseline-concise-test", BASE, tokens=70)
    (plan.out / "train" / "round1" / "model").mkdir(parents=True)
    found = cli.summarize(plan.pipeline, plan, 2, gate.conclude(plan, rounds))
    assert found["final_round"] == 1
    assert found["final"] == found["rounds"][0] != found["rounds"][1]
    assert found["sets"]["test"]["new"] == found["final"]


def test_the_last_accepted_round_is_the_one_to_take(plan):
    good, unsure, bad = BASE, BASE, [0.0] * 240
    rounds = [decided(plan, good, 1), decided(plan, unsure, 2, margin=0.001, undecided="continue")]
    make(plan.out / "eval" / "baseline-concise-test", [0.5] * 240, tokens=70)
    (plan.out / "train" / "round1" / "model").mkdir(parents=True)
    found = gate.conclude(plan, rounds)
    assert found == json.loads((plan.out / "gate.json").read_text())
    assert found["stopped"] is None
    assert found["best"] == {"round": 1, "model": str(plan.out / "train" / "round1" / "model")}
    assert (plan.out / "best").samefile(found["best"]["model"])
    assert "goes on after round 2. The model to take is that of round 1" in found["text"][0]
    assert found["text"][1].startswith("No baseline does as well as round 1")

    found = gate.conclude(plan, [*rounds, decided(plan, bad, 3)])
    assert (found["stopped"], found["best"]["round"]) == (3, 1)
    assert "stopped after round 3, which is refused" in found["text"][0]

    found = gate.conclude(plan, [decided(plan, bad, 1)])
    assert (found["stopped"], found["best"]) == (1, {"round": 0, "model": "STUDENT"})
    assert not (plan.out / "best").is_symlink()
    assert "No round was accepted. Keep the base student: STUDENT" in found["text"][0]


def test_a_prompt_that_does_as_well_says_do_not_train(plan):
    make(plan.out / "eval" / "baseline-concise-test", [1.0] * 240, tokens=40)
    found = gate.conclude(plan, [decided(plan, BASE)])
    (free,) = found["rounds"][0]["free"]
    assert free["does_as_well"] and free["token_reduction"] == pytest.approx(-0.25)
    assert found["text"][1].startswith(
        "Do not train: the baseline concise costs nothing and does as well as round 1: 20.0% fewer"
        " tokens, accuracy +"
    )
    # It also says what to do in place of a training that failed.
    found = gate.conclude(plan, [decided(plan, [0.0] * 240)])
    assert found["text"][1].startswith("The baseline concise costs nothing and does as well as the")


def test_what_the_gate_lacks_is_named(plan, tmp_path):
    path = tmp_path / "made.toml"
    for override, message in (
        (
            "gate.set=tset",
            "no evaluation set 'tset'; there are test. Did you mean 'test'",
        ),
        ("evaluation.0.rollouts.num_samples=1", "'test' needs answer_column, and num_samples of 2"),
        ("gate.margin=2", "gate.margin: "),
        ("gate.undecided='go'", "gate.undecided: "),
    ):
        with pytest.raises(ConfigError, match=message):
            load_pipeline(path, (override,))
    path.write_text(PIPELINE.replace('answer_column = "a", ', ""))
    with pytest.raises(ConfigError, match="needs answer_column"):
        load_pipeline(path, ())
    make(plan.out / "eval" / "baseline-concise-test", BASE)
    (plan.out / "best").mkdir()
    with pytest.raises(ConfigError, match="best: expected a link"):
        gate.conclude(plan, [decided(plan, BASE)])


# -- a real pipeline -------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_round_made_bad_is_refused_and_a_good_one_passes(prompts, tmp_path, capsys):
    path, out = small_pocket(prompts, tmp_path), tmp_path / "out"
    text = "[[evaluation]]".join(path.read_text().split("[[evaluation]]")[:2])
    text = text.replace("max_num_seqs = 256", 'backend = "transformers"')
    # A broken student goes on to its limit.
    text = text.replace("max_tokens = 400", "max_tokens = 200")
    path.write_text(text + "\n[gate]\nmargin = 0.2\nhard_margin = 0.6\n")
    arguments = [path, "--out", out, "--set", "rounds=2"]
    assert invoke(cli.cli, *arguments, "--dry-run") == 0
    planned = capsys.readouterr().out
    # (z(0.975) + z(0.8))² = 7.849; worst case 2 · 0.25 / 4 samples.
    needed = gate.problems_needed(0.125, 0.2, 0.025)
    assert f"a margin of 20.0 points needs {needed} problems, one of 60.0 on the hard" in planned
    assert "evaluation 'test' has 24, 4 samples of each" in planned and "worst case" in planned

    bad = [*arguments, "--set", "train.optimizer.learning_rate=1.5e-2"]
    said = run("mpd-rounds", *bad, code=cli.EXIT_NONE_ACCEPTED)
    assert "gate, round 1: refused: of its accuracy it has lost, on all problems" in said.stdout
    student = load_pipeline(path, ()).student
    ended = "stopped after round 1, which is refused. No round was accepted. Keep the base student"
    assert f"gate: {ended}: {student}" in said.stdout
    summary = json.loads((out / "summary.json").read_text())
    assert summary["best"] == student and summary["gate"]["best"]["round"] == 0
    assert summary["gate"]["stopped"] == len(summary["rounds"]) == summary["final_round"] == 1
    assert summary["gate"] == json.loads((out / "gate.json").read_text())
    assert not (out / "data" / "round2").exists() and not (out / "best").exists()
    assert invoke(report, out) == 0
    written = (out / "report" / "report.md").read_text()
    assert "stopped after round 1, which is refused" in written
    assert "| round 1 | refused | all problems | 24 |" in written
    assert "not begun" not in written

    # A decision stands; nothing runs again. A dry run knows it, and plans by the base's rows.
    capsys.readouterr()
    assert invoke(cli.cli, *bad) == cli.EXIT_NONE_ACCEPTED
    assert capsys.readouterr().err.count("done before") == 5
    assert json.loads((out / "summary.json").read_text()) == summary
    assert invoke(cli.cli, *bad, "--dry-run") == 0
    planned = capsys.readouterr().out
    assert "gate: round 1 was the last" in planned and "round 2" not in planned
    assert "the base's rows" in planned

    # The same rows at a learning rate that is no harm.
    for folder in (out / "train", out / "eval" / "round1-test"):
        shutil.rmtree(folder)
    said = run("mpd-rounds", path, "--out", out, "--set", "rounds=1")
    assert "gate, round 1: accepted" in said.stdout
    assert (out / "best" / "model.safetensors").exists()
    summary = json.loads((out / "summary.json").read_text())
    assert summary["best"] == str(out / "train" / "round1" / "model")


def test_a_study_refuses_a_gate(tmp_path):
    text = (ROOT / "pipelines" / "pocket" / "study.toml").read_text()
    path = tmp_path / "study.toml"
    path.write_text(f"{text}\n[pipeline.gate]\n")
    with pytest.raises(ConfigError, match="remove .gate."):
        Planner(load_study(path, ()), tmp_path / "out").runs()


@pytest.mark.parametrize("value, shown", [(-0.0, "+0.0"), (-0.0004, "+0.0"), (-0.001, "-0.1")])
def test_what_rounds_to_zero_has_no_minus(value, shown):
    assert gate._points(value) == shown
