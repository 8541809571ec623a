"""What each setting of rollouts and rewrite does, checked in the rows that the stages write.

The stages run in this process: vLLM is loaded once, and an engine then starts in two seconds.
"""

import json
import shutil
import sys
from collections import defaultdict

import polars as pl
import pyarrow.parquet as pq
import pytest
import torch
from conftest import (
    SCORES,
    STUDENT,
    TEACHER,
    TEMPLATE,
    assert_near,
    invoke,
    model_with,
    other_tokenizer,
    python,
    rewrite_arguments,
    rows,
    run,
    slow,
    write_jsonl,
)
from hub import Hub
from transformers import AutoModelForCausalLM

from mpd_data import rewrite_setup
from mpd_data.cli import cli
from mpd_data.common.errors import ConfigError, EngineError, MPDError
from mpd_data.common.models import load_tokenizer, resolve_model
from mpd_data.config import EngineConfig, FilterConfig, RewriteConfig, RolloutsConfig
from mpd_data.dryrun.refilter import plan_refilter
from mpd_data.dryrun.rewrite import plan_rewrite
from mpd_data.engines.start import start_engine
from mpd_data.inspect.validate import validate_round
from mpd_data.prompts.budget import Budget
from mpd_data.rewrite import Group, run_rewrite
from mpd_data.rollouts import run_rollouts, sample, setup
from mpd_data.select.pass_rates import PassRates
from mpd_data.select.refilter import run_refilter
from mpd_data.store.round import RoundDir
from mpd_data.store.shards import read_metadata
from mpd_data.store.writer import ShardWriter

ENGINE = {"dtype": "float32", "max_num_seqs": 16, "kv_cache_gib": 0.25}


def sampled(prompts, out, **changed):
    """Sample rollouts of four problems and return them."""
    settings = {"num_prompts": 4, "sampling": {"max_tokens": 250}, "engine": ENGINE}
    settings |= {"model": str(STUDENT), "id_column": "id", "answer_column": "answer"}
    run_rollouts(RolloutsConfig(prompts=[str(prompts)], out=out, **{**settings, **changed}))
    return rows(out, "rollouts")


def rewritten(drafts, out, **changed):
    """Rewrite the rollouts of a copy of `drafts` and return the rewrites."""
    shutil.copytree(drafts, out)
    run_rewrite(rewriting(out, template=str(TEMPLATE), **changed))
    return rows(out, "distill")


def rewriting(out, **changed):
    settings = {"score_context": "rewrite", "sampling": {"max_tokens": 200}, "engine": ENGINE}
    return RewriteConfig(shards=out, **{"teacher": str(TEACHER), **settings, **changed})


@pytest.fixture(scope="module")
def drafts(prompts, tmp_path_factory):
    """Two rollouts of each of six problems, none of them cut off."""
    out = tmp_path_factory.mktemp("drafts") / "round1"
    frame = sampled(prompts, out, num_prompts=6, num_samples=2, sampling={"max_tokens": 400})
    assert set(frame["finish_reason"]) == {"stop"}
    return out


@pytest.fixture
def engines(monkeypatch):
    """The vLLM engines that the test starts."""
    import vllm

    started = []

    class Seen(vllm.LLM):
        def __init__(self, *arguments, **settings):
            super().__init__(*arguments, **settings)
            started.append(self)

    monkeypatch.setattr(vllm, "LLM", Seen)
    return started


# -- rollouts -------------------------------------------------------------------------------


def test_rollouts_take_what_they_are_told(tmp_path):
    problems = [
        {"key": f"k{i}", "text": f"Dan has {20 + i} shells .", "gold": i, "family": "f"}
        for i in range(6)
    ]
    file = write_jsonl(tmp_path / "p.jsonl", [*problems, problems[0] | {"text": "again"}])
    examples = write_jsonl(tmp_path / "e.jsonl", [{"text": "1 + 1 ?", "done": "answer 2"}])
    suffix = "{{ word }}{% if enable_thinking %}thinks{% else %}says{% endif %}"
    student = str(model_with(tmp_path / "student", STUDENT, suffix))
    out = tmp_path / "r"
    frame = sampled(
        file,
        out,
        model=student,
        round=3,
        num_samples=2,
        num_prompts=4,
        prompt_column="text",
        id_column="key",
        answer_column="gold",
        metadata_columns=["family"],
        duplicates="first",
        prompt_template="{{problem}} now !",
        system_prompt="be brief",
        examples=examples,
        examples_column="done",
        thinking="off",
        template_kwargs={"word": "zebra"},
        sampling={"max_tokens": 5},
        output={"rows_per_shard": 3},
    )
    by_key = {problem["key"]: problem for problem in problems}
    assert frame["prompt_id"].n_unique() == 4
    assert frame.height == 8
    for row in frame.to_dicts():
        problem = by_key[row["prompt_id"]]
        assert row["problem"] == problem["text"]
        assert row["gold_answer"] == str(problem["gold"])
        assert json.loads(row["metadata"]) == {"family": "f"}
        assert row["round"] == 3
        order = ["be brief", "1 + 1 ?", "answer 2", problem["text"] + " now !", "zebra", "says"]
        places = [row["prompt"].rindex(part) for part in order]
        assert places == sorted(places)
        assert row["finish_reason"] == "length"
        assert row["num_completion_tokens"] == 5
    assert [shard.rows for shard in RoundDir(out).manifest("rollouts")] == [3, 3, 2]


