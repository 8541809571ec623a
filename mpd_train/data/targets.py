"""Which of the teacher's distributions a row is trained on, where it was scored in both contexts.

After the rewrite prompt the teacher sees the draft, and with it the results that the trace states:
there it is sure of what the student cannot know. The difference of the two scores at a token shows
it.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mpd_data.common.errors import ConfigError
from mpd_data.store.schema import WITH_DRAFT
from mpd_train.config import DEFAULT_LEAK_NATS, LossConfig

Floats = npt.NDArray[np.floating]
Ints = npt.NDArray[np.integer]


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
    """What rows are trained on that were scored in `score_context`, by `--targets` (None: by the
    score context, with `both` by the problem) and `--leak-nats`."""

    score_context: str
    name: str
    leak_nats: float

    @classmethod
    def of(cls, loss: LossConfig, score_context: str, source: str) -> "Targets":
        """Raise ConfigError where the rows of `source` do not have the targets asked for."""
        if score_context != "both" and loss.targets not in (None, score_context):
            raise ConfigError(
                f"--targets {loss.targets}: the rewrites of {source} are scored in one context,"
                f" {score_context!r}. Leave the option out, or score them anew, in another folder"
                " or with --overwrite: mpd-gen rewrite --score-context both."
            )
        name = loss.targets or ("problem" if score_context == "both" else score_context)
        return cls(score_context, name, loss.leak_nats or DEFAULT_LEAK_NATS)

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

    def taught(self, labels: Ints, records: list[Record]) -> Taught:
        """Return what the tokens `labels` [n] are trained on, from the records of `prefixes`."""
        nothing = np.zeros(len(labels), np.float32)
        if len(records) == 1:
            return Taught(records[0], nothing, nothing + 1)
        problem, rewrite = records
        given = given_away(labels, problem, rewrite, self.leak_nats)
        share = given.astype(np.float32)
        if self.name == "masked":
            return Taught(rewrite, share, 1 - share)
        parts = zip(problem, rewrite, strict=True)
        mixed = Record(*(np.where(given.reshape(-1, *[1] * (a.ndim - 1)), a, b) for a, b in parts))
        return Taught(mixed, share, nothing + 1)


def given_away(
    labels: Ints, problem: Record, rewrite: Record, leak_nats: float
) -> npt.NDArray[np.bool_]:
    """Return where the draft gave a token of `labels` [n] away: its log-probability after the
    rewrite prompt is more than `leak_nats` above that after the problem alone.

    Only what is certain counts. A token outside the problem's top K is taken for as probable as it
    can be there: as the last of the K, or as the whole tail, if that is less. One outside the
    rewrite's top K is not given away.
    """
    low, _ = _looked_up(labels, rewrite)
    high, found = _looked_up(labels, problem)
    bound = np.minimum(problem.logprobs[:, -1], problem.tail).astype(np.float32)
    result: npt.NDArray[np.bool_] = low > np.where(found, high, bound) + leak_nats
    return result


def _looked_up(
    labels: Ints, record: Record
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
    """Return the log-probabilities [n] of `labels`, -inf outside the top K, and which are in it."""
    at = record.ids == labels[:, None]
    logprobs = np.where(at, record.logprobs.astype(np.float32), -np.inf).max(axis=1)
    return logprobs, at.any(axis=1)
