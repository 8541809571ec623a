"""`mpd-gen contamination`: find evaluation prompts among training prompts, whole or in part.

The unit is the n-gram of words, as in GPT-3 (arXiv:2005.14165, appendix C: an evaluation example is
dirty if it shares a 13-gram with training text, in lower case and without punctuation). Words are
split as in lm-evaluation-harness (`lm_eval/decontamination/janitor.py`: ASCII punctuation is
deleted, spaces separate words). Each match says how much of the prompt the best training prompt
holds, as in open-instruct (`decontamination/README.md`): a shared instruction is a few per cent of
a prompt, a copied problem nearly all of it.
"""

import string
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby, islice

import numpy as np
import numpy.typing as npt

from mpd_data.common.text import format_table
from mpd_data.prompts.reader import same

_DELETED = str.maketrans("", "", string.punctuation)
_TRAIN_ROWS = 1024  # looked up in one batch
_SHOWN = 10
# Odd, so that multiplication loses no bits of a word at any place of the n-gram.
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)

Hashes = npt.NDArray[np.uint64]
Places = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Match:
    """An evaluation prompt and the training prompt that holds most of it: `share` of its n-grams
    (1 for an exact double), the first of them as an example."""

    evaluation_id: str
    train_id: str
    share: float
    ngram: str


@dataclass(frozen=True)
class Contamination:
    """The result of `check_contamination`. `exact` and `overlapping` count evaluation prompts; an
    exact one is overlapping too. `matches` has an entry for each overlapping one, the largest share
    first."""

    n: int
    num_train: int
    num_evaluation: int
    exact: int
    overlapping: int
    matches: list[Match]

    @property
    def share(self) -> float:
        """Fraction of the evaluation prompts that overlap; 0 if there are no prompts."""
        return self.overlapping / max(self.num_evaluation, 1)


def check_contamination(
    train: Iterable[tuple[str, str]], evaluation: Iterable[tuple[str, str]], n: int = 13
) -> Contamination:
    """Search `train` for `evaluation` prompts; both are (id, text).

    A prompt is exact if a training prompt has the same text, apart from spacing and case. It is
    overlapping if it is exact or shares an n-gram of `n` words, without punctuation and case. A
    prompt of fewer words, or of text without spaces, can only be exact. Memory holds the words of
    the evaluation prompts and 16 bytes per n-gram; `train` is read once, as a stream.
    """
    if n < 1:
        raise ValueError(f"n={n}: expected at least one word")
    index = _Index(evaluation, n)
    rows = iter(train)
    while batch := list(islice(rows, _TRAIN_ROWS)):
        index.look_up(batch)
    best = sorted(index.best.items(), key=lambda item: (-item[1].share, item[0]))
    return Contamination(
        n=n,
        num_train=index.num_train,
        num_evaluation=len(index.ids),
        exact=len(index.exact),
        overlapping=len(best),
        matches=[match for _, match in best],
    )


def _words(text: str) -> list[str]:
    return text.translate(_DELETED).casefold().split()


def _ngram_hashes(texts: list[list[str]], n: int) -> tuple[Hashes, Places, Places]:
    """Return for each n-gram of each text, in order, its hash, the index of its text, and the index
    of its first word. All three are [n-grams]."""
    lengths = np.array([len(words) for words in texts], np.int64)
    flat = [hash(word) for words in texts for word in words]
    words = np.array(flat, np.int64).view(np.uint64)
    counts = np.maximum(lengths - n + 1, 0)
    owner = np.repeat(np.arange(len(texts)), counts)
    place = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
    first = place + np.repeat(np.cumsum(lengths) - lengths, counts)
    hashes = np.zeros(len(owner), np.uint64)
    for offset in range(n):
        hashes = hashes * _MULTIPLIER + words[first + offset]
    return hashes, owner, place


class _Index:
    """Evaluation prompts by the hashes of their n-grams. A hash only finds candidates: matches are
    compared word by word."""

    def __init__(self, evaluation: Iterable[tuple[str, str]], n: int) -> None:
        self.n = n
        self.num_train = 0
        self.ids: list[str] = []
        self.exact: set[int] = set()
        self.best: dict[int, Match] = {}
        self._texts: list[list[str]] = []
        self._whole: dict[str, list[int]] = {}
        for number, (identifier, text) in enumerate(evaluation):
            self.ids.append(identifier)
            self._texts.append([sys.intern(word) for word in _words(text)])
            self._whole.setdefault(same(text), []).append(number)
        hashes, owner, place = _ngram_hashes(self._texts, n)
        order = np.argsort(hashes, kind="stable")
        self._hashes = hashes[order]
        self._owner = owner[order].astype(np.int32)
        self._place = place[order].astype(np.int32)

    def look_up(self, batch: list[tuple[str, str]]) -> None:
        """Add the matches of a batch of training prompts to `exact` and `best`."""
        self.num_train += len(batch)
        texts = [_words(text) for _, text in batch]
        for identifier, text in batch:
            for number in self._whole.get(same(text), ()):
                self.exact.add(number)
                self._keep(number, identifier, 1.0, 0)
        if not len(self._hashes):
            return
        for row, shared in self._shared(texts):
            for number, places in shared.items():
                share = len(places) / (len(self._texts[number]) - self.n + 1)
                self._keep(number, batch[row][0], share, min(places))

    def _keep(self, number: int, train_id: str, share: float, place: int) -> None:
        before = self.best.get(number)
        if before is None or share > before.share:
            ngram = " ".join(self._texts[number][place : place + self.n])
            self.best[number] = Match(self.ids[number], train_id, share, ngram)

    def _shared(self, texts: list[list[str]]) -> Iterator[tuple[int, dict[int, set[int]]]]:
        """Yield, for each training text that may share n-grams, (its row, {evaluation prompt:
        places in that prompt where shared n-grams begin})."""
        hashes, rows, places = _ngram_hashes(texts, self.n)
        left = np.searchsorted(self._hashes, hashes)
        hits = np.flatnonzero(self._hashes[np.minimum(left, len(self._hashes) - 1)] == hashes)
        right = np.searchsorted(self._hashes, hashes[hits], side="right")
        found = zip(hits.tolist(), right.tolist(), strict=True)
        for row, hits_of_row in groupby(found, key=lambda pair: int(rows[pair[0]])):
            shared: dict[int, set[int]] = {}
            for hit, end in hits_of_row:
                ngram = texts[row][places[hit] : places[hit] + self.n]
                for at in range(left[hit], end):
                    number, place = int(self._owner[at]), int(self._place[at])
                    if self._texts[number][place : place + self.n] == ngram:
                        shared.setdefault(number, set()).add(place)
            yield row, shared


def show(result: Contamination) -> str:
    """Return the counts as a table, followed by the worst matches."""
    counts = {
        "training prompts": result.num_train,
        "evaluation prompts": result.num_evaluation,
        "exact": result.exact,
        f"share a {result.n}-gram": result.overlapping,
        "of all": f"{100 * result.share:.1f}%",
    }
    text = format_table([counts])
    if not result.matches:
        return text
    worst = [
        {
            "evaluation prompt": match.evaluation_id,
            "training prompt": match.train_id,
            "share": f"{100 * match.share:.0f}%",
            "as in": match.ngram,
        }
        for match in result.matches[:_SHOWN]
    ]
    text += f"\n\n{format_table(worst)}"
    more = len(result.matches) - _SHOWN
    return f"{text}\n{more:,} more; --json has all" if more > 0 else text