def test_a_student_answers_at_its_token_budget(prompts, tmp_path):
    """What it said until then is what it says without one; then it is asked, and goes on."""
    settings = {"num_prompts": 8, "answer_formats": ["phrase"]}
    free = sampled(
        prompts, tmp_path / "a", sampling={"temperature": 0, "max_tokens": 400}, **settings
    )
    limit, text = 100, "answer"
    assert free["num_completion_tokens"].min() <= limit < free["num_completion_tokens"].max()
    frame = sampled(
        prompts, tmp_path / "b", token_budget=limit, budget_text=text,
        sampling={"temperature": 0, "max_tokens": 400}, **settings,
    )  # fmt: skip
    before = {row["prompt_id"]: row for row in free.to_dicts()}
    for row in frame.to_dicts():
        was = before[row["prompt_id"]]
        if was["num_completion_tokens"] <= limit:
            assert row["completion_ids"] == was["completion_ids"]
            continue
        assert row["completion_ids"][:limit] == was["completion_ids"][:limit]
        said = row["completion"].split()
        assert said[: limit + 1] == [*was["completion"].split()[:limit], text]
        assert len(row["completion_ids"]) == row["num_completion_tokens"] > limit + 1
        assert row["finish_reason"] == "stop"
        assert row["answer"] is not None


def test_the_rest_of_a_sample_has_the_room_that_is_left_and_numbers_of_its_own(prompts, tmp_path):
    """A sample that goes on at its token budget is asked for in two pieces."""
    asked = defaultdict(list)

    class Recorded:
        def __init__(self, *given):
            self._engine = start_engine(*given)

        def __getattr__(self, name):
            return getattr(self._engine, name)

        def submit_generate(self, key, prompt_ids, sampling, seed, *more):
            asked[key].append((len(prompt_ids), sampling.max_tokens, seed))
            self._engine.submit_generate(key, prompt_ids, sampling, seed, *more)

    config = RolloutsConfig(
        model=str(STUDENT), prompts=[str(prompts)], id_column="id", num_prompts=6,
        out=tmp_path / "r", token_budget=20, budget_text="answer", sampling={"max_tokens": 40},
        engine=ENGINE | {"backend": "transformers"},
    )  # fmt: skip
    sample(setup(config), start=Recorded)
    assert len(asked) == 6
    for first, rest in asked.values():
        assert first[1] == 20
        # The prompt of the rest has what was said and the text that asks for the answer.
        assert rest[0] - first[0] + rest[1] == 40
        assert rest[2] != first[2]
    assert rows(config.out)["num_completion_tokens"].max() <= 40


def test_thinking_that_has_ended_is_not_ended_again():
    thinks, answers = Budget(3, [7], thinks=True), Budget(3, [7], thinks=False)
    assert thinks.continuation([1, 2, 3], "<think> 1 + 1") == [1, 2, 3, 7]
    assert thinks.continuation([1, 2, 3], "1 </think> 2") == [1, 2, 3]
    assert answers.continuation([1, 2, 3], "1 </think> 2") == [1, 2, 3, 7]


@pytest.mark.parametrize(
    "settings, message",
    [
        ({}, "boxed.*the tokenizer cannot spell it"),
        ({"thinking": "on"}, "</think>.*the tokenizer cannot spell it"),
        ({"thinking": "off"}, "boxed.*the tokenizer cannot spell it"),
        ({"budget_text": "answer is now", "sampling": {"max_tokens": 12}}, "the 3 tokens of"),
    ],
)
def test_a_token_budget_needs_a_text_and_room(prompts, tmp_path, settings, message):
    student = STUDENT
    if "thinking" in settings:
        switch = "{% if enable_thinking %}{% endif %}"
        student = model_with(tmp_path / "s", STUDENT, switch)
    config = RolloutsConfig(
        model=str(student), prompts=[str(prompts)], out=tmp_path / "r", token_budget=9, **settings
    )
    with pytest.raises(ConfigError, match=message):
        setup(config)


@pytest.mark.parametrize("backend", ["vllm", "transformers"])
def test_stop_strings_end_a_sample(prompts, tmp_path, backend):
    engine = ENGINE | {"backend": backend}
    told = {"max_tokens": 250, "temperature": 0.0}
    whole, cut = (
        sampled(prompts, tmp_path / f"r{len(stop)}", engine=engine, sampling={**told, "stop": stop})
        for stop in ([], ["second", "Wed :"])
    )
    assert validate_round(tmp_path / "r2") == []
    shortened = 0
    pairs = zip(*(frame.sort("prompt").rows(named=True) for frame in (whole, cut)), strict=True)
    for old, new in pairs:
        found = [old["completion"].find(one) for one in ("second", "Wed :")]
        at = min((place for place in found if place >= 0), default=None)
        assert new["completion"].strip() == old["completion"][:at].strip()
        if at is not None:
            shortened += 1
            assert new["finish_reason"] == "stop"
            assert new["completion_ids"][-1] == old["completion_ids"][-1] == 2
            assert (
                new["completion_ids"][:-1]
                == old["completion_ids"][: len(new["completion_ids"]) - 1]
            )
    assert shortened > 0
    # They decide what a row is.
    assert not set(whole["row_id"]) & set(cut["row_id"])


@pytest.mark.parametrize("formats, found", [(["hashes"], False), (["phrase", "hashes"], True)])
def test_answers_are_read_in_the_declared_formats_only(prompts, tmp_path, formats, found):
    """The student writes "answer 7", which is the format `phrase`."""
    frame = sampled(prompts, tmp_path / "r", answer_formats=formats)
    ended = frame.filter(pl.col("finish_reason") == "stop")
    assert ended.height > 1
    assert ended["answer"].is_not_null().to_list() == [found] * ended.height
    assert found or set(ended["is_correct"]) == {False}
    assert ended["repetition"].is_between(0, 1, closed="left").all()


ONE_TOKEN = [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}]


