"""The built-in checkers, which extract final answers and compare them, and the choice of one.

A model wrote the text, so extracting takes time in proportion to its length whatever it contains.
Comparing may take long (`math`), so it runs in the processes of `pool.CheckPool`.
"""

import importlib
import importlib.util
import json
import logging
import re
import sys
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mpd_data.checkers.formats import MAX_ANSWER, Checker
from mpd_data.checkers.numbers import find_number, plain_text, plain_unicode, unmarked
from mpd_data.common.errors import ConfigError, did_you_mean, requires
from mpd_data.config import ANSWER_FORMATS, AnswerFormat


class NumberChecker(Checker):
    """Numbers as people write them (`numbers`), compared exactly, without unit and currency."""

    def read(self, text: str) -> str | None:
        number = find_number(plain_text(text[: MAX_ANSWER + 1]))
        return None if number is None else number.text

    def read_bare(self, text: str) -> str | None:
        if len(text) > 200 or find_number(plain_unicode(text), alone=True) is None:
            return None
        return text.removesuffix(".")

    def can_read(self, gold: str) -> bool:
        return self.read(gold) is not None

    def equal(self, answer: str, gold: str) -> bool:
        left, right = (find_number(plain_text(text[: MAX_ANSWER + 1])) for text in (answer, gold))
        return left is not None and right is not None and left.same(right)


# Parsing evaluates, and evaluating these would only reach the time limit.
_UNBOUNDED = re.compile(
    r"\^\s?\{?\s?-?\d{5}|\d{4}\s?\}?!|!!!|\x00|\d\s?\^\s?\{?\s?\d{2,9}\s?\^"
    r"|\d\s?\^\s?\{?\s?\d\s?\^\s?\{?\s?(?:[4-9]|\d\d|\d\s?\^)"
)
_WORD = re.compile(r"(?<![\\A-Za-z{])[A-Za-z]{3,}")
_FUNCTIONS = frozenset(
    ("sin", "cos", "tan", "cot", "sec", "csc", "log", "exp", "sqrt", "det", "max", "min", "mod")
)
# Space that has no meaning: `1 1/2` is not `11/2`.
_SPACE = re.compile(r"(?<!\d)\s|\s(?!\d)")
# A number in a base.
_SUBSCRIPT = re.compile(r"\d[\s)}]{0,4}_")
_GROUPING = re.compile(r"[\s{}()]|\\(?:text|mathrm)")
_ELLIPSIS = re.compile(r"\d\s?(?:\.\.\.|\\[lc]?dots)")
_LETTER_OR_FACTORIAL = re.compile(r"\d\s{0,4}(?![eE][-+]?\d)[A-Za-z]\s{0,4}(?![\w\s/])|!")
# More than these are prose, which two people hardly write alike.
_MOST_WORDS = 8
_MATH_MARKS = (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"))


def _same_numbers(left: str, right: str) -> bool | None:
    """Return whether two plain numbers are the same; None if one is not, for the library. It takes
    `1 1/2` for a product, and cannot read `1e3`."""
    answer, gold = (find_number(plain_text(text)) for text in (left, right))
    # `2m` may be two metres or twice m, and 5! a factorial.
    if answer is None or gold is None or _LETTER_OR_FACTORIAL.search(f"{left} ; {right}"):
        return None
    if answer.same(gold):
        return True
    # The library rounds: 0.333333 is a third.
    is_near = abs(answer.value - gold.value) <= abs(gold.value) / 10**5
    return None if is_near else False


def _numbers_in(value: Any) -> list[Any]:
    """Return the real numbers that a value of sympy is or lists, in order of size."""
    from sympy import Expr, FiniteSet, Interval, Symbol, Tuple, UnevaluatedExpr, nan, oo, zoo
    from sympy.core.relational import Relational

    if isinstance(value, Relational) and isinstance(value.lhs, Symbol):
        value = value.rhs
    parts = value.args if isinstance(value, Tuple | FiniteSet | Interval) else [value]
    numbers = [part for part in parts if isinstance(part, Expr) and part.is_number]
    # Per cent are unevaluated: the library compares them in its own way.
    numbers = [x.doit() for x in numbers if not x.has(UnevaluatedExpr, nan, oo, -oo, zoo)]
    return sorted((x for x in numbers if x.is_real), key=lambda number: number.evalf())


def _are_near(left: Any, right: Any) -> bool:
    """Return False where two real numbers of sympy differ, for the library compares them to a fixed
    number of decimals: 1e-10 and 2e-10 are both 0."""
    from sympy import Float

    if left.is_Rational and right.is_Rational:
        return bool(left == right)
    tolerance = 1e-5 if left.has(Float) or right.has(Float) else 1e-30
    return bool(abs((left - right).evalf(40)) <= tolerance * abs(right.evalf(40)))


def _brace_depth(text: str) -> int:
    depth = deepest = 0
    for char in text:
        depth += (char in "{([") - (char in "})]")
        deepest = max(deepest, depth)
    return deepest


class MathChecker(Checker):
    """Mathematics as LaTeX or plain text, compared with math-verify."""

    def prepare(self) -> None:
        import math_verify

        # It warns that its own time limits are off. The pool's limit is on.
        logging.getLogger(math_verify.__name__).setLevel(logging.ERROR)

    def read(self, text: str) -> str | None:
        text = text.strip()
        for opening, closing in _MATH_MARKS:
            inner = text[len(opening) : -len(closing)]
            if text.startswith(opening) and text.endswith(closing) and inner.strip():
                if opening not in inner:
                    text = inner.strip()
                break
        return text or None

    def read_bare(self, text: str) -> str | None:
        if not any(char.isalnum() for char in text) or len(text) > 200 or "\n" in text:
            return None
        if any(word not in _FUNCTIONS for word in _WORD.findall(text)):
            return None
        return self.read(text.removesuffix("."))

    def can_read(self, gold: str) -> bool:
        # A few words among mathematics are compared as text.
        words = [word for word in _WORD.findall(gold) if word not in _FUNCTIONS]
        return self._is_bounded(gold) and len(words) <= _MOST_WORDS

    def _is_bounded(self, text: str) -> bool:
        return len(text) <= MAX_ANSWER and not _UNBOUNDED.search(text) and _brace_depth(text) <= 40

    def equal(self, answer: str, gold: str) -> bool:
        left, right = self.read(answer), self.read(gold)
        if left is None or right is None:
            return False
        left, right = plain_unicode(unmarked(left)), plain_unicode(unmarked(right))
        if _SPACE.sub("", left) == _SPACE.sub("", right):
            return True
        if bool(_ELLIPSIS.search(left)) != bool(_ELLIPSIS.search(right)):
            return False  # the library takes 0.333... for 0.333
        if _SUBSCRIPT.search(left) or _SUBSCRIPT.search(right):
            # The library leaves the base out.
            return _GROUPING.sub("", left) == _GROUPING.sub("", right)
        if not (self._is_bounded(left) and self._is_bounded(right)):
            return False
        if (same := _same_numbers(left, right)) is not None:
            return same
        self.prepare()
        from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

        parsed = []
        for text in (right, left):
            # In prose, its search for plain expressions would pick out a single number.
            plain = [] if re.search(r"[A-Za-z_]", text) else [ExprExtractionConfig()]
            latex = text if re.search(r"(?<!\\)\$", text) else f"${text}$"
            parsed.append(parse(latex, [LatexExtractionConfig(), *plain], parsing_timeout=None))
        if not all(parsed) or not verify(*parsed, timeout_seconds=None):
            return False
        numbers = [_numbers_in(values[0]) for values in parsed]
        return len(numbers[0]) != len(numbers[1]) or all(map(_are_near, *numbers))


_QUOTES = " \t\r\n.,;:!?\"'`\u201c\u201d\u2018\u2019\u00ab\u00bb()[]{}*_"
_WRAPPED = re.compile(
    r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox|boxed)\s?\{([^{}]{0,500})\}"
)


