"""Load rewrite templates: TOML files with the teacher's prompt and the format of its output.

templates/tags.toml explains the format; templates/examples.toml shows a system message and earlier
turns. With the template `draft` the teacher rewrites nothing: the draft itself is filtered, scored
and trained on.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from mpd_data.common.errors import ConfigError, did_you_mean
from mpd_data.common.files import read_toml
from mpd_data.common.hashing import content_key
from mpd_data.common.options import parse
from mpd_data.config import Strict
from mpd_data.prompts.chat import ChatFormatter, Names

_FOLDER = Path(__file__).parent / "templates"
BUILT_IN = {name: _FOLDER / f"{name}.toml" for name in ("tags", "examples", "plain")}

_PLACEHOLDER = re.compile(r"\{\{(\w+)\}\}")


def fill(text: str, values: Mapping[str, str]) -> str:
    """Replace {{names}} by values in one pass, so that a {{name}} in a value is kept."""
    return _PLACEHOLDER.sub(lambda match: values[match.group(1)], text)


class Example(Strict):
    """A rewrite that the teacher is shown as an earlier turn of its own."""

    problem: str
    draft: str
    rewrite: str


class RewriteTemplate(Strict):
    """The content of a template file, with the methods that apply it."""

    name: str
    version: int
    system: str | None = None
    prompt: str | None = None
    output: str
    trace: str | None = None
    plain_trace: str | None = None
    example: list[Example] = Field(default_factory=list)

    def hash(self) -> str:
        """Return a hash of the content, which a round records."""
        content = self.model_dump()
        # They are newer than the hashes of templates that do not use them.
        for name in ("system", "example"):
            if not content[name]:
                del content[name]
        return content_key(content)

    @property
    def asks(self) -> bool:
        """Whether the teacher is asked for a rewrite."""
        return self.prompt is not None

    def message(self, problem: str, draft: str) -> str:
        """Return the user's message to the teacher."""
        assert self.prompt is not None
        return fill(self.prompt, {"problem": problem, "draft": draft}).strip()

    def formatter(
        self, tokenizer: Any, kwargs: Mapping[str, Any] | None = None, **thinking: Any
    ) -> ChatFormatter:
        """Return a formatter that shows the system message and the examples before a message. The
        settings are those of `ChatFormatter`, which raises ConfigError."""
        return ChatFormatter(
            tokenizer,
            kwargs,
            **thinking,
            system_prompt=None if self.system is None else self.system.strip(),
            examples=[
                (self.message(each.problem.strip(), each.draft.strip()), each.rewrite.strip())
                for each in self.example
            ],
            names=Names(*(f"the rewrite template's {x}" for x in ("system", "example", "prompt"))),
        )

    def trace_of(self, rewrite: str, thinks: bool) -> str | None:
        """Return the teacher's output in the layout of a student's trace, without the end token.
        Return None if the output is not in the template's format. `thinks` says whether the draft
        has a thinking part. Raise ConfigError if the template has no layout for such drafts."""
        match = re.fullmatch(self.output, rewrite, re.DOTALL)
        if match is None:
            return None
        parts = {name: text.strip() for name, text in match.groupdict("").items()}
        return fill(self.layout(thinks), parts)

    def layout(self, thinks: bool) -> str:
        """Return the trace's layout for drafts with or without a thinking part. Raise ConfigError
        if the template has none."""
        layout = self.trace if thinks else self.plain_trace or self.trace
        if layout is None:
            raise ConfigError(
                f"template {self.name!r} has no `trace`, and the drafts have a thinking part"
                " (<think>). Give it one, or use --template tags."
            )
        return layout


DRAFT = RewriteTemplate(name="draft", version=1, output="")


def load_template(name: str) -> RewriteTemplate:
    """Read and check a template: a built-in one by its name, or a file by its path. Raise
    ConfigError that names what is wrong."""
    if name == DRAFT.name:
        return DRAFT
    path = BUILT_IN.get(name, Path(name))
    try:
        template = parse(RewriteTemplate, read_toml(path), str(path))
        groups = set(re.compile(template.output).groupindex)
    except OSError as error:
        built_in = [*BUILT_IN, DRAFT.name]
        hint = did_you_mean(name, built_in) or f" The built-in ones are {', '.join(built_in)}."
        raise ConfigError(f"{path}: no template to read ({error.strerror}).{hint}") from error
    except re.error as error:
        raise ConfigError(f"{path}: `output` is not a regular expression: {error}") from error
    examples = list(enumerate(template.example, start=1))
    if template.trace is None and template.plain_trace is None:
        raise ConfigError(f"{path}: has neither `trace` nor `plain_trace`; it needs one of them.")
    for field, text, known in (
        ("system", template.system, set()),
        ("prompt", template.prompt, {"problem", "draft"}),
        ("trace", template.trace, groups),
        ("plain_trace", template.plain_trace, groups),
        *((f"example {i}", " ".join(each.model_dump().values()), set()) for i, each in examples),
    ):
        if unknown := sorted(set(_PLACEHOLDER.findall(text or "")) - known):
            usable = sorted(known) or "no {{placeholders}}"
            raise ConfigError(f"{path}: `{field}` uses {unknown}; it can use {usable}.")
    if "{{draft}}" not in (template.prompt or ""):
        raise ConfigError(f"{path}: `prompt` never shows the teacher the {{{{draft}}}}.")
    for i, each in examples:
        if re.fullmatch(template.output, each.rewrite.strip(), re.DOTALL) is None:
            raise ConfigError(
                f"{path}: the `rewrite` of example {i} is not of the form that `output` describes."
                " Write it as the teacher is to write its turn."
            )
    return template
