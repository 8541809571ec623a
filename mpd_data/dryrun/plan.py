"""What a stage would do: rows, tokens, disk and time, as data and as a table.

A prediction is learned from rows that are there: this round's, else those of a folder beside it
that a model of the same tokenizer made under the same name or with the same settings. Where there
are none the figures are bounds and say "at most"; speeds are recorded ones (run.json), never
guessed. Nothing here writes, and no engine is imported.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

# Bounds for rounds of which nothing is known; docs/contract.md has what real rounds take.
_BYTES_PER_ROW = 200
_TEXT_BYTES_PER_TOKEN = 2.0
_LOGPROB_BYTES = 2.0


@dataclass(frozen=True)
class Lengths:
    """Mean and maximum in tokens."""

    mean: float
    max: int

    @classmethod
    def of(cls, values: Sequence[int]) -> "Lengths | None":
        return cls(round(sum(values) / len(values), 1), max(values)) if values else None


@dataclass(frozen=True)
class Shown:
    """A rendered prompt."""

    name: str
    text: str
    num_tokens: int


@dataclass(frozen=True)
class StagePlan:
    """What one command would do. None: not known.

    `rows`, `committed`, `owed` are samples of rollouts, rollouts to rewrite, or kept rows to train
    on; tokens are completions, rewrites, or trained tokens, of the owed rows. `disk_bytes` is what
    the owed rows will take, expected where `tokens_expected` is known and at most else.
    `failing` counts what could not be used; `reasons` name the first few.
    """

    command: str
    out: str
    settings: list[str]
    rows: int | None
    committed: int
    owed: int | None
    shown: list[Shown] = field(default_factory=list)
    prompt_tokens: Lengths | None = None
    tokens_expected: int | None = None
    tokens_at_most: int | None = None
    failing: int = 0
    reasons: list[str] = field(default_factory=list)
    disk_bytes: int | None = None
    seconds: float | None = None
    device: str | None = None
    learned_from: str | None = None
    details: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def id_bytes(vocab_size: int) -> float:
    """Bytes of a token id, all ids being as likely: compression never does worse."""
    return math.log2(vocab_size) / 8


def rollout_bytes(rows: int, prompt_tokens: int, tokens: int, vocab_size: int) -> int:
    """At most, for rollouts of so many prompt tokens (of all rows) and completion tokens."""
    ids = (prompt_tokens + tokens) * id_bytes(vocab_size)
    return int(ids + tokens * _TEXT_BYTES_PER_TOKEN + rows * _BYTES_PER_ROW)


def distill_bytes(rows: int, context_tokens: int, tokens: int, k: int, vocab_size: int) -> int:
    """At most, for rows of so many context tokens (student's prompts, and rewrite prompts where
    they are stored) and rewritten tokens that are all kept with K log-probabilities each."""
    ids = (context_tokens + tokens) * id_bytes(vocab_size)
    entries = tokens * (k * (id_bytes(vocab_size) + _LOGPROB_BYTES) + _LOGPROB_BYTES)
    return int(ids + entries + tokens * _TEXT_BYTES_PER_TOKEN + rows * _BYTES_PER_ROW)
