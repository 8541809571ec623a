"""Filters, the choice among several rewrites, and `--refilter`, on real rounds."""

import json
import shutil
from functools import partial

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
from conftest import (
    SCORES,
    STUDENT,
    invoke,
    killed,
    num_shards,
    rewrite_arguments,
    rollout_arguments,
    run,
    without_rewrites,
)
from conftest import rows as stage_rows

from mpd_data.cli import cli
from mpd_data.common.errors import ConfigError
from mpd_data.common.ngrams import overlap
from mpd_data.config import FilterConfig, RewriteConfig
from mpd_data.engines.protocol import Scores
from mpd_data.select.filters import settle, status_of
from mpd_data.select.second_pass import Group
from mpd_data.select.student import _Student, candidates

PASSES = {
    "draft_is_correct": True,
    "keeps_answer": True,
    "compression_ratio": 1.0,
    "draft_overlap": 0.5,
    "pass_rate": 0.5,
    "repetition": 0.5,
    "is_correct": True,
    "answer_support": None,
    "weakest_step": -1.0,
}


rows = partial(stage_rows, stage="distill")


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
        ({"draft_overlap": 1.0}, {}, "ok"),
        ({"draft_overlap": 0.8}, {"max_overlap": 0.7}, "copied"),
        ({"draft_overlap": 0.7}, {"max_overlap": 0.7}, "ok"),
        ({"draft_overlap": None}, {"max_overlap": 0.7}, "ok"),
        (
            {"draft_overlap": 0.8, "repetition": 0.9},
            {"max_overlap": 0, "max_repetition": 0},
            "copied",
        ),
        ({"keeps_answer": False}, {"corrections": True}, "ok"),
        ({"keeps_answer": None}, {"corrections": True}, "ok"),
        ({"keeps_answer": False, "is_correct": False}, {"corrections": True}, "answer_changed"),
        ({"keeps_answer": False, "is_correct": None}, {"corrections": True}, "answer_changed"),
        ({"is_correct": False}, {"corrections": True}, "incorrect"),
        ({"compression_ratio": 0.9}, {"max_ratio": 0.8}, "longer"),
        # 0.8 where it is always solved, 1 where never, so 0.9 here.
        ({"compression_ratio": 0.9}, {"max_ratio": 0.8, "max_ratio_hard": 1.0}, "ok"),
        ({"compression_ratio": 0.91}, {"max_ratio": 0.8, "max_ratio_hard": 1.0}, "longer"),
        ({"pass_rate": 0.0}, {"max_ratio": 0.8, "max_ratio_hard": 1.0}, "ok"),
        ({"pass_rate": None}, {"max_ratio": 0.8, "max_ratio_hard": 1.0}, "longer"),
        ({"compression_ratio": 0.4}, {"min_ratio": 0.2, "min_ratio_hard": 0.6}, "ok"),
        ({"compression_ratio": 0.39}, {"min_ratio": 0.2, "min_ratio_hard": 0.6}, "too_short"),
        ({"compression_ratio": 0.4, "pass_rate": 0.0}, {"min_ratio_hard": 0.6}, "too_short"),
        # A ratio of 6 to 10 tokens, as a shard holds it.
        ({"compression_ratio": float(np.float32(0.6))}, {"max_ratio": 0.6}, "ok"),
        ({"repetition": 0.9}, {}, "ok"),
        ({"repetition": 0.9}, {"max_repetition": 0.6}, "repetitive"),
        ({"is_correct": False}, {}, "incorrect"),
        ({"is_correct": False}, {"require_correct": False}, "ok"),
        ({"is_correct": None}, {}, "ok"),
        ({"weakest_step": -2.0}, {}, "ok"),
        ({"weakest_step": -2.0}, {"min_step": -1.5}, "unsupported"),
        ({}, {"min_step": -1.0, "min_support": 9.0}, "ok"),
        ({"answer_support": 8.9}, {"min_support": 9.0}, "unsupported"),
        ({"answer_support": 8.9, "is_correct": False}, {"min_support": 9.0}, "incorrect"),
        ({}, {"drafts": "incorrect"}, "draft_rejected"),
        ({"draft_is_correct": False}, {"drafts": "correct"}, "draft_rejected"),
        ({"draft_is_correct": False}, {"drafts": "incorrect"}, "ok"),
        ({"draft_is_correct": None}, {"drafts": "correct"}, "ok"),
        ({"keeps_answer": False, "compression_ratio": 2.0}, {}, "answer_changed"),
    ],
)
def test_each_rule_has_its_status(changed, rules, status):
    assert status_of(PASSES | changed, FilterConfig(**rules)) == status


