"""Find the final answer in a solution, and the base class of checkers."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from mpd_data.config import ANSWER_FORMATS, AnswerFormat

# Nothing longer is taken for a marked answer: nested marks would make each other's text count.
MAX_ANSWER = 2000


def final_part(completion: str) -> str | None:
    """What follows the reasoning: the text after the last </think>. All of the text where it
    has no thinking tags; None where thinking was opened and never closed."""
    _, closed, after = completion.rpartition("</think>")
    if closed:
        return after
    return None if "<think>" in completion else completion


# Escaped braces and backslashes are matched so that they are passed over.
_BRACES = re.compile(r"\\boxed\s{0,4}\{|\\boxed\s{1,4}(\w{1,40})|\\[\\{}]|[{}]")
_TAGS = re.compile(r"<(/?)answer>", re.IGNORECASE)
_PHRASE = re.compile(
    r"\banswer[*_]{0,3}(?:\s{1,4}is\b\s{0,4}:?|\s{0,4}:|(?=\s{1,4}[-+]?\$?\d))[*_]{0,3}\s{0,4}",
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
            start = open_braces.pop() if open_braces else None
            if start is not None:
                spans.append((start, match.start()))
        elif token == "{":
            open_braces.append(None)
        elif token.endswith("{") and len(token) > 2:
            open_braces.append(match.end())
    yield from (text[a:b] for a, b in sorted(spans, reverse=True) if b - a <= MAX_ANSWER)


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
        end = _SENTENCE_END.search(line)
        answer = line[: end.start()] if end else line
        if len(answer) <= MAX_ANSWER:
            yield answer.strip().strip("*_")


_MARKED: dict[AnswerFormat, Callable[[str], Iterator[str]]] = {
    "boxed": _boxed,
    "hashes": _hashes,
    "tag": _tag,
    "phrase": _phrase,
}


class Checker:
    """Reads and compares answers. A checker of your own gives at least `equal`; `read` says what
    it takes for an answer. Reading never raises; comparing may (the check then has failed)."""

    def __init__(self, formats: Sequence[AnswerFormat] = ANSWER_FORMATS):
        self.formats = tuple(formats)

    def prepare(self) -> None:
        """Imports what comparing needs: called once, before any time limit runs."""

    def read(self, text: str) -> str | None:
        """The answer in `text`, which stood in a marked place; None if that is no answer."""
        return text.strip() or None

    def read_bare(self, text: str) -> str | None:
        """The answer where `text`, a whole final part, is nothing but an answer."""
        return self.read(text) if len(text) <= 200 and "\n" not in text else None

    def extract(self, completion: str) -> str | None:
        """The final answer: the last that `read` takes, of the first declared format (in the
        order of ANSWER_FORMATS) that has one; None where none has."""
        final = final_part(completion)
        if final is None:
            return None
        marked = [name for name in ANSWER_FORMATS if name in self.formats and name in _MARKED]
        answer = self._marked(final, marked)
        if answer is None and "bare" in self.formats:
            answer = self.read_bare(final.strip())
        return answer

    def _marked(self, text: str, formats: Sequence[AnswerFormat]) -> str | None:
        for name in formats:
            for found in _MARKED[name](text):
                answer = self.read(found)
                if answer is not None:
                    return answer
        return None

    def equal(self, answer: str, gold: str) -> bool:
        """Whether two answers mean the same."""
        raise NotImplementedError(f"{type(self).__name__} has no `equal`")

    def correct(self, answer: str, gold: str, metadata: Mapping[str, Any]) -> bool:
        """Whether `answer` is right. `metadata`: the prompt's carried columns."""
        return self.equal(answer, gold)

    def gold(self, text: str) -> str:
        r"""What a gold column's cell means: the answer marked in a solution (`\boxed{}`, `####`,
        `<answer>`), else the text itself."""
        answer = self._marked(text, ("boxed", "hashes", "tag"))
        return text if answer is None else answer
