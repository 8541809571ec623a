"""What a stage would do: rows, tokens, disk and time, as data.

Lengths, sizes and speeds are those of rows that were committed before. Without such rows the
figures are upper bounds, and the time is not known. Nothing here writes, and no engine is imported.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from mpd_data.common.options import arguments
from mpd_data.dryrun.learned import Learned

# Bounds where no rows exist; docs/contract.md says what real rounds take.
_BYTES_PER_ROW = 200
_TEXT_BYTES_PER_TOKEN = 2.0
_LOGPROB_BYTES = 2.0
# Reasons that a plan names.
_NAMED = 3


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

    `rows`, `committed` and `remaining` count samples of rollouts, rollouts to rewrite,
    or kept rows to train on. Tokens are those of remaining completions or rewrites, or the tokens
    to train on. `disk_bytes` is what the remaining rows will take: expected where `tokens_expected`
    is known, at most otherwise. `failing` counts what cannot be used, `reasons` name the first few.
    `refusal` says why the run would end without a result.
    """

    command: str
    out: str
    settings: list[str]
    rows: int
    committed: int
    remaining: int
    shown: list[Shown] = field(default_factory=list)
    prompt_tokens: Lengths | None = None
    tokens_expected: int | None = None
    tokens_at_most: int | None = None
    failing: int = 0
    reasons: list[str] = field(default_factory=list)
    refusal: str | None = None
    disk_bytes: int | None = None
    seconds: float | None = None
    device: str | None = None
    learned_from: str | None = None
    details: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def tokens(self) -> int | None:
        """The expected tokens, or else their upper bound."""
        return self.tokens_at_most if self.tokens_expected is None else self.tokens_expected

    @property
    def is_bound(self) -> bool:
        """Whether tokens, disk and time are upper bounds."""
        return self.tokens_expected is None and self.tokens_at_most is not None


def make_plan(
    command: str, config: BaseModel, out: Path, learned: Learned | None, *,
    generated: int | None = None, tokens_at_most: int | None = None,
    tokens_expected: int | None = None, disk_bytes: int, remaining: int, workers: int = 1,
    reasons: Sequence[str] = (), **fields: Any,
) -> StagePlan:  # fmt: skip
    """Build the plan of `command`. `generated` rows are expected to be like the `learned` ones;
    without these `tokens_at_most` and `disk_bytes` stay bounds. `tokens_expected`: where they are
    known exactly. `workers` share the tokens. `fields`: the others of StagePlan."""
    if learned is not None and generated is not None and tokens_at_most is not None:
        tokens_expected = min(round(generated * learned.tokens_per_row), tokens_at_most)
        disk_bytes = round(tokens_expected * learned.bytes_per_token)
    pace = None if learned is None else learned.seconds_per_token
    seconds = None if remaining else 0.0
    if remaining and learned is not None and pace is not None and tokens_expected is not None:
        seconds = tokens_expected / workers * pace + learned.start_seconds
    more = len(reasons) - _NAMED
    return StagePlan(
        command=command,
        out=str(out),
        settings=arguments(config),
        remaining=remaining,
        tokens_expected=tokens_expected,
        tokens_at_most=tokens_at_most,
        failing=len(reasons),
        reasons=[*reasons[:_NAMED], *([f"and {more:,} more"] if more > 0 else [])],
        disk_bytes=disk_bytes,
        seconds=seconds and round(seconds, 1),
        device=None if learned is None else learned.device,
        learned_from=None if learned is None else learned.source,
        **fields,
    )


def _id_bytes(vocab_size: int) -> float:
    """Return the bytes of a token id where all ids are equally likely, the worst case."""
    return math.log2(vocab_size) / 8


def rollout_bytes(rows: int, prompt_tokens: int, tokens: int, vocab_size: int) -> int:
    """Return an upper bound for rollouts: `prompt_tokens` and completion `tokens` of all rows."""
    ids = (prompt_tokens + tokens) * _id_bytes(vocab_size)
    return int(ids + tokens * _TEXT_BYTES_PER_TOKEN + rows * _BYTES_PER_ROW)


def distill_bytes(
    rows: int, context_tokens: int, tokens: int, k: int, vocab_size: int, in_both: bool = False
) -> int:
    """Return an upper bound for rewrites. `context_tokens`: the student's prompts, and the rewrite
    prompts where they are stored; `tokens`: rewritten ones, kept with `k` log-probabilities each,
    or `in_both` score contexts with twice as many."""
    entries = tokens * (k * (_id_bytes(vocab_size) + _LOGPROB_BYTES) + _LOGPROB_BYTES)
    entries *= 2 if in_both else 1
    return rollout_bytes(rows, context_tokens, tokens, vocab_size) + int(entries)
