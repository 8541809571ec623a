"""A study, small, with the real models: shared stages, resumption, and its figures."""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from contextlib import contextmanager

import polars as pl
import pyarrow.parquet as pq
import pytest
from conftest import (
    ROOT,
    STUDENT,
    TEACHER,
    TEMPLATE,
    command,
    environment,
    invoke,
    rows,
    run,
    small_pocket,
    write_jsonl,
)

from mpd_data.common.errors import ConfigError
from mpd_data.inspect.compare import compare, evaluate
from mpd_data.inspect.status import round_status
from mpd_data.store.round import RoundDir
from mpd_data.store.shards import read_metadata
from mpd_data.store.trainings import metrics_file
from mpd_data.store.writer import ShardWriter
from mpd_rounds.run.runner import at_once
from mpd_rounds.run.steps import load_pipeline
from mpd_rounds.study.cli import cli
from mpd_rounds.study.results import _LAST, _cost, _figures, _limits
from mpd_rounds.study.study import Planner, SettingRun, load_study, run_study, waves_of

POCKET = ROOT / "pipelines" / "pocket" / "study.toml"
QWEN = ROOT / "pipelines" / "qwen2.5-coder" / "study.toml"
TEXT = """
name = "small"
seeds = [0, 1]
parallel = 2

[pipeline]
name = "small"
student = "{student}"
teacher = "{teacher}"
[pipeline.environment]
OMP_NUM_THREADS = "1"
[pipeline.rollouts]
prompts = ["{prompts}"]
num_prompts = 24
num_samples = 2
id_column = "id"
answer_column = "answer"
sampling = {{ max_tokens = 400 }}
engine = {{ dtype = "float32", max_num_seqs = 64 }}
[pipeline.rewrite]
template = "{template}"
score_context = "rewrite"
sampling = {{ max_tokens = 200 }}
engine = {{ dtype = "float32", max_num_seqs = 64 }}
[pipeline.train]
max_steps = 6
pack_length = 600
optimizer = {{ learning_rate = 2e-3 }}
[[pipeline.evaluation]]
name = "held-out"
[pipeline.evaluation.rollouts]
prompts = ["{prompts}"]
num_prompts = 20
num_samples = 2
id_column = "id"
answer_column = "answer"
sampling = {{ max_tokens = 400 }}
engine = {{ dtype = "float32", max_num_seqs = 64 }}

[[group]]
name = "loss"
title = "Divergences"
reference = "forward"
evaluation = ["held-out"]
[[group.setting]]
name = "forward"
[[group.setting]]
name = "reverse"
set = {{ "train.loss.divergence" = "reverse_kl" }}

[[group]]
name = "later"
title = "A teacher that another setting ends with"
reference = "forward"
evaluation = ["held-out"]
[[group.setting]]
name = "of the result"
set = {{ teacher = "setting:reverse" }}
"""


@pytest.fixture(scope="module")
def file(prompts, tmp_path_factory):
    path = tmp_path_factory.mktemp("study") / "study.toml"
    models = {"student": STUDENT, "teacher": TEACHER, "template": TEMPLATE}
    path.write_text(TEXT.format(prompts=prompts, **models))
    return path