def test_a_copy_repeats_its_draft():
    draft = list(range(20))
    assert overlap(draft, draft) == 1
    assert overlap(draft, [99, *draft]) == 1
    # Seven of the draft's 17 4-grams lie in its first ten tokens.
    assert overlap(draft, draft[:10]) == pytest.approx(7 / 17)
    assert overlap(draft, draft[::-1]) == 0
    # One of five repetitions is a fifth of the draft, and not a copy.
    assert overlap([1, 2, 3, 4, 5] * 5, [1, 2, 3, 4, 5]) < 0.2
    assert overlap([1, 2], [1, 2]) == 0


def test_newer_filters_are_recorded_only_where_they_are_set():
    assert "corrections" not in FilterConfig().identity()
    assert FilterConfig(corrections=True).identity()["corrections"] is True


@pytest.mark.parametrize(
    "choose, expected",
    [
        ("shortest", ["not_chosen", "malformed", "ok", "not_chosen"]),
        ("first", ["ok", "malformed", "not_chosen", "not_chosen"]),
        ("all", ["ok", "malformed", "ok", "ok"]),
        ("support", ["not_chosen", "malformed", "not_chosen", "ok"]),
    ],
)
def test_the_choice_is_among_those_that_pass(choose, expected):
    group = [PASSES | {"status": None, "num_rewritten_tokens": n} for n in (9, 1, 5, 5)]
    group[1]["status"] = "malformed"
    group[0]["weakest_step"] = None
    group[3]["answer_support"] = 0.5
    wanted = settle(group, FilterConfig(), choose)
    assert [row["status"] for row in group] == expected
    assert wanted == [row for row in group if row["status"] == "ok"]


@pytest.fixture(scope="module")
def sampled(prompts, tmp_path_factory):
    """A round with three sampled rewrites per rollout; all that pass are kept."""
    out = tmp_path_factory.mktemp("several") / "round1"
    run("mpd-gen", *rollout_arguments(prompts, out, **{"--num-prompts": 20, "-n": 2}))
    run("mpd-gen", *several(out, **{"--choose": "all"}))
    return out


def several(out, **changed):
    settings = {"--temperature": 1.0, "--num-candidates": 3, "--rows-per-shard": 10, **changed}
    return rewrite_arguments(out, **settings)


def copy(round_dir, tmp_path):
    return shutil.copytree(round_dir, tmp_path / "round1")


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
    """A strict filter, then --refilter with a loose one, gives the round of the loose one."""
    out = copy(sampled, tmp_path)
    shutil.rmtree(out / "distill")
    (out / "distill.manifest.jsonl").unlink()
    strict = {"--choose": "all", "--max-ratio": 0.5}
    run("mpd-gen", *several(out, **strict), "--overwrite")
    first = rows(out).filter(pl.col("status") == "ok").height
    loose = ["mpd-gen", *several(out, **{"--choose": "all"}), "--refilter"]
    killed(*loose, until=lambda: num_shards(out / ".refilter", "distill"))
    run(*loose)
    run("mpd-gen", "validate", out)
    ours, theirs = rows(out), rows(sampled)
    assert first < ours.filter(pl.col("status") == "ok").height
    assert ours.drop(SCORES).equals(theirs.drop(SCORES))
    ids = [frame.filter(pl.col("status") == "ok")["topk_ids"] for frame in (ours, theirs)]
    assert [a[0] for a in ids[0]] == [b[0] for b in ids[1]]
    assert not (out / ".refilter").exists()


