"""`mpd-gen` as a user runs it: real processes, real engine, kills included."""

import json
import re
import shutil
import signal
import subprocess

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import (
    SCORES,
    STUDENT,
    TEACHER,
    assert_near,
    edit_rows,
    invoke,
    killed,
    model_with,
    num_shards,
    rewrite_arguments,
    rollout_arguments,
    rows,
    run,
    started,
    without_rewrites,
    write_jsonl,
)
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from mpd_data.cli import cli
from mpd_data.common.errors import ConfigError, DataError
from mpd_data.config import RolloutsConfig
from mpd_data.inspect import validate
from mpd_data.inspect.compare import compare, evaluate
from mpd_data.inspect.stats import plot_lengths, round_stats
from mpd_data.inspect.validate import validate_round
from mpd_data.store.round import RoundDir
from mpd_data.store.schema import DISTILL_SCHEMA, METADATA_KEY, ROLLOUT_SCHEMA, STATUSES
from mpd_data.store.shards import ROWS_PER_GROUP, read_columns, read_metadata


def killed_and_resumed(arguments, out, stage, kills):
    """Runs the command, killing it after so many shards each time; then lets it finish."""
    for shards in kills:
        killed("mpd-gen", *arguments, until=lambda n=shards: num_shards(out, stage) >= n)
    return run("mpd-gen", *arguments)


def test_rollouts_are_complete_and_right(round_dir, prompts):
    frame = rows(round_dir, "rollouts")
    # `rows` leaves the last one out.
    assert [*frame.columns, "sampled_logprobs"] == ROLLOUT_SCHEMA.names
    assert frame.height == 240
    assert frame["row_id"].n_unique() == 240
    assert frame.group_by("prompt_id").len()["len"].unique().to_list() == [4]
    gold = {json.loads(line)["id"]: json.loads(line) for line in prompts.open()}
    for row in frame.to_dicts():
        assert row["gold_answer"] == gold[row["prompt_id"]]["answer"]
        assert row["problem"] == gold[row["prompt_id"]]["problem"]
        assert row["num_completion_tokens"] == len(row["completion_ids"])
        assert row["num_thinking_tokens"] == thinking_tokens(row["completion_ids"])
        if row["finish_reason"] == "stop":
            assert row["completion_ids"][-1] == 2
            assert "<|im_end|>" not in row["completion"]
    # Samples of one prompt differ, so the seeds do.
    assert frame.group_by("prompt_id").agg(pl.col("completion").n_unique())["completion"].max() > 1
    assert 0.4 < frame["is_correct"].mean() < 1


def thinking_tokens(ids):
    """The pocket student's traces begin with <think>."""
    ids, close = list(ids), AutoTokenizer.from_pretrained(STUDENT).convert_tokens_to_ids("</think>")
    return ids.index(close) + 1 if close in ids else len(ids)


def test_every_rollout_has_one_rewrite_row_with_its_reason(round_dir):
    frame = rows(round_dir, "distill")
    assert frame.columns == DISTILL_SCHEMA.names
    assert sorted(frame["rollout_id"]) == sorted(rows(round_dir, "rollouts")["row_id"])
    assert set(frame["status"]) <= set(STATUSES)
    kept = frame.filter(pl.col("status") == "ok")
    assert 0.3 < kept.height / frame.height < 1
    assert kept["compression_ratio"].max() <= 1
    assert kept["is_correct"].all()
    assert kept["topk_ids"].null_count() == 0
    for row in kept.iter_rows(named=True):
        trace = row["input_ids"][row["loss_start"] :]
        assert row["num_thinking_tokens"] == thinking_tokens(trace) < len(trace)
    drafts = rows(round_dir, "rollouts").group_by("prompt_id").agg(pl.col("is_correct").mean())
    joined = frame.join(drafts, on="prompt_id")
    assert joined["pass_rate"].to_list() == joined["is_correct_right"].to_list()
    rejected = frame.filter(pl.col("status") != "ok")
    assert rejected["topk_ids"].null_count() == rejected.height
    assert rejected["rewrite"].null_count() < rejected.height


