"""Filters, the choice among several rewrites, and `--refilter`, on real rounds."""

import shutil
import signal
import subprocess
import time

import polars as pl
import pytest
from conftest import command, environment, rewrite_arguments, rollout_arguments, run

from mpd_data.config import FilterConfig
from mpd_data.filters import settle, status_of

PASSES = {
    "draft_is_correct": True,
    "keeps_answer": True,
    "compression_ratio": 1.0,
    "repetition": 0.5,
    "is_correct": True,
}


def rows(round_dir):
    return pl.read_parquet(round_dir / "distill" / "*.parquet").sort("row_id")


@pytest.mark.parametrize(
    "changed, rules, status",
    [
        ({}, {}, "ok"),
        ({"keeps_answer": False}, {}, "answer_changed"),
        ({"keeps_answer": None}, {}, "answer_changed"),
        ({"keeps_answer": False}, {"keep_answer": False}, "ok"),
        ({"compression_ratio": 1.01}, {}, "longer"),
        ({"compression_ratio": 1.01}, {"max_ratio": 1.5}, "ok"),
        ({}, {"max_ratio": 0.9}, "longer"),
        ({"compression_ratio": 0.2}, {}, "ok"),
        ({"compression_ratio": 0.2}, {"min_ratio": 0.3}, "too_short"),
        ({"repetition": 0.9}, {}, "ok"),
        ({"repetition": 0.9}, {"max_repetition": 0.6}, "repetitive"),
        ({"is_correct": False}, {}, "incorrect"),
        ({"is_correct": False}, {"require_correct": False}, "ok"),
        ({"is_correct": None}, {}, "ok"),
        ({}, {"drafts": "incorrect"}, "draft_rejected"),
        ({"draft_is_correct": False}, {"drafts": "correct"}, "draft_rejected"),
        ({"draft_is_correct": False}, {"drafts": "incorrect"}, "ok"),
        ({"draft_is_correct": None}, {"drafts": "correct"}, "ok"),
        ({"keeps_answer": False, "compression_ratio": 2.0}, {}, "answer_changed"),
    ],
)
def test_each_rule_has_its_status(changed, rules, status):
    assert status_of(PASSES | changed, FilterConfig(**rules)) == status


@pytest.mark.parametrize(
    "choose, expected",
    [
        ("shortest", ["not_chosen", "malformed", "ok", "not_chosen"]),
        ("first", ["ok", "malformed", "not_chosen", "not_chosen"]),
        ("all", ["ok", "malformed", "ok", "ok"]),
    ],
)
def test_the_choice_is_among_those_that_pass(choose, expected):
    group = [PASSES | {"status": None, "num_rewritten_tokens": n} for n in (9, 1, 5, 5)]
    group[1]["status"] = "malformed"
    settle(group, FilterConfig(), choose)
    assert [row["status"] for row in group] == expected


@pytest.fixture(scope="module")
def sampled(prompts, tmp_path_factory):
    """A round with three sampled rewrites per rollout, all that pass kept."""
    out = tmp_path_factory.mktemp("several") / "round1"
    run("mpd-gen", *rollout_arguments(prompts, out, **{"--num-prompts": 20, "-n": 2}))
    run("mpd-gen", *several(out, **{"--choose": "all"}))
    return out


def several(out, **changed):
    settings = {"--temperature": 1.0, "--num-candidates": 3, "--rows-per-shard": 10, **changed}
    return rewrite_arguments(out, **settings)


def copy(round_dir, tmp_path):
    shutil.copytree(round_dir, tmp_path / "round1")
    return tmp_path / "round1"


def test_several_rewrites_per_rollout(sampled):
    frame = rows(sampled)
    asked = frame.filter(pl.col("status") != "draft_truncated")
    assert asked.group_by("rollout_id").len()["len"].unique().to_list() == [3]
    assert asked["candidate_idx"].unique().sort().to_list() == [0, 1, 2]
    assert asked["row_id"].n_unique() == asked.height
    assert asked.group_by("rollout_id").agg(pl.col("rewrite").n_unique())["rewrite"].max() > 1
    run("mpd-gen", "validate", sampled)