@pytest.fixture(scope="module")
def greedy():
    """Return a function that continues ids greedily, in transformers."""
    model = AutoModelForCausalLM.from_pretrained(STUDENT, dtype=torch.float32).eval()

    def complete(prompt_ids):
        ids = torch.tensor([prompt_ids])
        mask = torch.ones_like(ids)
        found = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=250)
        return found[0, len(prompt_ids) :].tolist()

    return complete


@pytest.mark.parametrize(
    "sampling",
    [{"temperature": 0}, *(slow({"temperature": 2, **one}) for one in ONE_TOKEN)],
    ids=["temperature", *(next(iter(one)) for one in ONE_TOKEN)],
)
def test_greedy_by_each_of_four_ways(prompts, tmp_path, greedy, sampling):
    frame = sampled(prompts, tmp_path / "r", sampling={"max_tokens": 250, **sampling})
    for row in frame.to_dicts():
        assert row["completion_ids"] == greedy(row["prompt_ids"])


def test_the_seed_decides_prompts_and_samples(prompts, tmp_path):
    found = [sampled(prompts, tmp_path / str(seed), seed=seed) for seed in (0, 1)]
    assert set(found[0]["prompt_id"]) != set(found[1]["prompt_id"])
    more = {"num_prompts": 60, "sampling": {"max_tokens": 20}}
    found = [sampled(prompts, tmp_path / f"all{seed}", seed=seed, **more) for seed in (0, 1)]
    assert not set(found[0]["row_id"]) & set(found[1]["row_id"])
    both = found[0].join(found[1], on="prompt_id")
    assert both.height == 60
    assert (both["completion_ids"] != both["completion_ids_right"]).sum() > 30


def test_shards_close_by_age(prompts, tmp_path):
    sampled(prompts, tmp_path / "r", sampling={"max_tokens": 5}, output={"seconds_per_shard": 1e-9})
    assert [shard.rows for shard in RoundDir(tmp_path / "r").manifest("rollouts")] == [1] * 4


CHECKER = """
import os
import time
from pathlib import Path

from mpd_data.checkers import Checker


class Own(Checker):
    # A worker takes no work before MPD_TEST_WORKERS of them have started.
    def prepare(self):
        here = Path(os.environ["MPD_TEST_FOLDER"])
        (here / str(os.getpid())).touch()
        until = time.monotonic() + 20
        while len(list(here.iterdir())) < int(os.environ["MPD_TEST_WORKERS"]):
            if time.monotonic() > until:
                raise RuntimeError("too few workers")
            time.sleep(0.01)

    def equal(self, answer, gold):
        time.sleep(float(os.environ["MPD_TEST_SLEEP"]))
        return True
"""


@pytest.fixture
def own_checker(tmp_path, monkeypatch):
    """Return a function that makes own:Own a checker which needs `workers` workers and takes
    `seconds` for a comparison. It returns a folder with one file for each worker that started."""
    (tmp_path / "own.py").write_text(CHECKER)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own", raising=False)

    def make(name, workers, seconds):
        folder = tmp_path / name
        folder.mkdir()
        monkeypatch.setenv("MPD_TEST_FOLDER", str(folder))
        monkeypatch.setenv("MPD_TEST_WORKERS", str(workers))
        monkeypatch.setenv("MPD_TEST_SLEEP", str(seconds))
        return folder

    return make


@pytest.mark.slow
def test_checks_have_their_processes_and_their_time(prompts, tmp_path, own_checker):
    """In both stages."""
    started = own_checker("rollouts", workers=3, seconds=60)
    checks = {"checker_timeout": 0.25, "checker_processes": 3}
    settings = {"checker": "own:Own", "checks": checks, "num_prompts": 8}
    frame = sampled(prompts, tmp_path / "a", **settings)
    ended = frame.filter(pl.col("finish_reason") == "stop")
    assert ended.height >= 4
    assert set(ended["check_error"]) == {"timed out after 0.25 s"}
    assert ended["is_correct"].not_().all()
    assert len(list(started.iterdir())) >= 3

    own_checker("quick", workers=0, seconds=0)
    patient = settings | {"checks": checks | {"checker_timeout": 30}}
    frame = sampled(prompts, tmp_path / "b", **patient)
    # It finds every answer right.
    assert frame.filter(pl.col("finish_reason") == "stop")["is_correct"].all()

    started = own_checker("rewrites", workers=3, seconds=60)
    frame = rewritten(tmp_path / "b", tmp_path / "c", checks=checks)
    failed = frame.filter(pl.col("status") == "check_failed")
    assert failed.height >= 4
    assert set(failed["check_error"]) == {"timed out after 0.25 s"}
    assert len(list(started.iterdir())) >= 3


def nothing_to_sample(folder):
    """Write prompts that all fail, so that no engine starts: they leave no room in the context."""
    return write_jsonl(folder / "long.jsonl", [{"problem": "how many ? " * 999}])


def test_overwrite_of_rollouts(tmp_path):
    arguments = [
        "rollouts", "--model", STUDENT, "--prompts", nothing_to_sample(tmp_path),
        "--out", tmp_path / "r", "--max-tokens", 9,
    ]  # fmt: skip
    assert invoke(cli, *arguments) == 3
    changed = [*arguments, "--seed", 1]
    with pytest.raises(ConfigError, match="seed: saved 0 / now 1"):
        invoke(cli, *changed)
    assert invoke(cli, *changed, "--overwrite") == 3
    assert rows(tmp_path / "r", "errors").height == 1


# -- rewrite --------------------------------------------------------------------------------