def test_a_shard_explains_itself(round_dir):
    said = read_metadata(RoundDir(round_dir).shard_paths("distill")[0])
    assert said["student"]["name"] == str(STUDENT)
    assert said["teacher"]["name"] == str(TEACHER)
    assert said["score_context"] == "rewrite"
    assert said["num_logprobs"] == 64
    assert said["template"]["name"] == "pocket-concise"
    assert "torch" in said["versions"]


def test_rewrites_lie_in_small_row_groups(round_dir):
    """Which the trainer reads at random; rollouts are read from end to end."""
    sizes = {
        stage: [shard.row_groups for shard in RoundDir(round_dir).manifest(stage)]
        for stage in ("rollouts", "distill")
    }
    assert sizes == {"rollouts": [[100], [100], [40]], "distill": [[64, 36], [64, 36], [40]]}


@pytest.mark.slow
def test_rollouts_survive_sigkill(round_dir, prompts, tmp_path):
    """After two kills the same command completes to the rows of an uninterrupted run, although
    the shard size and the number of sequences changed."""
    out = tmp_path / "round1"
    arguments = [
        *rollout_arguments(prompts, out, **{"--max-num-seqs": 32}), "--rows-per-shard", 10,
    ]  # fmt: skip
    killed_and_resumed(arguments, out, "rollouts", kills=[1, 9])
    ours, theirs = rows(out, "rollouts"), rows(round_dir, "rollouts")
    assert ours.equals(theirs)
    run("mpd-gen", "validate", out)


@pytest.mark.slow
def test_rewrites_survive_sigkill(round_dir, prompts, tmp_path):
    out = tmp_path / "round1"
    run("mpd-gen", *rollout_arguments(prompts, out))
    arguments = [*rewrite_arguments(out), "--rows-per-shard", 10]
    killed_and_resumed(arguments, out, "distill", kills=[1, 8])
    ours, theirs = rows(out, "distill"), rows(round_dir, "distill")
    assert ours.drop(SCORES).equals(theirs.drop(SCORES))
    assert_near(ours, theirs)
    run("mpd-gen", "validate", out)
    assert "0 rows new" in run("mpd-gen", *arguments).stderr


def test_an_interrupt_exits_130_and_the_rest_follows(round_dir, prompts, tmp_path):
    out = tmp_path / "round1"
    arguments = [*rollout_arguments(prompts, out), "--rows-per-shard", 10]
    two = {"until": lambda: num_shards(out) >= 2, "stderr": subprocess.PIPE}
    process = started("mpd-gen", *arguments, **two)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate()
    assert process.returncode == 130
    assert "run the same command again" in said
    run("mpd-gen", *arguments)
    assert rows(out, "rollouts").equals(rows(round_dir, "rollouts"))


def test_thinking_that_the_chat_template_opens_is_not_opened_twice(prompts, tmp_path):
    suffix = "{% if add_generation_prompt %}<think>{% endif %}"
    student = model_with(tmp_path / "student", STUDENT, suffix)
    out = tmp_path / "r"
    settings = {"--model": student, "--num-prompts": 10, "-n": 2}
    run("mpd-gen", *rollout_arguments(prompts, out, **settings))
    run("mpd-gen", *rewrite_arguments(out))
    first = rows(out, "rollouts").row(0, named=True)
    assert first["prompt"].endswith("<think>")
    think = first["prompt_ids"][-1]
    kept = rows(out, "distill").filter(pl.col("status") == "ok")
    assert kept.height > 3
    assert all(list(ids).count(think) == 1 for ids in kept["input_ids"])


def padded_teacher(folder, more):
    """The teacher with `more` embedding rows that are no token's."""
    model = AutoModelForCausalLM.from_pretrained(TEACHER, dtype=torch.float32)
    model.resize_token_embeddings(model.config.vocab_size + more, mean_resizing=False)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(TEACHER / name, folder)
    return folder


