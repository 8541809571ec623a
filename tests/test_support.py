"""Whether a rewrite carries its answer: what is measured, what is kept by it, and `--refilter`."""

import shutil
import zlib

import numpy as np
import polars as pl
import pytest
import torch
from conftest import (
    STUDENT,
    TEACHER,
    TEMPLATE,
    edit_rows,
    killed,
    num_shards,
    rewrite_arguments,
    rows,
    run,
    without_rewrites,
)
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from benchmarks.support import auroc, pocket_rewrites, score
from mpd_data.common.models import load_tokenizer, resolve_model
from mpd_data.config import RewriteConfig
from mpd_data.engines.protocol import Scores
from mpd_data.inspect.stats import round_stats
from mpd_data.select import student
from mpd_data.select.refilter import run_refilter
from mpd_data.select.support import Measure, answer_spans, lead_in_spans, new_values

ENGINE = {"backend": "transformers", "dtype": "float32"}
MEASURES = ["answer_support", "weakest_step"]


def parts(text, spans):
    return [text[a:b] for a, b in spans]


@pytest.mark.parametrize(
    "text, new",
    [
        ("3 + 4 = 7, and 7 again.", ["4", "7"]),
        ("3.0 is 3; 1,200 is 1200.", ["1,200"]),
        ("1200.00 dollars, 1,200.50 dollars", ["1200", "1,200.50"]),
        ("no number", []),
    ],
)
def test_values_are_new_once(text, new):
    assert parts(text, new_values(text, {3})) == new


@pytest.mark.parametrize(
    "text, answer, is_number, found, lead_in",
    [
        ("12, 12.\nThe answer is \\boxed{12}", "$12", True, ["12"] * 3, ["The answer is \\boxed{"]),
        ("It is 112. So 12.5 and 12", "12", True, ["12"], ["So 12.5 and "]),
        ("B or A. The answer is (B)", "B", False, ["B"], ["The answer is ("]),
        ("<think> 3 </think> answer 5", "5", True, ["5"], ["<think> ", "</think> ", "answer "]),
        ("So 2 and \\frac{1}{2}", "\\frac{1}{2}", False, ["\\frac{1}{2}"], ["So 2 and "]),
    ],
)  # fmt: skip
def test_an_answer_is_found_with_what_leads_to_it(text, answer, is_number, found, lead_in):
    kind, spans = answer_spans(text, answer)
    assert (kind, parts(text, spans)) == (is_number, found)
    assert parts(text, lead_in_spans(text, spans[-1][0])) == lead_in


def test_an_answer_that_is_not_there_has_no_place():
    assert answer_spans("so 12", "13") == (True, [])
    assert answer_spans("cab", "a") == (False, [])
    assert answer_spans("cab", "") == (False, [])


@pytest.fixture(scope="module")
def scored():
    return score(pocket_rewrites(12), str(STUDENT), "float32")


@pytest.mark.parametrize("measure", MEASURES)
def test_rewrites_without_their_working_are_told_apart(scored, measure):
    values = {True: [], False: []}
    for one in scored:
        values[one.rewrite.working].append(one.columns[measure])
    assert len(values[False]) == 4 * len(values[True]) == 48
    assert auroc(values[True], values[False]) >= 0.9


def test_measures_follow_from_the_models_distributions(scored):
    """By transformers alone, in the pocket world, where a number is one token."""
    tokenizer = load_tokenizer(resolve_model(str(STUDENT)))
    model = AutoModelForCausalLM.from_pretrained(STUDENT, dtype=torch.float32).eval()
    numbers = {tokenizer.convert_tokens_to_ids(str(n)) for n in range(60)}

    def log_value(ids, place):
        """log p(the token at `place` | a number stands there, and ends)."""
        with torch.no_grad():
            logs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        best = [i for i in logs[place - 1].topk(20).indices.tolist() if i in numbers]
        chosen = torch.tensor(sorted({*best, ids[place]}))
        after = [i for i in logs[place].topk(20).indices.tolist() if i in numbers]
        more = logs[place, after].exp().sum() if after else torch.tensor(0.0)
        return float(
            logs[place - 1, ids[place]] - logs[place - 1, chosen].logsumexp(0) + torch.log1p(-more)
        )

    for one in scored[:5]:
        prompt, trace = one.rewrite.prompt_ids, one.rewrite.trace_ids
        answer = tokenizer.convert_tokens_to_ids(one.rewrite.answer)
        stated = [len(prompt) + i for i, token in enumerate(trace) if token == answer]
        ids = prompt + trace
        new = {
            ids[i]: i
            for i in reversed(range(len(prompt), len(ids)))
            if ids[i] in numbers and ids[i] not in prompt
        }
        lead_in = tokenizer("<think> </think> answer", add_special_tokens=False)["input_ids"]
        alone = [*prompt, *lead_in, answer, trace[-1]]
        without = log_value(alone, len(alone) - 2)
        expected = min(log_value(ids, place) for place in stated) - without
        assert one.columns["answer_support"] == pytest.approx(expected, abs=1e-3)
        expected = min(log_value(ids, place) for place in {*new.values(), *stated})
        assert one.columns["weakest_step"] == pytest.approx(expected, abs=1e-3)


