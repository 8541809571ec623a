"""Traces to read: drafts with their rewrites, problems before and after, and the worst of a run.

Rows are chosen by light columns and by their keys. Keys are hashes, so a choice is fair and always
the same. Text is read for the chosen rows only.
"""

import difflib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import polars as pl

from mpd_data.inspect.stats import collect, scan_round
from mpd_data.inspect.traces import kept_pairs

REWRITES = 2  # of each round
PAIRS = 3  # problems before and after
WORST = 3  # of each kind

# Words of a trace that are compared and shown at most; fewer of the worst traces.
MOST_WORDS = 1_200
EXCERPT_WORDS = 160

Kind = Literal["same", "removed", "added"]
# The unit of a comparison: a word or a sign, with the space after it.
_WORD = re.compile(r"(?:\w+|[^\w\s])\s*|\s+")
# A shorter common run between two changes is chance; one change is easier to read.
_SHORTEST_COMMON = 2


@dataclass(frozen=True)
class Part:
    text: str
    kind: Kind = "same"


@dataclass(frozen=True)
class Trace:
    """A text in parts; `facts` are shown next to its title."""

    title: str
    facts: list[str]
    parts: list[Part]
    is_correct: bool | None = None


@dataclass(frozen=True)
class Example:
    """One or two traces of one problem."""

    problem: str
    gold: str | None
    traces: list[Trace]


def word_diff(draft: str, rewrite: str) -> tuple[list[Part], list[Part]]:
    """Return both texts in parts: what was removed from the draft, what the rewrite added."""
    left, right = _WORD.findall(draft), _WORD.findall(rewrite)
    matcher = difflib.SequenceMatcher(
        None, [word.strip() for word in left], [word.strip() for word in right], autojunk=False
    )
    before: list[Part] = []
    after: list[Part] = []
    codes = matcher.get_opcodes()
    for index, (tag, i, j, k, m) in enumerate(codes):
        inside = 0 < index < len(codes) - 1
        same = tag == "equal" and not (inside and j - i < _SHORTEST_COMMON)
        _extend(before, "".join(left[i:j]), "same" if same else "removed")
        _extend(after, "".join(right[k:m]), "same" if same else "added")
    return before, after


def _extend(parts: list[Part], text: str, kind: Kind) -> None:
    if not text:
        return
    if parts and parts[-1].kind == kind:
        parts[-1] = Part(parts[-1].text + text, kind)
    else:
        parts.append(Part(text, kind))


def shortened(text: str, most: int) -> str:
    """Return about `most` words of a text at most, two fifths of them from its end."""
    words = _WORD.findall(text)
    if len(words) <= most:
        return text
    tail = most * 2 // 5
    left_out = len(words) - most
    head, end = "".join(words[: most - tail]).rstrip(), "".join(words[-tail:])
    return f"{head}\n[… {left_out:,} words left out …]\n{end}"


def kept_rewrites(folder: Path) -> list[Example]:
    """Return the first `kept_pairs` of a round."""
    pairs = []
    for row in kept_pairs(folder, REWRITES).to_dicts():
        before, after = word_diff(
            shortened(row["completion"], MOST_WORDS), shortened(row["rewrite"], MOST_WORDS)
        )
        tokens = row["num_completion_tokens"]
        saved = 1 - row["num_rewritten_tokens"] / tokens
        facts = [f"{row['num_rewritten_tokens']:,} tokens", f"{100 * saved:.0f}% fewer"]
        traces = [
            Trace("draft", [f"{tokens:,} tokens"], before, row["is_correct"]),
            Trace("kept rewrite", facts, after, row["rewrite_is_correct"]),
        ]
        pairs.append(Example(row["problem"], row["gold_answer"], traces))
    return pairs


_TEXT = ("row_id", "prompt_id", "sample_idx", "problem", "completion", "gold_answer")
_LIGHT = ("num_completion_tokens", "is_correct", "finish_reason", "repetition")