def test_a_teacher_with_padded_vocabulary(round_dir, tmp_path):
    """More embedding rows than the student, as in one family's larger models."""
    teacher = padded_teacher(tmp_path / "teacher", 27)
    vocab = AutoConfig.from_pretrained(TEACHER).vocab_size
    out = without_rewrites(round_dir, tmp_path / "r")
    run("mpd-gen", *rewrite_arguments(out, **{"--teacher": teacher}))
    run("mpd-gen", "validate", out)
    padded = rows(out, "distill").filter(pl.col("status") == "ok")
    plain = rows(round_dir, "distill").filter(pl.col("status") == "ok")
    assert read_metadata(RoundDir(out).shard_paths("distill")[0])["vocab_size"] == vocab
    assert padded.height > 0.9 * plain.height
    assert padded["topk_ids"].explode().max() < vocab
    both = padded.join(plain, on="rollout_id").filter(
        pl.col("input_ids") == pl.col("input_ids_right")
    )
    assert both.height > 0.9 * plain.height
    row = both.row(0, named=True)
    # What the padding took is given back: the distributions are the unpadded teacher's.
    near = [
        abs(a - b)
        for a, b in zip(row["topk_logprobs"], row["topk_logprobs_right"], strict=True)
        if b > -3
    ]
    assert max(near) < 0.02


@pytest.mark.slow
def test_a_padded_teacher_scores_what_a_refilter_lets_in(round_dir, tmp_path):
    """As many ids for each token as it did before, without its padding."""
    out = without_rewrites(round_dir, tmp_path / "r")
    teacher = {"--teacher": padded_teacher(tmp_path / "teacher", 27), "--backend": "transformers"}
    run("mpd-gen", *rewrite_arguments(out, **teacher, **{"--max-ratio": 0.4}))
    before = rows(out, "distill").filter(pl.col("status") == "ok")
    run("mpd-gen", *rewrite_arguments(out, **teacher), "--refilter")
    run("mpd-gen", "validate", out)
    after = rows(out, "distill").filter(pl.col("status") == "ok")
    assert 0 < before.height < after.height
    assert (after["topk_ids"].list.len() == 64 * after["num_rewritten_tokens"]).all()


def test_scores_are_over_the_vocabulary_of_the_model_that_is_trained(prompts, tmp_path):
    """Off-policy: the sampler is the padded teacher, and the student has fewer embedding rows."""
    teacher = padded_teacher(tmp_path / "teacher", 27)
    out = tmp_path / "r"
    few = {"--model": teacher, "--num-prompts": 12, "-n": 1}
    run("mpd-gen", *rollout_arguments(prompts, out, **few))
    draft = {"--teacher": teacher, "--template": "draft", "--score-context": "problem"}
    run("mpd-gen", *rewrite_arguments(out, **draft, **{"--student": STUDENT}))
    vocab = AutoConfig.from_pretrained(STUDENT).vocab_size
    assert read_metadata(RoundDir(out).shard_paths("distill")[0])["vocab_size"] == vocab
    kept = rows(out, "distill").filter(pl.col("status") == "ok")
    assert kept["topk_ids"].explode().max() < vocab
    student = ["--student", STUDENT, "--out", tmp_path / "run", "--pack-length", 600]
    run("mpd-train", "--shards", out, *student, "--dry-run")


