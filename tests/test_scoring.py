"""Log-probabilities from the engine to the shard: exact, aligned, and the student's zero loss.

One real vLLM engine per model, in this process.
"""

import itertools
from contextlib import closing

import numpy as np
import polars as pl
import pytest
import torch
from conftest import (
    STUDENT,
    TEACHER,
    TEMPLATE,
    drained,
    rewrite_arguments,
    rows,
    run,
    without_rewrites,
)
from transformers import AutoModelForCausalLM

from mpd_data.common.models import load_tokenizer, resolve_model
from mpd_data.config import EngineConfig, RewriteConfig, SamplingConfig
from mpd_data.engines.protocol import RequestError, Scores
from mpd_data.engines.scores import as_float16, drop_padding, tail_logprobs
from mpd_data.engines.start import start_engine
from mpd_data.prompts.chat import ChatFormatter
from mpd_data.prompts.template import load_template
from mpd_data.rewrite import distill
from mpd_data.rewrite_setup import setup
from mpd_data.store.progress import Progress
from mpd_data.store.round import RoundDir
from mpd_data.store.shards import read_metadata


@pytest.fixture(scope="module")
def teacher_engine():
    settings = EngineConfig(dtype="float32", max_num_seqs=16)
    with closing(start_engine(resolve_model(str(TEACHER)), settings, max_logprobs=64)) as engine:
        yield engine


@pytest.fixture(scope="module")
def teacher():
    return AutoModelForCausalLM.from_pretrained(TEACHER, dtype=torch.float32).eval()


