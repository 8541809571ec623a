"""Prompts: rows of files or datasets, turned into token ids by a model's chat template.

The template is applied once, here; from then on the ids are the truth.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mpd_data.common.errors import ConfigError, DataError
from mpd_data.common.hashing import content_key
from mpd_data.prompts.sources import read_rows
from mpd_data.prompts.template import fill

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


def same(text: str) -> str:
    """Problems that differ in spacing and case only are one problem."""
    return " ".join(text.split()).casefold()
