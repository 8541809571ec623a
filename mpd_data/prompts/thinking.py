"""Switch a model's thinking on and off, and count the tokens of a trace's thinking part."""

import re
from collections.abc import Sequence
from typing import Any

from mpd_data.common.errors import ConfigError
from mpd_data.prompts.special import CLOSE, Spelling, after_thinking

SWITCHES = ("enable_thinking", "thinking")


def thinking_switch(template: str) -> str | None:
    """Return the variable with which a chat template turns thinking on and off, if it has one."""
    from jinja2 import Environment, TemplateSyntaxError, meta

    try:
        parsed = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(template)
        variables = meta.find_undeclared_variables(parsed)
    except TemplateSyntaxError:
        # It uses tags of transformers, such as {% generation %}. Look for the bare name in its
        # code, but not in its prose or strings and not as the field of a message.
        code = " ".join(re.findall(r"\{[{%].*?[%}]\}", template, re.DOTALL))
        code = re.sub(r"'[^']*'|\"[^\"]*\"", "''", code)
        variables = set(re.findall(r"(?<![\w.])\w+(?!\w|\s*=[^=])", code))
    return next((name for name in SWITCHES if name in variables), None)


def set_thinking(
    tokenizer: Any, kwargs: dict[str, Any], thinking: str, default: bool
) -> bool | None:
    """Set the switch for thinking of a tokenizer's chat template in `kwargs`, the template's
    variables, and return its value; None where the template has no switch. `thinking` is "on",
    "off" or "auto", which means `kwargs` if they set the switch, otherwise `default`. Raise
    ConfigError where the template cannot take it."""
    name = tokenizer.name_or_path
    try:
        switch = thinking_switch(tokenizer.get_chat_template())
    except ValueError as error:
        raise ConfigError(f"{name}: no chat template to use: {error}") from error
    if switch is None:
        if thinking != "auto":
            raise ConfigError(
                f"{name}: --thinking {thinking}, but its chat template reads neither"
                f" {' nor '.join(SWITCHES)}. Use --thinking auto."
            )
        return None
    if switch not in kwargs:
        kwargs[switch] = default if thinking == "auto" else thinking == "on"
    elif thinking != "auto":
        raise ConfigError(
            f"{name}: {switch} is set by --thinking {thinking} and by the template's settings. Give"
            " only one of them."
        )
    value = kwargs[switch]
    if isinstance(value, bool):
        return value
    raise ConfigError(
        f"{name}: the template's setting {switch} is {value!r}, expected true or false."
    )


class ThinkingCounter:
    """Counts thinking tokens in traces of the model whose `tokenizer` is given."""

    def __init__(self, tokenizer: Any) -> None:
        self._spelling = Spelling(tokenizer)
        found = tokenizer.convert_tokens_to_ids(CLOSE)
        is_token = found is not None and tokenizer.convert_ids_to_tokens(found) == CLOSE
        self._close = found if is_token else None
        self._thinks = is_token or CLOSE in tokenizer.get_chat_template()

    def count(self, prompt: str, trace: str, ids: Sequence[int]) -> int | None:
        """Return how many of a trace's token `ids` (its text is `trace`) belong to its thinking
        part. Of several closing tags the last counts. A trace that ends in its thinking, which the
        `prompt` may have opened, is all thinking. Return None for a trace without tags of a model
        that has none."""
        if after_thinking(prompt, trace) is None:
            return len(ids)
        if CLOSE not in trace:
            return 0 if self._thinks else None
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
        return self._spelling.decode(ids).count(CLOSE)
