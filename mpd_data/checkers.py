"""Answer checking by program.

A checker reads the final answer from a completion and says whether two answers are equal.
`extract` gives None where no answer stands in a declared format: a failure of format, which
stages count apart from a wrong answer.
"""

import re
from collections.abc import Callable
from fractions import Fraction
from typing import Protocol

from mpd_data.errors import ConfigError


class Checker(Protocol):
    """Reads and compares answers. Both methods take hostile text and never raise on it."""

    def extract(self, completion: str) -> str | None:
        """The final answer as it stands in the text, or None."""

    def equal(self, answer: str, gold: str) -> bool:
        """Whether two answers mean the same."""


def final_part(completion: str) -> str | None:
    """What follows the reasoning: the text after the last </think>. All of the text where it
    has no thinking tags; None where thinking was opened and never closed."""
    _, closed, after = completion.rpartition("</think>")
    if closed:
        return after
    return None if "<think>" in completion else completion


# Every repetition is bounded: hostile text costs time in proportion to its length.
_NUMBER = r"[-+]?\$?\d[\d,]{0,40}(?:\.\d{1,40})?(?:\s?/\s?\d{1,40})?"
_SPACE = r"\s{0,4}"
_FORMATS = [
    re.compile(rf"\\boxed\{{{_SPACE}({_NUMBER}){_SPACE}\}}"),
    re.compile(rf"####{_SPACE}({_NUMBER})"),
    re.compile(rf"\banswer(?:\s{{1,4}}is)?{_SPACE}:?{_SPACE}({_NUMBER})", re.IGNORECASE),
]
_PLAIN = re.compile(_NUMBER)


class NumberChecker:
    r"""Exact numbers: integers, decimals, simple fractions. Formats taken, the last occurrence
    of the first that occurs: `\boxed{12}`, `#### 12`, `answer 12` / `the answer is: 12`, or a
    final part that is nothing but a number."""

    def extract(self, completion: str) -> str | None:
        final = final_part(completion)
        if final is None:
            return None
        for pattern in _FORMATS:
            found = pattern.findall(final)
            if found:
                return str(found[-1])
        bare = final.strip().removesuffix(".")
        return bare if _PLAIN.fullmatch(bare) else None

    def equal(self, answer: str, gold: str) -> bool:
        left, right = _value(answer), _value(gold)
        return left is not None and left == right


def _value(text: str) -> Fraction | None:
    if _PLAIN.fullmatch(text.strip()) is None:
        return None
    try:
        return Fraction(re.sub(r"[\s,$]", "", text))
    except ZeroDivisionError:
        return None


CHECKERS: dict[str, Callable[[], Checker]] = {"number": NumberChecker}


def make_checker(name: str) -> Checker:
    """The checker called `name`. Raises ConfigError listing the known ones."""
    if name not in CHECKERS:
        raise ConfigError(f"checker {name!r}: unknown; there are {', '.join(sorted(CHECKERS))}.")
    return CHECKERS[name]()


def judge(checker: Checker, answer: str | None, gold: str | None) -> bool | None:
    """Whether `answer` is right; None where there is no gold answer to say so."""
    if gold is None:
        return None
    return answer is not None and checker.equal(answer, gold)
