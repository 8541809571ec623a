"""Read prompts and few-shot examples from rows, and choose among prompts.

`sources.py` reads the rows, `rows.py` makes a prompt of each. `chat.py` turns a prompt into the
token ids of a model.
"""

import dataclasses
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

from mpd_data.common.errors import ConfigError, DataError
from mpd_data.common.hashing import content_key
from mpd_data.prompts.rows import Prompt, cell_text, prompt_of
from mpd_data.prompts.sources import read_rows
from mpd_data.prompts.template import fill

Example = tuple[str, str]


def read_prompts(
    paths: Iterable[str | Path], prompt_column: str, id_column: str | None = None,
    answer_column: str | None = None, metadata_columns: Sequence[str] = (),
) -> Iterator[Prompt]:  # fmt: skip
    """Yield the prompts of files, folders, globs and datasets of the hub, row by row.

    Repeated ids are not removed. Without `id_column` the id of a prompt is the hash of its text.
    `values` says what cells mean: numbers and dates in the id and answer columns become text,
    values in `metadata_columns` JSON, and a missing answer None. A row that cannot be used becomes
    a prompt with a `flaw`.

    Raise DataError, which names source and row, for a missing column, a damaged file, and where no
    row can be used. Raise ConfigError for a missing or unknown source and if there are no rows.
    """
    columns = [c for c in (prompt_column, id_column, answer_column, *metadata_columns) if c]
    sources = list(paths)
    is_usable = False
    flaws: list[str] = []
    for path in sources:
        for row in read_rows(path, list(dict.fromkeys(columns))):
            prompt = prompt_of(row, prompt_column, id_column, answer_column, metadata_columns)
            if prompt.flaw is None:
                is_usable = True
            elif len(flaws) < 3:
                flaws.append(f"{prompt.source}: {prompt.flaw}")
            yield prompt
    if flaws and not is_usable:
        raise DataError("\n".join(["no row can be used. The first reasons:", *flaws]))
    if not is_usable:
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
    id are left out; otherwise they raise DataError. Prompts with a flaw come last, each under an id
    of its own. Raise what `read_prompts` raises."""
    prompts: dict[str, Prompt] = {}
    unusable: list[Prompt] = []
    num_cut = 0
    for prompt in read_prompts(paths, prompt_column, id_column, answer_column, metadata_columns):
        if prompt.flaw is not None:
            unusable.append(prompt)
            continue
        num_cut += prompt.conversation is not None and prompt.conversation.cut
        earlier = prompts.setdefault(prompt.id, prompt)
        if earlier is not prompt and duplicates == "refuse":
            raise DataError(
                f"{prompt.source}: id {prompt.id!r} was already given by {earlier.source}. Ids"
                " must be unique: remove the duplicate, name another --id-column, or keep the"
                " first row of each id with --duplicates first."
            )
    if num_cut:
        cut = "end with an answer, which is left out: the student gives its own"
        print(f"{prompt_column}: {num_cut:,} conversations {cut}.", file=sys.stderr)
    seen = Counter(prompts.keys())
    for prompt in unusable:
        number, seen[prompt.id] = seen[prompt.id], seen[prompt.id] + 1
        key = prompt.id if number == 0 else f"{prompt.id}-{number}"
        prompts[key] = dataclasses.replace(prompt, id=key)
    return list(prompts.values())


def load_examples(path: str | Path, prompt_column: str, examples_column: str) -> list[Example]:
    """Return few-shot examples as (problem, solution), in the file's order. Raise DataError or
    ConfigError as `load_prompts` does, and DataError for a row that cannot be used."""
    examples: list[Example] = []
    for row in read_rows(path, list(dict.fromkeys([prompt_column, examples_column]))):
        try:
            if row.flaw is not None:
                raise DataError(row.flaw)
            problem = cell_text(row.cells, prompt_column, "--prompt-column")
            examples.append((problem, cell_text(row.cells, examples_column, "--examples-column")))
        except DataError as error:
            raise DataError(f"{row.place}: {error}") from error
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


def choose_prompts(prompts: list[Prompt], count: int | None, key: str) -> list[Prompt]:
    """Return a pseudo-random choice of `count` prompts (None: all), whatever their order. Each
    `key` (round and seed) gives another choice. Raise ConfigError for too few prompts."""
    if count is None:
        return prompts
    if count > (n := len(prompts)):
        at = ", ".join(dict.fromkeys(p.source.rpartition(", row ")[0] for p in prompts))
        raise ConfigError(f"--num-prompts {count}: only {n} prompts in {at}. Lower it or add rows.")
    return sorted(prompts, key=lambda prompt: content_key([key, prompt.id]))[:count]


def same(text: str) -> str:
    """Return a problem without what does not tell two problems apart: spacing and case."""
    return " ".join(text.split()).casefold()
