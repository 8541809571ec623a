"""Read a pipeline file, and build the command of each of its stages."""

import contextlib
import copy
import json
import math
import os
import shlex
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, Field, PrivateAttr, model_validator

from mpd_data.common.errors import ConfigError, DataError, OtherSettingsError, did_you_mean
from mpd_data.common.files import read_toml
from mpd_data.common.options import arguments, parse
from mpd_data.config import RewriteConfig, RolloutsConfig, Strict
from mpd_rounds.run.baselines import Baseline
from mpd_train.config import TrainConfig


class EvaluationSet(Strict):
    """Held-out prompts and how they are sampled: settings of `mpd-gen rollouts`."""

    name: str = Field(pattern=r"^[a-z0-9-]+$")
    rollouts: dict[str, Any]


class RoundSettings(Strict):
    """What a round changes in the pipeline's sections: the settings that it names, no others."""

    rollouts: dict[str, Any] = Field(default_factory=dict)
    rewrite: dict[str, Any] = Field(default_factory=dict)
    train: dict[str, Any] = Field(default_factory=dict)


class Gate(Strict):
    """How much accuracy a round may lose against the base student before the run stops."""

    set: str | None = None
    """Evaluation that decides. Default: the first. It needs gold answers and two samples of each
    problem."""
    margin: float = Field(0.02, gt=0, lt=1)
    """Accuracy that may be lost on all its problems, as a fraction: 0.02 is two points."""
    hard_margin: float | None = Field(None, gt=0, lt=1)
    """Accuracy that may be lost on the hard third, the problems that the base solves least often.
    Default: `margin` times the root of 3, as a third of the problems has intervals that much wider.
    """
    alpha: float = Field(0.05, gt=0, lt=0.5)
    """Largest chance to accept any round that has lost more, over all `rounds` together."""
    undecided: Literal["stop", "continue"] = "stop"
    """What to do after a round for which the problems are too few to tell."""

    @property
    def margin_on_hard(self) -> float:
        return self.margin * math.sqrt(3) if self.hard_margin is None else self.hard_margin


class Licenses(Strict):
    """Licences for the report's data card, where they are known."""

    student: str | None = None
    teacher: str | None = None
    prompts: str | None = None


class SettingsFile(Strict):
    """Settings of a TOML file, which errors name."""

    _source: str = PrivateAttr("")

    @property
    def source(self) -> str:
        return self._source

    @classmethod
    def from_values(cls, values: dict[str, Any], source: str) -> Self:
        """Return the settings. Raise ConfigError naming `source` and the setting."""
        settings = parse(cls, values, source)
        settings._source = source
        return settings


@dataclass(frozen=True)
class Step:
    """One command of the pipeline, with its settings. `out`: the folder it makes; `reads`: input
    files that its command does not name; `section`: of the pipeline file."""

    label: str
    why: str
    program: str
    command: list[str]
    out: Path
    config: RolloutsConfig | RewriteConfig | TrainConfig
    reads: tuple[Path, ...] = ()
    section: str = ""

    @property
    def folder(self) -> Path:
        """The folder of the round or training that it writes."""
        return self.out.parent if self.out.name in ("distill", "model") else self.out

    @property
    def words(self) -> list[str]:
        """The command, with its program."""
        return [self.program, *self.command]


_COMMANDS: dict[type[BaseModel], tuple[str, ...]] = {
    RolloutsConfig: ("mpd-gen", "rollouts"),
    RewriteConfig: ("mpd-gen", "rewrite"),
    TrainConfig: ("mpd-train",),
}


def _newest(round_: int) -> str:
    """Return what the student at the start of a round is called."""
    return "the base student" if round_ == 1 else f"the student of round {round_ - 1}"


