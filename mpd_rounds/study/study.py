"""`mpd-study`: many settings of one pipeline, over several seeds, from one TOML file.

A setting is a pipeline with a few values changed. Each of its stages is the command that
`mpd-rounds` would run, in a folder that is named by what made it: the command, whose inputs are
such folders again. So settings that share a stage share its rows, a study that is run again does
what is owed, and one that gains a setting does that one.

    OUT/stages/rollouts-0f…/   rewrite-…/   train-…/   evaluate-…/
    OUT/GROUP.json             a group's figures; OUT/GROUP.md, OUT/GROUP.svg its tables and plot
"""

import copy
import dataclasses
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from mpd_data.common.errors import ConfigError
from mpd_data.common.files import write_json_atomic
from mpd_data.common.hashing import content_key
from mpd_data.config import Strict
from mpd_data.store.round import RoundDir
from mpd_rounds.run.runner import Runner
from mpd_rounds.run.steps import (
    Pipeline,
    SettingsFile,
    Step,
    evaluation_step,
    override,
    read_settings,
    rewrite_step,
    rollouts_step,
    train_step,
)

_UNNAMED = Path("out")
# What a setting's model may be: the last one of another setting, of the same seed.
_RESULT_OF = "setting:"
# What a setting cannot change: the study decides it, or it is the same for all.
_NOT_ITS_OWN = (
    "name", "seed", "environment", "evaluation", "parallel_evaluations", "preload", "licenses",
)  # fmt: skip


class Setting(Strict):
    """A pipeline with some values changed, by their dotted names. `student` and `teacher` may be
    "setting:NAME": what that setting of the study ends with."""

    # A cell of a Markdown table.
    name: str = Field(pattern=r"^[^|:\n]+$")
    set: dict[str, Any] = Field(default_factory=dict)


class Group(Strict):
    """Settings that are compared with each other, on some of the pipeline's evaluation sets, and
    all with `reference`: a setting of this group or of one with the same sets. The first set gives
    the headline figures."""

    name: str = Field(pattern=r"^[a-z0-9-]+$")
    title: str
    reference: str
    evaluation: list[str] = Field(min_length=1)
    set: dict[str, Any] = Field(default_factory=dict)
    setting: list[Setting] = Field(min_length=1)


class Study(SettingsFile):
    """A study file. `pipeline` holds what all settings begin with; a group's `set` comes on top of
    it, and a setting's on top of that."""

    name: str
    seeds: list[int] = Field(min_length=1)
    parallel: int = Field(1, ge=1)
    pipeline: dict[str, Any]
    group: list[Group] = Field(min_length=1)

    @field_validator("seeds")
    @classmethod
    def _each_once(cls, seeds: list[int]) -> list[int]:
        if len(set(seeds)) < len(seeds):
            raise ValueError("a seed stands there twice")
        return seeds

    def group_of(self, setting: str) -> Group:
        """Raises KeyError where no group has the setting."""
        for group in self.group:
            if any(own.name == setting for own in group.setting):
                return group
        raise KeyError(setting)


@dataclass
class Run:
    """A setting with one seed: its stages, and where each model of it is evaluated: by round, 0 for
    the base, and by evaluation set (of the rounds in between, the first set alone)."""

    group: str
    setting: str
    seed: int
    pipeline: Pipeline
    stages: list[list[Step]] = field(default_factory=list)
    evaluations: dict[int, dict[str, Path]] = field(default_factory=dict)
    shards: list[Path] = field(default_factory=list)
    trained: list[Path] = field(default_factory=list)

    @property
    def model(self) -> str:
        """What the run ends with."""
        return str(self.trained[-1] / "model")


def load_study(path: Path, overrides: tuple[str, ...]) -> Study:
    """Read a study file. Raises ConfigError naming the file and what is wrong in it."""
    values = read_settings(path, overrides)
    if "rollouts" in values and "group" not in values:
        raise ConfigError(f"{path}: a pipeline, not a study. Run it with mpd-rounds {path}.")
    study = Study.from_values(values, str(path))
    names = [setting.name for group in study.group for setting in group.setting]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"{path}: {twice[0]!r} names more than one setting.")
    for group in study.group:
        where = f"{path}: group {group.name!r}: its reference {group.reference!r}"
        if group.reference not in names:
            raise ConfigError(f"{where} is no setting of the study.")
        other = study.group_of(group.reference)
        if other.evaluation != group.evaluation:
            raise ConfigError(
                f"{where} is evaluated on {', '.join(other.evaluation)} and this group on"
                f" {', '.join(group.evaluation)}: give both the same sets."
            )
    return study


