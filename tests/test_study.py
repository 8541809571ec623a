"""A study, small, with the real models: shared stages, resumption, and its figures."""

import json
import re
import shutil

import pytest
from conftest import ROOT, STUDENT, TEACHER, TEMPLATE, invoke, run

from mpd_data.compare import compare, evaluate
from mpd_data.errors import ConfigError
from pipelines.study import Planner, _waves, cli, load_study

POCKET = ROOT / "pipelines" / "pocket" / "study.toml"
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


@pytest.fixture(scope="module")
def done(file, tmp_path_factory):
    """The group `loss` with one seed."""
    out = tmp_path_factory.mktemp("done") / "out"
    said = run("mpd-study", file, "--out", out, "--group", "loss", "--set", "seeds=[0]").stderr
    return out, said


def kinds(out):
    names = sorted(path.name.partition("-")[0] for path in (out / "stages").iterdir())
    return {kind: names.count(kind) for kind in dict.fromkeys(names)}


def test_settings_share_the_stages_they_share(done):
    out, said = done
    assert kinds(out) == {"evaluate": 3, "rewrite": 1, "rollouts": 1, "train": 2}
    assert "[7/7]" in said


def test_figures_are_those_of_the_folders(done, file):
    out, said = done
    (group,) = json.loads((out / "study.json").read_text())["groups"]
    runs = {r.setting: r for r in Planner(load_study(file, ("seeds=[0]",)), out).runs(("loss",))}
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
    assert (out / "study.md").read_text() in said
    assert "<svg" in (out / "loss.svg").read_text()


def test_a_study_goes_on_with_what_is_owed(done, file, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(done[0], out)
    # Folders are named relative to where the study is run: the copy is another study's.
    moved = (out / "finished.jsonl").read_text().replace(str(done[0]), str(out))
    (out / "finished.jsonl").write_text(moved)
    arguments = [file, "--out", out, "--set", "seeds=[0]"]
    plan = Planner(load_study(file, ("seeds=[0]",)), out)
    stages = [stage for wave in _waves(plan.runs()) for stage in wave]
    new = [s for s in stages if not s.step.out.exists()]
    assert {s.step.out.parent.name.partition("-")[0] for s in new if s.step.out.name} >= {"train"}
    said = run("mpd-study", *arguments).stderr
    assert f"[{len(stages)}/{len(stages)}]" in said
    again = run("mpd-study", *arguments).stderr
    assert again.count("done before") == len(stages)
    assert again.split("\n\n# ")[1] == said.split("\n\n# ")[1]


def test_each_stage_follows_what_it_needs():
    for wave_of in (("methods",), ("concise",), ()):
        runs = Planner(load_study(POCKET, ()), ROOT / "out").runs(wave_of)
        there = set()
        for wave in _waves(runs):
            outs = [stage.step.out for stage in wave]
            assert len(set(outs)) == len(outs)
            assert not there & set(outs)
            for stage in wave:
                needed = [w for w in stage.step.command if "/stages/" in w]
                if stage.copied_from:
                    needed = [str(stage.copied_from)]
                for word in needed:
                    own = word == str(stage.step.out) or word == str(stage.step.out.parent)
                    assert own or any(str(out).startswith(word) for out in there), word
            there |= set(outs)


def test_one_setting_changes_the_folders_that_follow_from_it(file, tmp_path):
    def folders(*overrides):
        (own, *_) = Planner(load_study(file, overrides), tmp_path).runs(("loss",))
        return [stage.step.out for wave in own.stages for stage in wave]

    as_is = folders()
    assert folders() == as_is
    lr = folders("pipeline.train.optimizer.learning_rate=1e-3")
    assert [a == b for a, b in zip(as_is, lr, strict=True)] == [True, True, True, False, False]
    more = folders("pipeline.rollouts.num_prompts=23")
    assert [a == b for a, b in zip(as_is, more, strict=True)] == [True, *[False] * 4]


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
        (["group.0.set={'train.nonsense'=1}"], [], "nonsense"),
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