class Pipeline(SettingsFile):
    """A pipeline file. Its sections hold the settings of their commands, without those that the
    pipeline sets (models, folders, round number). Paths are relative to the folder in which the
    command is run. The n-th table of `round` changes the sections for round n; the last one also
    holds for all rounds after it. The first evaluation set gives the headline results."""

    name: str
    student: str
    teacher: str
    # Other methods differ in these two: in off-policy distillation the teacher samples, in
    # self-compression the student rewrites.
    sampler: Literal["student", "teacher"] = "student"
    rewriter: Literal["student", "teacher"] = "teacher"
    rounds: int = Field(1, ge=1, le=1000)
    seed: int = 0
    environment: dict[str, str] = Field(default_factory=dict)
    licenses: Licenses = Licenses()
    rollouts: dict[str, Any]
    rewrite: dict[str, Any] = Field(default_factory=dict)
    train: dict[str, Any] = Field(default_factory=dict)
    round: list[RoundSettings] = Field(default_factory=list)
    evaluation: list[EvaluationSet] = Field(min_length=1)
    # What costs nothing: the base student with other prompts or limits.
    baseline: list[Baseline] = Field(default_factory=list)
    gate: Gate | None = None

    @model_validator(mode="after")
    def _baselines_have_names_and_sets_of_their_own(self) -> Self:
        names = [chosen.name for chosen in self.evaluation]
        folders: set[str] = set()
        for baseline in self.baseline:
            for name in baseline.sets or names:
                if name not in names:
                    raise ValueError(
                        f"baseline {baseline.name}: no evaluation set {name!r}; there are"
                        f" {', '.join(names)}.{did_you_mean(name, names)}"
                    )
                folder = f"baseline-{baseline.name}-{name}"
                if folder in folders:
                    raise ValueError(
                        f"two baselines would write to {folder}: give one of them another name"
                    )
                folders.add(folder)
        return self

    @model_validator(mode="after")
    def _gate_can_be_measured(self) -> Self:
        if self.gate is None:
            return self
        sets = {chosen.name: chosen.rollouts for chosen in self.evaluation}
        if self.gated not in sets:
            raise ValueError(
                f"gate.set: no evaluation set {self.gated!r}; there are {', '.join(sets)}."
                f"{did_you_mean(self.gated, sets)}"
            )
        given = sets[self.gated]
        if given.get("answer_column") is None or given.get("num_samples", 1) == 1:
            raise ValueError(
                f"gate: evaluation {self.gated!r} needs answer_column, and num_samples of 2 or"
                " more: one half of the base's samples chooses the hard third, the other measures"
            )
        return self

    @property
    def gated(self) -> str:
        """The evaluation set that the gate looks at."""
        return (self.gate and self.gate.set) or self.evaluation[0].name

    def _step(
        self,
        label: str,
        why: str,
        out: Path,
        model: type[RolloutsConfig | RewriteConfig | TrainConfig],
        section: str,
        given: dict[str, Any],
        fixed: dict[str, Any],
    ) -> Step:
        """Return a step with the settings `given` in a section and the pipeline's own."""
        fixed = {**fixed, "seed": self.seed}
        clash = sorted(given.keys() & fixed.keys())
        if clash:
            raise ConfigError(
                f"{self.source}: [{section}]: the pipeline sets {', '.join(clash)}; remove them."
            )
        config = parse(model, {**given, **fixed}, self.source, section)
        program, *command = _COMMANDS[model]
        command += arguments(config)
        return Step(label, why, program, command, out, config, section=section)

    @contextlib.contextmanager
    def explaining(self, step: Step) -> Iterator[None]:
        """Add to an error about `step` its label, and what helps: its command where it was begun
        with other settings, the setting that names a file which does not exist."""
        try:
            yield
        except OtherSettingsError as error:
            option = "--refilter" if "--refilter" in str(error) else "--overwrite"
            command = shlex.join([*step.words, option])
            raise ConfigError(f"{step.label}: {error} This is:\n    {command}") from error
        except (ConfigError, DataError) as error:
            kind = ConfigError if isinstance(error, ConfigError) else DataError
            raise kind(f"{step.label}: {error}{self._whose(str(error), step)}") from error

    def _whose(self, message: str, step: Step) -> str:
        """Return, as a sentence, which setting names the path that `message` begins with, where
        that is relative and does not exist; "" for other messages."""
        own = {f"{step.section}.{k}": v for k, v in _dotted(step.config.model_dump())}
        for name, value in {"student": self.student, "teacher": self.teacher, **own}.items():
            for path in map(str, value if isinstance(value, list) else [value]):
                if not message.startswith(f"{path}: ") or Path(path).is_absolute():
                    continue
                if os.path.exists(path) or not self.source:  # noqa: PTH110  # as in runner.py
                    continue
                folders = [f for f in Path(self.source).resolve().parents if (f / path).exists()]
                # A model may be one of the hub.
                if folders or "no such file" in message:
                    there = f", or run this in {folders[0]}, where it is" if folders else ""
                    return (
                        f" {name} in {self.source} names it. Paths of a pipeline file are relative"
                        f" to the folder in which the command runs: change it{there}."
                    )
        return ""

    def changes(self, round_: int) -> dict[str, Any]:
        """Return what a round (from 1) changes, by the dotted names of the settings."""
        tables = self.round[:round_][-1:]
        return {name: value for table in tables for name, value in _dotted(table.model_dump())}

    def section(self, name: str, round_: int) -> dict[str, Any]:
        """Return a section's settings in a round (from 1)."""
        settings: dict[str, Any] = copy.deepcopy(getattr(self, name))
        for setting, value in self.changes(round_).items():
            section, _, rest = setting.partition(".")
            if section == name:
                override(settings, rest, value, f"{self.source}: [[round]], {setting}")
        return settings

    def changes_text(self) -> list[str]:
        """Return a line for each round that changes settings."""
        lines = []
        for round_ in range(1, self.rounds + 1):
            if changes := self.changes(round_):
                listed = ", ".join(f"{name} = {json.dumps(v)}" for name, v in changes.items())
                lines.append(f"round {round_}: {listed}")
        return lines

    def rollouts_step(self, student: str, round_: int, out: Path) -> Step:
        """Return the step in which the sampler (`student` or the teacher) fills the round `out`."""
        sampler, name = self.teacher, "the teacher"
        if self.sampler == "student":
            sampler, name = student, _newest(round_)
        label, why = f"round {round_}: rollouts", f"{name} samples solutions"
        fixed = {"model": sampler, "out": out, "round": round_}
        given = self.section("rollouts", round_)
        return self._step(label, why, out, RolloutsConfig, "rollouts", given, fixed)

    def rewrite_step(self, student: str, round_: int, shards: Path) -> Step:
        """Return the step in which the rewriter (the teacher or `student`) rewrites a round."""
        rewriter, name = self.teacher, "the teacher"
        if self.rewriter == "student":
            rewriter, name = student, _newest(round_)
        given = self.section("rewrite", round_)
        fixed: dict[str, Any] = {"teacher": rewriter, "shards": shards}
        if self.sampler == "teacher":
            # Needed for the vocabulary, which never changes, and for its judgement, which does.
            fixed["student"] = self.student
            config = parse(RewriteConfig, {**given, **fixed}, self.source, "rewrite")
            if config.student_option is not None:
                fixed["student"] = student
        label, out = f"round {round_}: rewrite", shards / "distill"
        why = f"{name} shortens them and scores what passes the filter"
        return self._step(label, why, out, RewriteConfig, "rewrite", given, fixed)

    def train_step(self, student: str, round_: int, shards: Path, out: Path) -> Step:
        """Return the step in which `student` learns from `shards`; it writes `out`/model."""
        label, why = f"round {round_}: train", f"{_newest(round_)} learns from the kept rewrites"
        fixed = {"shards": [shards], "student": student, "out": out}
        given = self.section("train", round_)
        return self._step(label, why, out / "model", TrainConfig, "train", given, fixed)

    def evaluation_step(self, chosen: EvaluationSet, student: str, round_: int, out: Path) -> Step:
        """Return the step in which `student`, after `round_` rounds, answers held-out prompts."""
        label = f"{'base' if round_ == 0 else f'round {round_}'}: evaluate {chosen.name}"
        why = "held-out prompts, the same for every round"
        section = f"evaluation.{chosen.name}.rollouts"
        fixed = {"model": student, "out": out}
        return self._step(label, why, out, RolloutsConfig, section, chosen.rollouts, fixed)

    def baseline_step(
        self, baseline: Baseline, chosen: EvaluationSet, out: Path, examples: Path
    ) -> Step:
        """Return the step in which the base student answers the prompts of an evaluation set as
        `baseline` says. `examples`: the file that the kind few_shot shows."""
        label = f"baseline {baseline.name}: evaluate {chosen.name}"
        why = "the base student, without training"
        given = baseline.settings(chosen.rollouts, examples)
        section = f"baseline.{baseline.name}.rollouts"
        fixed = {"model": self.student, "out": out}
        return self._step(label, why, out, RolloutsConfig, section, given, fixed)