@contextmanager
def in_its_first_stages(file, out, parallel, *more):
    """A study's process, in a group of its own, while its first stages, `parallel` of them,
    sample. `more`: settings."""
    changed = {
        "parallel": parallel,
        # Long enough that none is at its end yet.
        "pipeline.evaluation.0.rollouts.num_samples": 8,
    }
    settings = [*(f"{name}={value}" for name, value in changed.items()), *more]
    words = [word for value in settings for word in ("--set", value)]
    process = subprocess.Popen(
        command("mpd-study", file, "--out", out, "--group", "loss", *words),
        cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        while len(list(out.glob("stages/evaluate-*/run.json"))) < parallel:
            assert process.poll() is None
            time.sleep(0.05)
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.slow
@pytest.mark.parametrize("parallel, group", [(1, False), (2, False), (2, True)])
def test_told_to_end_it_lets_its_stages_commit_and_begins_no_other(file, tmp_path, parallel, group):
    """Schedulers signal this process alone, and its stages hear of it from here; or all of its
    group."""
    out = tmp_path / "study"
    begun = out / "stages"
    with in_its_first_stages(file, out, parallel) as process:
        if group:
            os.killpg(process.pid, signal.SIGTERM)
        else:
            process.terminate()
        said = process.communicate(timeout=900)[1]
    assert process.returncode == 130
    assert "run the same command again" in said
    # Of two seeds' bases, with room for both or for one.
    assert len(list(begun.iterdir())) == parallel
    for folder in begun.iterdir():
        # Nobody is at work on it, which would raise.
        with RoundDir(folder).lock("rollouts"):
            assert (folder / "run.json").exists()
    assert not (out / "finished.jsonl").exists()


ONE_SEED = ("seeds=[0]", "pipeline.baseline=[{kind='calculation'}]")


@pytest.fixture(scope="module")
def done(file, tmp_path_factory):
    """The group `loss` with one seed and a baseline."""
    out = tmp_path_factory.mktemp("done") / "out"
    words = [word for value in ONE_SEED for word in ("--set", value)]
    return out, run("mpd-study", file, "--out", out, "--group", "loss", *words)


@pytest.mark.slow
def test_a_stage_that_is_killed_has_failed(file, tmp_path):
    # Two samples of each problem: the other seed's stages run to their end.
    few = "pipeline.evaluation.0.rollouts.num_samples=2"
    one = "{name='loss', title='One', reference='forward', evaluation=['held-out'],"
    one += " setting=[{name='forward'}]}"
    with in_its_first_stages(file, tmp_path / "out", 1, few, f"group=[{one}]") as process:
        (folder,) = (tmp_path / "out" / "stages").iterdir()
        while not (writers := round_status(folder)["writers"]):
            time.sleep(0.05)
        os.kill(writers[0]["pid"], signal.SIGKILL)
        figures, said = process.communicate(timeout=900)
    assert process.returncode == 1
    assert "some settings did not finish" in said
    assert "seed 0, base: evaluate held-out was killed (SIGKILL)" in figures
    # The other seed's went on.
    finished = (tmp_path / "out" / "finished.jsonl").read_text()
    assert "seed 1, base" in finished
    assert "seed 0, base" not in finished


def kinds(out):
    names = sorted(path.name.partition("-")[0] for path in (out / "stages").iterdir())
    return {kind: names.count(kind) for kind in dict.fromkeys(names)}


@pytest.mark.slow
def test_settings_share_the_stages_they_share(done):
    out, process = done
    assert kinds(out) == {"evaluate": 4, "rewrite": 1, "rollouts": 1, "train": 2}
    assert "[8/8]" in process.stderr


@pytest.mark.slow
def test_figures_are_those_of_the_folders(done, file):
    out, process = done
    said = process.stdout
    group = json.loads((out / "loss.json").read_text())
    runs = {r.setting: r for r in Planner(load_study(file, ONE_SEED), out).runs(("loss",))}
    ((name, free),) = group["baselines"].items()
    assert name == "baseline calculation"
    base, new = (
        where["held-out"]
        for where in (runs["forward"].evaluations[0], runs["forward"].baselines["calculation"])
    )
    (row,) = pl.scan_parquet(new / "rollouts/*.parquet").head(1).collect().rows(named=True)
    assert "Write only the calculation" in row["prompt"]
    alone, both = evaluate(new), compare(base, new)
    figures = free["held-out"]
    assert (figures["accuracy"], figures["mean_tokens"]) == pytest.approx(
        (alone["accuracy"], alone["mean_tokens"])
    )
    assert figures["against_base"]["accuracy_difference"] == pytest.approx(
        both["accuracy_difference"]
    )
    assert re.search(rf"\| {name} \| {100 * alone['accuracy']:.1f} \|", said)
    for setting in group["settings"]:
        own = runs[setting["name"]]
        base, new = (own.evaluations[i]["held-out"] for i in (0, 1))
        figures = setting["rounds"][1]["sets"]["held-out"]
        alone, both = evaluate(new), compare(base, new)
        for name in ("accuracy", "mean_tokens", "median_tokens", "truncated"):
            assert figures[name] == pytest.approx(alone[name])
        assert figures["against_base"]["token_reduction_interval"] == pytest.approx(
            both["token_reduction_interval"]
        )
        reference = runs["forward"].evaluations[1]["held-out"]
        assert figures["against_reference"]["accuracy_difference"] == pytest.approx(
            compare(reference, new)["accuracy_difference"]
        )
        (cost,) = setting["costs"]
        assert cost["steps"] == 6
        tokens = f"{cost['generated_tokens']:,.0f}"
        assert re.search(rf"\| {setting['name']} \| {tokens} \|", said)
    assert (out / "loss.md").read_text() in said
    assert "<svg" in (out / "loss.svg").read_text()


@pytest.mark.slow
def test_a_study_goes_on_with_what_is_missing(done, file, tmp_path):
    out = shutil.copytree(done[0], tmp_path / "out")
    # Folders are named relative to where the study is run: the copy is another study's.
    moved = (out / "finished.jsonl").read_text().replace(str(done[0]), str(out))
    (out / "finished.jsonl").write_text(moved)
    arguments = [file, "--out", out, "--set", "seeds=[0]"]
    plan = Planner(load_study(file, ("seeds=[0]",)), out)
    stages = [step for wave in waves_of(plan.runs()) for step in wave]
    new = [step for step in stages if not step.out.exists()]
    assert 0 < len(new) < len(stages)
    first = run("mpd-study", *arguments)
    assert f"[{len(stages)}/{len(stages)}]" in first.stderr
    again = run("mpd-study", *arguments)
    assert again.stderr.count("done before") == len(stages)
    assert again.stdout.split("\n# ")[1:] == first.stdout.split("\n# ")[1:] != []


def test_costs_are_those_of_drafts_and_rewrites_of_all_rounds(prompts, round_dir, tmp_path):
    pipeline = load_pipeline(small_pocket(prompts, tmp_path), ())
    again = shutil.copytree(round_dir, tmp_path / "round2")
    drafts, rewrites = rows(round_dir, "rollouts"), rows(round_dir, "distill")
    cut = (rewrites["rewrite_finish_reason"] == "length").sum()
    written = rewrites["num_rewritten_tokens"].sum()
    written += cut * pipeline.section("rewrite", 1)["sampling"]["max_tokens"]
    lines = [
        {"step": step, "loss_tokens": 100 * step, **dict.fromkeys(_LAST, 0.1)} for step in (1, 2)
    ]
    write_jsonl(metrics_file(tmp_path), lines)
    found = _cost(
        SettingRun("a", 0, pipeline, shards=[round_dir, again], trained=[tmp_path, tmp_path])
    )
    assert found["generated_tokens"] == 2 * (drafts["num_completion_tokens"].sum() + written)
    assert found["rewrites"] == 2 * rewrites.height
    assert (found["steps"], found["loss_tokens"]) == (4, 600)


def test_each_stage_follows_what_it_needs():
    for wave_of in (("methods",), ("concise",), ()):
        runs = Planner(load_study(POCKET, ()), ROOT / "out").runs(wave_of)
        there = set()
        for wave in waves_of(runs):
            outs = [step.out for step in wave]
            assert len(set(outs)) == len(outs)
            assert not there & set(outs)
            for step in wave:
                needed = [word for word in step.command if "/stages/" in word]
                needed += [str(path.parent) for path in step.reads]
                for word in needed:
                    own = word in (str(step.out), str(step.out.parent))
                    assert own or any(str(out).startswith(word) for out in there), word
            there |= set(outs)


def test_one_setting_changes_the_folders_that_follow_from_it(file, tmp_path):
    def folders(*overrides):
        (own, *_) = Planner(load_study(file, overrides), tmp_path).runs(("loss",))
        return [step.out for wave in own.stages for step in wave]

    as_is = folders()
    assert folders() == as_is
    lr = folders("pipeline.train.optimizer.learning_rate=1e-3")
    assert [a == b for a, b in zip(as_is, lr, strict=True)] == [True, True, True, False, False]
    more = folders("pipeline.rollouts.num_prompts=23")
    assert [a == b for a, b in zip(as_is, more, strict=True)] == [True, *[False] * 4]


def test_a_step_counts_as_many_processes_as_it_has_workers(tmp_path):
    # Two trainings at a time, and one generation of two engines.
    study = load_study(QWEN, ())
    counts = {
        step.program: at_once(wave, study.parallel)
        for wave in waves_of(Planner(study, tmp_path).runs())
        for step in wave
        if len(wave) > 1
    }
    assert counts == {"mpd-gen": 1, "mpd-train": 2}
    assert at_once([], 2) == 0


@pytest.mark.parametrize(
    "overrides, groups, message",
    [
        (["group.0.reference='none'"], [], "'none' is no setting of the study"),
        (["group.0.setting.1.name='forward'"], [], "'forward' names more than one"),
        (["group.0.evaluation=['other']"], ["loss"], "evaluated on"),
        ([], ["lost"], "no group 'lost'; the study has loss, later"),
        (["group.1.setting.0.set={teacher='setting:x'}"], [], "'setting:x' names no setting"),
        (["group.1.setting.0.set={teacher='setting:of the result'}"], [], "its own result"),
        (["group.0.set={nonsense=1}"], [], "nonsense"),
        (["seeds=[0, 0]"], [], "a seed is listed twice"),
        (["group.0.set={'environment.X'='1'}"], [], "must be the same for all settings"),
        (["group.0.set={'train.nonsense'=1}"], [], "nonsense"),
        (["pipeline.baseline=[{kind='few_shot'}]"], [], "'few-shot' shows rewrites of round 1"),
        (
            ["pipeline.baseline=[{kind='concise',sets=['held-out']}]"],
            [],
            "a study measures it on those of each group",
        ),
    ],
)
def test_bad_studies_are_named(file, tmp_path, overrides, groups, message):
    words = [word for o in overrides for word in ("--set", o)]
    words += [word for g in groups for word in ("--group", g)]
    with pytest.raises(ConfigError, match=re.escape(message)):
        invoke(cli, file, "--out", tmp_path / "out", *words, "--dry-run")
    assert not (tmp_path / "out").exists()


def test_the_evaluation_sets_are_there(file, tmp_path):
    both = ("group.0.evaluation=['other']", "group.1.evaluation=['other']")
    with pytest.raises(ConfigError, match="no evaluation set 'other'; there are held-out"):
        Planner(load_study(file, both), tmp_path).runs()


def test_the_folders_do_not_say_where_the_study_lies(file, tmp_path):
    def names(out):
        runs = Planner(load_study(file, ()), out).runs()
        return [[str(s.out.relative_to(out)) for w in r.stages for s in w] for r in runs]

    assert names(tmp_path / "one") == names(tmp_path / "another")


@pytest.mark.slow
def test_a_setting_that_fails_stops_no_other(done, file, tmp_path):
    out = shutil.copytree(done[0], tmp_path / "out")
    # No rewrite is a hundredth of its draft.
    nothing = "set={'train.loss.divergence'='reverse_kl','rewrite.filters.max_ratio'=0.01}"
    overrides = ["seeds=[0]", f"group.0.setting.1.{nothing}"]
    words = [word for o in overrides for word in ("--set", o)]
    said = run("mpd-study", file, "--out", out, "--group", "loss", *words, code=1).stderr
    assert "some settings did not finish" in said
    found = json.loads((out / "loss.json").read_text())
    assert [setting["name"] for setting in found["settings"]] == ["forward"]
    assert list(found["stopped"]) == ["reverse, seed 0"]


@pytest.mark.slow
def test_a_round_with_other_rollouts_than_it_began_with_is_refused(done, file, tmp_path):
    out = shutil.copytree(done[0], tmp_path / "out")
    (rollouts,) = (out / "stages").glob("rollouts-*")
    manifest = rollouts / "rollouts.manifest.jsonl"
    manifest.write_text(manifest.read_text().replace('"sha256":"', '"sha256":"f', 1))
    with pytest.raises(ConfigError, match="was begun with other rollouts"):
        run_study(load_study(file, ("seeds=[0]",)), out, ("loss",))


@pytest.mark.slow
def test_other_problems_are_not_compared(done, file, tmp_path):
    run_ = Planner(load_study(file, ("seeds=[0]",)), done[0]).runs(("loss",))[0]
    base, new = (run_.evaluations[i]["held-out"] for i in (0, 1))
    source = RoundDir(new).shard_paths("rollouts")
    rows = [row for path in source for row in pq.read_table(path).to_pylist()]
    lost = rows[0]["prompt_id"]
    metadata = read_metadata(source[0])
    fewer = RoundDir(tmp_path / "fewer")
    for name in ("schema_version", "stage"):
        del metadata[name]
    with fewer.lock(), ShardWriter(fewer, "rollouts", metadata) as writer:
        for row in rows:
            if row["prompt_id"] != lost:
                writer.add(row)
    with pytest.raises(ConfigError, match="do not have the same problems"):
        _figures([fewer.path], [base], [base])


@pytest.mark.parametrize(
    "values, intervals, limits",
    [
        ([70, 74, 76, 85, 86, 89, 24], [], (70, 89)),
        ([40, 41, 42, 300, 43, 44], [(39, 45), (298, 303)], (39, 45)),
        ([40, 60, 80, 100, 120], [(70, 130), (30, 50)], (30, 130)),
        # Of four values none is an exception.
        ([40, 41, 42, 300], [(298, 303)], (40, 303)),
    ],
)
def test_one_value_far_from_all_others_does_not_make_the_plot_small(values, intervals, limits):
    """Nor are the intervals of the others cut off."""
    low, high = _limits(values, intervals)
    margin = 0.06 * (limits[1] - limits[0])
    assert (low, high) == pytest.approx((limits[0] - margin, limits[1] + margin))


def test_equal_values_have_room_around_them():
    assert _limits([50, 50], []) == (49, 51)