def test_rewrites_take_what_they_are_told(drafts, tmp_path):
    suffix = "{% if word is defined %}{{ word }}{% endif %}"
    out, teacher = tmp_path / "r", str(model_with(tmp_path / "teacher", TEACHER, suffix))
    told = {"score_template_kwargs": {"word": "shells"}, "output": {"rows_per_shard": 5}}
    frame = rewritten(drafts, out, teacher=teacher, num_logprobs=8, **told)
    assert [shard.rows for shard in RoundDir(out).manifest("distill")] == [5, 5, 2]
    kept = frame.filter(pl.col("status") == "ok")
    assert kept.height > 3
    tokenizer = load_tokenizer(resolve_model(str(TEACHER)))
    for row in kept.to_dicts():
        assert len(row["topk_ids"]) == 8 * row["num_rewritten_tokens"]
        # The scoring prompt is the rewrite prompt, with what its own settings put there.
        prompt = tokenizer.decode(row["teacher_prompt_ids"])
        assert "rewrite shorter" in prompt
        assert prompt.endswith("shells")


def test_the_teachers_template_has_its_own_settings(drafts, tmp_path):
    suffix = "{% if refuse is defined %}{{ raise_exception(refuse) }}{% endif %}"
    teacher = str(model_with(tmp_path / "teacher", TEACHER, suffix))
    shutil.copytree(drafts, tmp_path / "r")
    arguments = rewrite_arguments(tmp_path / "r", **{"--teacher": teacher})
    arguments += ["--template-kwargs", json.dumps({"refuse": "never so"})]
    with pytest.raises(MPDError, match="no rewrite was kept"):
        invoke(cli, *arguments)
    messages = rows(tmp_path / "r", "errors")["message"]
    assert messages.len() == 12
    assert messages.str.contains("never so").all()


def test_the_teacher_thinks_when_told(drafts, tmp_path):
    """By default it does not think, and this teacher fails then."""
    suffix = "{% if not enable_thinking %}{{ raise_exception('no') }}{% endif %}"
    teacher = str(model_with(tmp_path / "teacher", TEACHER, suffix))
    frame = rewritten(drafts, tmp_path / "r", teacher=teacher, thinking="on")
    assert frame.height == 12
    # Rows of both modes never mix.
    other = rewriting(tmp_path / "r", teacher=teacher, template=str(TEMPLATE))
    with pytest.raises(ConfigError, match="thinking: saved True / now False"):
        run_rewrite(other)


def test_thinking_that_never_closes_has_no_answer(prompts, tmp_path):
    """The student's chat template opens the thinking; neither model writes the closing tag."""
    for name, model, suffix in (
        ("student", STUDENT, "{% if add_generation_prompt %}<think>{% endif %}"),
        ("teacher", TEACHER, ""),
    ):
        folder = model_with(tmp_path / name, model, suffix)
        vocabulary = (folder / "tokenizer.json").read_text().replace("</think>", "<sep>")
        (folder / "tokenizer.json").write_text(vocabulary)
    engine, out = ENGINE | {"backend": "transformers"}, tmp_path / "r"
    drafts = sampled(prompts, out, model=str(tmp_path / "student"), num_prompts=3, engine=engine)
    assert set(drafts["finish_reason"]) == {"stop"}
    assert drafts["completion"].str.contains("<sep> answer").all()
    assert drafts["answer"].null_count() == 3
    assert not drafts["is_correct"].any()
    assert drafts["num_thinking_tokens"].equals(drafts["num_completion_tokens"])
    # A draft that never closes its thinking has a thinking part: `plain_trace` is not for it.
    layouts = TEMPLATE.read_text().replace("</think>", "<sep>") + 'plain_trace = "{{answer}}"'
    (tmp_path / "t.toml").write_text(layouts)
    told = {"teacher": str(tmp_path / "teacher"), "template": str(tmp_path / "t.toml")}
    run_rewrite(rewriting(out, engine=engine, **told))
    found = rows(out, "distill")
    assert set(found["status"]) == {"malformed"}
    assert found["rewrite"].str.contains("<sep> answer").all()


def texts(frame):
    return dict(frame.select("rollout_id", "rewrite").iter_rows())


@pytest.fixture(scope="module")
def greedy_rewrites(drafts, tmp_path_factory):
    return texts(rewritten(drafts, tmp_path_factory.mktemp("greedy") / "r"))


def test_rewrites_are_sampled_when_told(drafts, tmp_path, greedy_rewrites):
    sampling = {"max_tokens": 200, "temperature": 2}
    found = texts(rewritten(drafts, tmp_path / "r", sampling=sampling))
    assert found.keys() == greedy_rewrites.keys()
    # Even so hot, this teacher may write one as it would have anyway.
    assert sum(found[key] != rewrite for key, rewrite in greedy_rewrites.items()) > 6


@pytest.mark.parametrize("one", ONE_TOKEN, ids=[next(iter(one)) for one in ONE_TOKEN])
def test_a_choice_of_one_token_is_greedy(drafts, tmp_path, greedy_rewrites, one):
    sampling = {"max_tokens": 200, "temperature": 2, **one}
    assert texts(rewritten(drafts, tmp_path / "r", sampling=sampling)) == greedy_rewrites


def test_rewrites_are_cut_at_their_limit(drafts, tmp_path):
    frame = rewritten(drafts, tmp_path / "r", sampling={"max_tokens": 3})
    assert set(frame["status"]) == {"truncated"}
    assert set(frame["rewrite"].str.split(" ").list.len()) == {3}


def test_candidates_their_choice_and_their_seed(drafts, tmp_path):
    sampling = {"max_tokens": 200, "temperature": 1}
    told = {"num_candidates": 3, "choose": "all", "sampling": sampling}
    found = [rewritten(drafts, tmp_path / str(seed), seed=seed, **told) for seed in (0, 1)]
    for frame in found:
        assert frame.group_by("rollout_id").len()["len"].to_list() == [3] * 12
        kept = frame.filter(pl.col("status") == "ok")
        assert kept.group_by("rollout_id").len()["len"].max() > 1
    assert not set(found[0]["row_id"]) & set(found[1]["row_id"])
    both = found[0].join(found[1], on=["rollout_id", "candidate_idx"])
    assert (both["rewrite"] != both["rewrite_right"]).any()


