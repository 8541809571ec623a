"""Plan and run a study: many settings of one pipeline, over several seeds, from one TOML file.

A setting is a pipeline with a few values changed. Each of its stages is the command that
`mpd-rounds` would run. The stage's folder is named by a hash of that command, whose inputs are such
folders too. Therefore settings that share a stage share its folder, and a study that is run again,
or gains a setting, runs only the stages that are missing.

    OUT/stages/rollouts-0f…/   rewrite-…/   train-…/   evaluate-…/
    OUT/GROUP.json             a group's figures; OUT/GROUP.md, OUT/GROUP.svg its tables and plot
"""

import contextlib
import copy
import dataclasses
import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from mpd_data.common.errors import ConfigError
from mpd_data.common.hashing import content_key
from mpd_data.config import Strict
from mpd_data.store.locks import folder_lock
from mpd_data.store.round import RoundDir
from mpd_data.store.run_record import require_kind, write_record
from mpd_rounds.run.runner import Runner
from mpd_rounds.run.steps import Pipeline, SettingsFile, Step, override, read_settings

_UNNAMED = Path("out")
# A setting's model may be the last model of another setting with the same seed.
_RESULT_OF = "setting:"
# What a setting cannot change, because the study sets it for all.
_NOT_ITS_OWN = (
    "name", "seed", "environment", "evaluation", "baseline", "licenses",
)  # fmt: skip


class Setting(Strict):
    """A pipeline with some values changed, by their dotted names. `student` and `teacher` may be
    "setting:NAME": the last model of that setting."""

    # It becomes a cell of a Markdown table.
    name: str = Field(pattern=r"^[^|:\n]+$")
    set: dict[str, Any] = Field(default_factory=dict)


class Group(Strict):
    """Settings that are compared with each other and with `reference`, on some of the pipeline's
    evaluation sets. The reference is a setting of this group, or of a group with the same sets. The
    first set gives the headline results."""

    name: str = Field(pattern=r"^[a-z0-9-]+$")
    title: str
    reference: str
    evaluation: list[str] = Field(min_length=1)
    set: dict[str, Any] = Field(default_factory=dict)
    setting: list[Setting] = Field(min_length=1)


class Study(SettingsFile):
    """A study file. `pipeline` holds the values that all settings start from; a group's `set`
    overrides it, and a setting's `set` overrides both."""

    name: str
    seeds: list[int] = Field(min_length=1)
    parallel: int = Field(1, ge=1)
    pipeline: dict[str, Any]
    group: list[Group] = Field(min_length=1)

    @field_validator("seeds")
    @classmethod
    def _each_once(cls, seeds: list[int]) -> list[int]:
        if len(set(seeds)) < len(seeds):
            raise ValueError("a seed is listed twice")
        return seeds

    def settings(self) -> dict[str, tuple[Group, Setting]]:
        """Return each setting with its group, by the setting's name."""
        return {setting.name: (group, setting) for group in self.group for setting in group.setting}


@dataclass
class SettingRun:
    """A setting with one seed. `stages`: its steps in order, those in one list independent of each
    other; `evaluations`: folders by round (0: the base) and evaluation set; rounds between base and
    last have the first set only; `baselines`: folders by baseline and evaluation set."""

    setting: str
    seed: int
    pipeline: Pipeline
    stages: list[list[Step]] = field(default_factory=list)
    evaluations: dict[int, dict[str, Path]] = field(default_factory=dict)
    baselines: dict[str, dict[str, Path]] = field(default_factory=dict)
    shards: list[Path] = field(default_factory=list)
    trained: list[Path] = field(default_factory=list)

    @property
    def model(self) -> str:
        """The model that the run ends with."""
        return str(self.trained[-1] / "model")


def load_study(path: Path, overrides: tuple[str, ...]) -> Study:
    """Read a study file. Raise ConfigError naming the file and what is wrong in it."""
    values = read_settings(path, overrides)
    if "rollouts" in values and "group" not in values:
        raise ConfigError(f"{path}: a pipeline, not a study. Run it with mpd-rounds {path}.")
    study = Study.from_values(values, str(path))
    names = [setting.name for group in study.group for setting in group.setting]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"{path}: {twice[0]!r} names more than one setting.")
    settings = study.settings()
    for group in study.group:
        where = f"{path}: group {group.name!r}: its reference {group.reference!r}"
        if group.reference not in settings:
            raise ConfigError(f"{where} is no setting of the study.")
        other, _ = settings[group.reference]
        if other.evaluation != group.evaluation:
            raise ConfigError(
                f"{where} is evaluated on {', '.join(other.evaluation)} and this group on"
                f" {', '.join(group.evaluation)}: give both the same sets."
            )
    return study