@pytest.mark.parametrize(
    "changed, name",
    [
        ({"--max-model-len": 300}, "max_model_len"),
        ({"--dtype": "bfloat16"}, "dtype"),
        ({"--engine-kwargs": '{"quantization": "fp8"}'}, "engine_kwargs"),
    ],
)
def test_what_is_newly_kept_is_scored_as_the_rest(round_dir, tmp_path, changed, name):
    """A smaller context would make rows too_long for good."""
    out = copy(round_dir, tmp_path)
    before = rows(out)
    loose = [*rewrite_arguments(out, **changed), "--no-keep-answer", "--refilter"]
    for more in (["--dry-run"], []):
        with pytest.raises(ConfigError, match=rf"scored the rest, not with:\n  {name}: saved"):
            invoke(cli, *loose, *more)
        assert rows(out).equals(before)


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
    said = run("mpd-gen", *several(out, **{"--choose": "all"}), code=1).stderr
    assert "killed while its rows were put in place" in said


def test_refilter_down_to_nothing_is_a_clear_stop(sampled, tmp_path):
    out = copy(sampled, tmp_path)
    said = run("mpd-gen", *several(out, **{"--max-ratio": 0.001}), "--refilter", code=1).stderr
    assert "no rewrite was kept" in said
    assert "longer" in said


@pytest.mark.parametrize(
    "texts, statuses, expected",
    [
        ("abc", [None] * 3, ["not_chosen"] * 3),
        ("aba", [None] * 3, ["not_chosen"] * 3),
        ("aaa", [None] * 3, ["ok", "not_chosen", "not_chosen"]),
        ("abc", ["malformed", None, "truncated"], ["malformed", "ok", "truncated"]),
        ("abc", ["malformed"] * 3, ["malformed"] * 3),
    ],
)
def test_what_differs_waits_for_the_student(texts, statuses, expected):
    given = enumerate(zip(texts, statuses, strict=True))
    group = [
        PASSES | {"row_id": str(i), "rewrite": text, "status": status}
        for i, (text, status) in given
    ]
    wanted = settle(group, FilterConfig(), "likeliest")
    assert [row["status"] for row in group] == expected
    # What waits is scored by the teacher, whichever the student takes.
    kept = [row for row in group if row["status"] == "ok"]
    assert wanted == (kept or [row for row in group if row["status"] == "not_chosen"])


def test_the_student_chooses_among_what_is_scored():
    scored, unscored = ({"tail_logprobs": x, "status": "not_chosen"} for x in ([-1.0], None))
    assert candidates([scored, unscored, scored | {"status": "longer"}]) == [scored]
    assert candidates([unscored]) == []
    assert candidates([scored, scored | {"status": "ok"}]) == []


def mean_logprobs(frame):
    """Return each trace's mean log-probability after the student's prompt, from transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(STUDENT, dtype=torch.float32)
    found = []
    for ids, start in frame.select("input_ids", "loss_start").iter_rows():
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, start - 1 : -1]
        own = logits.log_softmax(-1).gather(1, torch.tensor(ids[start:])[:, None])
        found.append(float(own.mean()))
    return found


def varied(out, **changed):
    """Return arguments with a temperature at which rewrites differ and filters that keep them."""
    settings = {"--temperature": 1.5, "--max-ratio": 4, **changed}
    return [*several(out, **settings), "--no-keep-answer", "--no-require-correct"]


def test_the_likeliest_is_so_by_token_and_not_as_a_whole(tmp_path):
    """A long trace of likely tokens, and a short one of unlikely tokens that is likelier whole."""
    logprobs = {"short": [-0.5, -0.5], "long": [-0.2] * 10, "unlikely": [-0.6] * 3}
    group = [
        PASSES | {"row_id": name, "status": "not_chosen", "tail_logprobs": []} for name in logprobs
    ]
    scores = {
        name: Scores(
            name, np.zeros((len(own), 1), np.int32), np.zeros((len(own), 1)), np.array(own)
        )
        for name, own in logprobs.items()
    }
    config = RewriteConfig(teacher="t", shards=tmp_path, choose="likeliest")
    _Student(config, {}, None).decide(Group(group, group, scores=scores))
    assert [row["status"] for row in group] == ["not_chosen", "ok", "not_chosen"]


@pytest.fixture(scope="module")
def all_kept(sampled, tmp_path_factory):
    out = without_rewrites(sampled, tmp_path_factory.mktemp("varied") / "round1")
    run("mpd-gen", *varied(out, **{"--choose": "all"}))
    return out


@pytest.fixture(scope="module")
def likeliest(sampled, tmp_path_factory):
    """The same round, with the student's choice among three."""
    out = without_rewrites(sampled, tmp_path_factory.mktemp("likeliest") / "round1")
    run("mpd-gen", *varied(out, **{"--choose": "likeliest"}))
    return out


