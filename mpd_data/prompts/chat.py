"""Render prompts with a model's chat template."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from mpd_data.common.errors import ConfigError, DataError
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

    def layout(self, content: str) -> str:
        """Return the prompt's text. Raise PromptError as `render` does."""
        from jinja2 import TemplateError

        self._check(content)
        try:
            text: str = self._tokenizer.apply_chat_template(
                [*self._before, {"role": "user", "content": content}],
                tokenize=False,
                add_generation_prompt=True,
                **self._kwargs,
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise PromptError(f"the chat template failed: {error}") from error
        return text

    def render(self, content: str) -> tuple[str, list[int]]:
        """Return the prompt's text and its token ids, up to where the model's turn begins. Raise
        PromptError if `content` is empty or contains a control token of the model, or if the
        template fails."""
        text = self.layout(content)
        return text, self.spelling.encode(text)
