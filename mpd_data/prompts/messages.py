"""Prompts that are conversations: the turns of a cell as chat data sets have them.

OpenAI's shape is [{"role": "user", "content": "…"}, …], where a content may be a list of parts;
ShareGPT's is [{"from": "human", "value": "…"}, …].
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Turn = tuple[str, str]  # role ("system", "user", "assistant"), text

_ROLES = {
    "system": "system", "developer": "system", "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "model": "assistant", "bot": "assistant",
    "chatgpt": "assistant", "bing": "assistant", "bard": "assistant",
}  # fmt: skip
_NAMES = {"user": "User", "assistant": "Assistant"}


@dataclass(frozen=True)
class Conversation:
    """The turns up to the one that the model answers. `earlier`: all before the last, a system turn
    first if there is one; `last`: the text of the user's last turn; `cut`: whether answers to it
    were left out."""

    earlier: tuple[Turn, ...]
    last: str
    cut: bool

    @property
    def text(self) -> str:
        """The problem: the user's text, or all turns but the system's, with their speakers, where
        there are several."""
        turns = [*(turn for turn in self.earlier if turn[0] != "system"), ("user", self.last)]
        if len(turns) == 1:
            return self.last
        return "\n\n".join(f"{_NAMES[role]}: {text}" for role, text in turns)


def is_conversation(value: Any) -> bool:
    """Return whether a cell holds turns: a list with an object in it."""
    return isinstance(value, list | tuple) and any(isinstance(turn, Mapping) for turn in value)


def read_conversation(value: Sequence[Any]) -> Conversation:
    """Return the conversation of a cell; system turns without text are left out. Raise ValueError
    that says which turn cannot be used and why."""
    turns: list[Turn] = []
    for number, turn in enumerate(value, start=1):
        try:
            role, text = _read_turn(turn)
        except ValueError as error:
            raise ValueError(f"turn {number} {error}") from error
        if role == "system" and turns:
            raise ValueError(f"turn {number} is the system's, expected it first")
        if role != "system" or text.strip():
            turns.append((role, text))
    end = len(turns)
    while end and turns[end - 1][0] == "assistant":
        end -= 1
    if not end or turns[end - 1][0] != "user":
        raise ValueError("no turn is the user's, expected a last one to answer")
    return Conversation(tuple(turns[: end - 1]), turns[end - 1][1], cut=end < len(turns))


def _read_turn(turn: Any) -> Turn:
    if not isinstance(turn, Mapping):
        raise ValueError(f"is {type(turn).__name__}, expected an object with role and content")
    # A table gives every turn all keys that any has.
    name = turn.get("role") if turn.get("role") is not None else turn.get("from")
    content = turn.get("content") if turn.get("content") is not None else turn.get("value")
    role = _ROLES.get(name.lower()) if isinstance(name, str) else None
    if role is None:
        raise ValueError(f"has the role {name!r}, expected system, user or assistant")
    if turn.get("tool_calls") or turn.get("function_call"):
        raise ValueError("calls a tool, which cannot be laid out here")
    if isinstance(content, list | tuple):
        content = "\n".join(map(_read_part, content))
    if not isinstance(content, str):
        kind = "nothing" if content is None else type(content).__name__
        raise ValueError(f"holds {kind}, expected text")
    return role, content


def _read_part(part: Any) -> str:
    text = part.get("text") if isinstance(part, Mapping) else part
    if not isinstance(text, str):
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        raise ValueError(f"has a part of the type {kind!r}, expected text alone")
    return text
