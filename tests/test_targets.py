"""Rewrites that are scored with the draft in view and without it, and what is trained on."""

import json
import shutil
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch
from conftest import (
    SCORES,
    STUDENT,
    TEACHER,
    assert_near,
    edit_rows,
    metrics,
    rewrite_arguments,
    rows,
    run,
    train_config,
    without_rewrites,
)
from transformers import AutoModelForCausalLM

from mpd_data.common.errors import ConfigError, DataError
from mpd_data.common.models import load_tokenizer, resolve_model
from mpd_data.inspect.validate import validate_round
from mpd_data.store.schema import WITH_DRAFT
from mpd_train.config import LossConfig
from mpd_train.data.batches import load_pack
from mpd_train.data.packing import make_packs
from mpd_train.data.shard_set import ShardSet
from mpd_train.data.targets import Record, Targets, given_away
from mpd_train.loop import train
from mpd_train.loss import pack_loss
from mpd_train.model.causal_lm import CausalLM
from mpd_train.setup import setup

CPU = torch.device("cpu")
# The pocket teacher works its numbers out: the draft makes it only a little surer of them.
LEAK = {"leak_nats": 0.005}


def kept(round_dir):
    return rows(round_dir, "distill").filter(pl.col("status") == "ok")


# -- scoring --------------------------------------------------------------------------------


def test_each_kept_rewrite_is_scored_in_both_contexts(both_dir, round_dir):
    assert validate_round(both_dir) == []
    ours, theirs = kept(both_dir), kept(round_dir)
    drafts = [WITH_DRAFT + name for name in SCORES]
    assert ours.drop(*SCORES, *drafts).equals(theirs.drop(*SCORES, *drafts))
    with_draft = ours.select(pl.col(drafts).name.map(lambda x: x.removeprefix(WITH_DRAFT)))
    assert_near(with_draft, theirs)
    ratio = ours["compression_ratio"]
    # Of those that were scored when they were made, and of those that the refilter let in.
    model = AutoModelForCausalLM.from_pretrained(TEACHER, dtype=torch.float32).eval()
    for row in (
        ours.row(int(ratio.arg_min()), named=True),
        ours.row(int(ratio.arg_max()), named=True),
    ):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row["input_ids"]])).logits
        exact = logits[0, row["loss_start"] - 1 : -1].double().log_softmax(-1)
        ids = torch.tensor(row["topk_ids"]).view(len(exact), -1)
        stored = torch.tensor(row["topk_logprobs"], dtype=torch.float64).view_as(ids)
        expected = exact.gather(1, ids)
        assert ((stored - expected).abs() <= 2**-11 * expected.abs() + 1e-4).all()


BREACHES = {
    "but ids, counts or": {"draft_tail_logprobs": lambda x: None},
    "draft_topk_ids: an id occurs": {"draft_topk_ids": lambda x: [x[1], *x[1:]]},
    "and draft_tail_logprobs: the": {"draft_tail_logprobs": lambda x: [-0.5, *x[1:]]},
    "draft_topk_logprobs and": {"draft_topk_ids": lambda x: x[:-1]},
    "contradict 'both'": {"teacher_prompt_ids": lambda x: None},
}


def test_validate_checks_both_scores(both_dir, tmp_path):
    broken, breaches = shutil.copytree(both_dir, tmp_path / "r"), iter(BREACHES.values())

    def break_next(row):
        if row["status"] == "ok":
            for name, change in next(breaches, {}).items():
                row[name] = change(row[name])

    edit_rows(broken, "distill", break_next)
    found = validate_round(broken)
    for message in BREACHES:
        assert any(message in problem for problem in found), (message, found)


def test_a_second_score_in_a_round_of_one_context_is_a_breach(round_dir, tmp_path):
    broken = shutil.copytree(round_dir, tmp_path / "r")
    edit_rows(
        broken, "distill",
        lambda row: row.update({WITH_DRAFT + name: row[name] for name in SCORES}),
    )  # fmt: skip
    assert any("draft_* columns contradict" in problem for problem in validate_round(broken))


@pytest.mark.slow
def test_a_plan_counts_the_second_score(round_dir, both_dir, tmp_path):
    fresh = without_rewrites(round_dir, tmp_path / "round1")

    def planned(context, *more):
        arguments = rewrite_arguments(fresh, **{"--score-context": context})
        return json.loads(run("mpd-gen", *arguments, *more, "--dry-run", "--json").stdout)

    one, two = (planned(context)["disk_bytes"] for context in ("rewrite", "both"))
    assert 1.6 * one < two < 2 * one
    looser = ["--refilter", "--max-ratio", 2, "--no-keep-answer", "--no-require-correct"]
    arguments = rewrite_arguments(both_dir, **{"--score-context": "both"})
    plan = json.loads(run("mpd-gen", *arguments, *looser, "--dry-run", "--json").stdout)
    frame = rows(both_dir, "distill")
    newly = frame.filter(
        pl.col("status").is_in(["answer_changed", "incorrect", "longer"])
        & (pl.col("compression_ratio") <= 2)
        & pl.col("topk_ids").is_null()
    )
    assert newly.height > 0
    assert plan["details"]["tokens to score"] == 2 * newly["num_rewritten_tokens"].sum()


