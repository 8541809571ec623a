"""Make a student answer at a limit: `--token-budget`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mpd_data.common.errors import ConfigError
from mpd_data.config import RolloutsConfig
from mpd_data.prompts.chat import ChatFormatter
from mpd_data.prompts.special import CLOSE, opens_thinking

# What a student is told at its token budget. Qwen3's makers end its thinking by this sentence.
_ANSWER_NOW = {
    True: (
        "\n\nConsidering the limited time by the user, I have to give the solution based on the"
        f" thinking directly now.\n{CLOSE}\n\n"
    ),
    False: "\n\nThe final answer is \\boxed{",
}


@dataclass(frozen=True)
class Budget:
    """A limit at which the student must answer. `tokens`: the limit; `ids`: what is put there;
    `thinks`: whether it ends a thinking part, and is left out where that has ended."""

    tokens: int
    ids: list[int]
    thinks: bool

    def continuation(self, said: Sequence[int], text: str) -> list[int]:
        """Return the ids from which a sample goes on that used up the budget: what it has `said`
        (its text is `text`), and what makes it answer unless it answers already."""
        return list(said) if self.thinks and CLOSE in text else [*said, *self.ids]


def budget_of(config: RolloutsConfig, tokenizer: Any, formatter: ChatFormatter) -> Budget | None:
    """Return the budget that `config` sets. Raise ConfigError where it leaves no room."""
    if config.token_budget is None:
        return None
    thinks = bool(formatter.thinking) or opens_thinking(formatter.layout("1"))
    text = _ANSWER_NOW[thinks] if config.budget_text is None else config.budget_text
    # What the student has said, any text, stands before it.
    placed = formatter.spelling.place(formatter.spelling.encode("1"), text)
    ids = [] if placed is None else placed.ids
    if placed is None or tokenizer.unk_token_id in ids:
        raise ConfigError(
            f"--budget-text {text!r}: the tokenizer cannot spell it. Give one that asks for the"
            " answer in words that the model knows."
        )
    room = config.sampling.max_tokens
    if config.token_budget + len(ids) >= room:
        raise ConfigError(
            f"--token-budget {config.token_budget} and the {len(ids)} tokens of --budget-text leave"
            f" no room for an answer within --max-tokens {room}."
        )
    return Budget(config.token_budget, ids, thinks)
