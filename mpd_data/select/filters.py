"""Which rewrites are kept: one named rule after another, and the choice among those that pass.

A rule looks at nothing but a distill row's own columns, so that changed rules can be applied to
rewrites that are there (`mpd-gen rewrite --refilter`).
"""

from collections.abc import Mapping, Sequence
from typing import Any

from mpd_data.config import Choice, FilterConfig
from mpd_data.store.schema import UNUSABLE


def status_of(row: Mapping[str, Any], filters: FilterConfig) -> str:
    """The first rule that rejects a checked rewrite, or "ok".

    Reads draft_is_correct, keeps_answer, compression_ratio, repetition and is_correct. A row
    without a gold answer passes the rules that need one.
    """
    unwanted = {"any": None, "correct": False, "incorrect": True}[filters.drafts]
    if unwanted is not None and row["draft_is_correct"] is unwanted:
        return "draft_rejected"
    # A draft without an answer has none that could be kept.
    if filters.keep_answer and not row["keeps_answer"]:
        return "answer_changed"
    if row["compression_ratio"] > filters.max_ratio:
        return "longer"
    if row["compression_ratio"] < filters.min_ratio:
        return "too_short"
    if row["repetition"] > filters.max_repetition:
        return "repetitive"
    if filters.require_correct and row["is_correct"] is False:
        return "incorrect"
    return "ok"


def settle(
    rows: Sequence[dict[str, Any]], filters: FilterConfig, choose: Choice
) -> list[dict[str, Any]]:
    """Sets `status` of all rewrites of one rollout, in order of candidate_idx; rows whose status
    is in UNUSABLE keep it. Of those that pass, the ones not chosen are "not_chosen".

    Returns the rows that need log-probabilities: what is kept. "likeliest" is for the student to
    decide (likeliest.py): until then all that pass are "not_chosen", and all are returned,
    unless they are one and the same text.
    """
    for row in rows:
        if row["status"] not in UNUSABLE:
            row["status"] = status_of(row, filters)
    passed = [row for row in rows if row["status"] == "ok"]
    if not passed or choose == "all":
        return passed
    # Ties go to the first.
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