def test_bad_prompts_become_error_rows_and_hurt_no_other(tmp_path):
    good = {"id": "good", "problem": "Dan has 22 shells . on Mon Dan wins 7 . how many shells ?"}
    path = write_jsonl(
        tmp_path / "p.jsonl",
        [
            good,
            {"id": "long", "problem": "shells " * 900},
            {"id": "empty", "problem": " "},
            {"id": "control", "problem": "ignore <|im_end|> this"},
            {"id": "unlucky", "problem": "unlucky shells"},
        ],
    )
    with path.open("ab") as file:
        file.write(b'{"id": "bytes", "problem": "shells \xff"}\n')
    suffix = "{% if 'unlucky' in messages[-1]['content'] %}{{ raise_exception('no') }}{% endif %}"
    student = model_with(tmp_path / "student", STUDENT, suffix)
    out = tmp_path / "r"
    arguments = [
        "rollouts", "--model", student, "--prompts", path, "--out", out, "--id-column", "id",
        "-n", 2, "--max-tokens", 200,
    ]  # fmt: skip
    said = run("mpd-gen", *arguments, code=3).stderr
    assert "5 rows failed" in said
    assert set(rows(out, "rollouts")["prompt_id"]) == {"good"}
    messages = dict(rows(out, "errors").select("prompt_id", "message").iter_rows())
    assert "900 prompt tokens" in messages["long"] or "do not fit" in messages["long"]
    assert "p.jsonl, row 2" in messages["long"]
    assert "holds nothing" in messages["empty"]
    assert "control token" in messages["control"]
    assert "the chat template failed: no" in messages["unlucky"]
    assert "not UTF-8" in messages["bytes"]
    assert rows(out, "rollouts")["is_correct"].null_count() == 2
    run("mpd-gen", *arguments, code=3)
    assert rows(out, "errors").height == 5
    run("mpd-gen", "validate", out)


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"--model": "no/such/model"}, "not a folder here"),
        ({"--prompts": "no-such-file.jsonl"}, "no such file"),
        ({"--answer-column": "gold"}, "no column 'gold'"),
        ({"--checker": "maths"}, "checker 'maths': unknown"),
        ({"--num-prompts": 5000}, "only 60 prompts"),
        ({"--thinking": "on"}, "--thinking"),
        ({"--max-model-len": 999999}, "over the model's context"),
    ],
)
def test_bad_input_is_a_message_and_exit_1(prompts, tmp_path, changed, message):
    arguments = rollout_arguments(prompts, tmp_path / "r", **changed)
    said = run("mpd-gen", *arguments, code=1).stderr
    assert message in said
    assert "Traceback" not in said


def test_usage_errors_exit_2(prompts, tmp_path):
    for temperature in (-1, 2.1):
        wrong = rollout_arguments(prompts, tmp_path, **{"--temperature": temperature})
        assert "--temperature" in run("mpd-gen", *wrong, code=2).stderr
    with pytest.raises(ValueError, match="gives the same sample 4 times"):
        RolloutsConfig(
            model="m", prompts=["p"], out="o", num_samples=4, sampling={"temperature": 0}
        )
    assert "No such option" in run("mpd-gen", "rollouts", "--modell", "x", code=2).stderr
    bad_json = rollout_arguments(prompts, tmp_path, **{"--template-kwargs": "[1]"})
    assert "JSON object" in run("mpd-gen", *bad_json, code=2).stderr


def test_changed_settings_are_refused(round_dir, prompts):
    cooler = rollout_arguments(prompts, round_dir, **{"--temperature": 0.5})
    said = run("mpd-gen", *cooler, code=1).stderr
    assert "sampling.temperature: saved 1.0 / now 0.5" in said
    said = run("mpd-gen", *rewrite_arguments(round_dir, **{"--num-logprobs": 8}), code=1).stderr
    assert "num_logprobs: saved 64 / now 8" in said


@pytest.mark.parametrize(
    "changed, name",
    [
        ({"--template": "plain"}, "template"),
        ({"--template-kwargs": '{"word": "x"}'}, "template_kwargs.word"),
        ({"--score-template-kwargs": '{"word": "x"}'}, "score_template_kwargs.word"),
        ({"--score-context": "problem"}, "score_context"),
        ({"--num-candidates": 2, "--temperature": 1}, "num_candidates"),
        ({"--choose": "first"}, "choose"),
        ({"--max-ratio": 0.9}, "filters.max_ratio"),
        ({"--seed": 1}, "seed"),
        ({"--top-p": 0.5}, "sampling.top_p"),
        ({"--dtype": "bfloat16"}, "dtype"),
        ({"--max-model-len": 900}, "max_model_len"),
    ],
)
def test_each_setting_that_decides_a_rewrite_is_compared(round_dir, changed, name):
    """Or a stage that goes on would mix rows of two settings."""
    with pytest.raises(ConfigError, match=rf"\n  {name}: (saved|the content) "):
        invoke(cli, *rewrite_arguments(round_dir, **changed), "--dry-run")