class Planner:
    """Lays out the runs of a study. Raises ConfigError for settings that no stage would take."""

    def __init__(self, study: Study, out: Path) -> None:
        self._study = study
        self._stages = out / "stages"
        self._runs: dict[tuple[str, int], Run] = {}

    def runs(self, groups: tuple[str, ...] = ()) -> list[Run]:
        """The runs of these groups, of all where none is named, and of what they refer to."""
        known = [group.name for group in self._study.group]
        if unknown := [name for name in groups if name not in known]:
            raise ConfigError(f"no group {unknown[0]!r}; the study has {', '.join(known)}.")
        chosen = [group for group in self._study.group if not groups or group.name in groups]
        names = [
            name
            for group in chosen
            for name in (*(setting.name for setting in group.setting), group.reference)
        ]
        return [
            self._run(name, seed, ()) for name in dict.fromkeys(names) for seed in self._study.seeds
        ]

    def _run(self, name: str, seed: int, through: tuple[str, ...]) -> Run:
        if (name, seed) in self._runs:
            return self._runs[name, seed]
        if name in through:
            raise ConfigError(f"setting {name!r} begins with its own result.")
        group = self._study.group_of(name)
        setting = next(own for own in group.setting if own.name == name)
        where = f"{self._study.source}: group {group.name!r}, setting {setting.name!r}"
        values = copy.deepcopy(self._study.pipeline) | {"seed": seed}
        for dotted, value in {**group.set, **setting.set}.items():
            if dotted.partition(".")[0] in _NOT_ITS_OWN:
                raise ConfigError(f"{where}: {dotted!r} is the same for all settings.")
            override(values, dotted, copy.deepcopy(value), where)
        before: list[Run] = []
        for role in ("student", "teacher"):
            if str(values.get(role, "")).startswith(_RESULT_OF):
                before.append(self._result_of(values[role], seed, (*through, setting.name), where))
                values[role] = before[-1].model
        pipeline = Pipeline.from_values(values, where)
        sets = {chosen.name: chosen for chosen in pipeline.evaluation}
        if unknown := [name for name in group.evaluation if name not in sets]:
            raise ConfigError(
                f"{where}: no evaluation set {unknown[0]!r}; there are {', '.join(sets)}."
            )
        chosen = [sets[name] for name in group.evaluation]
        pipeline = pipeline.model_copy(update={"evaluation": chosen})
        run = Run(group.name, setting.name, seed, pipeline)
        for earlier in before:
            run.stages += earlier.stages
        self._lay_out(run)
        self._runs[setting.name, seed] = run
        return run

    def _result_of(self, name: str, seed: int, through: tuple[str, ...], where: str) -> Run:
        try:
            return self._run(name.removeprefix(_RESULT_OF), seed, through)
        except KeyError:
            raise ConfigError(f"{where}: {name!r} names no setting of the study.") from None

    def _lay_out(self, run: Run) -> None:
        p, label = run.pipeline, f"{run.setting}, seed {run.seed}"
        student = p.student
        self._evaluate(run, student, 0)
        for round_ in range(1, p.rounds + 1):
            sampled = self._named(rollouts_step(p, student, round_, _UNNAMED), "out", "rollouts")
            asked = rewrite_step(p, student, round_, sampled.out)
            rewritten = dataclasses.replace(
                self._named(asked, "shards", "rewrite"), reads=(_counted(sampled.out),)
            )
            shards = rewritten.out.parent
            made = train_step(p, student, round_, shards, _UNNAMED)
            trained = self._named(made, "out", "train")
            for step in (sampled, rewritten, trained):
                run.stages.append([dataclasses.replace(step, label=f"{label}, {step.label}")])
            run.shards.append(shards)
            run.trained.append(trained.out.parent)
            student = run.model
            self._evaluate(run, student, round_)

    def _evaluate(self, run: Run, student: str, round_: int) -> None:
        """Of the rounds in between the headline set is enough, for the curve."""
        sets = run.pipeline.evaluation
        between = 0 < round_ < run.pipeline.rounds
        steps = {
            chosen.name: self._named(
                evaluation_step(run.pipeline, chosen, student, round_, _UNNAMED), "out", "evaluate"
            )
            for chosen in (sets[:1] if between else sets)
        }
        run.evaluations[round_] = {name: step.out for name, step in steps.items()}
        label = f"{run.setting}, seed {run.seed}"
        run.stages.append(
            [dataclasses.replace(step, label=f"{label}, {step.label}") for step in steps.values()]
        )

    def _named(self, step: Step, folder: str, kind: str) -> Step:
        """The step in a folder that its settings name, those at their defaults included; `folder`
        is the one that says where it writes. Where the study lies is not in the name."""
        settings = step.config.model_dump(mode="json")
        if folder == "out":
            del settings["out"]
        made = json.dumps([step.program, settings]).replace(f"{self._stages}/", "stages/")
        path = self._stages / f"{kind}-{content_key(made)[:16]}"
        option = f"--{folder}"
        command = list(step.command)
        command[command.index(option) + 1] = str(path)
        config = step.config.model_copy(update={folder: path})
        inside = step.out.name if step.out.name in ("distill", "model") else ""
        return dataclasses.replace(step, command=command, out=path / inside, config=config)