def test_refilter_chooses_anew_and_goes_back_without_scoring(sampled, tmp_path):
    out = copy(sampled, tmp_path)
    before = rows(out)
    said = run("mpd-gen", *several(out), "--refilter").stderr
    assert "not_chosen" in said
    chosen = rows(out).filter(pl.col("status") == "ok")
    assert chosen["rollout_id"].is_unique().all()
    kept = before.filter(pl.col("status") == "ok")
    shortest = kept.group_by("rollout_id").agg(pl.col("num_rewritten_tokens").min())
    joined = chosen.join(shortest, on="rollout_id")
    assert joined.height == chosen.height == shortest.height
    assert (joined["num_rewritten_tokens"] == joined["num_rewritten_tokens_right"]).all()
    run("mpd-gen", "validate", out)
    # What was scored stays scored, so the way back needs no engine: and no teacher.
    run("mpd-gen", *several(out, **{"--choose": "all", "--teacher": "no/such"}), "--refilter")
    assert rows(out).equals(before)


def test_refilter_scores_what_it_newly_admits(round_dir, sampled, tmp_path):
    """A round made with a strict rule and then refiltered is the round made with the loose one."""
    out = copy(sampled, tmp_path)
    shutil.rmtree(out / "distill")
    (out / "distill.manifest.jsonl").unlink()
    strict = {"--choose": "all", "--max-ratio": 0.5}
    run("mpd-gen", *several(out, **strict), "--overwrite")
    first = rows(out).filter(pl.col("status") == "ok").height
    process = subprocess.Popen(
        command("mpd-gen", *several(out, **{"--choose": "all"}), "--refilter"),
        env=environment(),
        stderr=subprocess.DEVNULL,
    )
    while not list((out / ".refilter").glob("distill/part-*.parquet")):
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    run("mpd-gen", *several(out, **{"--choose": "all"}), "--refilter")
    run("mpd-gen", "validate", out)
    ours, theirs = rows(out), rows(sampled)
    assert first < ours.filter(pl.col("status") == "ok").height
    exact = [c for c in ours.columns if c not in ("topk_ids", "topk_logprobs", "tail_logprobs")]
    assert ours.select(exact).equals(theirs.select(exact))
    ids = [frame.filter(pl.col("status") == "ok")["topk_ids"] for frame in (ours, theirs)]
    assert [a[0] for a in ids[0]] == [b[0] for b in ids[1]]
    assert not (out / ".refilter").exists()


def test_refilter_changes_rules_and_nothing_else(sampled, round_dir, tmp_path):
    out = copy(sampled, tmp_path)
    said = run("mpd-gen", *several(out, **{"--seed": 5}), "--refilter", code=1).stderr
    assert "seed: saved 0 / now 5" in said
    said = run("mpd-gen", *several(out), code=1).stderr
    assert "choose: saved 'all' / now 'shortest'" in said
    said = run("mpd-gen", *several(out), "--refilter", "--overwrite", code=2).stderr
    assert "give one" in said
    greedy = rewrite_arguments(out, **{"--num-candidates": 3})
    assert "a temperature above 0" in run("mpd-gen", *greedy, code=1).stderr
    (out / ".refilter").mkdir()
    (out / ".refilter" / "complete").touch()
    assert (
        "a refilter was killed"
        in run("mpd-gen", *several(out, **{"--choose": "all"}), code=1).stderr
    )


def test_refilter_down_to_nothing_is_a_clear_stop(sampled, tmp_path):
    out = copy(sampled, tmp_path)
    said = run("mpd-gen", *several(out, **{"--max-ratio": 0.001}), "--refilter", code=1).stderr
    assert "no rewrite was kept" in said
    assert "longer" in said