def _dotted(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield nested settings by their dotted names."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _dotted(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def load_pipeline(path: Path, overrides: tuple[str, ...]) -> Pipeline:
    """Read a pipeline file. Raise ConfigError naming the file and the setting."""
    values = read_settings(path, overrides)
    if "pipeline" in values and "group" in values:
        raise ConfigError(f"{path}: a study, not a pipeline. Run it with mpd-study {path} --out …")
    return Pipeline.from_values(values, str(path))


def read_settings(path: Path, overrides: tuple[str, ...]) -> dict[str, Any]:
    """Return the content of a TOML file with `overrides`, each `a.b=value` in TOML or plain text.

    Raise ConfigError naming the file and the setting.
    """
    try:
        values = read_toml(path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    for override_ in overrides:
        name, equals, text = override_.partition("=")
        if not equals:
            raise ConfigError(f"--set {override_}: expected NAME=VALUE.")
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except (ValueError, RecursionError):
            value = text
        override(values, name, value, f"--set {override_}")
    return values


def override(values: dict[str, Any], name: str, value: Any, where: str) -> None:
    """Set the value of a dotted name in nested settings. Raise ConfigError, which begins with
    `where`, if the name does not fit the settings."""
    target: Any = values
    *parents, last = name.split(".")
    for part in parents:
        # `evaluation.0.rollouts.num_prompts`: sections in a list go by their number.
        if isinstance(target, list) and part.isdigit() and int(part) < len(target):
            target = target[int(part)]
        elif isinstance(target, dict):
            target = target.setdefault(part, {})
        else:
            target = None
        if not isinstance(target, dict | list):
            raise ConfigError(f"{where}: {part!r} is not a section.")
    if not isinstance(target, dict):
        raise ConfigError(f"{where}: {parents[-1]!r} is a list; give a number in it.")
    target[last] = value