@dataclass(frozen=True)
class Outcome:
    """What a study left behind: the runs that came to their end, what stopped the others, by
    setting and seed, and whether a stage left rows in errors/."""

    runs: list[Run]
    stopped: dict[tuple[str, int], str]
    failed_rows: bool


def run_study(study: Study, out: Path, groups: tuple[str, ...] = ()) -> Outcome:
    """Runs what is not finished of a study. A stage that fails stops the runs that need it and no
    other. Raises ConfigError for settings that no stage would take."""
    runs = Planner(study, out).runs(groups)
    waves = list(waves_of(runs))
    pipeline = runs[0].pipeline
    runner = Runner(out, pipeline.environment, sum(map(len, waves)), pipeline.preload)
    write_json_atomic(out / "settings.json", study.model_dump(mode="json"))
    broken: dict[Path, str] = {}
    stopped: dict[tuple[str, int], str] = {}
    for wave in waves:
        alive = [run for run in runs if (run.setting, run.seed) not in stopped]
        needed = {step.out for run in alive for steps in run.stages for step in steps}
        owed = [step for step in wave if step.out in needed]
        for step in owed:
            for source in step.reads:
                _begin_with(source.parent, step.out.parent)
        broken |= {step.out: str(error) for step, error in runner.attempt(owed, study.parallel)}
        for run in alive:
            mine = [step.out for steps in run.stages for step in steps if step.out in broken]
            if mine:
                stopped[run.setting, run.seed] = broken[mine[0]]
    done = [run for run in runs if (run.setting, run.seed) not in stopped]
    return Outcome(done, stopped, runner.failed_rows)


def waves_of(runs: Iterable[Run]) -> Iterator[list[Step]]:
    """Steps in an order in which each follows what it needs, those together that need nothing of
    each other; each folder once."""
    seen: set[Path] = set()
    left = [list(run.stages) for run in runs]
    while any(left):
        wave: dict[Path, Step] = {}
        for stages in left:
            # A run goes on with its next stage that is still owed.
            while stages:
                owed = [step for step in stages.pop(0) if step.out not in seen]
                if owed:
                    for step in owed:
                        wave.setdefault(step.out, step)
                    break
        seen |= wave.keys()
        yield list(wave.values())


def _counted(rollouts: Path) -> Path:
    """What names the shards of a round's rollouts."""
    return rollouts / "rollouts.manifest.jsonl"


def _begin_with(rollouts: Path, folder: Path) -> None:
    """Gives a round that is to be rewritten its rollouts: the same shards, by hard links where the
    file system has them (they are never changed), and copies of what counts them. Raises
    ConfigError where it has other ones."""
    if folder.exists():
        if RoundDir(folder).manifest("rollouts") != RoundDir(rollouts).manifest("rollouts"):
            raise ConfigError(
                f"{folder}: was begun with other rollouts than {rollouts} holds now. Delete it, and"
                " what was trained on it is refused in turn."
            )
        return
    begun = folder.with_name(f"{folder.name}.begun")
    shutil.rmtree(begun, ignore_errors=True)
    shutil.copytree(rollouts, begun, copy_function=_link_shards)
    begun.rename(folder)


def _link_shards(source: str, target: str) -> str:
    if source.endswith(".parquet"):
        try:
            os.link(source, target)
        except OSError:
            # No hard links here, or no more of them: a copy, which says itself what else is wrong.
            return shutil.copy2(source, target)
        return target
    return shutil.copy2(source, target)