def test_the_teacher_is_not_asked_about_drafts_of_the_other_kind(drafts, tmp_path):
    """The rows of the others are those of a round that asks about all, and no filter can later
    admit what was not rewritten."""
    whole = rewritten(drafts, tmp_path / "all")
    out = tmp_path / "some"
    asked = rewriting(
        shutil.copytree(drafts, out), template=str(TEMPLATE), filters={"drafts": "correct"}
    )
    plan = plan_rewrite(rewrite_setup.setup(asked, weights=False))
    run_rewrite(asked)
    frame = rows(out, "distill")
    wrong = ~pl.col("draft_is_correct")
    assert plan.details == {"not asked: draft_rejected": whole.filter(wrong).height}
    unasked = frame.filter(wrong)
    assert 0 < unasked.height < 12
    assert set(unasked["status"]) == {"draft_rejected"}
    assert unasked["rewrite"].null_count() == unasked["input_ids"].null_count() == unasked.height
    texts = ["row_id", "status", "rewrite", "input_ids"]
    assert frame.filter(~wrong).select(texts).equals(whole.filter(~wrong).select(texts))
    assert_near(frame.filter(~wrong), whole.filter(~wrong))
    run("mpd-gen", "validate", out)
    for kind in ("any", "incorrect"):
        message = f"--drafts {kind} admits {unasked.height} drafts"
        loosened = asked.model_copy(update={"filters": FilterConfig(drafts=kind)})
        for go in (run_refilter, plan_refilter):
            with pytest.raises(ConfigError, match=message):
                go(loosened)
    stricter = FilterConfig(drafts="correct", max_ratio=0.5)
    run_refilter(asked.model_copy(update={"filters": stricter}))
    again = rows(out, "distill")
    assert again.filter(wrong).equals(unasked)
    assert "longer" in set(again["status"])
    # A round that asked about all can do without some, and go back.
    everything = rewriting(tmp_path / "all", template=str(TEMPLATE))
    run_refilter(everything.model_copy(update={"filters": FilterConfig(drafts="correct")}))
    run_refilter(everything)
    assert rows(tmp_path / "all", "distill").equals(whole)


def test_shards_of_rewrites_close_by_age(drafts, tmp_path):
    out = tmp_path / "r"
    rewritten(drafts, out, sampling={"max_tokens": 3}, output={"seconds_per_shard": 1e-9})
    assert [shard.rows for shard in RoundDir(out).manifest("distill")] == [1] * 12


def test_each_rule_rejects_rewrites_of_a_round(round_dir, tmp_path):
    """A rewrite has the status of the first filter that rejects it."""
    out = shutil.copytree(round_dir, tmp_path / "r")
    rules = {"drafts": "correct", "max_ratio": 0.9, "min_ratio": 0.2, "max_repetition": 0.001}
    before = rows(out, "distill").filter(pl.col("status") == "ok")
    outcome = run_refilter(rewriting(out, filters=rules))
    assert set(outcome.statuses) > {"draft_rejected", "longer", "too_short", "repetitive"}
    ratio, repeated = pl.col("compression_ratio"), pl.col("repetition")
    kept = before.filter(ratio.is_between(0.2, 0.9) & (repeated <= 0.001)).height
    assert outcome.statuses["ok"] == kept > 0


@pytest.mark.slow
def test_a_rollout_waits_for_the_samples_of_its_prompt(drafts, prompts, tmp_path, capsys):
    """Its pass rate is that of all samples, whenever it is rewritten."""
    out = tmp_path / "r"
    asked = rewriting(out, template=str(TEMPLATE))
    settings = json.loads((drafts / "run.json").read_text())["stages"]["rollouts"]["details"]
    sampling = RolloutsConfig(**settings["config"] | {"out": out})
    run_rollouts(sampling, limit=3)
    outcome = run_rewrite(asked)
    assert (outcome.total, outcome.remaining) == (2, 0)
    assert "1 rollouts wait until all samples of their prompts are there" in capsys.readouterr().err
    plan = plan_rewrite(rewrite_setup.setup(asked, weights=False))
    assert (plan.rows, plan.committed, plan.remaining) == (3, 2, 0)
    assert plan.details["rollouts that wait for samples of their prompts"] == 1
    # The other sample has failed for good.
    last = rows(out, "rollouts").filter(pl.len().over("prompt_id") == 1).row(0, named=True)
    failed = {"row_id": last["row_id"], "prompt_id": last["prompt_id"], "message": "too long"}
    failed |= {"stage": "rollouts"}
    alone = shutil.copytree(out, tmp_path / "alone")
    round_dir = RoundDir(alone)
    with round_dir.lock("rollouts"), ShardWriter(round_dir, "errors", {}) as writer:
        writer.add(failed)
    rates = PassRates(round_dir, round_dir.shard_paths("rollouts"))
    # A sample that came after it had failed is counted once.
    assert set(rates.waiting) == {last["row_id"]}
    assert rates.of(last["prompt_id"]) is None
    with round_dir.lock("rollouts"), ShardWriter(round_dir, "errors", {}) as writer:
        writer.add(failed | {"row_id": "0" * 32})
    rates = PassRates(round_dir, round_dir.shard_paths("rollouts"))
    assert not rates.waiting
    assert rates.of(last["prompt_id"]) == float(last["is_correct"])
    run_rollouts(sampling)
    run_rewrite(asked)
    ours, theirs = rows(out, "distill"), rewritten(drafts, tmp_path / "whole")
    assert ours.drop(SCORES).equals(theirs.drop(SCORES))
    by_prompt = rows(drafts, "rollouts").group_by("prompt_id").agg(pl.col("is_correct").mean())
    both = ours.join(by_prompt, on="prompt_id")
    assert both["pass_rate"].to_list() == both["is_correct_right"].to_list()
    assert both["pass_rate"].n_unique() > 1