class Planner:
    """Plans the runs of a study. Raise ConfigError for settings that a stage would refuse."""

    def __init__(self, study: Study, out: Path) -> None:
        require_kind(out, "study")
        self._study = study
        self._settings = study.settings()
        self._stages = out / "stages"
        self._runs: dict[tuple[str, int], SettingRun] = {}

    def runs(self, groups: tuple[str, ...] = ()) -> list[SettingRun]:
        """Return the runs of these groups (none: of all groups) and of their references."""
        known = [group.name for group in self._study.group]
        if unknown := [name for name in groups if name not in known]:
            raise ConfigError(f"no group {unknown[0]!r}; the study has {', '.join(known)}.")
        names: dict[str, None] = {}
        for group in self._study.group:
            if not groups or group.name in groups:
                names |= dict.fromkeys(setting.name for setting in group.setting)
                names.setdefault(group.reference)
        return [self._run(name, seed, ()) for name in names for seed in self._study.seeds]

    def _run(self, name: str, seed: int, through: tuple[str, ...]) -> SettingRun:
        if (name, seed) in self._runs:
            return self._runs[name, seed]
        if name in through:
            raise ConfigError(f"setting {name!r} starts from its own result.")
        group, setting = self._settings[name]
        where = f"{self._study.source}: group {group.name!r}, setting {name!r}"
        values = copy.deepcopy(self._study.pipeline) | {"seed": seed}
        for dotted, value in {**group.set, **setting.set}.items():
            if dotted.partition(".")[0] in _NOT_ITS_OWN:
                raise ConfigError(f"{where}: {dotted!r} must be the same for all settings.")
            override(values, dotted, copy.deepcopy(value), where)
        before: list[SettingRun] = []
        for role in ("student", "teacher"):
            if str(values.get(role, "")).startswith(_RESULT_OF):
                source = values[role].removeprefix(_RESULT_OF)
                if source not in self._settings:
                    raise ConfigError(f"{where}: {values[role]!r} names no setting of the study.")
                before.append(self._run(source, seed, (*through, name)))
                values[role] = before[-1].model
        pipeline = Pipeline.from_values(values, where)
        if pipeline.gate is not None:
            raise ConfigError(f"{where}: a study runs all rounds of each setting; remove [gate].")
        for baseline in pipeline.baseline:
            if baseline.shows_rewrites:
                raise ConfigError(
                    f"{where}: baseline {baseline.name!r} shows rewrites of round 1, and each"
                    " setting has others. Give it examples of its own: rollouts.examples."
                )
            if baseline.sets:
                raise ConfigError(
                    f"{where}: baseline {baseline.name!r} names sets; a study measures it on those"
                    " of each group. Remove sets."
                )
        sets = {chosen.name: chosen for chosen in pipeline.evaluation}
        if unknown := [name for name in group.evaluation if name not in sets]:
            raise ConfigError(
                f"{where}: no evaluation set {unknown[0]!r}; there are {', '.join(sets)}."
            )
        chosen = [sets[name] for name in group.evaluation]
        pipeline = pipeline.model_copy(update={"evaluation": chosen})
        run = SettingRun(name, seed, pipeline)
        for earlier in before:
            run.stages += earlier.stages
        self._lay_out(run)
        self._runs[name, seed] = run
        return run

    def _lay_out(self, run: SettingRun) -> None:
        p, student = run.pipeline, run.pipeline.student
        self._evaluate(run, student, 0)
        for baseline in p.baseline:
            measured = {
                chosen.name: p.baseline_step(baseline, chosen, _UNNAMED, _UNNAMED)
                for chosen in p.evaluation
            }
            steps = {
                name: self._named(run, step, "out", "evaluate") for name, step in measured.items()
            }
            run.baselines[baseline.name] = {name: step.out for name, step in steps.items()}
            run.stages[0] += steps.values()
        for round_ in range(1, p.rounds + 1):
            sampling = p.rollouts_step(student, round_, _UNNAMED)
            rollouts = self._named(run, sampling, "out", "rollouts")
            rewriting = p.rewrite_step(student, round_, rollouts.out)
            rewrite = self._named(run, rewriting, "shards", "rewrite")
            manifest = rollouts.out / "rollouts.manifest.jsonl"
            rewrite = dataclasses.replace(rewrite, reads=(manifest,))
            shards = rewrite.out.parent
            training = p.train_step(student, round_, shards, _UNNAMED)
            train = self._named(run, training, "out", "train")
            run.stages += [[rollouts], [rewrite], [train]]
            run.shards.append(shards)
            run.trained.append(train.out.parent)
            student = run.model
            self._evaluate(run, student, round_)

    def _evaluate(self, run: SettingRun, student: str, round_: int) -> None:
        """Add evaluations of `student`. Rounds between base and last need the first set only."""
        sets = run.pipeline.evaluation
        steps = {}
        for chosen in sets[:1] if 0 < round_ < run.pipeline.rounds else sets:
            step = run.pipeline.evaluation_step(chosen, student, round_, _UNNAMED)
            steps[chosen.name] = self._named(run, step, "out", "evaluate")
        run.evaluations[round_] = {name: step.out for name, step in steps.items()}
        run.stages.append(list(steps.values()))

    def _named(self, run: SettingRun, step: Step, folder: str, kind: str) -> Step:
        """Return the step of a run with a folder named by a hash of all its settings, defaults
        included. `folder` is the setting that says where the step writes. The name does not depend
        on where the study's folder is."""
        settings = step.config.model_dump(mode="json")
        if folder == "out":
            del settings["out"]
        made = json.dumps([step.program, settings]).replace(f"{self._stages}/", "stages/")
        path = self._stages / f"{kind}-{content_key(made)[:16]}"
        command = list(step.command)
        command[command.index(f"--{folder}") + 1] = str(path)
        config = step.config.model_copy(update={folder: path})
        out = path / (step.out.name if step.out.name in ("distill", "model") else "")
        label = f"{run.setting}, seed {run.seed}, {step.label}"
        return dataclasses.replace(step, label=label, command=command, out=out, config=config)


