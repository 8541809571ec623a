"""Measure whether a rewrite carries its answer, step by step: two numbers from a model's scores.

*Answer support* is how much likelier the answer is after the rewrite than without it:
log p(answer | prompt, trace before it) - log p(answer | prompt, lead-in). Where a trace states the
answer several times, the least likely time counts: a trace that names a result it did not work out
has no trouble to repeat it. The lead-in is what the trace says around its last statement, without
the working: its thinking tags, and the answer's sentence up to the answer.

The *weakest step* is the least probable of the values that the trace states: numbers that stand
neither in the prompt nor earlier in the trace, and the answer, if it is a number, wherever it
stands.

A number may come as a surprise although its value does not ("the company laid off 150"), so its
probability is p(value | here stands a number): see `_log_value`. Both are in nats. They look at
token ids as they are stored: text is only used to find the places.
"""

import functools
import itertools
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import numpy as np

from mpd_data.engines.protocol import Scores
from mpd_data.prompts.special import Spelling

# Log-probabilities per token that a measurement asks the engine for: the alternatives to a value.
NUM_ALTERNATIVES = 20

# The whole part, then decimals. A repetition is bounded, so that hostile text takes linear time.
_NUMBER = re.compile(r"([0-9]{1,3}(?:,[0-9]{3}){1,12}(?![0-9])|[0-9]+)(\.[0-9]+)?")
_SENTENCE_START = re.compile(r"\n|[.!?][\"')*_]{0,3}\s+|</?think>\s*")
_OPENING = re.compile(r"\s*<think>\s*")
_CLOSING = re.compile(r"</think>\s*")

Span = tuple[int, int]


@dataclass(frozen=True)
class Places:
    """Where a trace states its answer and values, as ranges of its tokens.

    answers: each place of an answer that `is_number`, the last place of another one; none if it is
        not found
    lead_in: the tokens of the lead-in of the last
    steps: places of the values for the weakest step
    """

    answers: list[range]
    is_number: bool
    lead_in: list[int]
    steps: list[range]


NOWHERE = Places([], False, [], [])


class Measure:
    """Finds the places of a trace and measures them. `tokenizer` is the student's."""

    def __init__(self, tokenizer: Any) -> None:
        self._spelling = Spelling(tokenizer)
        # The text of a token without the spaces around it.
        self._word: Callable[[int], str] = functools.cache(
            lambda token: self._spelling.decode([token]).strip()
        )

    def places(self, prompt_ids: list[int], trace_ids: list[int], answer: str | None) -> Places:
        """Return where the trace (without its end token) states `answer`, as the checker read it,
        and its new values. Nowhere, if the tokens are not those that its text gives: the places of
        characters are then not known exactly."""
        text = self._spelling.decode(trace_ids, prompt_ids)
        placed = self._spelling.place(prompt_ids, text)
        if placed is None or placed.ids != trace_ids:
            return NOWHERE
        offsets = placed.offsets
        known = {value for value, _ in _numbers(self._spelling.decode(prompt_ids))}
        steps = list(new_values(text, known))
        is_number, spans = (False, []) if answer is None else answer_spans(text, answer)
        lead_in: set[int] = set()
        if spans:
            around = lead_in_spans(text, spans[-1][0])
            lead_in = {i for span in around for i in _tokens_of(offsets, span)}
            if is_number:
                steps = sorted({*steps, *spans})
        answers = [_tokens_of(offsets, span) for span in spans]
        return Places(
            answers,
            is_number,
            [i for i in sorted(lead_in) if i < answers[-1].start],
            [_tokens_of(offsets, span) for span in steps],
        )

    def alone(
        self, places: Places, prompt_ids: list[int], trace_ids: list[int]
    ) -> tuple[list[int], list[int]]:
        """Return prompt and lead-in, and what is scored after them: the answer and the token that
        ends it. There must be an answer."""
        last = places.answers[-1]
        return (
            prompt_ids + [trace_ids[i] for i in places.lead_in],
            trace_ids[last.start : last.stop + 1],
        )

    def columns(
        self, places: Places, trace_ids: list[int], trace: Scores, alone: Scores | None
    ) -> dict[str, float | None]:
        """Return `answer_support` and `weakest_step` of a trace. trace: the scores of all its
        tokens, end token included; alone: those of `alone`."""
        support = None
        if alone is not None:
            log_p = self._log_value if places.is_number else _log_text
            last = places.answers[-1]
            ids = trace_ids[last.start : last.stop + 1]
            without = log_p(range(len(last)), ids, alone)
            support = min(log_p(place, trace_ids, trace) for place in places.answers) - without
        values = [self._log_value(step, trace_ids, trace) for step in places.steps]
        return {"answer_support": support, "weakest_step": min(values, default=None)}

    def _log_value(self, step: range, trace_ids: list[int], trace: Scores) -> float:
        """Return log p(value | here stands a number).

        Where the number begins, the alternatives to its token are the digits among the engine's
        best; later they are all tokens. After its last token it must end: what does not end it are
        the digits among the best. A comma between thousands changes no value, so it counts neither
        as a token nor as an alternative.
        """
        total = 0.0
        for place in step:
            word, target = self._word(trace_ids[place]), float(trace.target_logprobs[place])
            if word == ",":
                continue
            digits, commas = self._digits_and_commas(trace, place, trace_ids[place])
            if place == step.start:
                total += -math.log1p(digits * math.exp(-target))
            else:
                total += min(target - math.log1p(-min(commas, 1 - _RESOLUTION)), 0.0)
        # The end token follows a trace, so there is a place after each number.
        digits, _ = self._digits_and_commas(trace, step.stop, None)
        return total + math.log1p(-min(digits, 1 - _RESOLUTION))

    def _digits_and_commas(
        self, trace: Scores, place: int, target: int | None
    ) -> tuple[float, float]:
        """Return the probability of the tokens of digits, and of commas, other than `target`, among
        the best at a place."""
        digits = commas = 0.0
        best = zip(trace.topk_ids[place].tolist(), trace.topk_logprobs[place].tolist(), strict=True)
        for token, logprob in best:
            if token != target:
                digits += math.exp(logprob) * self._word(token).isdecimal()
                commas += math.exp(logprob) * (self._word(token) == ",")
        return digits, commas


