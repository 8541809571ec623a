"""What costs nothing: the base student with another prompt or a limit, as `[[baseline]]` says.

A baseline answers the problems of an evaluation set with the set's seed and temperature, so that it
can be compared with the rounds problem by problem.
"""

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from mpd_data.config import RolloutsConfig, Strict

# What is appended to the user's message.
_CONCISE = "Be concise."
_CALCULATION = "Write only the calculation and the final answer."
_BUDGET = "Use at most {words} words."

Kind = Literal["concise", "calculation", "budget", "no_thinking", "few_shot", "token_budget"]


class BaselineSampling(Strict):
    """What a baseline can change of how a completion is sampled."""

    max_tokens: int | None = Field(None, ge=1)
    """Longest completion, in tokens. Longer ones are truncated, and count as wrong."""


class BaselineRollouts(Strict):
    """What a baseline can change of the evaluation's settings."""

    prompt_template: str | None = None
    system_prompt: str | None = None
    examples: Path | None = None
    examples_column: str | None = None
    thinking: Literal["auto", "on", "off"] | None = None
    template_kwargs: dict[str, Any] | None = None
    budget_text: str | None = None
    sampling: BaselineSampling | None = None

    @model_validator(mode="before")
    @classmethod
    def _only_what_a_baseline_can_change(cls, values: Any) -> Any:
        if isinstance(values, dict):
            fixed = sorted((values.keys() & RolloutsConfig.model_fields.keys()) - _CHANGED)
            sampling = values.get("sampling")
            if isinstance(sampling, dict):
                known = type(RolloutsConfig.model_fields["sampling"].default).model_fields.keys()
                own = BaselineSampling.model_fields.keys()
                fixed += [f"sampling.{name}" for name in sorted(sampling.keys() & known - own)]
            if fixed:
                raise ValueError(
                    f"a baseline cannot change {', '.join(fixed)}: it is measured as the"
                    f" evaluation is. It can change {', '.join(sorted(_CHANGED - {'sampling'}))}"
                    " and sampling.max_tokens"
                )
        return values


_CHANGED = BaselineRollouts.model_fields.keys()


class Baseline(Strict):
    """The base student as a user could run it without training."""

    name: str = Field(pattern=r"^[a-z0-9-]+$")
    """Name in folders, tables and plots. Default: the kind, with the number of a budget."""
    kind: Kind | None = None
    """A ready-made one. concise, calculation and budget append a sentence to the prompt;
    no_thinking switches the template's thinking off; few_shot shows kept rewrites of round 1;
    token_budget makes the student answer at a limit."""
    words: int | None = Field(None, ge=1)
    """Number of words that the kind budget asks for."""
    tokens: int | None = Field(None, ge=1)
    """Tokens after which the kind token_budget makes the student answer."""
    sets: list[str] = Field(default_factory=list)
    """Evaluation sets that it is measured on. Default: all."""
    rollouts: BaselineRollouts = BaselineRollouts()
    """Settings in place of the evaluation's. The kind is applied to them."""

    @model_validator(mode="before")
    @classmethod
    def _name_of_its_kind(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(kind := values.get("kind"), str):
            numbers = [values[x] for x in ("words", "tokens") if values.get(x) is not None]
            values = {"name": "-".join(map(str, [kind.replace("_", "-"), *numbers])), **values}
        return values

    @model_validator(mode="after")
    def _changes_something(self) -> Self:
        if (self.kind == "budget") != (self.words is not None):
            raise ValueError("kind budget and words go together, as kind = 'budget', words = 50")
        if (self.kind == "token_budget") != (self.tokens is not None):
            raise ValueError(
                "kind token_budget and tokens go together, as kind = 'token_budget', tokens = 1000"
            )
        if self.kind != "token_budget" and self.rollouts.budget_text is not None:
            raise ValueError("rollouts.budget_text goes with kind token_budget")
        if self.kind is None and not self.rollouts.model_dump(exclude_none=True):
            raise ValueError("give a kind, or settings in rollouts: this one is the base")
        if self.kind == "few_shot" and self.rollouts.examples is not None:
            raise ValueError("kind few_shot makes its examples itself; remove rollouts.examples")
        return self

    @property
    def shows_rewrites(self) -> bool:
        """Whether it needs the rewrites of round 1."""
        return self.kind == "few_shot"

    def settings(self, given: dict[str, Any], examples: Path) -> dict[str, Any]:
        """Return the settings of rollouts: those `given` for an evaluation set, with this
        baseline's in their place. `examples`: the file of the kind few_shot."""
        settings = dict(given)
        for name, value in self.rollouts.model_dump(exclude_none=True).items():
            is_section = isinstance(value, dict) and isinstance(settings.get(name), dict)
            settings[name] = {**settings[name], **value} if is_section else value
        match self.kind:
            case "concise":
                _append(settings, _CONCISE)
            case "calculation":
                _append(settings, _CALCULATION)
            case "budget":
                _append(settings, _BUDGET.format(words=self.words))
            case "no_thinking":
                settings["thinking"] = "off"
            case "token_budget":
                settings["token_budget"] = self.tokens
            case "few_shot":
                settings |= {"examples": examples, "examples_column": EXAMPLES_COLUMN}
        return settings


EXAMPLES_COLUMN = "kept_rewrite"


def _append(settings: dict[str, Any], sentence: str) -> None:
    template = settings.get("prompt_template")
    if template is None:
        template = RolloutsConfig.model_fields["prompt_template"].default
    # A template that is not text is refused with the other settings.
    if isinstance(template, str):
        settings["prompt_template"] = f"{template}\n\n{sentence}"