# -- what the draft gave away ---------------------------------------------------------------


# Ids 7 and 9 spell numbers, 8 and 1 do not.
NUMBERS = np.isin(np.arange(10), [7, 9])
LAST = np.log(0.05)


def top_two(tops, tails):
    """Return a record whose best ids and log-probabilities are `tops`; id 1 is their second."""
    ids = np.array([[token, 1] for token, _ in tops])
    logprobs = np.array([[logprob, LAST] for _, logprob in tops], np.float16)
    return Record(ids, logprobs, np.array(tails, np.float16))


def test_only_what_is_certain_was_given_away():
    """Of a large vocabulary; the label is 7, and the teacher expects a number, 9 or 7."""
    cases = [
        # With the draft, without it: log-probabilities of the best id, and the tail; the answer.
        ((7, -0.1), (9, -0.5), -9.0, True),
        ((7, -0.1), (7, -0.6), -3.0, False),
        ((7, -1.5), (7, -0.1), -3.0, False),
        # Outside the problem's top K it is at most as probable as the last of them, or the tail.
        ((7, -2.5), (9, -0.2), -3.0, False),
        ((7, -2.5), (9, -0.2), -9.0, True),
        # Outside the rewrite's top K nothing is known to be given away.
        ((9, -0.1), (9, -0.1), -9.0, False),
    ]
    with_draft, without, tails, expected = zip(*cases, strict=True)
    rewrite, problem = top_two(with_draft, tails), top_two(without, tails)
    found = given_away(np.full(len(cases), 7), problem, rewrite, 1.0, NUMBERS)
    assert found.tolist() == list(expected)


@pytest.mark.parametrize(
    "label, expects, given",
    [
        (7, 9, True),  # another number
        (7, 8, False),  # no number: the place is what the rewrite prompt changed
        (8, 9, False),  # a word where a number was expected
        (8, 8, False),
    ],
)
def test_the_form_of_a_rewrite_is_not_given_away(label, expects, given):
    """The rewrite prompt makes the token sure, and without the draft it is nearly impossible."""
    rewrite, problem = top_two([(label, -0.01)], [-9.0]), top_two([(expects, -0.2)], [-9.0])
    if label == expects:
        problem = top_two([(1, -0.2)], [-9.0])
    assert given_away(np.array([label]), problem, rewrite, 1.0, NUMBERS).tolist() == [given]


def test_tokens_of_numbers_are_those_that_spell_digits_alone():
    tokenizer = load_tokenizer(resolve_model(str(STUDENT)))
    targets = Targets.of(LossConfig(targets="mixed"), "both", "here")
    numbers = targets.numbers(tokenizer, len(tokenizer) + 3)
    assert Targets.of(LossConfig(targets="problem"), "both", "here").numbers(tokenizer, 200) is None
    words = [tokenizer.decode([i]).strip() for i in np.flatnonzero(numbers)]
    assert sorted(map(int, words)) == list(range(60))
    assert len(numbers) == len(tokenizer) + 3
    assert not numbers[-3:].any()


# -- training -------------------------------------------------------------------------------


def loaded(model=STUDENT):
    return CausalLM(resolve_model(str(model)), CPU, torch.float32, False)


def read(folder, **loss):
    """Return the first two packs' batches, the vocabulary's size and the loss' settings."""
    settings = LossConfig(**loss)
    shards = ShardSet([folder], settings, load_tokenizer(resolve_model(str(STUDENT))))
    packs = make_packs(shards, 600, 0, 0)[:2]
    return [load_pack(shards, pack) for pack in packs], shards.metadata["vocab_size"], settings


def naive(student, batches, vocab):
    """Return the mean divergence of tokens with weight, straight from the definition."""
    total = weight = 0.0
    for batch in batches:
        states = student.states(batch.input_ids, batch.position_ids)[0, batch.loss_positions]
        log_q = (states @ student.head(vocab).T).log_softmax(-1)
        q_tail = log_q.scatter(1, batch.topk_ids, -torch.inf).logsumexp(1, keepdim=True)
        log_q = torch.cat([log_q.gather(1, batch.topk_ids), q_tail], 1)
        log_p = torch.cat([batch.topk_logprobs, batch.tail_logprobs[:, None]], 1).log_softmax(1)
        of_tokens = (log_p.exp() * (log_p - log_q)).sum(1)
        total = total + (of_tokens * batch.weights).sum()
        weight += batch.weights.sum()
    return total / weight


