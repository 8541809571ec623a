"""Render prompts with a model's chat template."""

import copy
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, Literal, NamedTuple, Self

from mpd_data.common.errors import ConfigError, DataError
from mpd_data.prompts.messages import Turn
from mpd_data.prompts.special import Spelling, control_tokens
from mpd_data.prompts.thinking import set_thinking


class PromptError(DataError):
    """One prompt cannot be used; the others can."""


class Names(NamedTuple):
    """What messages call the settings that the turns come from."""

    system: str = "--system-prompt"
    examples: str = "--examples"
    prompt: str = "--prompt-template"


OPTIONS = Names()


class ChatFormatter:
    """Turns a user's message into the token ids that a chat model continues.

    `examples` are earlier turns, (user, assistant). `thinking` sets the template's switch for
    thinking to "on" or "off"; "auto" means `template_kwargs` if they set the switch, otherwise
    `default_thinking`. `names` are for messages. Raise ConfigError for settings that the template
    cannot take.
    """

    def __init__(
        self,
        tokenizer: Any,
        template_kwargs: Mapping[str, Any] | None = None,
        thinking: Literal["auto", "on", "off"] = "auto",
        default_thinking: bool = True,
        system_prompt: str | None = None,
        examples: Sequence[tuple[str, str]] = (),
        names: Names = OPTIONS,
    ) -> None:
        self._name = tokenizer.name_or_path
        if tokenizer.chat_template is None:
            raise ConfigError(
                f"{self._name}: its tokenizer has no chat template. Use an instruction-tuned model,"
                " or put a chat_template.jinja into its folder."
            )
        self._tokenizer = tokenizer
        self.spelling = Spelling(tokenizer)
        self._kwargs = dict(template_kwargs or {})
        # Whether the template turns thinking on; None if it has no switch.
        self.thinking = set_thinking(tokenizer, self._kwargs, thinking, default_thinking)
        self._control = control_tokens(tokenizer).values()
        before = [("system", system_prompt)] if system_prompt is not None else []
        for user, assistant in examples:
            before += [("user", user), ("assistant", assistant)]
        self._before = [{"role": role, "content": content} for role, content in before]
        self._check_turns_before(names)

    def at(self, moment: str | None) -> Self:
        """Return a formatter whose template sees `moment` (ISO 8601) as the time that it is, for
        templates that print the date; None: the clock's."""
        fixed = copy.copy(self)
        if moment is not None:
            # A variable hides the function of this name that transformers gives every template.
            now = datetime.fromisoformat(moment).strftime
            fixed._kwargs = {**self._kwargs, "strftime_now": now}
        return fixed

    def _check_turns_before(self, names: Names) -> None:
        """Raise ConfigError for a system prompt or example that would fail with every prompt."""
        if not self._before:
            return
        for turn in self._before:
            option = names.system if turn["role"] == "system" else names.examples
            try:
                self._check(turn["content"])
            except PromptError as error:
                raise ConfigError(f"{option}, {turn['content']!r}: {error}.") from error
        try:
            text = self.layout("1")
        except PromptError as error:
            raise ConfigError(
                f"{self._name}: its chat template fails with {names.system} or"
                f" {names.examples}: {error}. Put instructions into {names.prompt} instead."
            ) from error
        for turn in self._before:
            # Templates may cut thoughts from an assistant's turn, but nothing from the others.
            if turn["role"] != "assistant" and turn["content"].strip() not in text:
                raise ConfigError(
                    f"{self._name}: its chat template leaves out the {turn['role']} message"
                    f" {turn['content']!r}. Put it into {names.prompt} instead."
                )

    def _check(self, content: str) -> None:
        if not content.strip():
            raise PromptError("the prompt is empty")
        for control in self._control:
            if control in content:
                raise PromptError(
                    f"the prompt contains the control token {control!r}, which the model would"
                    " obey; remove it from the text"
                )

    def layout(self, content: str, turns: Sequence[Turn] = ()) -> str:
        """Return the prompt's text. Raise PromptError as `render` does."""
        own = [{"role": role, "content": text} for role, text in turns]
        system = own[:1] if own and own[0]["role"] == "system" else []
        if system and self._before and self._before[0]["role"] == "system":
            raise PromptError("it has a system turn, and --system-prompt gives another: use one")
        for text in (*(turn["content"] for turn in own), content):
            self._check(text)
        try:
            laid_out: str = self._tokenizer.apply_chat_template(
                [*system, *self._before, *own[len(system) :], {"role": "user", "content": content}],
                tokenize=False,
                add_generation_prompt=True,
                **self._kwargs,
            )
        except Exception as error:  # a template is a program, and fails in every way
            raise PromptError(f"the chat template failed: {error}") from error
        for role, text in turns:
            # Templates may cut thoughts from an assistant's turn, but nothing from the others.
            if role != "assistant" and text.strip() not in laid_out:
                raise PromptError(f"the chat template leaves out the {role} turn {text!r}")
        return laid_out

    def render(self, content: str, turns: Sequence[Turn] = ()) -> tuple[str, list[int]]:
        """Return the prompt's text and its token ids, up to where the model's turn begins. `turns`
        come before `content`, a system turn before the examples. Raise PromptError if a turn is
        empty, contains a control token of the model or is left out, or if the template fails."""
        text = self.layout(content, turns)
        return text, self.spelling.encode(text)