def test_a_comma_between_thousands_changes_no_measure():
    """Whatever its probability is: 1,234 is the value that 1234 is."""
    text = "2 + 2 = 1,234 ."
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(["2 + = , . 1 2 3 4"], vocab_size=257, show_progress=False)
    measure = Measure(PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer))
    ids = bpe.encode(text).ids
    places = measure.places(bpe.encode("2 + 2 ?").ids, ids, None)
    (step,) = places.steps
    assert len(step) == len("1,234")
    trace, comma = [*ids, 0], step.start + 1
    n = len(trace)

    def weakest(of_comma):
        """With digits as likely as each other at each place, and a comma `of_comma`."""
        target = np.full(n, np.log(0.5), np.float32)
        target[comma] = np.log(of_comma)
        none = np.full((n, 1), bpe.token_to_id("."), np.int32)
        scores = Scores("a", none, np.full((n, 1), np.log(0.1), np.float32), target)
        return measure.columns(places, trace, scores, None)["weakest_step"]

    assert weakest(0.9) == weakest(1e-6) == pytest.approx(3 * np.log(0.5), abs=1e-5)


# -- rounds ---------------------------------------------------------------------------------


def rewriting(out, **changed):
    settings = {"teacher": str(TEACHER), "template": str(TEMPLATE), "score_context": "rewrite"}
    settings |= {"sampling": {"max_tokens": 200}, "engine": ENGINE}
    return RewriteConfig(shards=out, **{**settings, **changed})


@pytest.fixture(scope="module")
def weakened(round_dir, tmp_path_factory):
    """A round in which every second kept rewrite says its answer alone. Return its folder and their
    keys."""
    out = shutil.copytree(round_dir, tmp_path_factory.mktemp("weakened") / "r")
    tokenizer = load_tokenizer(resolve_model(str(STUDENT)))
    bare = set()

    def cut(row):
        if row["status"] == "ok" and int(row["row_id"][-1], 16) % 2:
            text = f"<think> plan in order . </think> answer {row['rewrite_answer']}"
            ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
            row["input_ids"] = row["input_ids"][: row["loss_start"]] + ids
            row["rewrite"], row["num_rewritten_tokens"] = text, len(ids)
            unknown = ("topk_ids", "topk_logprobs", "tail_logprobs", "num_thinking_tokens")
            row |= dict.fromkeys(unknown)
            bare.add(row["row_id"])

    edit_rows(out, "distill", cut)
    (out / "distill.manifest.jsonl").unlink()
    return out, bare


@pytest.fixture(scope="module")
def measured(weakened, tmp_path_factory):
    """The same round, with what the student measures and no limit."""
    out = shutil.copytree(weakened[0], tmp_path_factory.mktemp("measured") / "r")
    run_refilter(rewriting(out, filters={"support": True}))
    return out


def test_what_is_measured_is_kept_and_shown(weakened, measured):
    before = rows(weakened[0], "distill")
    frame = rows(measured, "distill")
    run("mpd-gen", "validate", measured)
    assert frame["status"].equals(before["status"])
    ok = frame.filter(pl.col("status") == "ok")
    assert ok.height > 20
    assert ok.select(MEASURES).null_count().row(0) == (0, 0)
    assert frame.filter(pl.col("status") != "ok").select(MEASURES).drop_nulls().is_empty()
    bare = pl.col("row_id").is_in(list(weakened[1]))
    for name in MEASURES:
        whole, cut = ok.filter(~bare)[name].to_list(), ok.filter(bare)[name].to_list()
        assert auroc(whole, cut) >= 0.9
    table = round_stats([measured])["support"]
    assert [line["measure"] for line in table] == MEASURES
    assert [line["rewrites"] for line in table] == [ok.height] * 2
    assert table[1]["p50"] == ok["weakest_step"].quantile(0.5, "nearest")
    assert "weakest_step" in run("mpd-gen", "stats", measured).stdout
    assert "support" not in round_stats([weakened[0]])


