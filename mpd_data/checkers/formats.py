"""The formats in which a solution marks its final answer, and the base class of checkers."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from mpd_data.checkers.numbers import unmarked
from mpd_data.config import ANSWER_FORMATS, AnswerFormat
from mpd_data.prompts.special import after_thinking

# The longest marked answer, in characters: it keeps the cost of nested marks linear.
MAX_ANSWER = 2000

# Escaped braces and backslashes are matched so that they can be skipped.
_BRACES = re.compile(r"\\(?:boxed|fbox)\s{0,4}\{|\\boxed\s{1,4}(\w{1,40})|\\[\\{}]|[{}]")
# Between the boxes of one answer: `\boxed{3}$ and $y = \boxed{5}`.
_JOINED = re.compile(
    r"[}$*\s]{0,9}(?:\\[)\]]\s?)?(?:[,;]|(?:[,;]\s?)?(?:(?:and|or)\b|&|\\text\s?\{\s?(?:and|or)\s?\}))"
    r"[$*\s]{0,9}(?:\\[(\[]\s?)?(?:[A-Za-z](?:_\{?\w\}?)?\s?=\s?)?\\(?:boxed|fbox)\s{0,4}\{?"
)
_TAGS = re.compile(r"<(/?)answer>", re.IGNORECASE)
_PHRASE = re.compile(
    r"\banswer[*_]{0,3}(?:\s{1,4}is\b(?:\s{0,4}:)?|\s{0,4}:|(?=\s{1,4}[-+]?\$?\d))[*_]{0,3}\s{0,4}",
    re.IGNORECASE,
)
_SENTENCE_END = re.compile(r"[.?](?=[\s*]|$)")


def _boxed(text: str) -> Iterator[str]:
    open_braces: list[int | None] = []  # where a box's content starts, None for other braces
    spans = []
    for match in _BRACES.finditer(text):
        token = match[0]
        if match[1] is not None:
            spans.append(match.span(1))
        elif token == "}":
            opened = open_braces.pop() if open_braces else None
            if opened is not None:
                spans.append((opened, match.start()))
        elif token == "{":
            open_braces.append(None)
        elif token.endswith("{") and len(token) > 2:
            open_braces.append(match.end())
    answers: list[list[str]] = []
    end = 0
    for start, stop in sorted(spans):
        part = text[start:stop] if stop - start <= MAX_ANSWER else ""
        if not answers or start - end > 60 or not _JOINED.fullmatch(text, end, start):
            answers.append([part])
        elif part not in answers[-1]:
            answers[-1].append(part)
        end = stop
    for parts in reversed(answers):
        answer = ", ".join(filter(None, parts))
        if answer and len(answer) <= MAX_ANSWER:
            yield answer


def _hashes(text: str) -> Iterator[str]:
    for line in reversed(text.splitlines()):
        _, mark, answer = line.rpartition("####")
        if mark and len(answer) <= MAX_ANSWER:
            yield answer


def _tag(text: str) -> Iterator[str]:
    spans = []
    start = None
    for match in _TAGS.finditer(text):
        if not match[1]:
            start = match.end()
        elif start is not None:
            spans.append((start, match.start()))
            start = None
    yield from (text[a:b] for a, b in reversed(spans) if b - a <= MAX_ANSWER)


def _phrase(text: str) -> Iterator[str]:
    for start in reversed([match.end() for match in _PHRASE.finditer(text)]):
        line = text[start : start + MAX_ANSWER + 1].partition("\n")[0]
        answer = _SENTENCE_END.split(line, maxsplit=1)[0]
        if len(answer) <= MAX_ANSWER:
            yield unmarked(answer).strip().strip("*_")


_MARKED: dict[AnswerFormat, Callable[[str], Iterator[str]]] = {
    "boxed": _boxed, "hashes": _hashes, "tag": _tag, "phrase": _phrase,
}  # fmt: skip


class Checker:
    """Extracts answers from completions and compares them. A subclass defines at least `equal`. It
    may define `read`, which accepts or refuses a text as an answer. Extracting must not raise; if
    comparing raises, the check counts as failed."""

    def __init__(self, formats: Sequence[AnswerFormat] = ANSWER_FORMATS):
        self.formats = tuple(formats)

    def prepare(self) -> None:
        """Import what comparing needs. Called once, before any time limit starts."""

    def read(self, text: str) -> str | None:
        """Return the answer in `text`, which was marked as one; None if it is not an answer."""
        return text.strip() or None

    def read_bare(self, text: str) -> str | None:
        """Return the answer if `text`, a whole final part, is nothing but an answer."""
        return self.read(text) if len(text) <= 200 and "\n" not in text else None

    def extract(self, completion: str) -> str | None:
        """Return the completion's final answer; None if no declared format has one.

        The formats are tried in the order of ANSWER_FORMATS. Of the first that has an answer, the
        last text that `read` accepts is taken. None is a failure of format, which the stages count
        apart from a wrong answer.
        """
        final = after_thinking("", completion)
        if final is None:
            return None
        marked = [name for name in ANSWER_FORMATS if name in self.formats and name in _MARKED]
        answer = self._marked(final, marked)
        if answer is None and "bare" in self.formats:
            answer = self.read_bare(final.strip())
        return answer

    def _marked(self, text: str, formats: Sequence[AnswerFormat]) -> str | None:
        for name in formats:
            for marked in _MARKED[name](text):
                answer = self.read(marked)
                if answer is not None:
                    return answer
        return None

    def equal(self, answer: str, gold: str) -> bool:
        """Return whether two answers mean the same."""
        raise NotImplementedError(f"{type(self).__name__} has no `equal`")

    def correct(self, answer: str, gold: str, metadata: Mapping[str, Any]) -> bool:
        """Return whether `answer` is correct. `metadata` holds the prompt's carried columns."""
        return self.equal(answer, gold)

    def gold(self, text: str) -> str:
        r"""Return the gold answer of a cell: what a solution marks (`\boxed{}`, `####`,
        `<answer>`), otherwise the text itself."""
        answer = self._marked(text, ("boxed", "hashes", "tag"))
        return text if answer is None else answer

    def can_read(self, gold: str) -> bool:
        """Return whether an answer can be `correct` by this gold answer, as `gold` returns it. It
        is asked before the first sample is taken. Answers to a problem whose gold answer cannot be
        read are neither right nor wrong."""
        return True