def test_rewrite_without_rollouts_is_refused(tmp_path):
    assert "no rollouts here" in run("mpd-gen", *rewrite_arguments(tmp_path), code=1).stderr


def test_rewrites_that_are_all_rejected_are_an_error(prompts, tmp_path):
    """The student cannot rewrite: nothing is kept, and the counts say why."""
    out = tmp_path / "r"
    run("mpd-gen", *rollout_arguments(prompts, out, **{"--num-prompts": 4, "-n": 1}))
    said = run("mpd-gen", *rewrite_arguments(out, **{"--max-tokens": 2}), code=1).stderr
    assert "no rewrite was kept" in said
    assert "truncated" in said


def test_stats_agree_with_the_rows(round_dir, tmp_path):
    tables = json.loads(run("mpd-gen", "stats", round_dir, "--json").stdout)
    frame = rows(round_dir, "rollouts")
    (line,) = tables["rollouts"]
    assert line["samples"] == 240
    assert line["prompts"] == 60
    assert line["mean_tokens"] == pytest.approx(frame["num_completion_tokens"].mean())
    assert line["p50"] == frame["num_completion_tokens"].quantile(0.5, "nearest")
    assert line["accuracy"] == pytest.approx(frame["is_correct"].mean())
    distill = rows(round_dir, "distill")
    counts = {row["status"]: row["rows"] for row in tables["rewrites"]}
    assert counts == dict(distill.group_by("status").len().iter_rows())
    assert sum(row["share"] for row in tables["rewrites"]) == pytest.approx(1)
    (behaviour,) = tables["behaviour"]
    for name, correct in (("right_tokens", True), ("wrong_tokens", False)):
        mean = frame.filter(pl.col("is_correct") == correct)["num_completion_tokens"].mean()
        assert behaviour[name] == pytest.approx(mean)
    assert behaviour["repetition"] == pytest.approx(frame["repetition"].mean(), rel=1e-5)
    assert behaviour["check_failed"] == 0
    solved = frame.group_by("prompt_id").agg(pl.col("is_correct").sum())["is_correct"].to_list()
    passes = {row["k"]: row["pass_at_k"] for row in tables["pass_at_k"]}
    assert set(passes) == {1, 2, 4}
    assert passes[1] == pytest.approx(frame["is_correct"].mean())
    assert passes[2] == pytest.approx(sum(1 - (4 - c) * (3 - c) / 12 for c in solved) / len(solved))
    assert passes[4] == pytest.approx(sum(c > 0 for c in solved) / len(solved))
    said = run("mpd-gen", "stats", round_dir, "--plot", tmp_path / "l.png")
    assert "mean_tokens" in said.stdout
    assert (tmp_path / "l.png").read_bytes().startswith(b"\x89PNG")


def test_a_plot_does_not_parse_its_labels(round_dir, tmp_path):
    plot_lengths({"$\\frac{$ <b>": round_dir}, tmp_path / "l.svg")
    assert (tmp_path / "l.svg").read_text().startswith("<?xml")


def test_stats_keep_folders_apart(round_dir, tmp_path):
    """Evaluations share a round number and are not one set of rows."""
    other = shutil.copytree(round_dir, tmp_path / "other")
    tables = round_stats([round_dir, other])
    assert [line["folder"] for line in tables["rollouts"]] == [str(round_dir), str(other)]
    assert [line["samples"] for line in tables["rollouts"]] == [240, 240]


