"""Prompts: rows of files or datasets, turned into token ids by a model's chat template.

The template is applied once, here; from then on the ids are the truth.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mpd_data.errors import ConfigError, DataError
from mpd_data.schema import content_key
from mpd_data.sources import read_rows
from mpd_data.template import fill

_NOT_UNICODE = "holds bytes that are not UTF-8, or half a character"


@dataclass(frozen=True)
class Prompt:
    """One problem to solve: `text` is the problem, `answer` the gold answer if any, `metadata`
    what is carried through (JSON types only). `source` says where it was read, for messages; `flaw`
    why the row cannot be used, if it cannot: its text is then spelt so that it can be shown."""

    id: str
    text: str
    answer: str | None
    source: str
    metadata: dict[str, Any] = field(default_factory=dict)
    flaw: str | None = None


def read_prompts(
    paths: Iterable[str | Path],
    prompt_column: str,
    id_column: str | None = None,
    answer_column: str | None = None,
    metadata_columns: Sequence[str] = (),
) -> Iterator[Prompt]:
    """Prompts of *.jsonl, *.csv and *.parquet files and hf:// datasets, one row after another, an
    id as often as it stands there. Without `id_column` a prompt's id is the hash of its text.
    Numbers are taken as their text in the id and answer columns; in `metadata_columns` values stay
    as they are where JSON can hold them. A row whose problem or answer is not UTF-8 is a prompt
    with a `flaw`.

    Raises DataError (naming source and row) for a missing column or a value of the wrong type;
    ConfigError for a missing or unknown source or no rows at all.
    """
    wanted = [c for c in (prompt_column, id_column, answer_column, *metadata_columns) if c]
    wanted = list(dict.fromkeys(wanted))
    sources = list(paths)
    empty = True
    for path in sources:
        for number, row in read_rows(path, wanted):
            source = f"{path}, row {number}"
            row, flaw = _readable(row, [c for c in (prompt_column, answer_column) if c])
            text = _text_of(row, prompt_column, source)
            answer = _as_text(row, answer_column, source, "--answer-column")
            given = _as_text(row, id_column, source, "--id-column")
            if id_column is not None and given is None:
                raise DataError(f"{source}: column {id_column!r} is null, expected an id.")
            identifier = content_key(text) if given is None else given
            metadata = {c: as_json(row[c], f"{source}: column {c!r}") for c in metadata_columns}
            empty = False
            yield Prompt(identifier, text, answer, source, metadata, flaw)
    if empty:
        raise ConfigError(
            f"{', '.join(map(str, sources))}: no prompts. Expected at least one row with the column"
            f" {prompt_column!r}."
        )


def load_prompts(
    paths: Iterable[str | Path],
    prompt_column: str,
    id_column: str | None = None,
    answer_column: str | None = None,
    metadata_columns: Sequence[str] = (),
    duplicates: Literal["refuse", "first"] = "refuse",
) -> list[Prompt]:
    """All that `read_prompts` reads. With `duplicates` "first" later rows of an id are left out.

    Raises what `read_prompts` raises, and DataError for an id given twice.
    """
    prompts: list[Prompt] = []
    seen: dict[str, str] = {}
    for prompt in read_prompts(paths, prompt_column, id_column, answer_column, metadata_columns):
        if prompt.id in seen:
            if duplicates == "first":
                continue
            raise DataError(
                f"{prompt.source}: id {prompt.id!r} was already given by {seen[prompt.id]}. Ids"
                " must be unique: remove the double, name another --id-column, or keep the"
                " first of them with --duplicates first."
            )
        seen[prompt.id] = prompt.source
        prompts.append(prompt)
    return prompts


def load_examples(
    path: str | Path, prompt_column: str, examples_column: str
) -> list[tuple[str, str]]:
    """Few-shot examples as (problem, solution), in the file's order.

    Raises DataError or ConfigError like `load_prompts`.
    """
    examples: list[tuple[str, str]] = []
    for number, row in read_rows(path, list(dict.fromkeys([prompt_column, examples_column]))):
        source = f"{path}, row {number}"
        problem = _text_of(row, prompt_column, source)
        examples.append((problem, _text_of(row, examples_column, source, "--examples-column")))
    if not examples:
        raise ConfigError(f"{path}: no examples. Expected at least one row, or no --examples.")
    return examples


def fill_prompt(template: str, problem: str) -> str:
    """The user's message: `template` with the problem in place of {{problem}}, in one pass (what
    the problem contains is not expanded). Raises ConfigError where `template` lacks {{problem}}
    or uses another {{name}}."""
    names = set(re.findall(r"\{\{(\w+)\}\}", template))
    if "problem" not in names:
        raise ConfigError(
            f"--prompt-template {template!r}: lacks {{{{problem}}}}. Put it where the problem is to"
            " stand."
        )
    if names != {"problem"}:
        raise ConfigError(
            f"--prompt-template {template!r}: uses {sorted(names - {'problem'})}; it can use only"
            " {{problem}}."
        )
    return fill(template, {"problem": problem})


def _text_of(
    row: Mapping[str, Any], column: str, source: str, option: str = "--prompt-column"
) -> str:
    text = row[column]
    if not isinstance(text, str):
        found = "nothing" if text is None else type(text).__name__
        raise DataError(
            f"{source}: column {column!r} holds {found}, expected text. Name the column that holds"
            f" it with {option}."
        )
    if not _is_unicode(text):
        raise DataError(f"{source}: column {column!r} {_NOT_UNICODE}.")
    return text


def _readable(row: Mapping[str, Any], columns: list[str]) -> tuple[Mapping[str, Any], str | None]:
    """The row with what is no text in `columns` spelt out, and what was wrong with it if
    anything."""
    bad = [c for c in columns if isinstance(row[c], str) and not _is_unicode(row[c])]
    if not bad:
        return row, None
    spelt = {c: row[c].encode("utf-8", "backslashreplace").decode("utf-8") for c in bad}
    return {**row, **spelt}, f"column {bad[0]!r} {_NOT_UNICODE}"


def _is_unicode(text: str) -> bool:
    """False for text with lone surrogates, which JSON can spell and no tokenizer can read."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _as_text(row: Mapping[str, Any], column: str | None, source: str, option: str) -> str | None:
    value = None if column is None else row[column]
    if isinstance(value, str) and not _is_unicode(value):
        raise DataError(f"{source}: column {column!r} {_NOT_UNICODE}.")
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    raise DataError(
        f"{source}: column {column!r} holds {type(value).__name__}, expected text or a number. Name"
        f" the column that holds it with {option}."
    )


