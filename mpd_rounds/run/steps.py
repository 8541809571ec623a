"""Read a pipeline file, and build the command of each of its stages."""

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, Field, PrivateAttr

from mpd_data.common.errors import ConfigError
from mpd_data.common.options import arguments, parse
from mpd_data.config import RewriteConfig, RolloutsConfig, Strict
from mpd_train.config import TrainConfig


class EvaluationSet(Strict):
    """Held-out prompts and how they are sampled: settings of `mpd-gen rollouts`."""

    name: str = Field(pattern=r"^[a-z0-9-]+$")
    rollouts: dict[str, Any]


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
    files that its command does not name."""

    label: str
    why: str
    program: str
    command: list[str]
    out: Path
    config: RolloutsConfig | RewriteConfig | TrainConfig
    reads: tuple[Path, ...] = ()


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
    command is run. The first evaluation set gives the headline results."""

    name: str
    student: str
    teacher: str
    # Other methods differ in these two: in off-policy distillation the teacher samples, in
    # self-compression the student rewrites.
    sampler: Literal["student", "teacher"] = "student"
    rewriter: Literal["student", "teacher"] = "teacher"
    rounds: int = Field(1, ge=1)
    seed: int = 0
    parallel_evaluations: int = Field(1, ge=1)
    environment: dict[str, str] = Field(default_factory=dict)
    licenses: Licenses = Licenses()
    rollouts: dict[str, Any]
    rewrite: dict[str, Any] = Field(default_factory=dict)
    train: dict[str, Any] = Field(default_factory=dict)
    evaluation: list[EvaluationSet] = Field(min_length=1)

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
        return Step(label, why, program, [*command, *arguments(config)], out, config)

    def rollouts_step(self, student: str, round_: int, out: Path) -> Step:
        """Return the step in which the sampler (`student` or the teacher) fills the round `out`."""
        sampler, name = self.teacher, "the teacher"
        if self.sampler == "student":
            sampler, name = student, _newest(round_)
        label, why = f"round {round_}: rollouts", f"{name} samples solutions"
        fixed = {"model": sampler, "out": out, "round": round_}
        return self._step(label, why, out, RolloutsConfig, "rollouts", self.rollouts, fixed)

    def rewrite_step(self, student: str, round_: int, shards: Path) -> Step:
        """Return the step in which the rewriter (the teacher or `student`) rewrites a round."""
        rewriter, name = self.teacher, "the teacher"
        if self.rewriter == "student":
            rewriter, name = student, _newest(round_)
        fixed: dict[str, Any] = {"teacher": rewriter, "shards": shards}
        if self.sampler == "teacher":
            # Needed for the vocabulary, which never changes, and for its judgement, which does.
            fixed["student"] = self.student
            config = parse(RewriteConfig, {**self.rewrite, **fixed}, self.source, "rewrite")
            if config.student_option is not None:
                fixed["student"] = student
        label, out = f"round {round_}: rewrite", shards / "distill"
        why = f"{name} shortens them and scores what passes the filter"
        return self._step(label, why, out, RewriteConfig, "rewrite", self.rewrite, fixed)

    def train_step(self, student: str, round_: int, shards: Path, out: Path) -> Step:
        """Return the step in which `student` learns from `shards`; it writes `out`/model."""
        label, why = f"round {round_}: train", f"{_newest(round_)} learns from the kept rewrites"
        fixed = {"shards": [shards], "student": student, "out": out}
        return self._step(label, why, out / "model", TrainConfig, "train", self.train, fixed)

    def evaluation_step(self, chosen: EvaluationSet, student: str, round_: int, out: Path) -> Step:
        """Return the step in which `student`, after `round_` rounds, answers held-out prompts."""
        label = f"{'base' if round_ == 0 else f'round {round_}'}: evaluate {chosen.name}"
        why = "held-out prompts, the same for every round"
        section = f"evaluation.{chosen.name}.rollouts"
        fixed = {"model": student, "out": out}
        return self._step(label, why, out, RolloutsConfig, section, chosen.rollouts, fixed)


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
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not TOML: {error}") from error
    for override_ in overrides:
        name, equals, text = override_.partition("=")
        if not equals:
            raise ConfigError(f"--set {override_}: expected NAME=VALUE.")
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
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