def test_stats_of_a_torn_shard_is_a_message(round_dir, tmp_path):
    other = shutil.copytree(round_dir, tmp_path / "other")
    victim = RoundDir(other).shard_paths("rollouts")[0]
    victim.write_bytes(victim.read_bytes()[:-20])
    said = run("mpd-gen", "stats", other, code=1).stderr
    assert str(victim) in said
    assert "Traceback" not in said
    bad = run("mpd-gen", "stats", round_dir, "--plot", tmp_path / "x.nothing", code=1).stderr
    assert "cannot be written" in bad


def _swap_first_two(row):
    row["topk_logprobs"][:2] = row["topk_logprobs"][1::-1]


def _lose_mass(row):
    """Take half of the probability out of a token."""
    k = len(row["topk_logprobs"]) // len(row["tail_logprobs"])
    row["topk_logprobs"][:k] = [value - 0.7 for value in row["topk_logprobs"][:k]]
    row["tail_logprobs"][0] -= 0.7


BREACHES = {
    "expected loss_start": lambda row: row.update(loss_start=row["loss_start"] + 1),
    "log-probabilities and": lambda row: row.update(topk_ids=row["topk_ids"][:-1]),
    "not sorted": _swap_first_two,
    "occurs twice": lambda row: row["topk_ids"].__setitem__(1, row["topk_ids"][0]),
    "sum to 1.": lambda row: row["tail_logprobs"].__setitem__(0, -0.5),
    "sum to 0.": _lose_mass,
    "outside the vocabulary": lambda row: row["topk_ids"].__setitem__(63, 10_000),
    "not the end token": lambda row: row["input_ids"].__setitem__(-1, 7),
    "do not begin with the rollout's prompt": lambda row: row["input_ids"].insert(
        0, row["input_ids"].pop(1)
    ),
    "contradict 'rewrite' scoring": lambda row: row.update(teacher_prompt_ids=None),
    "but it has log-probabilities": lambda row: row.update(status="truncated"),
    "but ids, counts or": lambda row: row.update(loss_start=None),
    "is not in the round": lambda row: row.update(rollout_id="0" * 32),
    "not in (": lambda row: row.update(status="fine"),
    "num_thinking_tokens is 999": lambda row: row.update(num_thinking_tokens=999),
    "pass_rate is above 1": lambda row: row.update(pass_rate=1.5),
}


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("message", BREACHES)
def test_validate_finds_each_breach(round_dir, tmp_path, monkeypatch, message, together):
    """Shards are checked together, and those of large rows in parts."""
    if not together:
        monkeypatch.setattr(validate, "_BYTES_AT_ONCE", 1)
    other = shutil.copytree(round_dir, tmp_path / "r")
    file = RoundDir(other).shard_paths("distill")[1]
    table = pq.read_table(file)
    all_rows = table.to_pylist()
    index = max(i for i, row in enumerate(all_rows) if row["status"] == "ok")
    assert index >= ROWS_PER_GROUP
    BREACHES[message](all_rows[index])
    changed = pa.Table.from_pylist(all_rows, schema=table.schema)
    pq.write_table(changed, file, row_group_size=ROWS_PER_GROUP)
    found = [line for line in validate_round(other) if message in line]
    assert found
    assert all(line.startswith(f"{file}, row {index} (") for line in found), found


def test_metadata_that_lacks_a_name_is_said_of_its_shard(round_dir, tmp_path):
    other = shutil.copytree(round_dir, tmp_path / "r")
    files = RoundDir(other).shard_paths("distill")
    for file in files:
        table = pq.read_table(file)
        told = json.loads(table.schema.metadata[METADATA_KEY])
        del told["vocab_size"]
        pq.write_table(table.replace_schema_metadata({METADATA_KEY: json.dumps(told)}), file)
    said = [line for line in validate_round(other) if "lacks 'vocab_size'" in line]
    assert len(said) == len(files) == 3
    assert all(line.count(str(file)) == 2 for line, file in zip(said, files, strict=True))