def logprobs_of(model, ids, start):
    """[n, V] float64 log-probabilities over the tokens from `start` on."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0, start - 1 : -1]
    return logits.double().log_softmax(-1)


def kept(round_dir):
    return rows(round_dir, "distill").filter(pl.col("status") == "ok").to_dicts()


def test_engine_scores_equal_transformers(teacher_engine, teacher, round_dir):
    row = kept(round_dir)[0]
    context, target = row["teacher_prompt_ids"], row["input_ids"][row["loss_start"] :]
    teacher_engine.submit_score("a", context, target, 64)
    scores = drained(teacher_engine)["a"]
    assert isinstance(scores, Scores)
    exact = logprobs_of(teacher, context + target, len(context))
    at = torch.arange(len(target))
    assert np.abs(scores.target_logprobs - exact[at, target].numpy()).max() <= 1e-4
    gathered = exact.gather(1, torch.from_numpy(scores.topk_ids).long())
    assert np.abs(scores.topk_logprobs - gathered.numpy()).max() <= 1e-4
    assert np.abs(scores.topk_logprobs - exact.topk(64).values.numpy()).max() <= 1e-4


def test_what_is_in_the_prefix_cache_is_scored_too(teacher_engine, teacher, round_dir):
    """vLLM returns memory that nobody wrote where it reads its cache. Contexts may be cached; the
    tokens to score may not, whether they were generated or scored before."""
    row = max(kept(round_dir), key=lambda row: len(row["teacher_prompt_ids"]))
    # Longer than a block of the cache, which has 128 tokens on a CPU.
    context = row["teacher_prompt_ids"]
    assert len(context) > 128
    sampling = SamplingConfig(max_tokens=200, temperature=0)
    for key in "ab":
        teacher_engine.submit_generate(key, context, sampling, 0)
    generated = drained(teacher_engine)["b"].token_ids
    # So long that whole blocks of them are in the cache.
    targets = [generated * (300 // len(generated) + 1), row["input_ids"][row["loss_start"] :]]
    for target in (*targets, *targets):
        teacher_engine.submit_score("s", context, target, 8)
        scores = drained(teacher_engine)["s"]
        exact = logprobs_of(teacher, context + target, len(context))
        assert np.abs(scores.topk_logprobs - exact.topk(8).values.numpy()).max() <= 1e-4
        at = torch.arange(len(target))
        assert np.abs(scores.target_logprobs - exact[at, target].numpy()).max() <= 1e-4


def test_scores_of_what_is_written_are_those_of_a_second_pass(teacher_engine, round_dir):
    """To 1e-4 in float32, whatever the sampling does to the distribution that is sampled from."""
    row = kept(round_dir)[0]
    context = row["teacher_prompt_ids"]
    for key, sampling in (
        ("greedy", SamplingConfig(max_tokens=200, temperature=0)),
        ("warm", SamplingConfig(max_tokens=200, temperature=1.5, top_p=0.9, min_p=0.01)),
        ("penal", SamplingConfig(max_tokens=200, presence_penalty=1, repetition_penalty=1.2)),
    ):
        teacher_engine.submit_generate(key, context, sampling, 3, k=64)
        written = drained(teacher_engine)[key]
        teacher_engine.submit_score(key, context, written.token_ids, 64)
        second = drained(teacher_engine)[key]
        assert written.scores.topk_ids.shape == (len(written.token_ids), 64)
        for name in ("topk_logprobs", "target_logprobs"):
            difference = getattr(written.scores, name) - getattr(second, name)
            assert np.abs(difference).max() <= 1e-4
        # Equal ones may change places.
        assert (written.scores.topk_ids == second.topk_ids).mean() > 0.99


def test_no_second_pass_where_the_teachers_turn_is_the_trace(round_dir):
    speed = RoundDir(round_dir).run_info()["stages"]["distill"]["speed"]
    assert speed["scored_while_writing"] == speed["kept"] == len(kept(round_dir))


def test_a_trace_of_other_tokens_is_scored_by_itself(round_dir, teacher, tmp_path):
    """The layout puts another word in place of the teacher's, so the trace has as many tokens as
    its turn and not the same ones."""
    text = TEMPLATE.read_text().replace("<think> (?P", "<think> plan (?P")
    template = tmp_path / "other.toml"
    template.write_text(text.replace("<think> {{", "<think> check {{"))
    out = without_rewrites(round_dir, tmp_path / "r")
    words = rewrite_arguments(out, **{"--template": template})
    run("mpd-gen", *words, "--limit", 20)
    found = kept(out)
    assert len(found) > 5
    assert RoundDir(out).run_info()["stages"]["distill"]["speed"]["scored_while_writing"] == 0
    for row in found[:3]:
        context, target = row["teacher_prompt_ids"], row["input_ids"][row["loss_start"] :]
        exact = logprobs_of(teacher, context + target, len(context))
        ids = torch.tensor(row["topk_ids"]).view(len(target), -1)
        stored = torch.tensor(row["topk_logprobs"], dtype=torch.float64).view_as(ids)
        expected = exact.gather(1, ids)
        assert ((stored - expected).abs() <= 2**-11 * expected.abs() + 1e-4).all()


def test_the_longest_drafts_are_begun_first(teacher_engine, round_dir, tmp_path):
    """Among those that a limit leaves. Rows do not depend on the order."""
    out = without_rewrites(round_dir, tmp_path / "r")
    begun = []

    class Recorded:
        def __getattr__(self, name):
            return getattr(teacher_engine, name)

        def submit_generate(self, key, *given, **named):
            begun.append(key)
            teacher_engine.submit_generate(key, *given, **named)

        def close(self):
            pass

    config = RewriteConfig(
        teacher=str(TEACHER), shards=out, template=str(TEMPLATE), score_context="rewrite",
        engine={"dtype": "float32"}, sampling={"max_tokens": 200},
    )  # fmt: skip
    outcome = distill(setup(config), limit=20, start=lambda *_: Recorded())
    written = rows(out, "distill")
    first = itertools.islice(RoundDir(round_dir).rows("rollouts", ["row_id"]), 20)
    assert set(written["rollout_id"]) == {row["row_id"] for row in first}
    assert len(begun) >= 10
    lengths = dict(written.select("row_id", "num_original_tokens").iter_rows())
    assert [lengths[key] for key in begun] == sorted(map(lengths.get, begun), reverse=True)
    same = rows(round_dir, "distill").filter(pl.col("row_id").is_in(written["row_id"].implode()))
    assert same.select("row_id", "rewrite").equals(written.select("row_id", "rewrite"))
    assert outcome.remaining == 220


def test_the_time_with_few_requests_is_recorded(tmp_path, monkeypatch):
    monkeypatch.setattr("mpd_data.store.progress._SECONDS_PER_LOOK", 0)
    with Progress("rollouts", 3, tmp_path / "status" / "rollouts.json") as progress:
        progress.engine_started()
        # Four is half of the most, so it is not less.
        for running in (8, 8, 4, 3, 1):
            progress.tick(8, lambda: (running, 10))  # noqa: B023
        progress.update(100, 0)
        assert progress.speed("vllm")["half_empty"] == 0.4


@pytest.mark.parametrize("index", range(5))
def test_stored_records_equal_transformers(teacher, round_dir, index):
    """Position by position under the context the shard says, end token included."""
    row = kept(round_dir)[index * 7]
    metadata = read_metadata(RoundDir(round_dir).shard_paths("distill")[0])
    k = metadata["num_logprobs"]
    context, target = row["teacher_prompt_ids"], row["input_ids"][row["loss_start"] :]
    assert target[-1] == metadata["eos_token_id"]
    exact = logprobs_of(teacher, context + target, len(context))
    ids = torch.tensor(row["topk_ids"]).view(len(target), k)
    stored = torch.tensor(row["topk_logprobs"], dtype=torch.float64).view(len(target), k)
    expected = exact.gather(1, ids)
    assert ((stored - expected).abs() <= 2**-11 * expected.abs() + 1e-4).all()
    outside = torch.ones_like(exact, dtype=torch.bool).scatter(1, ids, False)
    tail = exact.masked_fill(~outside, float("-inf")).logsumexp(1)
    stored_tail = torch.tensor(row["tail_logprobs"], dtype=torch.float64)
    # Where float32 cannot resolve the tail it is bounded, not known: compare masses.
    assert ((stored_tail.exp() - tail.exp()).abs() <= 1e-3 * tail.exp() + 1e-6).all()


def test_the_teacher_knows_where_a_rewrite_ends(round_dir):
    """Under the rewrite prompt the trace is the whole of the teacher's turn, so that the end
    token gets its due: a wrapper after the trace would teach the student not to stop."""
    k = read_metadata(RoundDir(round_dir).shard_paths("distill")[0])["num_logprobs"]
    ends = [row["topk_logprobs"][-k] for row in kept(round_dir)]
    tops = [row["topk_ids"][-k] == row["input_ids"][-1] for row in kept(round_dir)]
    assert np.mean(tops) > 0.99
    assert np.mean(np.exp(ends)) > 0.9


def test_rewrite_prompt_is_the_templates(round_dir):
    tokenizer = load_tokenizer(resolve_model(str(TEACHER)))
    rollouts = {row["row_id"]: row for row in rows(round_dir).to_dicts()}
    for row in kept(round_dir)[:5]:
        rollout = rollouts[row["rollout_id"]]
        message = load_template(TEMPLATE).message(rollout["problem"], rollout["completion"])
        assert row["teacher_prompt_ids"] == ChatFormatter(tokenizer).render(message)[1]
        assert row["input_ids"][: row["loss_start"]] == rollout["prompt_ids"]
        assert row["num_rewritten_tokens"] <= rollout["num_completion_tokens"]
        assert row["rewrite_answer"] == rollout["answer"] == rollout["gold_answer"]


@pytest.mark.slow
def test_problem_context_scores_the_students_prompt(round_dir, teacher, tmp_path):
    """The same rewrites, scored the paper's way."""
    other = without_rewrites(round_dir, tmp_path / "round1")
    run("mpd-gen", *rewrite_arguments(other, **{"--score-context": "problem"}))
    found = kept(other)
    assert [r["input_ids"] for r in found] == [r["input_ids"] for r in kept(round_dir)]
    row = found[3]
    assert row["teacher_prompt_ids"] is None
    exact = logprobs_of(teacher, row["input_ids"], row["loss_start"])
    ids = torch.tensor(row["topk_ids"]).view(len(exact), -1)
    stored = torch.tensor(row["topk_logprobs"], dtype=torch.float64).view_as(ids)
    expected = exact.gather(1, ids)
    assert ((stored - expected).abs() <= 2**-11 * expected.abs() + 1e-4).all()