@dataclass(frozen=True)
class StudyOutcome:
    """The result of a study: `runs` that finished, the errors that stopped the others by setting
    and seed, and whether a stage left rows in errors/."""

    runs: list[SettingRun]
    stopped: dict[tuple[str, int], str]
    failed_rows: bool


def run_study(study: Study, out: Path, groups: tuple[str, ...] = ()) -> StudyOutcome:
    """Run the unfinished stages of a study. A stage that fails stops only the runs that need it.

    Raise ConfigError for settings that a stage would refuse.
    """
    runs = Planner(study, out).runs(groups)
    waves = waves_of(runs)
    # mpd-gen status sees by it that the study is alive.
    with folder_lock(out):
        return _run_waves(study, runs, waves, out)


def _run_waves(
    study: Study, runs: list[SettingRun], waves: list[list[Step]], out: Path
) -> StudyOutcome:
    pipeline = runs[0].pipeline
    failed: dict[Path, str] = {}
    stopped: dict[tuple[str, int], str] = {}
    every = [step for wave in waves for step in wave]
    with contextlib.closing(Runner(out, pipeline.environment, every, study.parallel)) as runner:
        write_record(out, "study", study.model_dump(mode="json"))
        for wave in waves:
            going_on = [run for run in runs if (run.setting, run.seed) not in stopped]
            needed = {step.out for run in going_on for steps in run.stages for step in steps}
            steps = [step for step in wave if step.out in needed]
            for step in steps:
                for source in step.reads:
                    _link_rollouts(source.parent, step.out.parent)
            failed |= {step.out: str(error) for step, error in runner.attempt(steps)}
            for run in going_on:
                errors = [failed[s.out] for stage in run.stages for s in stage if s.out in failed]
                if errors:
                    stopped[run.setting, run.seed] = errors[0]
    finished = [run for run in runs if (run.setting, run.seed) not in stopped]
    return StudyOutcome(finished, stopped, runner.failed_rows)


def waves_of(runs: list[SettingRun]) -> list[list[Step]]:
    """Return each step of the runs once, in waves. A step is in a later wave than its inputs."""
    # In each run the inputs of a step come before it, so its smallest place in any run is late
    # enough.
    steps: dict[Path, Step] = {}
    places: dict[Path, int] = {}
    for run in runs:
        for place, stage in enumerate(run.stages):
            for step in stage:
                steps.setdefault(step.out, step)
                places[step.out] = min(place, places.get(step.out, place))
    return [
        [steps[out] for out in places if places[out] == place]
        for place in sorted(set(places.values()))
    ]


def _link_rollouts(rollouts: Path, folder: Path) -> None:
    """Give the round in `folder` the rollouts of another: the same shards, as hard links where
    the file system allows it (shards never change), and copies of its other files.

    Raise ConfigError if the round has other rollouts.
    """
    if folder.exists():
        if RoundDir(folder).manifest("rollouts") != RoundDir(rollouts).manifest("rollouts"):
            raise ConfigError(
                f"{folder}: was begun with other rollouts than {rollouts} holds now. Delete it;"
                " trainings on it must then be deleted too."
            )
        return
    partial = folder.with_name(f"{folder.name}.begun")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(rollouts, partial, copy_function=_link_shard)
    partial.rename(folder)


def _link_shard(source: str, target: str) -> str:
    if source.endswith(".parquet"):
        # Where no hard link is possible; another error shows up in the copy.
        with contextlib.suppress(OSError):
            os.link(source, target)
            return target
    return shutil.copy2(source, target)