def as_json(value: Any, where: str) -> Any:
    """`value` in JSON's types: NaN as None, what JSON lacks (dates, decimals) as its text."""
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(
                f"{where} holds bytes that are no text; leave the column out."
            ) from error
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        if math.isnan(value):
            return None
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {as_json(str(k), where): as_json(v, where) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(v, where) for v in value]
    text = str(value)
    if not _is_unicode(text):
        raise DataError(f"{where} {_NOT_UNICODE}.")
    return text


def choose_prompts(prompts: list[Prompt], count: int | None, key: str) -> list[Prompt]:
    """A pseudo-random choice of `count` prompts, the same whatever their order in the file.

    `key` makes it another choice for each round and seed. All of them where `count` is None.
    Raises ConfigError where there are not that many.
    """
    if count is None:
        return prompts
    if count > len(prompts):
        raise ConfigError(f"--num-prompts {count}: only {len(prompts)} prompts were given.")
    return sorted(prompts, key=lambda prompt: content_key([key, prompt.id]))[:count]


class PromptError(DataError):
    """This one prompt cannot be used; the others can."""


SWITCHES = ("enable_thinking", "thinking")


def thinking_switch(template: str) -> str | None:
    """The variable by which a chat template turns thinking on and off, None where it has none."""
    from jinja2 import Environment, TemplateSyntaxError, meta

    try:
        parsed = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(template)
        read = meta.find_undeclared_variables(parsed)
    except TemplateSyntaxError:
        # Tags of transformers' own, such as {% generation %}. Look for the bare name inside the
        # template's code: not in its prose or strings, and not as a message's field.
        code = " ".join(re.findall(r"\{[{%].*?[%}]\}", template, re.DOTALL))
        code = re.sub(r"'[^']*'|\"[^\"]*\"", "''", code)
        read = set(re.findall(r"(?<![\w.])\w+(?!\w|\s*=[^=])", code))
    return next((name for name in SWITCHES if name in read), None)