def test_rows_do_not_depend_on_order_or_company(teacher_engine):
    """Seeds come from keys: the same request gives the same tokens whatever runs beside it."""
    tokenizer = load_tokenizer(resolve_model(str(STUDENT)))
    formatter = ChatFormatter(tokenizer)
    ids = [formatter.render(f"Dan has {i} shells .")[1] for i in range(10, 20)]
    sampling = SamplingConfig(max_tokens=40)

    def sample(order):
        for i in order:
            teacher_engine.submit_generate(str(i), ids[i], sampling, 1000 + i)
        return {key: result.token_ids for key, result in drained(teacher_engine).items()}

    together, backwards = sample(range(10)), sample(reversed(range(10)))
    assert together == backwards
    assert sample([4])["4"] == together["4"]
    assert len({tuple(tokens) for tokens in together.values()}) > 1


def test_an_over_long_request_is_refused_alone(teacher_engine):
    sampling = SamplingConfig(max_tokens=4)
    teacher_engine.submit_generate("short", [1, 5, 6], sampling, 0)
    with pytest.raises(RequestError):
        teacher_engine.submit_generate("long", [5] * 5000, sampling, 0)
    assert drained(teacher_engine).keys() == {"short"}


def test_tail_of_peaked_distributions_is_never_zero_or_positive():
    rng = np.random.default_rng(0)
    for scale in (1, 10, 40):
        logits = rng.normal(size=(200, 500)) * scale
        exact = logits - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1))[:, None]
        exact -= logits.max(1, keepdims=True)
        top = -np.sort(-exact, axis=1)[:, :64]
        tail = tail_logprobs(top.astype(np.float32), 500)
        assert np.isfinite(tail).all()
        assert (tail < 0).all()
        truth = np.log(np.exp(-np.sort(-exact, axis=1)[:, 64:]).sum(1))
        resolved = truth > -12
        assert np.abs(tail - truth)[resolved].max(initial=0) < 0.05
        assert (np.abs(np.exp(tail) - np.exp(truth)) < 1e-5).all()


def test_what_padding_rows_took_is_given_back():
    p = np.array([[0.5, 0.2, 0.1, 0.05], [0.4, 0.3, 0.2, 0.06]], np.float32)
    ids, logprobs = drop_padding(np.array([[9, 3, 8, 1], [2, 0, 4, 5]]), np.log(p), 2, 8)
    assert ids.tolist() == [[3, 1], [2, 0]]
    assert np.exp(logprobs) == pytest.approx(np.array([[0.5, 0.125], [0.4, 0.3]]))


def test_no_tail_where_k_is_the_vocabulary():
    assert np.isneginf(tail_logprobs(np.log(np.full((2, 4), 0.25, np.float32)), 4)).all()


def test_float16_rounding_keeps_order_and_infinity():
    stored = as_float16(np.array([-1e-6, -3.0, -1e9, -np.inf]))
    assert stored.dtype == np.float16
    assert np.isfinite(stored[:3]).all()
    assert np.isneginf(stored[3])
