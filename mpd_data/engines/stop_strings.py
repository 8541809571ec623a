"""Stop strings: where a completion contains one, it ends before it, as if the model had ended its
turn there.

An engine that knows the strings stops early. What a row holds does not depend on when: the ids are
cut here, in one way for all engines, and the end token follows, so that a student which learns from
them learns to stop.
"""

from collections.abc import Sequence

from mpd_data.engines.protocol import Completion, RequestError
from mpd_data.prompts.special import Turn


def ended(
    completion: Completion, before: Sequence[int], stop: Sequence[str], turn: Turn
) -> Completion:
    """Return a completion up to the first of the strings `stop`, with the end token; as it is where
    none is in it. `before`: the ids of its prompt; `turn`: of the model that sampled it.

    Where the string begins within a token, the part before it is tokenised anew. Raise RequestError
    where this tokenizer cannot spell that part, and where the engine stopped for no reason that is
    known here.
    """
    ids = list(completion.token_ids)
    has_end = completion.finish_reason == "stop" and ids[-1:] != [] and ids[-1] in turn.stop_ids
    said = ids[:-1] if has_end else ids
    text = turn.spelling.decode(said, before)
    at = min((place for one in stop if (place := text.find(one)) >= 0), default=None)
    if at is None:
        if completion.finish_reason == "stop" and not has_end:
            raise RequestError(
                f"the engine stopped at the token {ids[-1:]}, which is no end token, and none of"
                f" the stop strings {list(stop)} is in the text"
            )
        return completion
    low, high = 0, len(said)
    while low < high:
        middle = (low + high + 1) // 2
        if len(turn.spelling.decode(said[:middle], before)) <= at:
            low = middle
        else:
            high = middle - 1
    # A character whose bytes are divided between tokens is not text before its last one.
    while not text.startswith(kept := turn.spelling.decode(said[:low], before)):
        low -= 1
    rest: list[int] = []
    if part := text[len(kept) : at]:
        placed = turn.spelling.place([*before, *said[:low]], part)
        if placed is None:
            raise RequestError(
                f"a stop string begins within a token, and the tokenizer cannot spell {part!r}, the"
                " part before it"
            )
        rest = placed.ids
    return Completion(completion.key, [*said[:low], *rest, turn.end_id], "stop")