def test_hard_problems_get_the_room_they_are_given(round_dir, tmp_path):
    """Also in a round whose rewrites an older version made without the pass rate."""
    out = shutil.copytree(round_dir, tmp_path / "r")
    before = rows(out, "distill")
    for file in RoundDir(out).shard_paths("distill"):
        table = pq.read_table(file)
        pq.write_table(table.drop_columns(["pass_rate"]), file)
    RoundDir(out).manifest_path("distill").unlink()
    rules = {"max_ratio": 0.3, "max_ratio_hard": 0.9, "min_ratio": 0.1, "min_ratio_hard": 0.5}
    plan = plan_refilter(asked := rewriting(out, filters=rules))
    outcome = run_refilter(asked)
    after = rows(out, "distill")
    assert after["pass_rate"].equals(before["pass_rate"])
    counts = after["status"].value_counts().rows()
    assert all(plan.details[name].endswith(f"-> {count}") for name, count in counts)
    rate, ratio = pl.col("pass_rate").cast(pl.Float64), pl.col("compression_ratio")
    low, high = 0.5 - 0.4 * rate, 0.9 - 0.6 * rate
    kept = before.filter((pl.col("status") == "ok") & ratio.is_between(low - 1e-7, high + 1e-7))
    assert outcome.statuses["ok"] == kept.height > 0
    assert {"longer", "too_short"} < set(outcome.statuses)
    # Of one ratio, some are kept and some are not: by the pass rate.
    assert kept["compression_ratio"].max() > 0.3


def test_rules_that_are_dropped_let_rewrites_in(round_dir, tmp_path):
    out = shutil.copytree(round_dir, tmp_path / "r")
    run_refilter(rewriting(out, filters={"keep_answer": False, "require_correct": False}))
    kept = rows(out, "distill").filter(pl.col("status") == "ok")
    assert kept["topk_ids"].null_count() == 0
    assert kept.filter(pl.col("keeps_answer").not_()).height > 10
    assert kept.filter(pl.col("keeps_answer") & pl.col("is_correct").not_()).height > 0


def test_corrections_of_wrong_drafts_are_kept_when_told(round_dir, tmp_path):
    out = shutil.copytree(round_dir, tmp_path / "r")
    before = rows(out, "distill")
    run_refilter(rewriting(out, filters={"corrections": True}))
    kept = rows(out, "distill").filter(pl.col("status") == "ok")
    assert kept["is_correct"].all()
    corrected = kept.filter(pl.col("keeps_answer").not_())
    assert not corrected["draft_is_correct"].any()
    lost = before.filter((pl.col("status") == "answer_changed") & pl.col("is_correct"))
    assert 0 < corrected.height <= lost.height
    assert set(corrected["row_id"]) <= set(lost["row_id"])


def test_copies_are_rejected_and_counted(round_dir, tmp_path, capsys):
    out = shutil.copytree(round_dir, tmp_path / "r")
    before = rows(out, "distill")
    drafts = dict(rows(out, "rollouts").select("row_id", "completion_ids").iter_rows())
    for row in before.filter(pl.col("input_ids").is_not_null()).to_dicts():
        draft, trace = drafts[row["rollout_id"]], row["input_ids"][row["loss_start"] :]
        left, repeated = [trace[i : i + 4] for i in range(len(trace) - 3)], 0
        for gram in (draft[i : i + 4] for i in range(len(draft) - 3)):
            if gram in left:
                left.remove(gram)
                repeated += 1
        assert row["draft_overlap"] == pytest.approx(repeated / (len(draft) - 3))
    limit = before.filter(pl.col("status") == "ok")["draft_overlap"].median()
    arguments = rewrite_arguments(out, **{"--max-overlap": limit})
    assert invoke(cli, *arguments, "--refilter") == 0
    after = rows(out, "distill")
    copied = after.filter(pl.col("status") == "copied")
    assert copied.height > 10
    assert copied["draft_overlap"].min() > limit
    kept = after.filter(pl.col("status") == "ok")
    assert kept["draft_overlap"].max() <= limit
    shares = f"{kept.height / after.height:.1%} kept, "
    shares += f"{(after['draft_overlap'] > limit).sum() / after.height:.1%} copies (draft_overlap"
    said = capsys.readouterr().err
    assert shares in said
    # The share of rewrites that correct their draft, and how to keep them.
    changed = (after["status"] == "answer_changed") & after["is_correct"]
    assert changed.mean() > 0.05
    assert f"; {changed.mean():.1%} correct a wrong draft (--corrections --refilter" in said


@pytest.fixture(scope="module")
def cut_off(prompts, tmp_path_factory):
    """Rollouts of which some hit their limit."""
    out = tmp_path_factory.mktemp("cut") / "round1"
    frame = sampled(prompts, out, num_prompts=12, num_samples=2, sampling={"max_tokens": 90})
    assert set(frame["finish_reason"]) == {"stop", "length"}
    return out


