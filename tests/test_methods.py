"""The methods that mixed-policy distillation is compared with, as settings of the same stages."""

import json
import shutil

import polars as pl
import pytest
from conftest import ROOT, STUDENT, TEACHER, invoke, rewrite_arguments, rows, run

from mpd_data.cli import cli
from mpd_data.common.errors import ConfigError
from mpd_rounds.run.layout import Plan
from mpd_rounds.run.steps import load_pipeline

POCKET = ROOT / "pipelines" / "pocket" / "pipeline.toml"
DRAFT = {"--template": "draft", "--score-context": "problem"}


@pytest.fixture(scope="module")
def drafts(round_dir, tmp_path_factory):
    """The round's drafts, scored by the teacher as they are."""
    out = tmp_path_factory.mktemp("drafts") / "round1"
    shutil.copytree(round_dir, out, ignore=shutil.ignore_patterns("distill*"))
    run("mpd-gen", *rewrite_arguments(out, **DRAFT), "--overwrite")
    return out


@pytest.mark.slow
def test_a_draft_stands_for_its_rewrite_id_for_id(drafts):
    rollouts = rows(drafts)
    both = rows(drafts, "distill").join(
        rollouts, left_on="rollout_id", right_on="row_id", suffix="_draft"
    )
    assert len(both) == len(rollouts)
    stopped = both.filter(pl.col("finish_reason") == "stop")
    assert len(stopped) > 100
    for row in stopped.iter_rows(named=True):
        assert row["input_ids"] == row["prompt_ids"] + row["completion_ids"]
        assert row["loss_start"] == len(row["prompt_ids"])
        assert row["compression_ratio"] == 1
    # All that the filters can find in a draft that rewrites nothing is a wrong or missing answer.
    expected = (
        pl.when(pl.col("finish_reason") == "length").then(pl.lit("draft_truncated"))
        .when(pl.col("answer").is_null()).then(pl.lit("malformed"))
        .when(pl.col("is_correct_draft")).then(pl.lit("ok"))
        .otherwise(pl.lit("incorrect"))
    )  # fmt: skip
    assert both.select((pl.col("status") == expected).all()).item()
    kept = both.filter(pl.col("status") == "ok")
    k = len(kept["topk_ids"][0]) // kept["num_rewritten_tokens"][0]
    assert (kept["topk_ids"].list.len() == k * kept["num_rewritten_tokens"]).all()
    run("mpd-gen", "validate", drafts)


@pytest.mark.slow
def test_drafts_without_a_filter_are_all_kept(drafts, tmp_path):
    out = shutil.copytree(drafts, tmp_path / "round1")
    rules = ["--refilter", "--no-require-correct"]
    run("mpd-gen", *rewrite_arguments(out, **DRAFT), *rules)
    assert "incorrect" not in rows(out, "distill")["status"].to_list()


def test_a_plan_knows_that_drafts_are_not_rewritten(round_dir, capsys):
    invoke(cli, *rewrite_arguments(round_dir, **DRAFT), "--overwrite", "--dry-run", "--json")
    plan = json.loads(capsys.readouterr().out)
    whole = rows(round_dir).filter(pl.col("finish_reason") == "stop")
    assert plan["tokens_at_most"] == whole["num_completion_tokens"].sum()


@pytest.mark.parametrize(
    "changed", [{"--score-context": "rewrite"}, {"-n": 2, "--num-candidates": 2}]
)
def test_drafts_have_no_rewrite_prompt_and_no_candidates(round_dir, changed):
    settings = {**DRAFT, "--temperature": 0.7, **changed}
    settings.pop("-n", None)
    with pytest.raises(ConfigError, match="--template draft"):
        invoke(cli, *rewrite_arguments(round_dir, **settings), "--dry-run")


@pytest.mark.parametrize(
    "settings, samples, rewrites",
    [
        ((), STUDENT, TEACHER),
        (("sampler=teacher",), TEACHER, TEACHER),
        (("rewriter=student",), STUDENT, STUDENT),
    ],
    ids=["mixed policy", "off-policy", "self"],
)
def test_who_samples_and_who_rewrites(settings, samples, rewrites, tmp_path):
    pipeline = load_pipeline(
        POCKET, (f"student={STUDENT}", f"teacher={TEACHER}", "rounds=2", *settings)
    )
    plan = Plan(pipeline, tmp_path)
    newest = str(tmp_path / "train" / "round1" / "model")
    for round_ in (1, 2):
        rollouts, rewrite, train = (step.config for step in plan.training(round_))
        later = {str(STUDENT): newest} if round_ == 2 else {}
        assert rollouts.model == later.get(str(samples), str(samples))
        assert rewrite.teacher == later.get(str(rewrites), str(rewrites))
        assert train.student == later.get(str(STUDENT), str(STUDENT))


@pytest.mark.parametrize(
    "settings",
    [
        ("rewrite.template=draft", "rewrite.score_context=problem"),
        ("sampler=teacher", "rewrite.template=draft", "rewrite.score_context=problem"),
        ("rewriter=student", "rounds=2"),
    ],
    ids=["on-policy", "off-policy", "self"],
)
def test_each_method_can_be_planned(settings, prompts, tmp_path):
    files = [
        f"{section}.{setting}"
        for section in ("rollouts", *(f"evaluation.{i}.rollouts" for i in range(3)))
        for setting in (f"prompts=['{prompts}']", "num_prompts=24")
    ]
    overrides = [word for setting in (*files, *settings) for word in ("--set", setting)]
    said = run("mpd-rounds", POCKET, "--out", tmp_path / "run", *overrides, "--dry-run").stdout
    assert "round 1: train" in said
