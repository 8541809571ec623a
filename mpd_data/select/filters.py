"""Decide which rewrites are kept: filters, then a choice among those that pass.

A filter reads only the columns of a distill row, so changed filters can be applied to rewrites that
exist (`mpd-gen rewrite --refilter`).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mpd_data.config import Choice, FilterConfig
from mpd_data.store.schema import UNUSABLE


def status_of(row: Mapping[str, Any], filters: FilterConfig) -> str:
    """Return the status of the first filter that rejects a checked rewrite, or "ok".

    `row` has draft_is_correct, keeps_answer, compression_ratio, pass_rate, draft_overlap,
    repetition and is_correct. A row without a gold answer or an overlap passes the filters that
    need one.
    """
    unwanted = {"any": None, "correct": False, "incorrect": True}[filters.drafts]
    if unwanted is not None and row["draft_is_correct"] is unwanted:
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
    return "ok"


def _limit(easy: float, hard: float | None, pass_rate: float | None) -> float:
    """Return the limit of a length ratio for a problem: `hard` for one that the student never
    solves, `easy` for one that it always solves and where the pass rate is not known."""
    if hard is None or pass_rate is None:
        return easy
    return hard + (easy - hard) * pass_rate


def settle(
    rows: Sequence[dict[str, Any]], filters: FilterConfig, choose: Choice
) -> list[dict[str, Any]]:
    """Set the status of all rewrites of one rollout, given in order of candidate_idx.

    Rows whose status is in UNUSABLE keep it. Rows that pass but are not chosen get "not_chosen".
    With "likeliest" the student chooses later (likeliest.py): until then all rows that pass are
    "not_chosen", except when their texts are all the same; then the first is kept.

    Return the rows that need log-probabilities: those that are kept, or all among which the
    student will choose.
    """
    for row in rows:
        if row["status"] not in UNUSABLE:
            row["status"] = status_of(row, filters)
    passed = [row for row in rows if row["status"] == "ok"]
    if not passed or choose == "all":
        return passed
    # Of equally short rewrites the first is kept.
    if choose == "shortest":
        kept = [min(passed, key=lambda row: row["num_rewritten_tokens"])]
    elif choose == "first" or len({row["rewrite"] for row in passed}) == 1:
        kept = passed[:1]
    else:
        kept = []
    for row in passed:
        if not any(row is one for one in kept):
            row["status"] = "not_chosen"
    return kept or passed