def test_the_student_chooses_what_it_finds_likeliest(all_kept, likeliest):
    run("mpd-gen", "validate", likeliest)
    ours, theirs = rows(likeliest), rows(all_kept)
    assert ours["row_id"].equals(theirs["row_id"])
    kept = ours.filter(pl.col("status") == "ok")
    passed = theirs.filter(pl.col("status") == "ok")
    assert kept["rollout_id"].is_unique().all()
    assert set(kept["rollout_id"]) == set(passed["rollout_id"])
    scored = passed.with_columns(mean=pl.Series(mean_logprobs(passed)))
    best = scored.group_by("rollout_id").agg(pl.col("mean").max(), pl.col("rewrite").n_unique())
    assert best.filter(pl.col("rewrite") > 1).height > 10
    chosen = scored.join(kept.select("row_id"), on="row_id").join(best, on="rollout_id")
    assert ((chosen["mean"] - chosen["mean_right"]).abs() < 1e-4).all()
    # Neither the first nor the shortest in all of them.
    assert (kept["candidate_idx"] > 0).any()
    shortest = passed.group_by("rollout_id").agg(pl.col("num_rewritten_tokens").min())
    lengths = kept.join(shortest, on="rollout_id")
    assert (lengths["num_rewritten_tokens"] > lengths["num_rewritten_tokens_right"]).any()


@pytest.mark.slow
def test_a_choice_survives_a_kill_and_is_made_once(sampled, all_kept, likeliest, tmp_path):
    """A kill while the student chooses, then the same command: the choice is as without a kill. And
    --refilter of a round with --choose all makes the same choice."""
    out = without_rewrites(sampled, tmp_path / "round1")
    asked = varied(out, **{"--choose": "likeliest", "--rows-per-shard": 5})
    killed("mpd-gen", *asked, until=lambda: num_shards(out / ".refilter", "distill"))
    chosen = {file.stat().st_ino for file in (out / ".refilter").glob("distill/part-*.parquet")}
    plan = run("mpd-gen", *asked, "--dry-run").stdout
    assert "rollouts for the student to choose" in plan
    # What was begun anew does not get rows of what was there before.
    anew = copy(out, tmp_path / "anew")
    again = varied(anew, **{"--choose": "likeliest", "--rows-per-shard": 5})
    run("mpd-gen", *again, "--overwrite", "--limit", 1)
    assert rows(anew)["rollout_id"].n_unique() == 1
    waiting = rows(out)
    assert waiting.height == rows(likeliest).height
    assert waiting.group_by("rollout_id").agg((pl.col("status") == "ok").sum())["status"].max() == 1
    said = run("mpd-gen", *asked).stderr
    assert "choose: " in said
    assert not (out / ".refilter").exists()
    # What was chosen before the kill was not chosen again.
    assert chosen <= {file.stat().st_ino for file in (out / "distill").glob("part-*.parquet")}
    before = [path.stat().st_mtime_ns for path in sorted((out / "distill").iterdir())]
    # Nothing waits any more: no engine, and nothing is written.
    assert "choose: " not in run("mpd-gen", *asked).stderr
    assert before == [path.stat().st_mtime_ns for path in sorted((out / "distill").iterdir())]
    other = copy(all_kept, tmp_path / "other")
    run("mpd-gen", *varied(other, **{"--choose": "likeliest"}), "--refilter")
    columns = ["row_id", "status", "rewrite", "input_ids"]
    for made in (out, other):
        assert rows(made).select(columns).equals(rows(likeliest).select(columns))


