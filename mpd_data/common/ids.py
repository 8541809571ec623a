"""Token ids that a model cannot take."""

from collections.abc import Sequence


def unknown_id(ids: Sequence[int], vocab_size: int, whose: str) -> str | None:
    """Return what is wrong with a sequence that holds a token outside the `vocab_size` embeddings
    of the model, or models, `whose`; None for other sequences."""
    if not len(ids) or (min(ids) >= 0 and max(ids) < vocab_size):
        return None
    strange = next(token for token in ids if not 0 <= token < vocab_size)
    return (
        f"the token id {strange} has no embedding: {whose} has those of 0 to {vocab_size - 1}. Was"
        " a token added to the tokenizer, and not to the model?"
    )
