"""Read prompts and few-shot examples from rows, and choose among prompts.

`sources.py` reads the rows, `values.py` says what a cell means. `chat.py` turns a prompt into the
token ids of a model.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from mpd_data.common.errors import ConfigError, DataError
from mpd_data.common.hashing import content_key
from mpd_data.prompts.sources import read_rows
from mpd_data.prompts.template import fill
from mpd_data.prompts.values import NOT_UNICODE, as_json, as_text, is_unicode

Example = tuple[str, str]


@dataclass(frozen=True)
class Prompt:
    """One problem to solve. `text` is the problem, `answer` the gold answer if there is one, and
    `metadata` the carried columns in JSON types. Messages name the prompt by `source`. `flaw` says
    why the row cannot be used; `text` and `answer` are then escaped so that they can be shown.
    `missing`: the text of a missing answer. It is part of a round's identity, as older versions took
    it for an answer. `unreadable`: the checker cannot read the answer."""

    id: str
    text: str
    answer: str | None
    source: str
    metadata: dict[str, Any] = field(default_factory=dict)
    flaw: str | None = None
    missing: str = ""
    unreadable: bool = False


def read_prompts(
    paths: Iterable[str | Path], prompt_column: str, id_column: str | None = None,
    answer_column: str | None = None, metadata_columns: Sequence[str] = (),
) -> Iterator[Prompt]:  # fmt: skip
    """Yield the prompts of *.jsonl, *.csv and *.parquet files and of hf:// datasets, row by row.

    Repeated ids are not removed. Without `id_column` the id of a prompt is the hash of its text.
    `values` says what cells mean: numbers and dates in the id and answer columns become text,
    values in `metadata_columns` JSON, and a missing answer None. A row without a problem or id, or
    with one or an answer that is not to be read, becomes a prompt with a `flaw`, whose id may be
    its source.

    Raise DataError, which names source and row, for a missing column and metadata that JSON cannot
    hold. Raise ConfigError for a missing or unknown source and if there are no rows at all.
    """
    columns = [c for c in (prompt_column, id_column, answer_column, *metadata_columns) if c]
    sources = list(paths)
    empty = True
    for path in sources:
        for number, raw in read_rows(path, list(dict.fromkeys(columns))):
            source = f"{path}, row {number}"
            row, flaw = _escape(raw, [c for c in (prompt_column, answer_column) if c])
            text = row[prompt_column] if isinstance(row[prompt_column], str) else ""
            identifier = content_key(text) if id_column is None else source
            answer, cell = None, None if answer_column is None else row[answer_column]
            try:
                if id_column is not None:
                    identifier = _text(row, id_column, "--id-column", scalars=True)
                text = _text(row, prompt_column, "--prompt-column")
                if id_column is None:
                    identifier = content_key(text)
                if answer_column is not None:
                    answer = as_text(cell, answer_column, "--answer-column", scalars=True)
            except DataError as error:
                flaw = flaw or str(error)
            metadata = {c: as_json(row[c], f"{source}: column {c!r}") for c in metadata_columns}
            empty = False
            missing = str(cell) if answer is None and isinstance(cell, str | float) else ""
            yield Prompt(identifier, text, answer, source, metadata, flaw, missing)
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
    id are left out; otherwise they raise DataError. So do prompts of which each has a flaw: a wrong
    column was named. Raise what `read_prompts` raises."""
    prompts: dict[str, Prompt] = {}
    for prompt in read_prompts(paths, prompt_column, id_column, answer_column, metadata_columns):
        if prompt.flaw is not None and prompt.id in prompts and duplicates == "refuse":
            prompt = replace(prompt, id=prompt.source)  # such as rows without a problem
        earlier = prompts.setdefault(prompt.id, prompt)
        if earlier is not prompt and duplicates == "refuse":
            raise DataError(
                f"{prompt.source}: id {prompt.id!r} was already given by {earlier.source}. Ids"
                " must be unique: remove the duplicate, name another --id-column, or keep the"
                " first row of each id with --duplicates first."
            )
    first = next(iter(prompts.values()))
    if all(prompt.flaw is not None for prompt in prompts.values()):
        more = f" None of the {len(prompts):,} prompts can be used." if len(prompts) > 1 else ""
        raise DataError(f"{first.source}: {first.flaw}{more}")
    return list(prompts.values())


def load_examples(path: str | Path, prompt_column: str, examples_column: str) -> list[Example]:
    """Return few-shot examples as (problem, solution), in the file's order. Raise DataError or
    ConfigError as `load_prompts` does."""
    examples: list[Example] = []
    for number, row in read_rows(path, list(dict.fromkeys([prompt_column, examples_column]))):
        source = f"{path}, row {number}"
        try:
            problem = _text(row, prompt_column, "--prompt-column")
            examples.append((problem, _text(row, examples_column, "--examples-column")))
        except DataError as error:
            raise DataError(f"{source}: {error}") from error
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


def _text(row: Mapping[str, Any], column: str, option: str, scalars: bool = False) -> str:
    """Return a cell's text as `as_text` does. Raise DataError for a missing one, too."""
    text = as_text(row[column], column, option, scalars)
    if text is None:
        raise DataError(
            f"column {column!r} holds nothing, expected text{' or a number' * scalars}. Name the"
            f" column that holds it with {option}."
        )
    return text


def _escape(row: Mapping[str, Any], columns: list[str]) -> tuple[Mapping[str, Any], str | None]:
    """Return the row with undecodable bytes of `columns` escaped, and the first such flaw."""
    bad = [c for c in columns if isinstance(row[c], str) and not is_unicode(row[c])]
    if not bad:
        return row, None
    escaped = {c: row[c].encode("utf-8", "backslashreplace").decode("utf-8") for c in bad}
    return {**row, **escaped}, f"column {bad[0]!r} {NOT_UNICODE}"


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