@pytest.mark.slow
def test_parts_leave_the_choice_for_later(sampled, likeliest, tmp_path):
    out = without_rewrites(sampled, tmp_path / "round1")
    asked = varied(out, **{"--choose": "likeliest"})
    said = ""
    for index in range(2):
        said = run("mpd-gen", *asked, "--shard-index", index, "--num-shards", 2).stderr
    assert "rollouts still need the student to choose" in said
    kept = rows(out).filter(pl.col("status") == "ok").height
    plan = run("mpd-gen", *asked, "--refilter", "--dry-run").stdout
    assert "rollouts for the student to choose" in plan
    info = json.loads((out / "run.json").read_text())
    info["stages"]["distill"]["chosen_by"] = {"version": "0" * 64}
    (out / "run.json").write_text(json.dumps(info))
    said = run("mpd-gen", *asked, "--refilter", code=1).stderr
    assert "another student judged some of its rewrites" in said
    del info["stages"]["distill"]["chosen_by"]
    (out / "run.json").write_text(json.dumps(info))
    run("mpd-gen", *asked, "--refilter")
    plan = run("mpd-gen", *asked, "--refilter", "--dry-run").stdout
    assert "The existing rewrites were chosen by these rules." in plan
    assert kept < rows(out).filter(pl.col("status") == "ok").height
    assert rows(out).select("row_id", "status").equals(rows(likeliest).select("row_id", "status"))
    # Workers of one command are followed by the choice.
    again = without_rewrites(sampled, tmp_path / "again" / "round1")
    asked = varied(again, **{"--choose": "likeliest"})
    assert "still need the student" not in run("mpd-gen", *asked, "--workers", 2).stderr
    assert rows(again).select("row_id", "status").equals(rows(out).select("row_id", "status"))


def test_a_student_that_cannot_choose_is_said_before_the_teacher_works(sampled, tmp_path):
    gone = shutil.copytree(STUDENT, tmp_path / "student")
    out = without_rewrites(sampled, tmp_path / "round1")
    for file in (out / "rollouts").glob("*.parquet"):
        table = pq.read_table(file)
        saved = json.loads(table.schema.metadata[b"mpd"])
        saved["model"]["name"] = str(gone)
        pq.write_table(table.replace_schema_metadata({b"mpd": json.dumps(saved)}), file)
    asked = varied(out, **{"--choose": "likeliest"})
    (gone / "config.json").write_text((gone / "config.json").read_text() + "\n")
    assert "has changed since it sampled" in run("mpd-gen", *asked, code=1).stderr
    shutil.rmtree(gone)
    for more in ([], ["--dry-run"]):
        said = run("mpd-gen", *asked, *more, code=1).stderr
        assert "needs the student that sampled the drafts" in said
        assert "--student" in said
    server = ["--backend", "openai", "--base-url", "http://localhost:1"]
    said = run("mpd-gen", *asked, *server, "--dry-run", code=1).stderr
    assert "does not run on the teacher's server" in said
    assert not (out / "distill").exists()
    # Nor does a refilter undo the choice that was made before it finds out.
    run("mpd-gen", *varied(out, **{"--choose": "first"}), "--limit", 3)
    before = rows(out)
    said = run("mpd-gen", *asked, "--refilter", code=1).stderr
    assert "needs the student that sampled the drafts" in said
    assert rows(out).equals(before)
    run("mpd-gen", *asked, "--refilter", "--student", STUDENT)
