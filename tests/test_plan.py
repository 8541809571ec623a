"""Dry runs: what they check and predict, and that they write nothing; --limit; speeds."""

import json
import re
import shlex
import shutil
import tomllib
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from conftest import (
    ROOT,
    STUDENT,
    command,
    edit_rows,
    finish,
    metrics,
    python,
    rewrite_arguments,
    rollout_arguments,
    rows,
    run,
    small_pocket,
    without_rewrites,
    write_jsonl,
)
from hub import Hub
from test_prompts import OFF, QWEN
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from mpd_data.cli import cli as gen
from mpd_data.common.errors import ConfigError, MPDError
from mpd_data.common.machine import device_name
from mpd_data.config import RolloutsConfig
from mpd_data.dryrun.learned import Learned
from mpd_data.dryrun.plan import distill_bytes, make_plan, rollout_bytes
from mpd_data.store.round import RoundDir
from mpd_rounds.cli import cli as rounds
from mpd_rounds.run.layout import Plan
from mpd_rounds.run.plan import plan_pipeline
from mpd_rounds.run.runner import _inputs
from mpd_rounds.run.steps import load_pipeline
from mpd_train.cli import cli as train


def ask(program, *arguments):
    """A dry run in this process, which has loaded what it needs: its stdout. Raises what the
    command would print as an error."""
    command = {"mpd-gen": gen, "mpd-train": train, "mpd-rounds": rounds}[program]
    result = CliRunner().invoke(command, [*map(str, arguments), "--dry-run"])
    if result.exception is not None:
        raise result.exception
    return result.stdout


def dry(program, *arguments):
    """What a dry run prints as JSON."""
    return json.loads(ask(program, *arguments, "--json"))


def content(folder):
    """Names, sizes and times of all that lies in a folder."""
    files = (p for p in sorted(folder.rglob("*")))
    return [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in files]


# -- what is there already -------------------------------------------------------------------


def test_a_new_round_is_planned_and_not_made(round_dir, prompts, tmp_path):
    out = tmp_path / "data" / "new"
    arguments = rollout_arguments(prompts, out)
    plan = dry("mpd-gen", *arguments)
    there = rows(round_dir, "rollouts")
    lengths = there["num_prompt_tokens"]
    assert (plan["rows"], plan["committed"], plan["remaining"]) == (240, 0, 240)
    assert plan["prompt_tokens"] == {"mean": round(lengths.mean(), 1), "max": lengths.max()}
    (first,) = plan["shown"]
    (shown,) = there.filter(pl.col("prompt") == first["text"])["num_prompt_tokens"].unique()
    assert first["num_tokens"] == shown
    assert (plan["tokens_expected"], plan["tokens_at_most"]) == (None, 240 * 400)
    assert plan["disk_bytes"] > sum(p.stat().st_size for p in (round_dir / "rollouts").iterdir())
    # What is not at its default, as it stands on the command line.
    assert plan["settings"][:2] == ["--model", str(STUDENT)]
    assert "--temperature" not in plan["settings"]
    said = ask("mpd-gen", *arguments)
    assert "first prompt (" in said
    assert "<|im_start|>user\n  | " in said
    assert re.search("tokens remaining, at most +96,000", said)
    assert "make a few (--limit 64), then plan again" in said
    few = ask("mpd-gen", *arguments, "--num-prompts", 16)
    assert "since no rows exist yet." in few and "--limit" not in few
    assert not (tmp_path / "data").exists()


def test_a_finished_round_has_nothing_to_do_and_stays_as_it_is(round_dir, prompts, tmp_path):
    before = content(round_dir)
    plan = dry("mpd-gen", *rollout_arguments(prompts, round_dir))
    assert (plan["rows"], plan["committed"], plan["remaining"]) == (240, 240, 0)
    assert (plan["tokens_expected"], plan["seconds"]) == (0, 0)
    plan = dry("mpd-gen", *rewrite_arguments(round_dir))
    assert (plan["rows"], plan["committed"], plan["remaining"]) == (240, 240, 0)
    changed = [*rewrite_arguments(round_dir), "--refilter", "--max-ratio", 0.5]
    plan = dry("mpd-gen", *changed)
    frame = rows(round_dir, "distill")
    kept = frame.filter((pl.col("status") == "ok") & (pl.col("compression_ratio") <= 0.5)).height
    assert plan["details"]["ok"] == f"{(frame['status'] == 'ok').sum()} -> {kept}"
    assert plan["details"]["rewrites to score"] == 0
    looser = ["--refilter", "--no-keep-answer", "--no-require-correct"]
    plan = dry("mpd-gen", *rewrite_arguments(round_dir), *looser)
    newly = frame.filter(
        pl.col("status").is_in(["answer_changed", "incorrect"]) & (pl.col("compression_ratio") <= 1)
    )
    assert plan["details"]["rewrites to score"] == newly.height > 0
    assert plan["details"]["tokens to score"] == newly["num_rewritten_tokens"].sum()
    assert content(round_dir) == before


def test_what_was_there_with_other_settings_is_refused(round_dir, prompts, tmp_path):
    before = content(round_dir)
    sampling = rollout_arguments(prompts, round_dir)
    calls = [
        ([*sampling, "--temperature", 0.9], "give another --out"),
        ([*sampling, "--num-prompts", 2], r"prompts: saved \d+ / now 2\n"),
        ([*rewrite_arguments(round_dir), "--num-logprobs", 8], "--overwrite"),
        ([*rewrite_arguments(round_dir), "--max-ratio", 0.8], "--refilter: it deletes nothing"),
    ]
    for call, text in calls:
        with pytest.raises(ConfigError, match="was started here with other settings") as raised:
            ask("mpd-gen", *call)
        assert re.search(text, str(raised.value))
        # The model of a folder is not hashed in a dry run, and not said to be another one.
        assert "model" not in str(raised.value) and "teacher" not in str(raised.value)
    call = [*rewrite_arguments(round_dir), "--refilter", "--seed", 3]
    with pytest.raises(ConfigError, match="--refilter can change only the filters"):
        ask("mpd-gen", *call)
    assert content(round_dir) == before
    assert "no --limit" in run("mpd-gen", *call, "--limit", 3, code=2).stderr


def test_the_rows_of_a_torn_shard_are_planned_and_it_stays_where_it_is(
    round_dir, prompts, tmp_path
):
    out = shutil.copytree(round_dir, tmp_path / "round")
    torn = out / "rollouts" / "part-00002.parquet"
    count = pq.read_metadata(torn).num_rows
    torn.write_bytes(torn.read_bytes()[:-100])
    before = content(out)
    plan = dry("mpd-gen", *rollout_arguments(prompts, out))
    assert (plan["committed"], plan["remaining"]) == (240 - count, count)
    assert plan["learned_from"] == f"{out} ({240 - count} rows)"
    assert content(out) == before


def test_rows_that_cannot_be_used_are_counted_and_named(tmp_path):
    good = [{"id": i, "problem": f"Ida has {i} coins ."} for i in range(3)]
    long = [{"id": f"long{i}", "problem": "coins " * 700} for i in range(5)]
    control = [{"id": "c", "problem": "coins <|im_end|> \x1b[31m"}]
    path = write_jsonl(tmp_path / "p.jsonl", [*control, *good, *long])
    out = tmp_path / "out"
    arguments = [
        "rollouts", "--model", STUDENT, "--prompts", path, "--out", out, "--id-column", "id",
        "--max-tokens", 400, "-n", 2,
    ]  # fmt: skip
    plan = dry("mpd-gen", *arguments)
    assert (plan["rows"], plan["failing"]) == (6, 6)
    assert "row 1: the prompt contains the control token" in plan["reasons"][0]
    assert "do not fit the context of 1024" in plan["reasons"][1]
    assert plan["reasons"][-1] == "and 3 more"
    assert plan["refusal"] is None
    write_jsonl(path, [*control, *long])
    said = run("mpd-gen", *arguments, "--dry-run", code=1).stdout
    assert "do not fit the context of 1024" in said
    assert "* No prompt can be used." in said
    assert not out.exists()
    # The first prompt that is shown is one that is used; hostile text is escaped.
    write_jsonl(path, [{"id": "x", "problem": "coins \x1b[31m ."}])
    said = ask("mpd-gen", *arguments)
    assert "\x1b" not in said
    assert "coins \\x1b[31m ." in said


def test_a_rewrite_of_nothing_is_refused_with_the_reason(round_dir, tmp_path):
    shards = without_rewrites(round_dir, tmp_path / "round")
    call = [*map(str, rewrite_arguments(shards, **{"--max-model-len": 205})), "--dry-run", "--json"]
    refused = CliRunner().invoke(gen, call)
    plan = json.loads(refused.stdout)
    cut = (rows(round_dir, "rollouts")["finish_reason"] == "length").sum()
    assert refused.exit_code == 1
    assert plan["tokens_at_most"] == 0
    assert f"{240 - cut} too_long (lower --max-tokens, raise" in plan["refusal"]
    assert (f"{cut} draft_truncated (sample" in plan["refusal"]) == (cut > 0)
    assert dry("mpd-gen", *rewrite_arguments(shards))["refusal"] is None


