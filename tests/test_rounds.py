"""A whole pipeline, small, with the real models; killed in the middle and resumed."""

import json
import os
import re
import signal
import subprocess
import time
import tomllib
from pathlib import Path

import polars as pl
import pytest
import torch
from conftest import ROOT, STUDENT, command, environment, rows, run, small_pocket, with_adapter
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from mpd_data.common.errors import ConfigError
from mpd_data.common.hashing import content_key
from mpd_data.config import RolloutsConfig
from mpd_data.inspect.status import show_status, status_of
from mpd_rounds.run import few_shot
from mpd_rounds.run.layout import Plan
from mpd_rounds.run.plan import plan_pipeline
from mpd_rounds.run.runner import Finished, Runner, _inputs
from mpd_rounds.run.steps import Step, load_pipeline
from mpd_rounds.study.study import load_study

POCKET = ROOT / "pipelines" / "pocket" / "pipeline.toml"


@pytest.fixture(scope="module")
def small(prompts, tmp_path_factory):
    """The pocket pipeline on a handful of prompts."""
    path = small_pocket(prompts, tmp_path_factory.mktemp("pipeline"))
    path.write_text(path.read_text().replace("5e-4", "2e-3"))
    values = tomllib.loads(path.read_text())
    assert values["rollouts"]["num_prompts"] == 24
    return path


