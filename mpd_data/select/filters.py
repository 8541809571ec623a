"""Decide which rewrites are kept: filters, then a choice among those that pass.

A filter reads only the columns of a distill row, so changed filters can be applied to rewrites that
exist (`mpd-gen rewrite --refilter`).
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mpd_data.config import Choice, FilterConfig
from mpd_data.store.schema import UNUSABLE


def status_of(row: Mapping[str, Any], filters: FilterConfig) -> str:
    """Return the status of the first filter that rejects a checked rewrite, or "ok".

    `row` has draft_is_correct, keeps_answer, compression_ratio, pass_rate, draft_overlap,
    repetition, is_correct, answer_support and weakest_step. A row without a gold answer, a pass
    rate, an overlap or a measure passes the filters that need one.
    """
    if not wants_draft(row["draft_is_correct"], filters):
        return "draft_rejected"
    # None: the draft has no answer to keep.
    corrected = filters.corrections and row["is_correct"]
    if filters.keep_answer and not row["keeps_answer"] and not corrected:
        return "answer_changed"
    # In the precision of the stored ratio: 6 of 10 tokens are not more than 0.6, then as now.
    ratio, pass_rate = np.float32(row["compression_ratio"]), row["pass_rate"]
    if ratio > np.float32(_limit(filters.max_ratio, filters.max_ratio_hard, pass_rate)):
        return "longer"
    if ratio < np.float32(_limit(filters.min_ratio, filters.min_ratio_hard, pass_rate)):
        return "too_short"
    if filters.max_overlap is not None and (row["draft_overlap"] or 0) > filters.max_overlap:
        return "copied"
    if row["repetition"] > filters.max_repetition:
        return "repetitive"
    if filters.require_correct and row["is_correct"] is False:
        return "incorrect"
    for name, least in (
        ("answer_support", filters.min_support),
        ("weakest_step", filters.min_step),
    ):
        if least is not None and row[name] is not None and row[name] < least:
            return "unsupported"
    return "ok"


def wants_draft(is_correct: bool | None, filters: FilterConfig) -> bool:
    """Return whether rewrites of such a draft may be kept. None: it has no gold answer."""
    unwanted = {"any": None, "correct": False, "incorrect": True}[filters.drafts]
    return is_correct is None or is_correct is not unwanted


def _limit(easy: float, hard: float | None, pass_rate: float | None) -> float:
    """Return the limit of a length ratio for a problem: `hard` for one that the student never
    solves, `easy` for one that it always solves and where the pass rate is not known."""
    if hard is None or pass_rate is None:
        return easy
    return hard + (easy - hard) * pass_rate


def choose_among(
    passed: Sequence[dict[str, Any]], choose: Choice, means: Mapping[str, float]
) -> list[dict[str, Any]]:
    """Return those of a rollout's rewrites that are kept among those that passed; the others get
    the status "not_chosen". Of equally good ones the first is kept.

    means: the student's mean log-probability per token, by row_id, for "likeliest".
    """
    if not passed or choose == "all":
        return list(passed)
    if choose == "shortest":
        kept = min(passed, key=lambda row: row["num_rewritten_tokens"])
    elif choose == "first":
        kept = passed[0]
    elif choose == "support":
        kept = max(passed, key=_support)
    else:
        kept = max(passed, key=lambda row: means.get(row["row_id"], -math.inf))
    for row in passed:
        if row is not kept:
            row["status"] = "not_chosen"
    return [kept]


def _support(row: Mapping[str, Any]) -> tuple[int, float]:
    """Return what is larger for the rewrite that carries its answer better: the sum of both
    measures. What was measured by fewer comes after what was measured by more."""
    measures = [row[name] for name in ("answer_support", "weakest_step") if row[name] is not None]
    return len(measures), sum(measures)


def settle(
    rows: Sequence[dict[str, Any]], filters: FilterConfig, choose: Choice, measures: bool = False
) -> list[dict[str, Any]]:
    """Set the status of all rewrites of one rollout, given in order of candidate_idx.

    Rows whose status is in UNUSABLE keep it, and so do those that the teacher was not asked about.
    Rows that pass but are not chosen get "not_chosen". If the student measures them, or with
    "likeliest" chooses (student.py), it has the last word: until then all rows that pass are
    "not_chosen", except that of equal texts the student need not choose.

    Return the rows that need log-probabilities: those that are kept, or all that wait for the
    student.
    """
    for row in rows:
        unasked = row["status"] == "draft_rejected" and row["num_rewritten_tokens"] is None
        if row["status"] not in UNUSABLE and not unasked:
            row["status"] = status_of(row, filters)
    passed = [row for row in rows if row["status"] == "ok"]
    if measures or (choose == "likeliest" and len({row["rewrite"] for row in passed}) > 1):
        for row in passed:
            row["status"] = "not_chosen"
        return passed
    return choose_among(passed, choose, {})
