"""Read prompts and few-shot examples from rows, and choose among prompts.

`sources.py` reads the rows. `chat.py` turns a prompt into the token ids of a model.
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

Example = tuple[str, str]
_NOT_UNICODE = "holds bytes that are not UTF-8, or half a character"


@dataclass(frozen=True)
class Prompt:
    """One problem to solve. `text` is the problem, `answer` the gold answer if there is one, and
    `metadata` the carried columns in JSON types. Messages name the prompt by `source`. `flaw` says
    why the row cannot be used; `text` and `answer` are then escaped so that they can be shown."""

    id: str
    text: str
    answer: str | None
    source: str
    metadata: dict[str, Any] = field(default_factory=dict)
    flaw: str | None = None


def read_prompts(
    paths: Iterable[str | Path], prompt_column: str, id_column: str | None = None,
    answer_column: str | None = None, metadata_columns: Sequence[str] = (),
) -> Iterator[Prompt]:  # fmt: skip
    """Yield the prompts of *.jsonl, *.csv and *.parquet files and of hf:// datasets, row by row.

    Repeated ids are not removed. Without `id_column` the id of a prompt is the hash of its text.
    Numbers in the id and answer columns become text; values in `metadata_columns` become JSON. A
    row whose problem or answer is not UTF-8 becomes a prompt with a `flaw`.

    Raise DataError, which names source and row, for a missing column or a value of the wrong type.
    Raise ConfigError for a missing or unknown source and if there are no rows at all.
    """
    columns = [c for c in (prompt_column, id_column, answer_column, *metadata_columns) if c]
    sources = list(paths)
    empty = True
    for path in sources:
        for number, raw in read_rows(path, list(dict.fromkeys(columns))):
            source = f"{path}, row {number}"
            row, flaw = _escape(raw, [c for c in (prompt_column, answer_column) if c])
            text = _text(row, prompt_column, source, "--prompt-column")
            answer = None
            if answer_column is not None and row[answer_column] is not None:
                answer = _text(row, answer_column, source, "--answer-column", numbers=True)
            identifier = content_key(text)
            if id_column is not None:
                identifier = _text(row, id_column, source, "--id-column", numbers=True)
            metadata = {c: as_json(row[c], f"{source}: column {c!r}") for c in metadata_columns}
            empty = False
            yield Prompt(identifier, text, answer, source, metadata, flaw)
    if empty:
        raise ConfigError(
            f"{', '.join(map(str, sources))}: no prompts. Expected at least one row with the column"
            f" {prompt_column!r}."
        )


def load_prompts(
    paths: Iterable[str | Path], prompt_column: str, id_column: str | None = None,
    answer_column: str | None = None, metadata_columns: Sequence[str] = (),
    duplicates: Literal["refuse", "first"] = "refuse",
) -> list[Prompt]:  # fmt: skip
    """Return what `read_prompts` yields, each id once. With `duplicates` "first", later rows of an
    id are left out; otherwise they raise DataError. Raise what `read_prompts` raises."""
    prompts: dict[str, Prompt] = {}
    for prompt in read_prompts(paths, prompt_column, id_column, answer_column, metadata_columns):
        earlier = prompts.setdefault(prompt.id, prompt)
        if earlier is not prompt and duplicates == "refuse":
            raise DataError(
                f"{prompt.source}: id {prompt.id!r} was already given by {earlier.source}. Ids"
                " must be unique: remove the duplicate, name another --id-column, or keep the"
                " first row of each id with --duplicates first."
            )
    return list(prompts.values())


def load_examples(path: str | Path, prompt_column: str, examples_column: str) -> list[Example]:
    """Return few-shot examples as (problem, solution), in the file's order. Raise DataError or
    ConfigError as `load_prompts` does."""
    examples: list[Example] = []
    for number, row in read_rows(path, list(dict.fromkeys([prompt_column, examples_column]))):
        source = f"{path}, row {number}"
        problem = _text(row, prompt_column, source, "--prompt-column")
        examples.append((problem, _text(row, examples_column, source, "--examples-column")))
    if not examples:
        raise ConfigError(f"{path}: no examples. Expected at least one row, or no --examples.")
    return examples


def fill_prompt(template: str, problem: str) -> str:
    """Return the user's message: `template` with the problem in place of {{problem}}. A {{name}} in
    the problem is not replaced. Raise ConfigError if `template` lacks {{problem}} or uses another
    {{name}}."""
    names = set(re.findall(r"\{\{(\w+)\}\}", template))
    if "problem" not in names:
        problem = "lacks {{problem}}. Put it where the problem belongs."
        raise ConfigError(f"--prompt-template {template!r}: {problem}")
    if other := sorted(names - {"problem"}):
        problem = f"uses {other}; it can use only {{{{problem}}}}."
        raise ConfigError(f"--prompt-template {template!r}: {problem}")
    return fill(template, {"problem": problem})


def _text(
    row: Mapping[str, Any], column: str, source: str, option: str, numbers: bool = False
) -> str:
    """Return a cell's text; a number becomes text if `numbers`. Raise DataError for the rest."""
    value = row[column]
    if numbers and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        kind = "nothing" if value is None else type(value).__name__
        raise DataError(
            f"{source}: column {column!r} holds {kind}, expected text"
            f"{' or a number' if numbers else ''}. Name the column that holds it with {option}."
        )
    if not _is_unicode(value):
        raise DataError(f"{source}: column {column!r} {_NOT_UNICODE}.")
    return value


def _escape(row: Mapping[str, Any], columns: list[str]) -> tuple[Mapping[str, Any], str | None]:
    """Return the row with undecodable bytes of `columns` escaped, and the first such flaw."""
    bad = [c for c in columns if isinstance(row[c], str) and not _is_unicode(row[c])]
    if not bad:
        return row, None
    escaped = {c: row[c].encode("utf-8", "backslashreplace").decode("utf-8") for c in bad}
    return {**row, **escaped}, f"column {bad[0]!r} {_NOT_UNICODE}"


def _is_unicode(text: str) -> bool:
    """Return False for text with lone surrogates, which JSON can hold and no tokenizer can read."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def as_json(value: Any, where: str) -> Any:
    """Return `value` in JSON types: None for NaN, text for what JSON lacks (dates, decimals). Raise
    DataError, which begins with `where`, for bytes and text that are not UTF-8."""
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{where} holds bytes, not text. Leave the column out.") from error
    if isinstance(value, float) and math.isnan(value):
        return None
    if isinstance(value, int | None) or (isinstance(value, float) and math.isfinite(value)):
        return value
    if isinstance(value, Mapping):
        return {as_json(str(k), where): as_json(v, where) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(v, where) for v in value]
    text = str(value)
    if not _is_unicode(text):
        raise DataError(f"{where} {_NOT_UNICODE}.")
    return text


def choose_prompts(prompts: list[Prompt], count: int | None, key: str) -> list[Prompt]:
    """Return a pseudo-random choice of `count` prompts, or all of them if `count` is None. The
    choice does not depend on the order of the prompts. Each `key` (round and seed) gives another
    choice. Raise ConfigError if there are fewer than `count` prompts."""
    if count is None:
        return prompts
    if count > len(prompts):
        raise ConfigError(f"--num-prompts {count}: only {len(prompts)} prompts were given.")
    return sorted(prompts, key=lambda prompt: content_key([key, prompt.id]))[:count]


def same(text: str) -> str:
    """Return a problem without what does not tell two problems apart: spacing and case."""
    return " ".join(text.split()).casefold()