@pytest.mark.parametrize(
    "rule, column", [({"min_step": -3}, "weakest_step"), ({"min_support": 2}, "answer_support")]
)
def test_a_limit_rejects_what_is_below_it(weakened, measured, tmp_path, monkeypatch, rule, column):
    (limit,) = rule.values()
    out = shutil.copytree(measured, tmp_path / "r")

    def refuse(*_):
        raise AssertionError("nothing is to be measured twice")

    monkeypatch.setattr(student, "start_engine", refuse)
    before = rows(out, "distill")
    outcome = run_refilter(rewriting(out, filters=rule))
    frame = rows(out, "distill")
    kept, refused = (frame.filter(pl.col("status") == name) for name in ("ok", "unsupported"))
    assert kept.height == outcome.statuses["ok"] > 5
    assert (kept[column] >= limit).all()
    assert refused.height == outcome.statuses["unsupported"] > 5
    assert (refused[column] < limit).all()
    assert frame.drop("status").equals(before.drop("status"))
    run("mpd-gen", "validate", out)
    # The way back needs no engine at all.
    run_refilter(rewriting(out, teacher="no/such"))
    assert rows(out, "distill").equals(before)


def test_another_student_measures_anew(measured, tmp_path):
    out = shutil.copytree(measured, tmp_path / "r")
    config = rewriting(out, filters={"min_step": -3}, student=str(TEACHER))
    run_refilter(config)
    ours, theirs = rows(out, "distill"), rows(measured, "distill")
    both = ours.filter(pl.col("answer_support").is_not_null()).join(theirs, on="row_id")
    assert both.height > 20
    assert (both["answer_support"] != both["answer_support_right"]).all()


@pytest.mark.slow
def test_the_best_supported_is_chosen(round_dir, tmp_path):
    """After a kill the same command goes on, and what was measured before stays."""
    asked = {"--num-candidates": 3, "--temperature": 1.5, "--choose": "support"}
    asked |= {"--backend": "transformers", "--rows-per-shard": 20, "--max-ratio": 4}
    out = without_rewrites(round_dir, tmp_path / "r")

    def limited(row):
        # All samples of a prompt: the others would wait for those that are missing.
        return zlib.crc32(row["prompt_id"].encode()) % 4 == 0

    edit_rows(out, "rollouts", limited)
    (out / "rollouts.manifest.jsonl").unlink()
    words = [*rewrite_arguments(out, **asked), "--no-keep-answer", "--no-require-correct"]
    killed("mpd-gen", *words, until=lambda: num_shards(out / ".refilter", "distill"))
    done = {file.stat().st_ino for file in (out / ".refilter").glob("distill/part-*.parquet")}
    assert (rows(out, "distill")["status"] == "not_chosen").sum() > 5
    run("mpd-gen", *words)
    assert done <= {file.stat().st_ino for file in (out / "distill").glob("part-*.parquet")}
    run("mpd-gen", "validate", out)
    frame = rows(out, "distill").filter(pl.col("status").is_in(["ok", "not_chosen"]))
    frame = frame.with_columns(pl.col(MEASURES).cast(pl.Float64))
    groups = frame.group_by("rollout_id").agg(
        pl.struct(pl.col("weakest_step", "answer_support", "status")).alias("all")
    )
    several = differ = 0
    for (candidates,) in groups.select("all").iter_rows():
        (kept,) = [row for row in candidates if row["status"] == "ok"]
        measured = [row for row in candidates if row["answer_support"] is not None]
        best = max((row["answer_support"] + row["weakest_step"] for row in measured), default=None)
        assert best is None or kept["answer_support"] + kept["weakest_step"] == pytest.approx(best)
        several += len(candidates) > 1
        differ += candidates[0]["status"] != "ok"
    assert several > 5
    assert differ > 0