@pytest.mark.parametrize("name", ["problem", "rewrite", "mixed", "masked"])
def test_targets_are_those_asked_for(both_dir, tmp_path, name):
    """A step of two packs, against the loss and the gradient by the definition."""
    more = LEAK if name in ("mixed", "masked") else {}
    batches, vocab, loss = read(both_dir, targets=name, **more)
    train(
        train_config(
            both_dir,
            STUDENT,
            tmp_path / "run",
            max_steps=1,
            gradient_accumulation_steps=2,
            loss=loss,
        )
    )
    (step,) = metrics(tmp_path / "run")
    student = loaded()
    expected = naive(student, batches, vocab)
    expected.backward()
    norm = torch.stack([p.grad.norm() for p in student.model.parameters()]).norm()
    assert step["loss"] == pytest.approx(expected.item(), rel=1e-4)
    assert step["kl"] == pytest.approx(expected.item(), rel=1e-4)
    assert step["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    given = torch.cat([batch.given_away for batch in batches])
    if not more:
        assert "given_away" not in step
        return
    assert step["given_away"] == pytest.approx(given.mean().item())
    assert 0.01 < given.mean() < 0.5
    # By a higher threshold, by default 1, less was given away.
    usual, one = (read(both_dir, targets=name, **x)[0] for x in ({}, {"leak_nats": 1.0}))
    assert sum(batch.given_away.sum() for batch in usual) < given.sum()
    assert all(torch.equal(a.given_away, b.given_away) for a, b in zip(usual, one, strict=True))
    # Each token is taught by the one record or the other.
    problem, rewrite = (read(both_dir, targets=x)[0] for x in ("problem", "rewrite"))
    for batch, without, with_draft in zip(batches, problem, rewrite, strict=True):
        at = batch.given_away.bool()
        for field in SCORES:
            one, other = (getattr(x, field) for x in (without, with_draft))
            chosen = torch.where(at[:, None] if one.dim() > 1 else at, one, other)
            assert torch.equal(getattr(batch, field), other if name == "masked" else chosen)
        assert torch.equal(
            batch.weights, 1 - batch.given_away if name == "masked" else at * 0.0 + 1
        )


def test_both_contexts_ask_which_and_the_problem_needs_its_own_columns_alone(both_dir, tmp_path):
    with pytest.raises(ConfigError, match="--targets: .* scored in both contexts"):
        read(both_dir)
    for batch in read(both_dir, targets="problem")[0]:
        # A teacher in the process reads the problem too.
        assert torch.equal(batch.teacher_input_ids, batch.input_ids)
    broken = shutil.copytree(both_dir, tmp_path / "r")
    edit_rows(broken, "distill", lambda row: row.update(draft_topk_ids=None))
    assert len(read(broken, targets="problem")[0]) == 2
    with pytest.raises(DataError, match="0 draft_topk_ids, .* Check the round"):
        read(broken, targets="mixed")


def test_a_masked_token_teaches_nothing(both_dir):
    (batch, _), vocab, loss = read(both_dir, targets="masked", **LEAK)
    masked = batch.weights == 0
    assert 0 < masked.sum() < len(masked)
    student, teacher = loaded(), loaded(TEACHER)
    ids, logprobs = batch.topk_ids.clone(), batch.topk_logprobs.clone()
    ids[masked] = ids[masked].flip(1)
    logprobs[masked, 0] = -20.0
    other = replace(batch, topk_ids=ids, topk_logprobs=logprobs)
    for taught in (None, teacher):
        found = []
        for each in (batch, other):
            student.model.zero_grad()
            value = pack_loss(student, taught, each, vocab, loss, 100.0).loss
            value.backward()
            found.append((value, student.head().grad.clone()))
        assert torch.equal(found[0][0], found[1][0])
        assert torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"loss": {"targets": "mixed"}}, "scored in one context, 'rewrite'"),
        ({"loss": {"targets": "problem"}}, "scored in one context, 'rewrite'"),
        ({"loss": {"leak_nats": 1.0}}, "--leak-nats: give --targets"),
        ({"loss": {"targets": "mixed"}, "teacher": str(TEACHER)}, "one distribution"),
        ({"loss": {"divergence_clip": 1.0, "entry_clip": 1.0}}, "two clips"),
    ],
)
def test_targets_that_are_not_there_are_refused(round_dir, tmp_path, settings, message):
    with pytest.raises(ConfigError, match=message):
        setup(train_config(round_dir, STUDENT, tmp_path / "run", **settings))
    assert ShardSet([round_dir], LossConfig(targets="rewrite")).num_rows > 0