# Of a float32 probability near 1.
_RESOLUTION = float(np.finfo(np.float32).eps)


def _numbers(text: str) -> Iterator[tuple[Decimal, Span]]:
    """Yield the numbers of a text, each by its value and its place, without decimals that are
    zero: 1,200.00 is 1200."""
    for match in _NUMBER.finditer(text):
        whole, decimals = match[1].replace(",", ""), (match[2] or "").rstrip("0")
        is_whole = decimals in ("", ".")
        end = match.end(1) if is_whole else match.end()
        yield Decimal(whole if is_whole else whole + decimals), (match.start(), end)


def new_values(text: str, known: set[Decimal]) -> Iterator[Span]:
    """Yield the places of the values that are not `known` and stand in the text for the first
    time."""
    seen = set(known)
    for value, span in _numbers(text):
        if value not in seen:
            seen.add(value)
            yield span


def answer_spans(text: str, answer: str) -> tuple[bool, list[Span]]:
    """Return whether `answer` is a number, and its places in a text: of a number, all with its
    value; of another answer the last where it is a whole word. In order; none if it is not there.
    """
    numbers = list(_numbers(answer))
    if len(numbers) == 1 and not re.search(r"[^\W\d_]|[/^]", answer):
        value = numbers[0][0]
        return True, [span for own, span in _numbers(text) if own == value]
    before, after = (r"(?<!\w)" * answer[:1].isalnum(), r"(?!\w)" * answer[-1:].isalnum())
    found = [m.span() for m in re.finditer(before + re.escape(answer) + after, text)]
    return False, found[-1:] if answer else []


def lead_in_spans(text: str, answer: int) -> Iterator[Span]:
    """Yield what the lead-in of an answer that begins at the character `answer` consists of: the
    thinking tags before it, and its own sentence or line up to the answer."""
    closings = list(_CLOSING.finditer(text, 0, answer))
    if closings:
        opening = _OPENING.match(text)
        yield from (tag.span() for tag in (opening, closings[-1]) if tag is not None)
    starts = itertools.chain([0], (m.end() for m in _SENTENCE_START.finditer(text, 0, answer)))
    yield max(starts), answer


def _tokens_of(offsets: list[Span], span: Span) -> range:
    """Return the tokens that hold the characters of a span; offsets: those of each token."""
    held = [i for i, (a, b) in enumerate(offsets) if a < span[1] and b > span[0]]
    return range(held[0], held[-1] + 1) if held else range(0)


def _log_text(place: range, _: list[int], scores: Scores) -> float:
    """Return log p of the tokens of an answer that is not a number."""
    return float(scores.target_logprobs[place.start : place.stop].sum())
