"""Measure what token sequences repeat: within themselves, and of each other."""

from collections import Counter
from collections.abc import Sequence


def repetition(token_ids: Sequence[int], n: int = 4) -> float:
    """Return the share of n-grams of `token_ids` that occur earlier in it too; 0 for less than n
    tokens."""
    total = len(token_ids) - n + 1
    if total <= 0:
        return 0.0
    grams = set(zip(*(token_ids[i : total + i] for i in range(n)), strict=True))
    return 1.0 - len(grams) / total


def overlap(draft_ids: Sequence[int], token_ids: Sequence[int], n: int = 4) -> float:
    """Return the share of the n-grams of `draft_ids` that `token_ids` repeats, each as often as
    both have it (ROUGE-N's recall); 0 for a draft of less than n tokens."""
    draft, rewrite = (
        Counter(zip(*(ids[i:] for i in range(n)), strict=False)) for ids in (draft_ids, token_ids)
    )
    return (draft & rewrite).total() / max(draft.total(), 1)
