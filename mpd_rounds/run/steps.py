"""What a pipeline file says, and the command of each of its stages."""

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
    """What the report's data card says of what the shards are made from, where it is known."""

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
        """Return the settings. Raises ConfigError naming `source` and the setting."""
        settings = parse(cls, values, source)
        settings._source = source
        return settings


class Pipeline(SettingsFile):
    """A pipeline file. The sections hold the settings of their commands; what a round decides
    (models, folders, round number) is not theirs to set. Paths are relative to where the
    command is run. The first evaluation set gives the headline figures."""

    name: str
    student: str
    teacher: str
    # Other methods are other answers to these two: off-policy distillation learns the teacher's
    # own traces, self-compression the student's own rewrites.
    sampler: Literal["student", "teacher"] = "student"
    rewriter: Literal["student", "teacher"] = "teacher"
    rounds: int = Field(1, ge=1)
    seed: int = 0
    parallel_evaluations: int = Field(1, ge=1)
    # Where stages are short, on a CPU: each starts as a fork of a process that has imported its
    # libraries, and spares the seconds that this takes.
    preload: bool = False
    environment: dict[str, str] = Field(default_factory=dict)
    licenses: Licenses = Licenses()
    rollouts: dict[str, Any]
    rewrite: dict[str, Any] = Field(default_factory=dict)
    train: dict[str, Any] = Field(default_factory=dict)
    evaluation: list[EvaluationSet] = Field(min_length=1)


@dataclass(frozen=True)
class Step:
    """One command of the pipeline, with its settings; `out` is the folder it makes. `reads`: what
    it depends on beside what its command names."""

    label: str
    why: str
    program: str
    command: list[str]
    out: Path
    config: RolloutsConfig | RewriteConfig | TrainConfig
    reads: tuple[Path, ...] = ()


def load_pipeline(path: Path, overrides: tuple[str, ...]) -> Pipeline:
    """Read a pipeline file. Raises ConfigError naming the file and the setting."""
    values = read_settings(path, overrides)
    if "pipeline" in values and "group" in values:
        raise ConfigError(f"{path}: a study, not a pipeline. Run it with mpd-study {path} --out …")
    return Pipeline.from_values(values, str(path))


def read_settings(path: Path, overrides: tuple[str, ...]) -> dict[str, Any]:
    """What a TOML file says; `overrides` are `a.b=value`, the value in TOML (or plain text).

    Raises ConfigError naming the file and the setting.
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
    """Sets the value of a dotted name in nested settings. Raises ConfigError, which begins with
    `where`, for a name that does not fit them."""
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


def _stage(
    model: type[BaseModel], p: Pipeline, section: str, given: dict[str, Any], fixed: dict[str, Any]
) -> Any:
    """Return a stage's settings: those `given` in a section, and those that the pipeline fixes."""
    clash = sorted(given.keys() & fixed.keys())
    if clash:
        raise ConfigError(
            f"{p.source}: [{section}]: the pipeline sets {', '.join(clash)}; remove them."
        )
    return parse(model, {**given, **fixed}, p.source, section)


def rollouts_step(p: Pipeline, student: str, round_: int, out: Path) -> Step:
    """`student`, or the teacher where it is the sampler, samples into the round `out`."""
    rollouts = _stage(
        RolloutsConfig,
        p,
        "rollouts",
        p.rollouts,
        {
            "model": student if p.sampler == "student" else p.teacher,
            "out": out,
            "round": round_,
            "seed": p.seed,
        },
    )
    return Step(
        f"round {round_}: rollouts",
        f"{_newest(round_) if p.sampler == 'student' else 'the teacher'} samples solutions",
        "mpd-gen",
        ["rollouts", *arguments(rollouts)],
        out,
        rollouts,
    )


def rewrite_step(p: Pipeline, student: str, round_: int, shards: Path) -> Step:
    """The teacher, or `student` where it is the rewriter, rewrites the round `shards`."""
    chooses = p.rewrite.get("choose") == "likeliest"
    rewrite = _stage(
        RewriteConfig,
        p,
        "rewrite",
        p.rewrite,
        {
            "teacher": p.teacher if p.rewriter == "teacher" else student,
            # The vocabulary is the same in every round, the choice is not.
            **({} if p.sampler == "student" else {"student": student if chooses else p.student}),
            "shards": shards,
            "seed": p.seed,
        },
    )
    return Step(
        f"round {round_}: rewrite",
        f"{'the teacher' if p.rewriter == 'teacher' else _newest(round_)} shortens them and scores"
        " what passes the filter",
        "mpd-gen",
        ["rewrite", *arguments(rewrite)],
        shards / "distill",
        rewrite,
    )


def train_step(p: Pipeline, student: str, round_: int, shards: Path, out: Path) -> Step:
    """`student` learns the round `shards`; the new one is `out`/model."""
    train = _stage(
        TrainConfig,
        p,
        "train",
        p.train,
        {"shards": [shards], "student": student, "out": out, "seed": p.seed},
    )
    return Step(
        f"round {round_}: train",
        f"{_newest(round_)} learns from the kept rewrites",
        "mpd-train",
        arguments(train),
        out / "model",
        train,
    )


def evaluation_step(
    p: Pipeline, chosen: EvaluationSet, student: str, round_: int, out: Path
) -> Step:
    """`student`, that of after `round_` rounds, samples on held-out prompts."""
    rollouts = _stage(
        RolloutsConfig,
        p,
        f"evaluation.{chosen.name}.rollouts",
        chosen.rollouts,
        {"model": student, "out": out, "seed": p.seed},
    )
    label = "base" if round_ == 0 else f"round {round_}"
    return Step(
        f"{label}: evaluate {chosen.name}",
        "held-out prompts, the same for every round",
        "mpd-gen",
        ["rollouts", *arguments(rollouts)],
        out,
        rollouts,
    )


def _newest(round_: int) -> str:
    """The student that begins a round."""
    return "the base student" if round_ == 1 else f"the student of round {round_ - 1}"