def test_bad_input_is_what_the_real_run_says(prompts, round_dir, tmp_path):
    out = tmp_path / "out"
    calls = [
        rollout_arguments(prompts, out, **{"--answer-column": "gold"}),
        rollout_arguments(prompts, out, **{"--max-model-len": 5000}),
        rollout_arguments(prompts, out, **{"--model": ROOT}),
        rollout_arguments(prompts, out, **{"--checker": "nowhere"}),
    ]
    expected = ["no column 'gold'", "over the model's context", "no config.json here", "nowhere"]
    for call, message in zip(calls, expected, strict=True):
        with pytest.raises(MPDError, match=message):
            ask("mpd-gen", *call)
    with pytest.raises(ConfigError, match="no rollouts here"):
        ask("mpd-gen", *rewrite_arguments(out))
    said = run("mpd-gen", *calls[0], "--dry-run", code=1).stderr
    assert said.startswith("error: ") and "no column 'gold'" in said
    assert not out.exists()


def test_a_dry_run_starts_no_engine(round_dir, prompts, tmp_path):
    calls = [
        rollout_arguments(prompts, tmp_path / "o"),
        [*rewrite_arguments(round_dir), "--overwrite"],
    ]
    code = "from mpd_data.cli import cli\nimport sys\n"
    for arguments in calls:
        code += f"cli.main({[*map(str, arguments), '--dry-run']!r}, standalone_mode=False)\n"
    loaded = python(code + "print(*sorted(sys.modules))").stdout.split()
    assert "transformers" in loaded
    assert "vllm" not in loaded


# -- predictions and --limit -----------------------------------------------------------------


@pytest.fixture(scope="module")
def part(round_dir, prompts, tmp_path_factory):
    """The first 120 of the round's rollouts, and the first 120 rewrites of all of them."""
    folder = tmp_path_factory.mktemp("part")
    rollouts = folder / "rollouts"
    said = run("mpd-gen", *rollout_arguments(prompts, rollouts), "--limit", 120).stderr
    assert "120 remaining" in said
    rewrites = folder / "rewrites"
    without_rewrites(round_dir, rewrites)
    said = run("mpd-gen", *rewrite_arguments(rewrites), "--limit", 120).stderr
    assert "120 remaining" in said
    return rollouts, rewrites


@pytest.mark.slow
def test_a_limited_run_says_what_the_rest_takes(part, round_dir, prompts):
    """Expected tokens and bytes are within a quarter of what the whole round then holds."""
    calls = [
        ("rollouts", rollout_arguments(prompts, part[0]), "num_completion_tokens"),
        ("distill", rewrite_arguments(part[1]), "num_rewritten_tokens"),
    ]
    for (stage, call, column), folder in zip(calls, part, strict=True):
        there, whole = rows(folder, stage), rows(round_dir, stage)
        key = "row_id" if stage == "rollouts" else "rollout_id"
        assert there.height == 120
        assert set(there[key]) < set(whole[key])
        speed = json.loads((folder / "run.json").read_text())["stages"][stage]["speed"]
        assert speed["rows"] == 120
        assert speed["tokens"] == there[column].sum()
        assert speed["device"] == device_name()
        assert speed["start_seconds"] > 0
        plan = dry("mpd-gen", *call)
        assert (plan["rows"], plan["committed"], plan["remaining"]) == (240, 120, 120)
        assert str(folder) in plan["learned_from"]
        remaining = whole.filter(~pl.col(key).is_in(there[key].to_list()))
        assert plan["tokens_expected"] == pytest.approx(remaining[column].sum(), rel=0.25)
        size = sum(p.stat().st_size for p in (round_dir / stage).iterdir())
        assert 2 * plan["disk_bytes"] == pytest.approx(size, rel=0.25)
        seconds = plan["tokens_expected"] * speed["seconds"] / speed["tokens"]
        assert plan["seconds"] == pytest.approx(seconds + speed["start_seconds"], abs=0.2)
        assert plan["device"] == f"{speed['device']}, vllm"


@pytest.mark.slow
def test_without_the_limit_the_rest_follows(part, round_dir, prompts, tmp_path):
    out = shutil.copytree(part[0], tmp_path / "r")
    said = run("mpd-gen", *rollout_arguments(prompts, out)).stderr
    assert "240 rollouts, 120 of them new" in said
    assert "remaining" not in said
    assert rows(out).equals(rows(round_dir))


