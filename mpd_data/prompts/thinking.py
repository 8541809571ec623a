"""Count the tokens of a trace's thinking part: up to and including its closing tag."""

from collections.abc import Sequence
from typing import Any

OPEN, CLOSE = "<think>", "</think>"


class ThinkingCounter:
    """Counts thinking tokens in traces of the model whose `tokenizer` is given."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        found = tokenizer.convert_tokens_to_ids(CLOSE)
        is_token = found is not None and tokenizer.convert_ids_to_tokens(found) == CLOSE
        self._close = found if is_token else None
        self._thinks = is_token or CLOSE in tokenizer.get_chat_template()

    def count(self, prompt: str, trace: str, ids: Sequence[int]) -> int | None:
        """Return how many of a trace's token `ids` (its text is `trace`) belong to its thinking
        part. Of several closing tags the last counts. All of a trace that opens its thinking, or
        whose `prompt` ends with the opening tag, and never closes it is thinking. Return None for
        a trace without tags of a model that has none."""
        if CLOSE not in trace:
            is_open = OPEN in trace or prompt.rstrip().endswith(OPEN)
            return len(ids) if is_open else 0 if self._thinks else None
        places = [at for at, token in enumerate(ids, start=1) if token == self._close]
        if len(places) == trace.count(CLOSE):
            return places[-1]
        # The tag is spelled by several tokens, the last of which may also begin the answer. The
        # number of tags in a text grows with its tokens, so bisection finds where the last ends.
        tags = self._tags(ids)
        low, high = 0, len(ids)
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self._tags(ids[:middle]) == tags else (middle + 1, high)
        return low

    def _tags(self, ids: Sequence[int]) -> int:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=False)
        return text.count(CLOSE)