def _texts(rollouts: pl.LazyFrame, by: str, values: pl.Series) -> pl.DataFrame:
    """Return the rows with one of `values` in the column `by`, with their text, sorted by key."""
    rows = rollouts.filter(pl.col(by).is_in(values.unique().implode()))
    return collect(rows.select(*_TEXT, *_LIGHT)).sort("row_id")


def before_and_after(base: Path, last: Path, name: str) -> list[Example]:
    """Return the first samples of the base and of the newest model, called `name`, for the held-out
    problems with the base's smallest keys."""
    firsts = [scan_round(folder).filter(pl.col("sample_idx") == 0) for folder in (base, last)]
    prompts = collect(firsts[0].select("row_id", "prompt_id").bottom_k(PAIRS, by="row_id")).sort(
        "row_id"
    )["prompt_id"]
    left, right = (_by_prompt(frame, prompts) for frame in firsts)
    both = [prompt for prompt in prompts if prompt in left and prompt in right]
    return [_pair(left[prompt], right[prompt], name, MOST_WORDS) for prompt in both]


def _by_prompt(rollouts: pl.LazyFrame, prompts: pl.Series) -> dict[str, dict[str, Any]]:
    """Return the row with the smallest key of each of these prompts, with its text."""
    rows = _texts(rollouts, "prompt_id", prompts).unique("prompt_id", keep="first")
    return {row["prompt_id"]: row for row in rows.to_dicts()}


def _pair(base: dict[str, Any], last: dict[str, Any], name: str, most: int) -> Example:
    traces = [_whole("base", base, most), _whole(name, last, most)]
    return Example(base["problem"], base["gold_answer"], traces)


def _whole(title: str, row: dict[str, Any], most: int) -> Trace:
    facts = [f"{row['num_completion_tokens']:,} tokens"]
    if row["finish_reason"] == "length":
        facts.append("cut off at the limit")
    if row["repetition"] >= 0.005:
        facts.append(f"{100 * row['repetition']:.0f}% of 4-grams repeated")
    text = shortened(row["completion"], most)
    return Trace(title, facts, [Part(text)], row["is_correct"])


@dataclass(frozen=True)
class Lost:
    """Answers lost and won between the base and the last round. A problem is lost if a smaller
    share of its samples is right; `examples` are those with the largest loss."""

    problems: int
    lost: int
    won: int
    examples: list[Example]


def answers_lost(base: Path, last: Path, name: str) -> Lost | None:
    """Compare the answers. Return None if no problem has a gold answer on both sides."""
    frames = [scan_round(folder) for folder in (base, last)]
    sides = [
        collect(frame.group_by("prompt_id").agg(accuracy=pl.col("is_correct").mean()))
        for frame in frames
    ]
    both = sides[0].join(sides[1], on="prompt_id", suffix="_last").drop_nulls()
    if both.is_empty():
        return None
    falls = both.select("prompt_id", fall=pl.col("accuracy") - pl.col("accuracy_last"))
    worst = (
        falls.filter(pl.col("fall") > 0)
        # The id decides between equals, so that the choice is always the same.
        .sort("fall", "prompt_id", descending=[True, False])
        .head(WORST)["prompt_id"]
    )
    left, right = (
        _by_prompt(frame.filter(pl.col("is_correct") == wanted), worst)
        for frame, wanted in zip(frames, (True, False), strict=True)
    )
    examples = [_pair(left[prompt], right[prompt], name, EXCERPT_WORDS) for prompt in worst]
    lost, won = ((falls["fall"] * sign > 0).sum() for sign in (1, -1))
    return Lost(both.height, int(lost), int(won), examples)


def most(
    folder: Path, column: Literal["num_completion_tokens", "repetition"], name: str
) -> list[Example]:
    """Return the rollouts with the largest values of a column, the largest first."""
    rollouts = scan_round(folder)
    order = [column, "row_id"]  # the key decides between equals
    chosen = collect(rollouts.select(order).top_k(WORST, by=order))
    rows = _texts(rollouts, "row_id", chosen["row_id"]).sort(order, descending=True)
    return [
        Example(row["problem"], row["gold_answer"], [_whole(name, row, EXCERPT_WORDS)])
        for row in rows.to_dicts()
    ]
