"""Which of the teacher's distributions a row is trained on, where it was scored in both contexts.

After the rewrite prompt the teacher sees the draft, and with it the results that the trace states:
there it is sure of what the student has to work out. It is also sure of the form in which it was
asked to write. The first is to be kept from the student, the second is what the student learns. So
only numbers count as given away, and of these only those where the teacher expects a number without
the draft, too, but not this one.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mpd_data.common.errors import ConfigError
from mpd_data.store.schema import WITH_DRAFT
from mpd_train.config import DEFAULT_LEAK_NATS, LossConfig

Floats = npt.NDArray[np.floating]
Ints = npt.NDArray[np.integer]
Bools = npt.NDArray[np.bool_]

# Of the teacher's probability without the draft, the share on numbers from which on it expects one.
_EXPECTED = 0.5


class Record(NamedTuple):
    """A teacher's distributions over n tokens: ids [n, K], most probable first, logprobs [n, K],
    tail [n], natural logs."""

    ids: Ints
    logprobs: Floats
    tail: Floats


class Taught(NamedTuple):
    """What n tokens are trained on. given_away: float32 [n], 1 where the draft gave the token away;
    weights: float32 [n]."""

    record: Record
    given_away: npt.NDArray[np.float32]
    weights: npt.NDArray[np.float32]


@dataclass(frozen=True)
class Targets:
    """What rows are trained on that were scored in `score_context`, by `--targets` and
    `--leak-nats`."""

    score_context: str
    name: str
    leak_nats: float
    by_token: bool

    @classmethod
    def of(cls, loss: LossConfig, score_context: str, source: str | Path) -> "Targets":
        """Raise ConfigError where the rows of `source` do not have the targets asked for."""
        if score_context != "both" and loss.targets not in (None, score_context):
            raise ConfigError(
                f"--targets {loss.targets}: the rewrites of {source} are scored in one context,"
                f" {score_context!r}. Leave the option out, or score them anew, in another folder"
                " or with --overwrite: mpd-gen rewrite --score-context both."
            )
        if score_context == "both" and loss.targets is None:
            raise ConfigError(
                f"--targets: the rewrites of {source} are scored in both contexts. Say which"
                " distribution to learn: rewrite (after the teacher's prompt, which asks for few"
                " words), problem (after the student's), mixed or masked."
            )
        name = loss.targets or score_context
        return cls(score_context, name, loss.leak_nats or DEFAULT_LEAK_NATS, loss.by_token)

    @property
    def prefixes(self) -> tuple[str, ...]:
        """How the names of the score columns begin that are read."""
        if self.score_context != "both" or self.name == "problem":
            return ("",)
        return (WITH_DRAFT,) if self.name == "rewrite" else ("", WITH_DRAFT)

    @property
    def with_draft(self) -> bool:
        """Whether a teacher in the process sees the draft."""
        return self.name != "problem"

    def numbers(self, tokenizer: Any, vocab_size: int) -> Bools | None:
        """Return what `taught` needs of the student's tokenizer: which of `vocab_size` ids spell
        digits and nothing else but spaces. None where it needs nothing."""
        if not self.by_token:
            return None
        result = np.zeros(vocab_size, np.bool_)
        for token in range(min(len(tokenizer), vocab_size)):
            text = tokenizer.decode([token], clean_up_tokenization_spaces=False)
            result[token] = text.strip().isdecimal()
        return result

    def taught(self, labels: Ints, records: list[Record], numbers: Bools | None) -> Taught:
        """Return what the tokens `labels` [n] are trained on, from the records of `prefixes`.
        numbers: of the method of this name."""
        nothing = np.zeros(len(labels), np.float32)
        if len(records) == 1:
            return Taught(records[0], nothing, nothing + 1)
        problem, rewrite = records
        assert numbers is not None
        given = given_away(labels, problem, rewrite, self.leak_nats, numbers)
        share = given.astype(np.float32)
        if self.name == "masked":
            return Taught(rewrite, share, 1 - share)
        parts = zip(problem, rewrite, strict=True)
        mixed = Record(*(np.where(given.reshape(-1, *[1] * (a.ndim - 1)), a, b) for a, b in parts))
        return Taught(mixed, share, nothing + 1)


def given_away(
    labels: Ints, problem: Record, rewrite: Record, leak_nats: float, numbers: Bools
) -> Bools:
    """Return where the draft gave a token of `labels` [n] away.

    It is a token of a number (`numbers`: bool [vocab]); after the problem alone the teacher expects
    a number there; and its log-probability after the rewrite prompt is more than `leak_nats` above
    that after the problem.

    Only what is certain counts. A token outside the problem's top K is taken for as probable as it
    can be there: as the last of the K, or as the whole tail, if that is less. One outside the
    rewrite's top K is not given away.
    """
    low, _ = _looked_up(labels, rewrite)
    high, found = _looked_up(labels, problem)
    bound = np.minimum(problem.logprobs[:, -1], problem.tail).astype(np.float32)
    surer = low > np.where(found, high, bound) + leak_nats
    on_numbers = np.exp(problem.logprobs.astype(np.float32)) * numbers[problem.ids]
    result: Bools = numbers[labels] & surer & (on_numbers.sum(axis=1) > _EXPECTED)
    return result


def _looked_up(labels: Ints, record: Record) -> tuple[npt.NDArray[np.float32], Bools]:
    """Return the log-probabilities [n] of `labels`, -inf outside the top K, and which are in it."""
    at = record.ids == labels[:, None]
    logprobs = np.where(at, record.logprobs.astype(np.float32), -np.inf).max(axis=1)
    return logprobs, at.any(axis=1)