class TextChecker(Checker):
    """Words, compared without case, width, spacing, surrounding punctuation, leading article."""

    def equal(self, answer: str, gold: str) -> bool:
        return _plain_words(answer) == _plain_words(gold)


def _plain_words(text: str) -> str:
    text = unmarked(unicodedata.normalize("NFKC", text))
    text = _WRAPPED.sub(r"\1", text).casefold()
    words = " ".join(text.split())
    bare = words.strip(_QUOTES).removeprefix("the ").removeprefix("a ").removeprefix("an ")
    return bare.strip(_QUOTES) or words


_LETTER = re.compile(
    r"(?:(?:option|choice|answer)\s{0,4}:?\s{0,4})?[(\[]?([A-J])(?:\s?[)\].:]+(?=\s|$)|\s{0,4}$)",
    re.IGNORECASE,
)
_LETTER_IN_SENTENCE = re.compile(
    r"(?:(?i:option|choice)\s{1,4}\(?([A-J])\b|([B-HJ])[\s,](?!\s?(?:or|and|[A-J])\b))"
)


class ChoiceChecker(Checker):
    """Multiple choice: the letters A to J."""

    def read(self, text: str) -> str | None:
        text = _stripped_choice(text)
        match = _LETTER.match(text) or _LETTER_IN_SENTENCE.match(text)
        return next(letter for letter in match.groups() if letter).upper() if match else None

    def read_bare(self, text: str) -> str | None:
        match = _LETTER.match(_stripped_choice(text)) if "\n" not in text else None
        return match[1].upper() if match else None

    def can_read(self, gold: str) -> bool:
        return self.read(gold) is not None

    def equal(self, answer: str, gold: str) -> bool:
        left = self.read(answer)
        return left is not None and left == self.read(gold)