class ChatFormatter:
    """Renders one user message into the ids a chat model continues from.

    `examples` are earlier turns, (user, assistant). `thinking` sets the template's switch for
    thinking: "on", "off", or "auto": `default_thinking` where there is a switch and
    `template_kwargs` do not set it. Raises ConfigError for settings the template cannot take.
    """

    def __init__(
        self,
        tokenizer: Any,
        template_kwargs: Mapping[str, Any] | None = None,
        thinking: Literal["auto", "on", "off"] = "auto",
        default_thinking: bool = True,
        system_prompt: str | None = None,
        examples: Sequence[tuple[str, str]] = (),
    ) -> None:
        self._name = tokenizer.name_or_path
        if tokenizer.chat_template is None:
            raise ConfigError(
                f"{self._name}: its tokenizer has no chat template. Use an instruction"
                " tuned model, or put a chat_template.jinja into its folder."
            )
        self._tokenizer = tokenizer
        self._kwargs = dict(template_kwargs or {})
        self._thinking = self._resolve_thinking(thinking, default_thinking)
        self._control = [
            token.content for token in tokenizer.added_tokens_decoder.values() if token.special
        ]
        self._before: list[dict[str, str]] = []
        if system_prompt is not None:
            self._before.append({"role": "system", "content": system_prompt})
        for user, assistant in examples:
            self._before.append({"role": "user", "content": user})
            self._before.append({"role": "assistant", "content": assistant})
        self._check_turns_before()

    @property
    def thinking(self) -> bool | None:
        """Whether the template is asked to think; None where it has no switch."""
        return self._thinking

    def _resolve_thinking(self, thinking: str, default: bool) -> bool | None:
        try:
            switch = thinking_switch(self._tokenizer.get_chat_template())
        except ValueError as error:
            raise ConfigError(f"{self._name}: no chat template to use: {error}") from error
        if switch is None:
            if thinking != "auto":
                raise ConfigError(
                    f"{self._name}: --thinking {thinking}, but its chat template reads neither"
                    f" {' nor '.join(SWITCHES)}. Use --thinking auto."
                )
            return None
        if switch not in self._kwargs:
            self._kwargs[switch] = default if thinking == "auto" else thinking == "on"
        elif thinking != "auto":
            raise ConfigError(
                f"{self._name}: {switch} is set by --thinking {thinking} and by the template's"
                " settings. Give only one of them."
            )
        value = self._kwargs[switch]
        if not isinstance(value, bool):
            raise ConfigError(
                f"{self._name}: the template's setting {switch} is {value!r}, expected true or"
                " false."
            )
        return value

    def _check_turns_before(self) -> None:
        """A system prompt or example that cannot be used would fail on every prompt: say it now."""
        if not self._before:
            return
        for turn in self._before:
            option = "--system-prompt" if turn["role"] == "system" else "--examples"
            try:
                self._check(turn["content"])
            except PromptError as error:
                raise ConfigError(f"{option}, {turn['content']!r}: {error}.") from error
        try:
            text = self.layout("1")
        except PromptError as error:
            raise ConfigError(
                f"{self._name}: it takes no --system-prompt or --examples as given: {error}. Put"
                " instructions into --prompt-template instead."
            ) from error
        for turn in self._before:
            # Templates may cut an assistant's turn (its thoughts), but not what it answers to.
            if turn["role"] != "assistant" and turn["content"].strip() not in text:
                raise ConfigError(
                    f"{self._name}: its chat template leaves out the {turn['role']} message"
                    f" {turn['content']!r}. Put it into --prompt-template instead."
                )

    def _check(self, content: str) -> None:
        if not content.strip():
            raise PromptError("the prompt is empty")
        for control in self._control:
            if control in content:
                raise PromptError(
                    f"the prompt spells the control token {control!r}, which the model would"
                    " obey; remove it from the text"
                )

    def layout(self, content: str) -> str:
        """The prompt's text. Raises PromptError like `render`."""
        from jinja2 import TemplateError

        self._check(content)
        try:
            text: str = self._tokenizer.apply_chat_template(
                [*self._before, {"role": "user", "content": content}],
                tokenize=False,
                add_generation_prompt=True,
                **self._kwargs,
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise PromptError(f"the chat template failed: {error}") from error
        return text

    def render(self, content: str) -> tuple[str, list[int]]:
        """The prompt's text and its ids, ready for the model's turn.

        Raises PromptError where `content` is empty, spells a control token of the model (it
        would be read as one), or the template fails on it.
        """
        text = self.layout(content)
        return text, self.encode(text)

    def encode(self, text: str) -> list[int]:
        """Ids of text that is already laid out, adding nothing to it."""
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids
