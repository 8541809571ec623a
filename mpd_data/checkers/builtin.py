"""Answer checking by program.

A checker reads the final answer from a completion and says whether two answers mean the same.
`extract` gives None where no answer stands in a declared format: a failure of format, which
stages count apart from a wrong answer. Models write what is read here, so reading costs time in
proportion to the text; comparing may take long (`math`), and runs under `checks.CheckPool`.
"""

import importlib
import importlib.util
import json
import logging
import re
import sys
import unicodedata
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from mpd_data.checkers.formats import MAX_ANSWER, Checker
from mpd_data.common.errors import ConfigError, did_you_mean, requires
from mpd_data.config import ANSWER_FORMATS, AnswerFormat

# Every repetition is bounded: hostile text costs time in proportion to its length.
_NUMBER = (
    r"(?:\$[-+]|[-+]?\$?)(?:\d{1,3}(?:,\d{3}){1,12}(?!\d)|\d{1,40}(?!\d))(?:\.\d{1,40}(?!\d))?"
    r"(?:\s?/\s?\d{1,40}(?!\d))?"
)
_PLAIN = re.compile(_NUMBER)
_NAMED = re.compile(r"[A-Za-z]{1,20}\s{0,4}=\s{0,4}(?=[-+$\d])")
# What may follow a number: its unit or the sentence's rest, and no more mathematics.
_UNIT = re.compile(
    r"\s{0,4}(?:$|%|°|\^\{?\\circ|\\(?:text|mathrm|mbox|circ|degree)\b|[.;:!)](?:\s|$)|,\s(?!\s?\d))"
    r"|(?:\s{1,4}|(?=[A-Za-z]{2}|[mgshL]\b))(?!(?:and|or)\b|[A-Za-z]\s?[-+*/^=])[^\W\d]"
)
_LATEX_FRACTION = re.compile(r"\\[dt]?frac\s?\{\s?(\d{1,40})\s?\}\s?\{\s?(\d{1,40})\s?\}")


def _delatex(text: str) -> str:
    """Number text without LaTeX's money, spacing and fractions."""
    for old, new in (("\\$", "$"), ("{,}", ","), ("\\!", ""), ("\\,", " "), ("\\%", "%")):
        text = text.replace(old, new)
    text = text.strip().removeprefix("\\(").removesuffix("\\)").strip("*").strip()
    if text.startswith("$") and text.endswith("$"):
        text = text.strip("$").strip()
    return _LATEX_FRACTION.sub(r"\1/\2", text).replace("\u2212", "-")


class NumberChecker(Checker):
    """Exact numbers: integers, decimals, simple fractions. Units and currency are dropped."""

    def read(self, text: str) -> str | None:
        text = _delatex(text[: MAX_ANSWER + 1])
        named = _NAMED.match(text)
        found = _PLAIN.match(text, named.end() if named else 0)
        if found is None or _UNIT.match(text, found.end()) is None:
            return None
        return found[0]

    def read_bare(self, text: str) -> str | None:
        bare = text.removesuffix(".")
        return bare if _PLAIN.fullmatch(bare) else None

    def equal(self, answer: str, gold: str) -> bool:
        left, right = self._value(answer), self._value(gold)
        return left is not None and left == right

    def _value(self, text: str) -> Fraction | None:
        number = self.read(text)
        if number is None:
            return None
        try:
            return Fraction(re.sub(r"[\s,$]", "", number))
        except ZeroDivisionError:
            return None


# Parsing evaluates: these would be evaluated until the time limit, to no avail.
_UNBOUNDED = re.compile(
    r"\^\s?\{?\s?-?\d{5}|\d{4}\s?\}?!|!!!|\x00|\d\s?\^\s?\{?\s?\d{2,9}\s?\^"
    r"|\d\s?\^\s?\{?\s?\d\s?\^\s?\{?\s?(?:[4-9]|\d\d|\d\s?\^)"
)
_WORD = re.compile(r"(?<![\\A-Za-z{])[A-Za-z]{3,}")
_FUNCTIONS = frozenset(
    ("sin", "cos", "tan", "cot", "sec", "csc", "log", "exp", "sqrt", "det", "max", "min", "mod")
)
_MATH_MARKS = (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"))


def _brace_depth(text: str) -> int:
    depth = deepest = 0
    for char in text:
        depth += (char in "{([") - (char in "})]")
        deepest = max(deepest, depth)
    return deepest


class MathChecker(Checker):
    """Mathematics as LaTeX or plain text, compared by math-verify."""

    def prepare(self) -> None:
        import math_verify

        # It warns, once, that its own time limits (signals) are off: the pool's is on.
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

    def equal(self, answer: str, gold: str) -> bool:
        left, right = self.read(answer), self.read(gold)
        if left is None or right is None:
            return False
        if re.sub(r"\s", "", left) == re.sub(r"\s", "", right):
            return True
        for text in (left, right):
            if len(text) > MAX_ANSWER or _UNBOUNDED.search(text) or _brace_depth(text) > 40:
                return False
        self.prepare()
        from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

        parsed = []
        for text in (right, left):
            # Its search for plain expressions would pick one number out of prose.
            plain = [] if re.search(r"[A-Za-z_]", text) else [ExprExtractionConfig()]
            configs = [LatexExtractionConfig(), *plain]
            parsed.append(parse(_as_latex(text), configs, parsing_timeout=None))
        return all(parsed) and bool(verify(*parsed, timeout_seconds=None))


def _as_latex(text: str) -> str:
    return text if re.search(r"(?<!\\)\$", text) else f"${text}$"


_QUOTES = " \t\r\n.,;:!?\"'`\u201c\u201d\u2018\u2019\u00ab\u00bb()[]{}*_"
_WRAPPED = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mbox)\s?\{([^{}]{0,500})\}")


class TextChecker(Checker):
    """Words: case, width, spacing, surrounding punctuation and a leading article do not count."""

    def equal(self, answer: str, gold: str) -> bool:
        return _plain_words(answer) == _plain_words(gold)


def _plain_words(text: str) -> str:
    text = _WRAPPED.sub(r"\1", unicodedata.normalize("NFKC", text)).casefold()
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
        found = _LETTER.match(text) or _LETTER_IN_SENTENCE.match(text)
        return next(group for group in found.groups() if group).upper() if found else None

    def read_bare(self, text: str) -> str | None:
        found = _LETTER.match(_stripped_choice(text)) if "\n" not in text else None
        return found[1].upper() if found else None

    def equal(self, answer: str, gold: str) -> bool:
        left = self.read(answer)
        return left is not None and left == self.read(gold)


def _stripped_choice(text: str) -> str:
    return _WRAPPED.sub(r"\1", text[: MAX_ANSWER + 1]).strip(" \t\r\n$*_\"'`\u201c\u201d")


class ReasoningGymChecker(Checker):
    """Tasks of reasoning-gym, scored by the task's own function; a full score is right."""

    def prepare(self) -> None:
        import reasoning_gym  # noqa: F401  # takes seconds

    def read_bare(self, text: str) -> str | None:
        return text or None

    def gold(self, text: str) -> str:
        return text

    def equal(self, answer: str, gold: str) -> bool:
        return answer.strip() == gold.strip()

    def correct(self, answer: str, gold: str, metadata: Mapping[str, Any]) -> bool:
        """Raises ValueError where the metadata names no `source_dataset`, or an unknown one."""
        inner = metadata.get("metadata", metadata)  # a column `metadata`, carried whole
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
_LIBRARIES = {"math": "math_verify", "reasoning-gym": "reasoning_gym"}


class _Foreign(Checker):
    """A user's object that has `extract` and `equal` and is no Checker."""

    def __init__(self, theirs: Any):
        super().__init__()
        self._theirs = theirs
        for name in ("prepare", "correct", "gold"):
            if callable(getattr(theirs, name, None)):
                setattr(self, name, getattr(theirs, name))

    def extract(self, completion: str) -> str | None:
        answer = self._theirs.extract(completion)
        return None if answer is None else str(answer)

    def equal(self, answer: str, gold: str) -> bool:
        return bool(self._theirs.equal(answer, gold))


def make_checker(name: str, formats: Sequence[AnswerFormat] = ANSWER_FORMATS) -> Checker:
    """The checker called `name`, or a user's own by `package.module:Name`. Raises ConfigError
    where there is none, or where it cannot be used."""
    if ":" in name:
        return _own_checker(name, formats)
    if name not in CHECKERS:
        raise ConfigError(
            f"checker {name!r}: unknown; there are {', '.join(sorted(CHECKERS))}, or your own as"
            f" package.module:Name.{did_you_mean(name, CHECKERS)}"
        )
    library = _LIBRARIES.get(name)
    if library is not None and importlib.util.find_spec(library) is None:
        # Not imported here: that takes seconds, and the processes that check import it.
        with requires("checkers", f"checker {name!r}"):
            raise ModuleNotFoundError(f"No module named {library!r}")
    return CHECKERS[name](formats)


def _own_checker(name: str, formats: Sequence[AnswerFormat]) -> Checker:
    module_name, _, attribute = name.partition(":")
    here = str(Path.cwd())
    if "" not in sys.path and here not in sys.path:
        sys.path.append(here)  # console scripts do not look in the working folder
    try:
        factory = getattr(importlib.import_module(module_name), attribute)
        theirs = factory()
    except Exception as error:  # a user's code may raise anything
        raise ConfigError(
            f"checker {name!r}: cannot be made: {type(error).__name__}: {error}"
        ) from error
    missing = [m for m in ("extract", "equal") if not callable(getattr(theirs, m, None))]
    if missing:
        raise ConfigError(
            f"checker {name!r}: {type(theirs).__name__} has no method {' and no '.join(missing)};"
            " subclass mpd_data.checkers.Checker or give both."
        )
    if isinstance(theirs, Checker):
        theirs.formats = tuple(formats)
        return theirs
    return _Foreign(theirs)


def judge(
    checker: Checker,
    answer: str | None,
    gold: str | None,
    metadata: Mapping[str, Any] | None = None,
) -> bool | None:
    """Whether `answer` is right; None where there is no gold answer to say so."""
    if gold is None:
        return None
    return answer is not None and checker.correct(answer, checker.gold(gold), metadata or {})