def test_each_shard_is_judged_by_its_own_metadata(round_dir, tmp_path):
    other = shutil.copytree(round_dir, tmp_path / "r")
    file = RoundDir(other).shard_paths("distill")[0]
    table = pq.read_table(file)
    told = json.loads(table.schema.metadata[METADATA_KEY])
    named = {METADATA_KEY: json.dumps({**told, "end_ids": [7]})}
    pq.write_table(table.replace_schema_metadata(named), file)
    wrong = [line for line in validate_round(other) if "not the end token" in line]
    assert wrong
    assert all(line.startswith(str(file)) for line in wrong)


@pytest.mark.parametrize(
    ("stage", "column", "value", "message"),
    [
        ("rollouts", "completion_ids", None, "completion_ids has nulls in its lists"),
        ("distill", "topk_ids", None, "topk_ids has nulls in its lists"),
        ("rollouts", "prompt_ids", -5, r"row 3 \(.*: prompt_ids outside the vocabulary of"),
        (
            "rollouts",
            "completion_ids",
            165,
            r"row 3 \(.*: completion_ids outside the vocabulary of",
        ),
    ],
)
def test_each_id_of_a_list_is_looked_at(round_dir, tmp_path, stage, column, value, message):
    other = shutil.copytree(round_dir, tmp_path / "r")
    file = RoundDir(other).shard_paths(stage)[-1]
    table = pq.read_table(file)
    found = table.to_pylist()
    row = found[3] if value is not None else next(row for row in found if row[column])
    row[column][0] = value
    pq.write_table(pa.Table.from_pylist(found, schema=table.schema), file)
    assert re.search(message, "\n".join(validate_round(other)))
    if value is None:
        with pytest.raises(DataError, match=message):
            read_columns(file, [column])


def test_validate_judges_each_round_that_it_is_given(round_dir, tmp_path):
    assert f"{round_dir}: sound" in run("mpd-gen", "validate", round_dir).stdout
    other = shutil.copytree(round_dir, tmp_path / "r")
    edit_rows(other, "rollouts", lambda row: row.update(num_completion_tokens=1))
    said = run("mpd-gen", "validate", round_dir, other, code=1)
    assert str(other) in said.stdout
    assert "breaches of the contract" in said.stderr
    assert str(round_dir) not in said.stdout


def test_stats_of_nothing_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="no shards here"):
        round_stats([tmp_path])


def test_compare_a_round_with_itself(round_dir):
    result = compare(round_dir, round_dir)
    assert result["token_reduction"] == 0
    assert result["token_reduction_interval"] == [0, 0]
    assert result["accuracy_difference_interval"] == [0, 0]
    frame = rows(round_dir, "rollouts")
    side = evaluate(round_dir)
    assert side["accuracy"] == pytest.approx(frame["is_correct"].mean())
    low, high = side["accuracy_interval"]
    assert low < side["accuracy"] < high
    assert high - low < 0.3
    said = run("mpd-gen", "compare", round_dir, round_dir).stdout
    assert "tokens saved 0.0%" in said


def test_compare_needs_the_same_prompts(round_dir, prompts, tmp_path):
    run("mpd-gen", *rollout_arguments(prompts, tmp_path / "r", **{"--num-prompts": 5, "-n": 1}))
    with pytest.raises(ConfigError, match="share 5"):
        compare(round_dir, tmp_path / "r")


def test_self_correction_markers_are_counted(round_dir, tmp_path):
    other = shutil.copytree(round_dir, tmp_path / "r")
    files = RoundDir(other).shard_paths("rollouts")
    for file in files:
        table = pq.read_table(file)
        text = "Wait, no. Hmm, let me check: awaiting." if file == files[0] else "fine"
        index = table.schema.get_field_index("completion")
        column = pa.array([text] * table.num_rows)
        pq.write_table(table.set_column(index, table.schema.field(index), column), file)
    changed = pq.read_metadata(files[0]).num_rows
    (line,) = round_stats([other])["behaviour"]
    tokens = rows(other, "rollouts")["num_completion_tokens"].sum()
    assert line["markers_per_1k"] == pytest.approx(1000 * 3 * changed / tokens)
