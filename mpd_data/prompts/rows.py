"""Make a prompt of a row. What is wrong with a row is a flaw of its prompt, and costs it alone.

`sources.py` reads rows, `values.py` says what a cell means, `messages.py` what turns mean.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from mpd_data.common.errors import DataError
from mpd_data.common.hashing import content_key
from mpd_data.prompts.messages import Conversation, Turn, is_conversation, read_conversation
from mpd_data.prompts.sources import Row, Unreadable
from mpd_data.prompts.values import as_json, as_text, is_unicode, not_unicode, without_hint


@dataclass(frozen=True)
class Prompt:
    """One problem to solve. `text` is the problem, `answer` the gold answer if there is one, and
    `metadata` the carried columns in JSON types. Messages name the prompt by `source`. `flaw` says
    why the row cannot be used; `text` and `answer` are then escaped so that they can be shown.
    `missing`: the text of a missing answer, part of a round's identity, as older versions took it
    for an answer. `unreadable`: the checker cannot read the answer. `conversation`: the
    turns, where the cell holds some; `text` is then their text."""

    id: str
    text: str
    answer: str | None
    source: str
    metadata: dict[str, Any] = field(default_factory=dict)
    flaw: str | None = None
    missing: str = ""
    unreadable: bool = False
    conversation: Conversation | None = None

    @property
    def turns(self) -> tuple[Turn, ...]:
        """The turns before the one that the model answers."""
        return () if self.conversation is None else self.conversation.earlier

    @property
    def message(self) -> str:
        """The text of the turn that the model answers."""
        return self.text if self.conversation is None else self.conversation.last


def prompt_of(
    row: Row, prompt_column: str, id_column: str | None = None, answer_column: str | None = None,
    metadata_columns: Sequence[str] = (),
) -> Prompt:  # fmt: skip
    """Return the prompt of a row; one with a flaw where the row cannot be used. A cell that the row
    lacks is None."""
    if row.flaw is not None:
        unusable = content_key(["unusable", without_hint(row.flaw)])
        return Prompt(unusable, "", None, row.place, {}, row.flaw)
    columns = [c for c in (prompt_column, answer_column, id_column, *metadata_columns) if c]
    whole = {c: row.cells.get(c) for c in columns}
    cells, flaw = _escape(whole, [c for c in (prompt_column, answer_column) if c])
    flaws = [flaw] if flaw else []

    def read(column: str, convert: Callable[[], Any]) -> Any:
        """Return what `convert` makes of a cell; None, and a flaw, where it cannot be used."""
        try:
            if isinstance(value := cells[column], Unreadable):
                raise DataError(f"column {column!r} holds {value.reason}")
            return convert()
        except DataError as error:
            flaws.append(str(error).rstrip("."))
            return None

    turns = None
    if is_conversation(cells[prompt_column]):
        turns = read(prompt_column, partial(_turns, cells[prompt_column], prompt_column))
        text = turns and turns.text
    else:
        text = read(prompt_column, partial(cell_text, cells, prompt_column, "--prompt-column"))
        if text is None and isinstance(blank := cells[prompt_column], str):
            text = blank  # as in the identities of rounds that older versions began
    answer, missing, identifier = None, "", None
    if answer_column is not None:
        cell = cells[answer_column]
        answer = read(answer_column, partial(as_text, cell, answer_column, "--answer-column", True))
        missing = str(cell) if answer is None and isinstance(cell, str | float) else ""
    if id_column is not None:
        identifier = read(id_column, partial(cell_text, cells, id_column, "--id-column", True))
    metadata = {c: read(c, partial(as_json, cells[c], f"column {c!r}")) for c in metadata_columns}
    if identifier is None:
        # Without turns before it a message is the same prompt as its text.
        what = [turns.earlier, text] if turns and turns.earlier else text
        identifier = content_key(["unusable", without_hint(flaws[0])] if text is None else what)
    flaw = flaws[0] if flaws else None
    return Prompt(
        identifier, text or "", answer, row.place, metadata, flaw, missing, conversation=turns
    )


def cell_text(row: Mapping[str, Any], column: str, option: str, scalars: bool = False) -> str:
    """Return a cell's text as `as_text` does. Raise DataError for a missing one, too."""
    text = as_text(row[column], column, option, scalars)
    if text is None:
        raise DataError(
            f"column {column!r} holds nothing, expected text{' or a number' * scalars}. Name the"
            f" column that holds it with {option}."
        )
    return text


def _turns(value: Sequence[Any], column: str) -> Conversation:
    """Return the turns of a cell. Raise DataError."""
    try:
        conversation = read_conversation(value)
    except ValueError as error:
        raise DataError(f"column {column!r}: {error}") from error
    for text in (*(text for _, text in conversation.earlier), conversation.last):
        if not is_unicode(text):
            raise DataError(f"column {column!r} {not_unicode(text)}")
    return conversation


def _escape(row: Mapping[str, Any], columns: list[str]) -> tuple[Mapping[str, Any], str | None]:
    """Return the row with undecodable bytes of `columns` escaped, and the first such flaw."""
    bad = [c for c in columns if isinstance(row[c], str) and not is_unicode(row[c])]
    if not bad:
        return row, None
    escaped = {c: row[c].encode("utf-8", "backslashreplace").decode("utf-8") for c in bad}
    return {**row, **escaped}, f"column {bad[0]!r} {not_unicode(row[bad[0]])}"