def test_drafts_that_were_cut_off_are_rewritten_when_told(cut_off, tmp_path):
    out, cut = tmp_path / "r", pl.col("finish_reason") == "length"
    frame = rewritten(cut_off, out, cut_drafts=True)
    assert frame.filter(pl.col("status") == "draft_truncated").is_empty()
    drafts = rows(out, "rollouts").select(pl.col("row_id").alias("rollout_id"), "finish_reason")
    parts = frame.join(drafts, on="rollout_id").filter(cut)
    assert parts["rewrite"].null_count() == 0
    judged = parts.filter(pl.col("rewrite_answer").is_not_null())
    assert (judged["keeps_answer"] == judged["is_correct"]).all()
    kept = parts.filter(pl.col("status") == "ok")
    assert kept.height > 0
    assert kept["is_correct"].all()
    ratio = kept["num_rewritten_tokens"] / kept["num_original_tokens"]
    assert (kept["compression_ratio"] - ratio).abs().max() < 1e-6
    with pytest.raises(ConfigError, match="cut_drafts: saved True / now None"):
        run_rewrite(rewriting(out, template=str(TEMPLATE)))
    with pytest.raises(ConfigError, match="not:\n  cut_drafts: saved True / now None"):
        run_refilter(rewriting(out, template=str(TEMPLATE)))
    assert "draft_truncated" in set(rewritten(cut_off, tmp_path / "off")["status"])


@pytest.mark.parametrize(
    "shown, reason, is_part", [(3, "stop", False), (2, "stop", True), (3, "length", True)]
)
def test_a_draft_of_which_the_teacher_sees_less_is_a_part(shown, reason, is_part):
    """Its rewrite is judged by the gold answer: the teacher may not have seen the draft's."""
    rollout = {"completion_ids": [5, 6, 7], "finish_reason": reason}
    assert Group(rollout, {}, draft_ids=[5, 6, 7][:shown]).is_part == is_part