def _stripped_choice(text: str) -> str:
    text = unicodedata.normalize("NFKC", text[: MAX_ANSWER + 1])
    return _WRAPPED.sub(r"\1", text).strip(" \t\r\n$*_\"'`\u201c\u201d")


class ReasoningGymChecker(Checker):
    """Tasks of reasoning-gym, scored by the task's own function; a full score is correct."""

    def prepare(self) -> None:
        import reasoning_gym  # noqa: F401  # takes seconds

    def read_bare(self, text: str) -> str | None:
        return text or None

    def gold(self, text: str) -> str:
        return text

    def equal(self, answer: str, gold: str) -> bool:
        return answer.strip() == gold.strip()

    def correct(self, answer: str, gold: str, metadata: Mapping[str, Any]) -> bool:
        """Score the answer. Raise ValueError if its `source_dataset` is missing or unknown."""
        inner = metadata.get("metadata", metadata)  # if the column `metadata` was carried
        if "source_dataset" not in metadata:
            metadata = json.loads(inner) if isinstance(inner, str) else inner
        if not isinstance(metadata, Mapping) or "source_dataset" not in metadata:
            raise ValueError(
                "the prompt's metadata has no 'source_dataset': carry reasoning-gym's metadata"
                " with metadata_columns"
            )
        from reasoning_gym import get_score_answer_fn

        score = get_score_answer_fn(metadata["source_dataset"])
        return float(score(answer, {"answer": gold, "metadata": dict(metadata)})) >= 1.0 - 1e-6


CHECKERS: dict[str, type[Checker]] = {
    "number": NumberChecker,
    "math": MathChecker,
    "text": TextChecker,
    "choice": ChoiceChecker,
    "reasoning-gym": ReasoningGymChecker,
}
# The library of a checker, and the extra that brings it.
_LIBRARIES = {
    "math": ("math_verify", "checkers"),
    "reasoning-gym": ("reasoning_gym", "reasoning-gym"),
}


class _Adapter(Checker):
    """A Checker made from a user's object that has `extract` and `equal` and is not a Checker."""

    def __init__(self, inner: Any):
        super().__init__()
        self._inner = inner
        for name in ("prepare", "correct", "gold", "can_read"):
            if callable(getattr(inner, name, None)):
                setattr(self, name, getattr(inner, name))

    def extract(self, completion: str) -> str | None:
        answer = self._inner.extract(completion)
        return None if answer is None else str(answer)

    def equal(self, answer: str, gold: str) -> bool:
        return bool(self._inner.equal(answer, gold))


def make_checker(name: str, formats: Sequence[AnswerFormat] = ANSWER_FORMATS) -> Checker:
    """Return the built-in checker `name`, or a user's own, named as `package.module:Name`. Raise
    ConfigError if it does not exist or cannot be used."""
    if ":" in name:
        return _own_checker(name, formats)
    if name not in CHECKERS:
        raise ConfigError(
            f"checker {name!r}: unknown; there are {', '.join(sorted(CHECKERS))}, or your own as"
            f" package.module:Name.{did_you_mean(name, CHECKERS)}"
        )
    library, extra = _LIBRARIES.get(name, (None, ""))
    if library is not None and importlib.util.find_spec(library) is None:
        # Not imported here: that takes seconds, and the processes that check import it.
        with requires(extra, f"checker {name!r}"):
            raise ModuleNotFoundError(f"No module named {library!r}")
    return CHECKERS[name](formats)


def _own_checker(name: str, formats: Sequence[AnswerFormat]) -> Checker:
    module_name, _, attribute = name.partition(":")
    here = str(Path.cwd())
    if "" not in sys.path and here not in sys.path:
        sys.path.append(here)  # console scripts do not look in the working folder
    try:
        checker = getattr(importlib.import_module(module_name), attribute)()
    except Exception as error:  # a user's code may raise anything
        reason = f"{type(error).__name__}: {error}"
        raise ConfigError(f"checker {name!r} cannot be created: {reason}") from error
    missing = [m for m in ("extract", "equal") if not callable(getattr(checker, m, None))]
    if missing:
        raise ConfigError(
            f"checker {name!r}: {type(checker).__name__} has no method {' and no '.join(missing)};"
            " subclass mpd_data.checkers.Checker or define both."
        )
    if isinstance(checker, Checker):
        checker.formats = tuple(formats)
        return checker
    return _Adapter(checker)