@pytest.mark.slow
def test_only_own_rows_of_the_same_backend_teach(part, prompts):
    """Lengths hold for every backend, speeds do not. Rows that --overwrite deletes say nothing."""
    new = dry("mpd-gen", *rollout_arguments(prompts, part[0].parent / "new"))
    assert (new["tokens_expected"], new["learned_from"]) == (None, None)
    call = rollout_arguments(prompts, part[0])
    own, other = dry("mpd-gen", *call), dry("mpd-gen", *call, "--backend", "transformers")
    assert other["tokens_expected"] == own["tokens_expected"] > 0
    assert own["seconds"] > 0
    assert (other["seconds"], other["device"]) == (None, None)
    assert "No speed of this backend" in ask("mpd-gen", *call, "--backend", "transformers")
    assert dry("mpd-gen", *call, "--overwrite")["learned_from"] is None


def test_workers_share_the_time_after_their_starts():
    config = RolloutsConfig(model="m", prompts=["p"], out=Path("out"))
    learned = Learned("rows", 0.01, "cpu", start_seconds=20, tokens_per_row=100)
    plan = make_plan(
        "rollouts", config, config.out, learned, generated=60, tokens_at_most=10**6,
        disk_bytes=0, remaining=60, workers=3, rows=60, committed=0,
    )  # fmt: skip
    assert (plan.tokens_expected, plan.seconds) == (6000, pytest.approx(20 + 20))


def test_bounds_on_disk_hold(round_dir):
    """What is said where nothing is known is more than a real round takes, and no nonsense."""
    student, distill = rows(round_dir, "rollouts"), rows(round_dir, "distill")

    def size(stage):
        return sum(p.stat().st_size for p in (round_dir / stage).iterdir())

    tokens = [student[f"num_{part}_tokens"].sum() for part in ("prompt", "completion")]
    bound = rollout_bytes(240, *tokens, 165)
    assert 1 < bound / size("rollouts") < 2
    kept = distill.filter(pl.col("status") == "ok")
    contexts = kept["loss_start"].sum() + kept["teacher_prompt_ids"].list.len().sum()
    bound = distill_bytes(240, contexts, kept["num_rewritten_tokens"].sum(), 64, 165)
    assert 1 < bound / size("distill") < 2


def test_a_shorter_run_does_not_replace_a_longer_ones_speed(tmp_path):
    round_dir = RoundDir(tmp_path)
    round_dir.claim("rollouts", {"a": 1}, {})

    def record(count, device):
        # A run that rejects rows without an engine has many of them.
        speed = {"rows": 100 - count, "tokens": count, "device": device, "backend": "vllm"}
        speed |= {"start_seconds": 1.0, "seconds": 1.0}
        round_dir.record_speed("rollouts", speed)
        round_dir.claim("rollouts", {"a": 1}, {"more": count})
        return round_dir.run_info()["stages"]["rollouts"]["speed"]["tokens"]

    assert record(10, "cpu") == 10
    assert record(5, "cpu") == 10
    assert record(20, "cpu") == 20
    assert record(5, "gpu") == 5


# -- training --------------------------------------------------------------------------------


def test_a_training_is_planned(round_dir, tmp_path):
    def arguments(out, *more):
        return ["--shards", round_dir, "--student", STUDENT, "--out", tmp_path / out, *more]

    call = arguments("one", "--pack-length", 1024)
    plan = dry("mpd-train", *call)
    assert list(tmp_path.iterdir()) == []
    run("mpd-train", *call)
    lines = metrics(tmp_path / "one")
    assert plan["details"]["steps"] == len(lines)
    assert plan["tokens_expected"] == sum(line["tokens"] for line in lines)
    assert plan["details"]["loss tokens"] == sum(line["loss_tokens"] for line in lines)
    size = sum(p.stat().st_size for p in (tmp_path / "one" / "model").iterdir())
    assert plan["disk_bytes"] == pytest.approx(size, rel=0.05)
    assert plan["seconds"] is None
    finished = dry("mpd-train", *call)
    assert (finished["remaining"], finished["seconds"]) == (0, 0)
    with pytest.raises(ConfigError, match="started here with other settings"):
        ask("mpd-train", *arguments("one", "--pack-length", 2048))

    # Killed before its end, it has its own speed; another training has none.
    two = arguments("two", "--pack-length", 1024)
    shutil.copytree(tmp_path / "one", tmp_path / "two", ignore=shutil.ignore_patterns("model"))
    plan = dry("mpd-train", *two)
    assert plan["learned_from"] == f"{tmp_path / 'two'} ({len(lines)} steps)"
    per_token = sum(x["seconds"] for x in lines) / sum(x["tokens"] for x in lines)
    assert plan["seconds"] == pytest.approx(plan["tokens_expected"] * per_token, abs=0.1)
    assert plan["device"] == "cpu"
    shutil.rmtree(tmp_path / "two")
    assert dry("mpd-train", *two)["seconds"] is None

    lengths = rows(round_dir, "distill").filter(pl.col("status") == "ok")
    lengths = lengths["loss_start"] + lengths["num_rewritten_tokens"]
    short = [*map(str, arguments("three", "--pack-length", 90, "--dry-run", "--json"))]
    refused = CliRunner().invoke(train, short)
    plan = json.loads(refused.stdout)
    assert refused.exit_code == 1
    assert plan["failing"] == (lengths > 90).sum() > 3
    assert "do not fit --pack-length 90" in plan["reasons"][0]
    assert plan["refusal"].startswith("Training does not start")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one"]
    (tmp_path / "one" / "run.json").unlink()
    with pytest.raises(ConfigError, match="run.json does not say how they were made"):
        ask("mpd-train", *call)


def test_a_folder_without_weights_is_refused(prompts, round_dir, tmp_path):
    """A dry run reads none, and the run would not begin."""
    bare, out = tmp_path / "bare", tmp_path / "out"
    shutil.copytree(STUDENT, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    new = ["mpd-train", "--shards", round_dir, "--out", out]
    for call in (
        ["mpd-gen", *rollout_arguments(prompts, out, **{"--model": bare})],
        ["mpd-gen", *rewrite_arguments(round_dir, **{"--teacher": bare})],
        [*new, "--student", bare],
        [*new, "--student", STUDENT, "--teacher", bare],
    ):
        with pytest.raises(ConfigError, match=r"bare: no \*\.safetensors here"):
            ask(*call)


# -- pipelines -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pocket(prompts, tmp_path_factory):
    return small_pocket(prompts, tmp_path_factory.mktemp("pocket"))


def with_first_round(pocket, round_dir, out, changed=()):
    """A run of the pipeline that has `round_dir` as its first round, not trained on yet."""
    shutil.copytree(round_dir, out / "data" / "round1")
    sampling, rewriting, _ = Plan(load_pipeline(pocket, changed), out).training(1)
    write_jsonl(out / "finished.jsonl", [
        {"command": [step.program, *step.command], "inputs": _inputs(step), "exit_code": 0}
        for step in (sampling, rewriting)
    ])  # fmt: skip


def test_a_later_round_is_planned_from_the_first(pocket, round_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    out = tmp_path / "run"
    with_first_round(pocket, round_dir, out)
    before = content(out)
    found = dry("mpd-rounds", pocket, "--out", out)
    plans = {step["label"]: step["plan"] for step in found["steps"]}
    assert len(plans) == 15
    drafts, rewrites = rows(round_dir, "rollouts"), rows(round_dir, "distill")
    kept = rewrites.filter(pl.col("status") == "ok")
    assert plans["round 1: rollouts"] is plans["round 1: rewrite"] is None
    assert plans["round 1: train"]["rows"] == kept.height
    plan = plans["round 2: rollouts"]
    expected = 96 * drafts["num_completion_tokens"].mean()
    assert plan["tokens_expected"] == pytest.approx(expected, abs=1)
    plan = plans["round 2: rewrite"]
    asked = 96 * (1 - (drafts["finish_reason"] == "length").mean())
    per_row = rewrites["num_rewritten_tokens"].sum() / 240
    assert plan["tokens_expected"] == pytest.approx(asked * per_row, rel=0.02)
    plan = plans["round 2: train"]
    assert plan["rows"] == pytest.approx(asked * kept.height / 240, rel=0.02)
    length = (kept["loss_start"] + kept["num_rewritten_tokens"]).mean()
    assert plan["tokens_expected"] == pytest.approx(plan["rows"] * length, rel=0.05)
    assert plans["base: evaluate test"]["tokens_expected"] is None
    assert content(out) == before
    table = run("mpd-rounds", pocket, "--out", out, "--dry-run").stdout
    assert "round 2: train" in table
    assert f"learned from {out}/data/round1 (240 rows): round 2: rollouts" in table


def test_drafts_that_will_be_cut_are_planned_too(pocket, round_dir, tmp_path, monkeypatch):
    """Of a round to come as many are taken to be cut off as of the round before."""
    monkeypatch.chdir(ROOT)
    out = tmp_path / "run"
    first = shutil.copytree(round_dir, tmp_path / "round")
    edit_rows(
        first, "rollouts", lambda row: row["sample_idx"] or row.update(finish_reason="length")
    )
    found = []
    for changed in ((), ("rewrite.cut_drafts=true",)):
        with_first_round(pocket, first, out, changed)
        words = [word for change in changed for word in ("--set", change)]
        steps = dry("mpd-rounds", pocket, "--out", out, *words)["steps"]
        (plan,) = (step["plan"] for step in steps if step["label"] == "round 2: rewrite")
        found.append(plan["tokens_at_most"])
        shutil.rmtree(out)
    # A quarter of 96 drafts, each of which may become a rewrite of 200 tokens.
    assert found == [72 * 200, 96 * 200]


def test_an_engine_that_steps_could_share_is_named(pocket, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    shared = plan_pipeline(load_pipeline(pocket, ()), tmp_path / "o").notes
    assert not any("engine starts" in note for note in shared)
    sets = ("evaluation.1.rollouts.engine.max_num_seqs=8", "rollouts.parts.workers=3")
    notes = plan_pipeline(load_pipeline(pocket, sets), tmp_path / "o").notes
    apart = [note for note in notes if "engine starts once more" in note]
    assert [note.partition(" than")[0] for note in apart] == [
        "base: evaluate greedy: has another max_num_seqs",
        "round 1: rollouts: has another workers",
    ]


def test_a_pipeline_is_planned_at_given_rates(pocket, round_dir, tmp_path):
    """A rate gives the time of its stage, a bound where the tokens are one, and goes before the
    speed that is recorded."""
    sets = ["--set", "rounds=1", "--set", "rollouts.num_prompts=5"]
    new = ["mpd-rounds", pocket, "--out", tmp_path / "o", *sets, "--dry-run"]
    rates = {"rollouts": 1000, "rewrite": 500, "train": 2000}
    given = [x for stage, rate in rates.items() for x in ("--rate", f"{stage}={rate}")]
    plans = {x["label"]: x["plan"] for x in json.loads(run(*new, *given, "--json").stdout)["steps"]}
    assert len(plans) == 9
    assert plans["round 1: rollouts"]["rows"] == 20
    for label, plan in plans.items():
        rate = rates.get(label.rpartition(" ")[2], rates["rollouts"])
        assert plan["tokens_expected"] is None
        assert plan["seconds"] == pytest.approx(plan["tokens_at_most"] / rate, abs=0.1), label
    said = run(*new, *given).stdout.splitlines()
    (line,) = [x for x in said if x.startswith("round 1: rewrite")]
    assert re.search(r"at most \d+:\d\d:\d\d \(500 tokens/s, given\)", line)
    (line,) = [x for x in said if x.startswith("total")]
    assert len(re.findall("at most", line)) == 3
    partly = run(*new, "--rate", "rewrite=500").stdout
    assert "not known" in partly
    for wrong in ("rewrites=500", "rewrite", "rewrite=fast", "rewrite=0", "rewrite=inf"):
        assert "tokens per second" in run(*new, "--rate", wrong, code=2).stderr

    with_first_round(pocket, round_dir, tmp_path / "p")
    known = ["mpd-rounds", pocket, "--out", tmp_path / "p", "--rate", "rollouts=7"]
    plans = {x["label"]: x["plan"] for x in dry(*known)["steps"]}
    plan = plans["round 2: rollouts"]
    assert plan["seconds"] == pytest.approx(plan["tokens_expected"] / 7, abs=0.1)
    assert plans["round 2: rewrite"]["device"].startswith("cpu")


QWEN_CONFIG = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "attention_bias": False,
    "head_dim": 128, "hidden_act": "silu", "max_position_embeddings": 40960,
    "num_key_value_heads": 8, "rms_norm_eps": 1e-6, "rope_theta": 1000000,
    "torch_dtype": "bfloat16", "vocab_size": 151936,
}  # fmt: skip
QWEN_SIZES = {
    "Qwen/Qwen3-1.7B": {
        "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28,
        "num_attention_heads": 16, "tie_word_embeddings": True,
    },
    "Qwen/Qwen3-8B": {
        "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
        "num_attention_heads": 32, "tie_word_embeddings": False,
    },
}  # fmt: skip
# The datasets' real columns, splits and configs; the rows are made up.
QWEN_DATA = {
    "nvidia/OpenMathInstruct-2": (
        "default", "train_1M", 2100,
        lambda i: {"problem": f"What is {i} + 1 ?", "generated_solution": "…",
                   "expected_answer": str(i + 1), "problem_source": "augmented_gsm8k"},
    ),
    "openai/gsm8k": (
        "main", "test", 20,
        lambda i: {"question": f"Ida has {i} coins .", "answer": f"{i} - 0 = {i}\n#### {i}"},
    ),
    "HuggingFaceH4/MATH-500": (
        "default", "test", 20,
        lambda i: {"problem": f"Find ${i}x$ .", "solution": "…", "answer": rf"\frac{{{i}}}{{7}}",
                   "subject": "Algebra", "level": 3, "unique_id": f"test/{i}"},
    ),
    "HuggingFaceH4/aime_2024": (
        "default", "train", 30,
        lambda i: {"id": i, "problem": f"Let {i} be .", "solution": "…", "answer": f"{i:03}",
                   "url": "…", "year": "2024"},
    ),
    "math-ai/aime25": (
        "default", "test", 30,
        lambda i: {"problem": f"Let {i} be .", "answer": str(i), "id": str(i)},
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def qwen_hub(tmp_path_factory):
    """Stand-ins of the models (configurations and a tokenizer, no weights) and datasets that the
    Qwen3 pipeline names."""
    with Hub() as hub:
        for name, sizes in QWEN_SIZES.items():
            folder = tmp_path_factory.mktemp("model")
            # As Qwen3's, it spells every text.
            alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
            tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
            tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            tokenizer.decoder = decoders.ByteLevel()
            tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
            tokenizer.save(str(folder / "tokenizer.json"))
            settings = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
            settings["tokenizer_class"] = "PreTrainedTokenizerFast"
            (folder / "tokenizer_config.json").write_text(json.dumps(settings))
            (folder / "chat_template.jinja").write_text(QWEN)
            (folder / "config.json").write_text(json.dumps(QWEN_CONFIG | sizes))
            hub.add("models", name, folder)
        for name, (config, split, count, row) in QWEN_DATA.items():
            folder = tmp_path_factory.mktemp("dataset")
            (folder / "data").mkdir()
            (folder / "README.md").write_text(
                f"---\nconfigs:\n- config_name: {config}\n  data_files:\n"
                f"  - {{split: {split}, path: data/{split}-*.parquet}}\n---\n"
            )
            table = pa.Table.from_pylist([row(i) for i in range(count)])
            pq.write_table(table, folder / "data" / f"{split}-00000-of-00001.parquet")
            hub.add("datasets", name, folder)
        yield hub


@pytest.mark.slow
def test_the_qwen3_pipeline_is_sound_in_every_stage(qwen_hub, tmp_path):
    command_ = command("mpd-rounds", "pipelines/qwen3-1.7b/pipeline.toml", "--out")
    words = [*command_, tmp_path / "run", "--dry-run", "--json"]
    done = finish(words, env=qwen_hub.environment(tmp_path / "home"))
    found = json.loads(done.stdout)
    plans = {step["label"]: step["plan"] for step in found["steps"]}
    assert len(plans) == 4 + 10 + 3 * (3 + 4)
    # What is free is measured before anything is trained, on the base's problems.
    labels = list(plans)
    (first,) = {i for i, label in enumerate(labels) if label == "round 1: rollouts"}
    assert all(label.startswith(("base:", "baseline ")) for label in labels[:first])
    for name in (
        "concise",
        "calculation",
        "no-thinking",
        "budget-100",
        "budget-400",
        "token-budget-2048",
    ):
        free = plans[f"baseline {name}: evaluate math-500"]
        assert free["rows"] == plans["base: evaluate math-500"]["rows"]
    unthinking = plans["baseline no-thinking: evaluate math-500"]["shown"][0]["text"]
    assert unthinking.endswith("<|im_start|>assistant\n" + OFF)
    assert all(plan["failing"] == 0 for plan in plans.values())
    drafts, rewrite, training = (plans[f"round 3: {s}"] for s in ("rollouts", "rewrite", "train"))
    assert (drafts["rows"], drafts["tokens_at_most"]) == (8000, 8000 * 27000)
    assert (rewrite["rows"], rewrite["tokens_at_most"]) == (8000, 8000 * 10000)
    assert plans["base: evaluate aime24"]["rows"] == 30 * 16
    # The student thinks, the teacher rewrites without.
    (student,), (teacher,) = drafts["shown"], rewrite["shown"]
    assert "\\boxed{}" in student["text"]
    assert student["text"].endswith("<|im_start|>assistant\n")
    assert teacher["text"].endswith("<|im_start|>assistant\n" + OFF)
    assert "Rewrite the draft" in teacher["text"]
    # The context budget.
    longest = drafts["prompt_tokens"]["max"]
    asked = plans["round 1: rewrite"]["details"]["longest rewrite prompt + draft + rewrite"]
    assert 37000 < asked <= 40960
    assert f"prompt {longest} + rewrite 10,000 = {longest + 10000:,} of pack_length" in str(
        training["notes"]
    )
    budget = [note for plan in plans.values() for note in plan["notes"]]
    assert len(budget) == 9
    assert all(note.endswith(": fits") for note in budget)
    # Rank 64 on every linear layer of 28, from the configuration alone.
    assert training["details"]["trained parameters"] == "69,730,304"
    assert training["details"]["parameters"] == "1,720,574,976"
    served = {name.partition("/Qwen3")[0] for name in qwen_hub.served if "safetensors" in name}
    assert served == set()
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_qwen3_evaluations_are_checked_as_its_page_says(qwen_hub, tmp_path):
    """The page's commands, as they stand there, on the stand-ins: one for each evaluation set."""
    page = (ROOT / "docs" / "qwen3.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```\n(train=.*?)```", page, re.DOTALL)
    program = shlex.join(command("mpd-gen"))
    words = ["bash", "-euc", block.replace("mpd-gen", program)]
    done = finish(words, env=qwen_hub.environment(tmp_path / "home"))
    counts = re.findall(r"^ +2,100 +(\d+) +0 +0 +0.0%", done.stdout, re.MULTILINE)
    assert counts == ["20", "20", "30", "30"]
    pipeline = tomllib.loads((ROOT / "pipelines/qwen3-1.7b/pipeline.toml").read_text())
    evaluated = [url for x in pipeline["evaluation"] for url in x["rollouts"]["prompts"]]
    assert re.findall(r"--against '(\S+)'", block) == evaluated
    assert re.findall(r"train='(\S+)'", block) == pipeline["rollouts"]["prompts"]


@pytest.mark.parametrize(
    "setting, option",
    [("num_logprobs=8", "--overwrite"), ("filters.max_ratio=0.8", "--refilter")],
)
def test_a_step_of_other_settings_is_refused_with_its_command(
    pocket, round_dir, tmp_path, monkeypatch, setting, option
):
    """The command does what the message says: it goes on with the new settings."""
    monkeypatch.chdir(ROOT)
    out = tmp_path / "run"
    with_first_round(pocket, round_dir, out)
    arguments = [pocket, "--out", out, "--set", f"rewrite.{setting}"]
    with pytest.raises(ConfigError, match="round 1: rewrite: .*with other settings") as raised:
        ask("mpd-rounds", *arguments)
    assert str(raised.value) in run("mpd-rounds", *arguments, code=1).stderr.replace("error: ", "")
    program, *words = shlex.split(str(raised.value).splitlines()[-1])
    assert words[-1] == option
    assert dry(program, *words)["refusal"] is None


def test_whose_a_path_is_that_does_not_exist_is_said(pocket, tmp_path, monkeypatch):
    """A pipeline file that is run in another folder than its own paths."""
    (tmp_path / "run1").mkdir()
    (tmp_path / "else").mkdir()
    write_jsonl(tmp_path / "run1" / "test.jsonl", [{"id": "1", "problem": "a", "answer": "1"}])
    text = pocket.read_text().replace('"pipelines/', f'"{ROOT}/pipelines/')
    (tmp_path / "run1" / "pipeline.toml").write_text(text)
    monkeypatch.chdir(tmp_path / "else")
    file, prompts = "../run1/pipeline.toml", "['run1/test.jsonl']"
    arguments = [file, "--out", "o", "--set", f"evaluation.1.rollouts.prompts={prompts}"]
    with pytest.raises(ConfigError) as raised:
        ask("mpd-rounds", *arguments)
    message = str(raised.value)
    assert message.startswith("base: evaluate greedy: run1/test.jsonl: no such file.")
    assert f" evaluation.greedy.rollouts.prompts in {file} names it. Paths of a pipe" in message
    assert message.endswith(f"change it, or run this in {tmp_path}, where it is.")
    (tmp_path / "run1" / "test.jsonl").unlink()
    with pytest.raises(ConfigError, match=r"in which the command runs: change it\.$"):
        ask("mpd-rounds", *arguments)
    shutil.copytree(STUDENT, tmp_path / "run1" / "model")
    with pytest.raises(ConfigError, match=f"student in {file} names it.*run this in {tmp_path}, "):
        ask("mpd-rounds", file, "--out", "o", "--set", "student=run1/model")


def test_a_budget_that_does_not_hold_is_said(pocket, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    sets = ["rounds=1", "rewrite.sampling.max_tokens=600", "train.pack_length=300"]
    arguments = [a for s in sets for a in ("--set", s)]
    said = ask("mpd-rounds", pocket, "--out", tmp_path / "o", *arguments)
    assert "first prompt" in said and "first rewrite prompt" in said
    assert re.search(rf"mpd-gen rewrite .*--shards {tmp_path}/o/data/round1 .*--limit 64", said)
    assert "of the teacher's context of 1,024: OVER by" in said
    assert "of pack_length 300: OVER by" in said
    bad = ["--set", "rewrite.num_candidates=2"]
    with pytest.raises(ConfigError, match="--num-candidates 2 at --temperature 0"):
        ask("mpd-rounds", pocket, "--out", tmp_path / "o", *bad)
    assert not (tmp_path / "o").exists()