@pytest.mark.slow
def test_a_pipeline_runs_survives_a_kill_and_sums_up(small, tmp_path):
    out = tmp_path / "run"
    ratios = "round=[{rewrite.filters.max_ratio=0.95}, {rewrite.filters.max_ratio=0.9}]"
    arguments = [small, "--out", out, "--set", "rounds=2", "--set", ratios]
    process = subprocess.Popen(
        command("mpd-rounds", *arguments), env=environment(), cwd=ROOT,
        stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    while not (out / "data" / "round1" / "distill").exists():
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    # The command is a child of the nursery, which ends it a moment later.
    while (said := status_of(out))["state"] == "running":
        time.sleep(0.05)
    assert said["state"] == "stopped"
    assert [step["state"] for step in said["steps"]][-1] == "waiting"
    done = run("mpd-rounds", *arguments)
    said = status_of(out)
    assert (said["kind"], said["state"]) == ("pipeline", "finished")
    assert {step["state"] for step in said["steps"]} == {"finished"}
    assert f"finished: {len(said['steps'])} of {len(said['steps'])} steps" in show_status(said)
    assert "done before" in done.stderr
    assert "mpd-train --shards" in done.stderr

    summary = json.loads((out / "summary.json").read_text())
    assert len(summary["rounds"]) == 2
    assert summary["final"] == summary["rounds"][-1]
    asked = [{"rewrite.filters.max_ratio": ratio} for ratio in (0.95, 0.9)]
    assert summary["round_settings"] == asked
    assert "round 2: rewrite.filters.max_ratio = 0.9" in done.stdout
    for round_, ratio in enumerate((0.95, 0.9), start=1):
        frame = rows(out / "data" / f"round{round_}", "distill")
        kept = frame.filter(pl.col("status") == "ok")["compression_ratio"].max()
        longer = frame.filter(pl.col("status") == "longer")["compression_ratio"].min()
        assert kept <= ratio < longer
    for side in (summary["base"], *summary["rounds"]):
        assert set(side) >= {
            "accuracy", "accuracy_interval", "mean_tokens", "median_tokens", "truncated",
            "problems", "samples",
        }  # fmt: skip
        assert side["problems"] == 24
        assert side["samples"] == 96
    saved = 1 - summary["final"]["mean_tokens"] / summary["base"]["mean_tokens"]
    assert summary["token_reduction"] == pytest.approx(saved)
    # Even this little moves the student: the stages are connected.
    assert saved > 0.1
    assert set(summary["sets"]) == {"test", "greedy", "ood"}
    for name, result in summary["sets"].items():
        (line,) = [x for x in done.stdout.splitlines() if re.match(rf"{name}  .* -> .* -> ", x)]
        for change in ("accuracy_difference", "token_reduction"):
            low, high = (100 * bound for bound in result[f"{change}_interval"])
            assert f"{100 * result[change]:.1f}% [{low:.1f}, {high:.1f}]" in line
        for figure in ("{:.1f}", "mean_tokens", 1), ("{:.1f}%", "accuracy", 100):
            form, key, factor = figure
            sides = [form.format(factor * result[side][key]) for side in ("base", "new")]
            assert " -> ".join(sides) in line
    warning = "only 24 problems: intervals of fewer than 30 problems are too narrow to rely on"
    for name in summary["sets"]:
        assert f"\n{name}: {warning}\n" in done.stdout
    assert (out / "lengths.png").read_bytes().startswith(b"\x89PNG")
    run("mpd-gen", "validate", out / "data" / "round1", out / "data" / "round2")
    # Round 2 was sampled from round 1's student, not from the base again.
    config = json.loads((out / "data" / "round2" / "run.json").read_text())
    model = config["stages"]["rollouts"]["details"]["config"]["model"]
    assert model == str(out / "train" / "round1" / "model")
    card = (out / "train" / "round2" / "model" / "README.md").read_text()
    assert card.count("type: mean_tokens") == 3 and card.count("type: accuracy") == 3
    assert f"value: {round(summary['final']['accuracy'], 4)}" in card
    assert "learning rate" in card and "* Teacher: teacher" in card
    assert f"test: {warning}." in card
    row = next(line for line in card.splitlines() if " accuracy | " in line)
    cells = [cell.strip() for cell in row.split("|")[3:5]]
    sides = [summary[side]["accuracy"] for side in ("base", "final")]
    assert [cell.split()[0] for cell in cells] == [f"{100 * side:.1f}%" for side in sides]
    assert run("mpd-rounds", *arguments).stderr.count("done before") == 15


def tiny(small, folder):
    """One round on four problems, measured once, with the engine that starts fastest."""
    text = "[[evaluation]]".join(small.read_text().split("[[evaluation]]")[:2])
    text = text.replace("num_prompts = 24", "num_prompts = 4").replace("rounds = 2", "rounds = 1")
    path = folder / "tiny.toml"
    path.write_text(text.replace("max_num_seqs = 256", 'backend = "transformers"'))
    return path


@pytest.mark.slow
def test_a_first_student_that_is_an_adapter(small, tmp_path):
    """Sampled from as it is, trained merged; later rounds go on from whole models."""
    pytest.importorskip("peft")
    base = AutoModelForCausalLM.from_pretrained(STUDENT)
    adapted = with_adapter(base, ["q_proj"])
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.mul_(0.01)  # so little that it still solves problems
    adapted.save_pretrained(tmp_path / "adapter")
    arguments = [tiny(small, tmp_path), "--out", tmp_path / "o"]
    arguments += ["--set", f"student={tmp_path / 'adapter'}"]
    said = run("mpd-rounds", *arguments, "--set", "rounds=2", "--dry-run").stdout
    assert "round 2: train" in said
    # One that training would refuse is refused before anything is sampled.
    file = tmp_path / "adapter" / "adapter_config.json"
    told = file.read_text()
    file.write_text(json.dumps({**json.loads(told), "init_lora_weights": "pissa"}))
    assert "began by 'pissa'" in run("mpd-rounds", *arguments, code=1).stderr
    assert not (tmp_path / "o").exists()
    file.write_text(told)
    run("mpd-rounds", *arguments)
    details = json.loads((tmp_path / "o" / "train" / "round1" / "run.json").read_text())
    assert details["details"]["config"]["student"] == str(tmp_path / "adapter")
    assert "+" in details["identity"]["student"]["version"]
    model = tmp_path / "o" / "train" / "round1" / "model"
    found = load_file(model / "model.safetensors")
    assert found.keys() == load_file(STUDENT / "model.safetensors").keys()


@pytest.mark.slow
def test_seeds_are_run_apart_and_compared(small, tmp_path):
    path = tiny(small, tmp_path)
    out = tmp_path / "o"
    said = run("mpd-rounds", path, "--out", out, "--seeds", 2).stdout
    summaries = json.loads((out / "seeds.json").read_text())
    assert [summary["seed"] for summary in summaries] == [0, 1]
    table = said.partition("\nseed ")[2].splitlines()
    for seed, summary in enumerate(summaries):
        assert json.loads((out / f"seed{seed}" / "summary.json").read_text()) == summary
        assert summary["base"]["problems"] == 4
        (line,) = [line for line in table if line.startswith(f"{seed} ")]
        assert f"-> {summary['final']['mean_tokens']:,.1f}" in line
    assert summaries[0]["base"] != summaries[1]["base"]


def test_rounds_follow_one_another(small, tmp_path):
    plan = Plan(load_pipeline(small, ("rounds=3",)), tmp_path)
    labels = [step.label for step in plan.all_steps() if "evaluate" not in step.label]
    assert labels == [
        f"round {r}: {stage}" for r in (1, 2, 3) for stage in ("rollouts", "rewrite", "train")
    ]
    for step in plan.training(3):
        student = str(tmp_path / "train" / "round2" / "model")
        assert (student in step.command) == (
            step.program == "mpd-train" or "rollouts" in step.label
        )


def test_a_round_changes_the_settings_that_it_names(small, tmp_path):
    path = tmp_path / "schedule.toml"
    path.write_text(
        small.read_text().replace(
            "[[evaluation]]",
            """[[round]]
rewrite.filters.max_ratio = 0.8
train.optimizer.learning_rate = 1e-3
[[round]]
rewrite.filters.max_ratio = 0.65
rollouts.num_prompts = 8

[[evaluation]]""",
            1,
        )
    )
    pipeline = load_pipeline(path, ("rounds=3",))
    plan, plain = Plan(pipeline, tmp_path), Plan(load_pipeline(small, ("rounds=3",)), tmp_path)
    found = []
    for round_ in (1, 2, 3):
        sampling, rewriting, training = (step.config for step in plan.training(round_))
        settings = rewriting.filters.max_ratio, sampling.num_prompts
        found.append((*settings, training.optimizer.learning_rate))
        # What it does not name stays.
        unchanged = [step.config for step in plain.training(round_)][1]
        ratio = {"filters": unchanged.filters.model_copy(update={"max_ratio": settings[0]})}
        assert rewriting == unchanged.model_copy(update=ratio)
    # The last table also holds for the rounds after it; the first ends with its round.
    assert found == [(0.8, 24, 1e-3), (0.65, 8, 2e-3), (0.65, 8, 2e-3)]
    notes = plan_pipeline(pipeline, tmp_path / "run").notes
    assert "round 3: rollouts.num_prompts = 8, rewrite.filters.max_ratio = 0.65" in notes


@pytest.mark.parametrize(
    "override, message",
    [
        ("round=[{rewrite.filters.max_rato=1}]", "max_rato: unknown .* 'rewrite.filters.max_rat"),
        ("round=[{rewrte.template='plain'}]", "round.0.rewrte: .*Did you mean 'round.0.rewrite'"),
        ("round=[{rollouts.seed=1}]", r"\[rollouts\]: the pipeline sets seed; remove"),
        ("runds=2", "runds: unknown setting. Did you mean 'rounds'"),
        ("rounds=0", "rounds: "),
        ("rounds", "expected NAME=VALUE"),
        ("rollouts.model=x", r"toml: \[rollouts\]: the pipeline sets model; remove"),
        ("train.epoch=2", "toml: train.epoch: unknown setting. Did you mean 'train.epochs'"),
        ("rewrte.filters.max_ratio=1", "rewrte: unknown setting. Did you mean 'rewrite'"),
        ("rewrite.filter.max_ratio=1", "filter: unknown setting. Did you mean 'rewrite.filters'"),
        ("rewrite.filters.max_rato=1", "max_rato: unknown .* 'rewrite.filters.max_ratio'"),
        ("evaluation.0.rollots.seed=1", "evaluation.0.rollots: .*mean 'evaluation.0.rollouts'"),
        ("train.loss.divergence=foward_kl", "Did you mean 'forward_kl'"),
        ("train.learning_rate=1", "train.learning_rate: .*mean 'train.optimizer.learning_rate'"),
        ("train.lr=1", "train.lr: unknown setting. Did you mean 'train.optimizer.learning_rate'"),
        ("train.optimizer.epochs=1", "Did you mean 'train.epochs'"),
        ("evaluation.1.rollouts.max_token=1", "evaluation.*'.*rollouts.sampling.max_tokens'"),
        ("seed.x=2", "not a section"),
        ("evaluation.9.name=x", "not a section"),
        ("evaluation.name=x", "give a number"),
    ],
)
def test_bad_settings_are_named(small, tmp_path, override, message):
    with pytest.raises(ConfigError, match=message):
        Plan(load_pipeline(small, (override,)), tmp_path).all_steps()


def test_what_is_missing_is_named_and_a_study_is_no_pipeline(tmp_path):
    path = tmp_path / "p.toml"
    path.write_text('name = "secret"\n[rollouts]\n[[evaluation]]\nrollouts = {}')
    expected = "p.toml: student: required; teacher: required; evaluation.0.name: required"
    with pytest.raises(ConfigError, match=rf"{expected}$"):
        load_pipeline(path, ())
    with pytest.raises(ConfigError, match="a pipeline, not a study. Run it with mpd-rounds"):
        load_study(path, ())
    with pytest.raises(ConfigError, match="a study, not a pipeline. Run it with mpd-study"):
        load_pipeline(POCKET.with_name("study.toml"), ())


def test_a_failing_stage_stops_the_pipeline(small, tmp_path):
    # No dry run can tell that the engine will not start with this.
    bad = "evaluation.0.rollouts.engine.kv_cache_gib=0.000001"
    said = run("mpd-rounds", small, "--out", tmp_path / "o", "--set", bad, code=1)
    assert "vLLM cannot start" in said.stderr
    assert "base: evaluate test ended with exit code 1" in said.stderr
    assert not (tmp_path / "o" / "summary.json").exists()


@pytest.mark.parametrize(
    "baseline, message",
    [
        ("{kind='concse'}", "baseline.0.kind: .*Did you mean 'concise'"),
        ("{kind='budget'}", "baseline.0: kind budget and words go together"),
        ("{kind='concise', words=5}", "kind budget and words go together"),
        ("{kind='token_budget'}", "baseline.0: kind token_budget and tokens go together"),
        ("{name='x', rollouts={budget_text='x'}}", "budget_text goes with kind token_budget"),
        ("{name='x'}", "baseline.0: give a kind, or settings in rollouts"),
        ("{rollouts={thinking='off'}}", "baseline.0.name: required"),
        ("{kind='concise', sets=['tset']}", "no evaluation set 'tset'; .* Did you mean 'test'"),
        ("{kind='concise'}, {kind='concise'}", "two baselines would write to .*-concise-test"),
        ("{kind='few_shot', rollouts={examples='x'}}", "few_shot makes its examples itself"),
        (
            "{kind='concise', rollouts={promt_template='x'}}",
            "'baseline.0.rollouts.prompt_template'",
        ),
        (
            "{kind='concise', rollouts={num_prompts=3, sampling={temperature=0}}}",
            "a baseline cannot change num_prompts, sampling.temperature: .* can change .*examples",
        ),
        (
            "{name='x', rollouts={sampling={max_token=3}}}",
            "max_token: unknown setting. Did you mean 'baseline.0.rollouts.sampling.max_tokens'",
        ),
    ],
)
def test_bad_baselines_are_named(small, baseline, message):
    with pytest.raises(ConfigError, match=rf"small.toml: .*{message}"):
        load_pipeline(small, (f"baseline=[{baseline}]",))


def test_a_kind_is_applied_to_the_baselines_own_settings(small, tmp_path):
    own = "{prompt_template='{{problem}} .', system_prompt='x', sampling={max_tokens=9}}"
    budget = f"{{kind='budget', words=7, sets=['greedy'], rollouts={own}}}"
    changes = (f"baseline=[{budget}, {{kind='few_shot'}}]", "rounds=2")
    plan = Plan(load_pipeline(small, changes), tmp_path)
    folders = [(x.name, x.set, x.folder.name) for x in plan.baseline_folders()]
    assert folders == [
        ("budget-7", "greedy", "baseline-budget-7-greedy"),
        *(("few-shot", x, f"baseline-few-shot-{x}") for x in ("test", "greedy", "ood")),
    ]
    steps = {step.label: step for step in plan.all_steps()}
    budget, base = (
        steps[f"{x}: evaluate greedy"].config.model_dump() for x in ("baseline budget-7", "base")
    )
    changed = {name for name in base if base[name] != budget[name]}
    assert changed == {"out", "prompt_template", "system_prompt", "sampling"}
    assert budget["prompt_template"] == "{{problem}} .\n\nUse at most 7 words."
    assert budget["sampling"] == base["sampling"] | {"max_tokens": 9}
    order = list(steps)
    assert order.index("baseline budget-7: evaluate greedy") < order.index("round 1: rollouts")
    # The examples are rewrites of round 1.
    rewritten = order.index("round 1: rewrite")
    assert order[rewritten + 1 : rewritten + 5] == [
        *(f"baseline few-shot: evaluate {x}" for x in ("test", "greedy", "ood")), "round 1: train"
    ]  # fmt: skip


@pytest.mark.parametrize(
    "override, message",
    [
        ("teacher=nowhere", "nowhere: not a folder here"),
        ("evaluation.2.rollouts.prompts=['nowhere.jsonl']", "nowhere.jsonl: no such file"),
        ("rollouts.answer_column=gold", "no column 'gold'"),
        ("evaluation.1.rollouts.engine.max_model_len=9999", "over the model's context"),
        ("rewrite.num_candidates=2", "--num-candidates 2 at --temperature 0"),
        ("train.lora={lora_r=2, lora_target_modules=['x']}", "has no layer of that name"),
        ("baseline=[{kind='no_thinking'}]", "baseline no-thinking: evaluate test: "),
        ("baseline=[{kind='token_budget', tokens=9}]", "the tokenizer cannot spell it"),
        ("baseline=[{kind='token_budget', tokens=400}]", "--token-budget 400 leaves no room"),
    ],
)
def test_what_would_fail_hours_in_fails_at_once(small, tmp_path, override, message):
    said = run("mpd-rounds", small, "--out", tmp_path / "o", "--set", override, code=1)
    assert message in said.stderr
    assert not (tmp_path / "o").exists()


def test_changed_inputs_and_torn_records_are_done_again(tmp_path):
    prompts = tmp_path / "p.jsonl"
    prompts.write_text("a")
    out = tmp_path / "made"
    out.mkdir()
    config = RolloutsConfig(model="m", prompts=[str(prompts)], out=out)
    step = Step("label", "why", "mpd-gen", ["rollouts", str(prompts), str(out)], out, config)
    record = {"command": ["mpd-gen", *step.command], "inputs": _inputs(step), "exit_code": 0}
    (tmp_path / "finished.jsonl").write_text(json.dumps(record) + '\n{"command": ["mp')

    def is_done():
        Runner(tmp_path, {}, [])
        assert (tmp_path / "finished.jsonl").read_text().endswith("\n")
        return Finished(tmp_path).holds(step)

    assert is_done()
    prompts.write_text("ab")
    assert not is_done()


def test_a_step_whose_folder_other_settings_made_since_is_done_again(tmp_path):
    def step(seed):
        config = RolloutsConfig(model="m", prompts=["p"], out=tmp_path / "made", seed=seed)
        words = ["rollouts", "--seed", str(seed), "--out", str(config.out)]
        return Step("label", "why", "mpd-gen", words, config.out, config)

    step(0).out.mkdir()
    records = [{"command": step(seed).words, "inputs": {}, "exit_code": 0} for seed in (0, 1)]
    lines = "".join(f"{json.dumps(record)}\n" for record in records)
    (tmp_path / "finished.jsonl").write_text(lines)
    assert [Finished(tmp_path).holds(step(seed)) for seed in (0, 1)] == [False, True]


def test_prompts_that_a_pattern_names_are_inputs(tmp_path):
    for name in ("p1", "p2"):
        (tmp_path / f"{name}.jsonl").write_text("a")
    for pattern in ("p*.jsonl", "**/*.jsonl"):
        config = RolloutsConfig(model="m", prompts=[str(tmp_path / pattern)], out=tmp_path / "made")
        step = Step("label", "why", "mpd-gen", ["rollouts", *config.prompts], config.out, config)
        assert [Path(file).name for file in _inputs(step)] == ["p1.jsonl", "p2.jsonl"]


def test_the_base_of_an_adapter_is_an_input(tmp_path):
    adapter, base = tmp_path / "adapter", tmp_path / "base"
    for folder, file in ((adapter, "adapter_model.safetensors"), (base, "model.safetensors")):
        folder.mkdir()
        (folder / file).write_text("a")
    told = {"peft_type": "LORA", "base_model_name_or_path": str(base)}
    (adapter / "adapter_config.json").write_text(json.dumps(told))
    config = RolloutsConfig(model=str(adapter), prompts=["p"], out=tmp_path / "made")
    step = Step("label", "why", "mpd-gen", ["rollouts", str(adapter)], config.out, config)
    assert str(base / "model.safetensors") in _inputs(step)
    told["base_model_name_or_path"] = "Some/Model"
    (adapter / "adapter_config.json").write_text(json.dumps(told))
    assert [*map(Path, _inputs(step))] == sorted(adapter.iterdir())


def test_the_examples_are_of_the_smallest_hashes(round_dir, tmp_path):
    config = RolloutsConfig(
        model=str(STUDENT), prompts=["p"], out=tmp_path, examples=tmp_path / "e.jsonl"
    )
    few_shot._write(config.examples, round_dir, [config])
    kept = rows(round_dir, "distill").filter(pl.col("status") == "ok")["prompt_id"].unique()
    chosen = sorted(kept, key=content_key)[: few_shot.COUNT]
    assert chosen != sorted(kept)[: few_shot.COUNT]
    drafts = rows(round_dir, "rollouts")
    problems = dict(drafts.select("prompt_id", "problem").iter_rows())
    shown = [json.loads(line) for line in config.examples.read_text().splitlines()]
    assert [one["problem"] for one in shown] == [problems[prompt_id] for prompt_id in chosen]


def test_who_chooses_where_the_teacher_samples(small):
    """The student of the round, not the first one, whose vocabulary is the same."""
    for choose, expected in (("shortest", "FIRST"), ("likeliest", "NEWEST")):
        changed = ("sampler='teacher'", "student='FIRST'", f"rewrite.choose='{choose}'")
        step = load_pipeline(small, changed).rewrite_step("NEWEST", 2, Path("shards"))
        assert step.config.student == expected


def test_shipped_pipelines_are_valid(tmp_path):
    found = sorted((ROOT / "pipelines").rglob("pipeline.toml"))
    assert len(found) >= 1
    for path in found:
        assert len(Plan(load_pipeline(path, ()), tmp_path).all_steps()) > 3