def test_a_draft_that_does_not_fit_is_cut_in_its_middle(drafts):
    """Without an engine: what the teacher would be shown."""

    def prepared(**changed):
        told = {"cut_drafts": True, "template": str(TEMPLATE), **changed}
        return rewrite_setup.setup(rewriting(drafts, **told), weights=False)

    rollouts = RoundDir(drafts).rows("rollouts", rewrite_setup.ROLLOUT_COLUMNS)
    rollout = max(rollouts, key=lambda row: len(row["completion_ids"]))
    asked, ids = prepared().ask_about(rollout), rollout["completion_ids"]
    assert asked.draft_ids == ids
    context = len(asked.prompt_ids) + 200 - 40
    small = ENGINE | {"max_model_len": context}
    cut = prepared(engine=small).ask_about(rollout)
    assert 0 <= context - 200 - len(cut.prompt_ids) <= 2
    shown = len(cut.draft_ids)
    assert shown < len(ids) - 40
    head, tail = ids[: (shown + 1) // 2], ids[-(shown // 2) :]
    assert cut.draft_ids == head + tail
    decode = prepared().tokenizer.decode
    texts = (decode(part, skip_special_tokens=True) for part in (head, tail))
    assert rewrite_setup.OMISSION.join(texts).strip() in cut.text
    # Nothing checks the rewrite of a part where there is no gold answer.
    assert prepared(engine=small).ask_about(rollout | {"gold_answer": None}) is None
    assert prepared(engine=small, cut_drafts=False).ask_about(rollout) is None
    with pytest.raises(ConfigError, match="without --cut-drafts"):
        prepared(template="draft", score_context="problem")


def test_overwrite_of_rewrites(drafts, tmp_path):
    out = shutil.copytree(drafts, tmp_path / "r")
    arguments = rewrite_arguments(out, **{"--num-logprobs": 4})
    assert invoke(cli, *arguments) == 0
    changed = rewrite_arguments(out, **{"--num-logprobs": 5})
    with pytest.raises(ConfigError, match="num_logprobs: saved 4 / now 5"):
        invoke(cli, *changed)
    assert invoke(cli, *changed, "--overwrite") == 0
    assert read_metadata(RoundDir(out).shard_paths("distill")[0])["num_logprobs"] == 5


# -- the engine, in both stages -------------------------------------------------------------


STAGES = {"rollouts": sampled, "rewrite": rewritten}


@pytest.fixture(params=STAGES)
def stage(request, prompts, drafts, tmp_path):
    """Return a function that runs a stage with the given settings."""
    source = prompts if request.param == "rollouts" else drafts
    return lambda **changed: STAGES[request.param](source, tmp_path / "r", **changed)


def test_the_engine_runs_as_it_is_told(stage, engines):
    told = {
        "dtype": "float16",
        "max_model_len": 700,
        "max_num_seqs": 5,
        "max_num_batched_tokens": 800,
        "kv_cache_gib": 0.125,
    }
    stage(engine=told, trust_remote_code=True)
    (engine,) = engines
    config = engine.llm_engine.vllm_config
    assert config.model_config.dtype == torch.float16
    assert config.model_config.max_model_len == 700
    assert config.model_config.trust_remote_code
    assert config.scheduler_config.max_num_seqs == 5
    assert config.scheduler_config.max_num_batched_tokens == 800
    assert config.cache_config.kv_cache_memory_bytes == 2**27


@pytest.mark.parametrize("name", STAGES)
def test_penalties_are_the_engines(prompts, drafts, tmp_path, name):
    """Each changes most greedy texts."""
    source, column = (prompts, "completion") if name == "rollouts" else (drafts, "rewrite")
    found = {}
    for told in ({}, {"presence_penalty": 2.0}, {"repetition_penalty": 3.0}):
        out = tmp_path / f"r{len(found)}"
        sampling = {"max_tokens": 100, "temperature": 0, **told}
        frame = STAGES[name](source, out, sampling=sampling).sort("row_id")
        found[str(told)] = frame[column].to_list()
    plain, *others = found.values()
    assert [
        sum(a != b for a, b in zip(plain, o, strict=True)) > len(plain) / 2 for o in others
    ] == [
        True,
        True,
    ]


def test_stop_strings_end_a_rewrite(drafts, tmp_path, greedy_rewrites):
    frame = rewritten(drafts, tmp_path / "r", sampling={"max_tokens": 200, "stop": ["answer"]})
    for rollout_id, rewrite in frame.select("rollout_id", "rewrite").iter_rows():
        whole = greedy_rewrites[rollout_id]
        assert rewrite.strip() == whole[: whole.index("answer")].strip()
    assert set(frame["status"]) == {"malformed"}


@pytest.mark.parametrize("penalty", [{"presence_penalty": 1.0}, {"repetition_penalty": 1.1}])
def test_penalties_are_refused_where_there_are_none(prompts, tmp_path, penalty):
    with pytest.raises(ValueError, match="the backend transformers has none"):
        sampled(prompts, tmp_path, sampling=penalty, engine={"backend": "transformers"})


def test_vllm_gets_its_own_arguments(prompts, tmp_path, stage, engines):
    """Those that change the model belong to the round; those that do not may differ on resuming."""
    stage(engine={**ENGINE, "engine_kwargs": {"block_size": 64, "kv_cache_dtype": "auto"}})
    (engine,) = engines
    assert engine.llm_engine.vllm_config.cache_config.block_size == 64
    stages = json.loads((tmp_path / "r" / "run.json").read_text())["stages"].values()
    assert {"kv_cache_dtype": "auto"} in [s["identity"].get("engine_kwargs") for s in stages]


@pytest.mark.parametrize(
    "engine, says",
    [
        ({"engine_kwargs": {"dtype": "half"}}, "dtype: use --dtype"),
        ({"engine_kwargs": {"seed": 1}, "backend": "openai"}, "seed: use --seed"),
        ({"engine_kwargs": {"quantization": "fp8"}, "backend": "openai"}, "the backend is openai"),
    ],
)
def test_arguments_that_vllm_does_not_get_are_refused(engine, says):
    with pytest.raises(ValueError, match=says):
        EngineConfig(**engine)


def test_the_engine_is_the_one_asked_for(stage, engines, tmp_path):
    assert stage(engine={**ENGINE, "backend": "transformers"}).height > 0
    stages = json.loads((tmp_path / "r" / "run.json").read_text())["stages"]
    # The drafts were sampled by vLLM.
    assert "transformers" in {stage["speed"]["backend"] for stage in stages.values()}
    assert not engines


def test_a_gpu_is_filled_as_told(stage, monkeypatch):
    """The settings that vLLM gets on a machine with a GPU, on any machine."""
    import vllm

    class Refusing:
        def __init__(self, *_, **settings):
            raise ValueError(f"share {settings['gpu_memory_utilization']}")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(vllm, "LLM", Refusing)
    with pytest.raises(EngineError, match="share 0.375"):
        stage(engine={**ENGINE, "gpu_memory_utilization": 0.375})


def test_the_engine_shares_a_model_as_it_is_told(stage):
    """Three processes cannot share the pocket models' four heads, so vLLM refuses."""
    with pytest.raises(EngineError, match="divi"):
        stage(engine={**ENGINE, "tensor_parallel_size": 3})


def test_a_pipeline_is_refused_on_a_cpu(stage):
    with pytest.raises(EngineError, match="pipeline-parallel-size 3: vLLM runs pipelines on GPUs"):
        stage(engine={**ENGINE, "pipeline_parallel_size": 3})


# -- revisions ------------------------------------------------------------------------------

RUN = """
import json, sys
from mpd_data.config import EngineConfig, RewriteConfig, RolloutsConfig
from mpd_data.common.errors import MPDError
from mpd_data.rewrite import run_rewrite
from mpd_data.rollouts import run_rollouts
from mpd_train.config import TrainConfig
from mpd_train.loop import train
stages = [(RolloutsConfig, run_rollouts), (RewriteConfig, run_rewrite), (TrainConfig, train)]
for settings in json.loads(sys.argv[1]):
    model, run = next((m, r) for m, r in stages if m.model_fields.keys() >= settings.keys())
    try:
        run(model(**settings))
        print("done")
    except MPDError as error:
        print(str(error).replace(chr(10), " "))
"""


def test_models_are_had_in_the_revision_that_is_asked_for(round_dir, tmp_path):
    """Revision `other` of these models has another tokenizer, which the commands refuse."""
    other = other_tokenizer(tmp_path / "other")
    rollouts = {
        "model": "pocket/student",
        "revision": "other",
        "prompts": [str(nothing_to_sample(tmp_path))],
        "out": str(tmp_path / "r"),
        "sampling": {"max_tokens": 9},
    }
    rewrite = {"teacher": "pocket/teacher", "revision": "other", "shards": str(round_dir)}
    train = {"shards": [str(round_dir)], "student": "pocket/student"}
    train_out = {"out": str(tmp_path / "train"), "revision": "other"}
    teacher = {
        "student": str(STUDENT),
        "teacher": "pocket/teacher",
        "teacher_revision": "other",
        "out": str(tmp_path / "taught"),
    }
    calls = [rollouts, rewrite, train | train_out, train | teacher]
    with Hub() as hub:
        for name, folder in (("student", STUDENT), ("teacher", TEACHER)):
            hub.add("models", f"pocket/{name}", folder)
            commit = hub.add("models", f"pocket/{name}", other, "other")
            if name == "student":
                asked = commit
        done = python(RUN, json.dumps(calls), env=hub.environment(tmp_path / "home"))
    said = done.stdout.splitlines()
    assert said[0] == "done"
    (shard,) = RoundDir(tmp_path / "r").shard_paths("errors")
    assert read_metadata(shard)["model"] == {"name": "pocket/student", "version": asked}
    refused = "have different tokenizers"
    assert said[1].startswith("pocket/teacher and the student of") and refused in said[1]
    assert said[2].startswith("pocket/student and") and refused in said[2]
    assert said[3].startswith("pocket/teacher and") and refused in said[3]
