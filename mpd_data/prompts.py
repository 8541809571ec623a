"""Prompts: rows of Parquet or JSONL files, turned into token ids by a model's chat template.

The template is applied once, here; from then on the ids are the truth.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mpd_data.errors import ConfigError, DataError
from mpd_data.schema import content_key


@dataclass(frozen=True)
class Prompt:
    """One problem to solve: `text` is what the user says, `answer` the gold answer if any.
    `source` says where it was read, for messages."""

    id: str
    text: str
    answer: str | None
    source: str


def load_prompts(
    paths: Iterable[str | Path],
    prompt_column: str,
    id_column: str | None = None,
    answer_column: str | None = None,
) -> list[Prompt]:
    """Reads *.jsonl and *.parquet files. Without `id_column` a prompt's id is the hash of its
    text. Numbers are taken as their text in the id and answer columns.

    Raises DataError (naming file and row) for a missing column, a value of the wrong type or
    an id given twice; ConfigError for a missing or unknown file or no rows at all.
    """
    prompts: list[Prompt] = []
    seen: dict[str, str] = {}
    wanted = [c for c in (prompt_column, id_column, answer_column) if c is not None]
    files = [Path(p) for p in paths]
    for path in files:
        for number, row in _rows(path, wanted):
            source = f"{path}, row {number}"
            text = row[prompt_column]
            if not isinstance(text, str):
                raise DataError(
                    f"{source}: column {prompt_column!r} holds {type(text).__name__}, expected"
                    " text. Name the column of the problem with --prompt-column."
                )
            if not _is_unicode(text):
                raise DataError(f"{source}: column {prompt_column!r} holds half a character.")
            answer = None if answer_column is None else _as_text(row[answer_column], source)
            given = None if id_column is None else _as_text(row[id_column], source)
            if id_column is not None and given is None:
                raise DataError(f"{source}: column {id_column!r} is null, expected an id.")
            identifier = content_key(text) if given is None else given
            if identifier in seen:
                raise DataError(
                    f"{source}: id {identifier!r} was already given by {seen[identifier]}. Ids"
                    " must be unique: remove the double or name another --id-column."
                )
            seen[identifier] = source
            prompts.append(Prompt(identifier, text, answer, source))
    if not prompts:
        raise ConfigError(
            f"{', '.join(map(str, files))}: no prompts. Expected at least one row with the column"
            f" {prompt_column!r}."
        )
    return prompts


def _is_unicode(text: str) -> bool:
    """False for text with lone surrogates, which JSON can spell and no tokenizer can read."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _as_text(value: Any, source: str) -> str | None:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    raise DataError(f"{source}: found {type(value).__name__} where text or a number was expected.")


def _rows(path: Path, columns: list[str]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    if not path.is_file():
        raise ConfigError(f"{path}: no such file. Give --prompts a JSONL or Parquet file.")
    if path.suffix == ".parquet":
        yield from _parquet_rows(path, columns)
    elif path.suffix in (".jsonl", ".json"):
        yield from _jsonl_rows(path, columns)
    else:
        raise ConfigError(f"{path}: prompts are read from *.jsonl and *.parquet files.")


def _parquet_rows(path: Path, columns: list[str]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: not a whole Parquet file ({error}).") from error
    with file:
        for column in columns:
            if column not in file.schema_arrow.names:
                raise DataError(_missing(path, column, file.schema_arrow.names))
        number = 0
        for batch in file.iter_batches(4096, columns=columns):
            for row in batch.to_pylist():
                number += 1
                yield number, row


def _jsonl_rows(path: Path, columns: list[str]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8"))
            except ValueError as error:
                raise DataError(
                    f"{path}, row {number}: not a JSON object in UTF-8 ({error})."
                ) from error
            if not isinstance(row, dict):
                raise DataError(f"{path}, row {number}: found {type(row).__name__}, not an object.")
            for column in columns:
                if column not in row:
                    raise DataError(_missing(f"{path}, row {number}", column, list(row)))
            yield number, row


def _missing(where: object, column: str, found: list[str]) -> str:
    return (
        f"{where}: no column {column!r}; found {', '.join(map(repr, found)) or 'none'}. Name the"
        " columns with --prompt-column, --id-column and --answer-column."
    )


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


class ChatFormatter:
    """Renders one user message into the ids a chat model continues from."""

    def __init__(self, tokenizer: Any, template_kwargs: Mapping[str, Any] | None = None) -> None:
        if tokenizer.chat_template is None:
            raise ConfigError(
                f"{tokenizer.name_or_path}: its tokenizer has no chat template. Use an instruction"
                " tuned model, or put a chat_template.jinja into its folder."
            )
        self._tokenizer = tokenizer
        self._kwargs = dict(template_kwargs or {})
        self._control = [
            token.content for token in tokenizer.added_tokens_decoder.values() if token.special
        ]

    def render(self, content: str) -> tuple[str, list[int]]:
        """The prompt's text and its ids, ready for the model's turn.

        Raises PromptError where `content` is empty, spells a control token of the model (it
        would be read as one), or the template fails on it.
        """
        from jinja2 import TemplateError

        if not content.strip():
            raise PromptError("the prompt is empty")
        for control in self._control:
            if control in content:
                raise PromptError(
                    f"the prompt spells the control token {control!r}, which the model would"
                    " obey; remove it from the text"
                )
        try:
            text: str = self._tokenizer.apply_chat_template(
                [{"role": "user", "content": content}],
                tokenize=False,
                add_generation_prompt=True,
                **self._kwargs,
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise PromptError(f"the chat template failed: {error}") from error
        return text, self.encode(text)

    def encode(self, text: str) -> list[int]:
        """Ids of text that is already laid out, adding nothing to it."""
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids
