"""What is special in a model's token ids: control tokens, the end of a turn, spaces.

All of it is defined here, once, because names mislead. `eos_token` is often not what ends a turn:
Gemma's turns end with <end_of_turn>, Phi-3's with <|end|>. `all_special_ids` lacks most control
tokens. And text that is tokenised alone may begin with a space that nobody wrote: tokenizers of the
Llama 2 kind put one before every text that they are given, and take it away when they decode.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from mpd_data.common.models import ModelFiles, end_tokens

OPEN, CLOSE = "<think>", "</think>"


def opens_thinking(prompt: str) -> bool:
    """Return whether a prompt ends with the opening tag, so that the turn begins as thinking."""
    return prompt.rstrip().endswith(OPEN)


def after_thinking(prompt: str, trace: str) -> str | None:
    """Return what a trace says after its thinking part, all of it if it has none. Return None where
    the thinking is open at its end: begun by the trace, or by the `prompt` before it, and not
    closed."""
    _, closed, after = trace.rpartition(CLOSE)
    is_open = OPEN in after or (not closed and opens_thinking(prompt))
    return None if is_open else after


# So many tokens before a text decide how it is decoded and tokenised.
_CONTEXT = 16
# Spells a byte, though some tokenizers mark it special.
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
# Stand in turns for what people and models write there; no template has these words.
_ASKED, _ANSWERED, _NEXT = "Mpdasked", "Mpdanswered", "Mpdnext"


class Placed(NamedTuple):
    """The tokens of a text in its place. `offsets`: the characters of the text that each holds, as
    (start, end)."""

    ids: list[int]
    offsets: list[tuple[int, int]]


class Spelling:
    """Turns text into a tokenizer's ids and back, and adds or takes away no space."""

    def __init__(self, tokenizer: Any) -> None:
        from tokenizers.decoders import WordPiece

        self._tokenizer = tokenizer
        decoder = tokenizer.backend_tokenizer.decoder
        # Such a tokenizer puts a space between all tokens, and so knows of none in a text.
        self._joins = decoder is None or isinstance(decoder, WordPiece)

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text of its own, such as a prompt; no special tokens are added."""
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def decode(self, ids: Sequence[int], before: Sequence[int] = ()) -> str:
        """Return the text of `ids`, special tokens included, as it stands after the ids `before`.
        Without these, many tokenizers take a space from its beginning."""
        tail = [] if self._joins else list(before[-_CONTEXT:])
        first, both = self._decode(tail), self._decode([*tail, *ids])
        return both[len(first) :] if both.startswith(first) else self._decode(ids)

    def unspelt(self, text: str) -> list[str]:
        """Return the words of a text that no tokens spell, each once."""
        words = dict.fromkeys(text.split())
        return [word for word in words if self.place([], word) is None]

    def place(self, before: Sequence[int], text: str) -> Placed | None:
        """Return the tokens of `text` after the ids `before`, which stay as they are.

        They decode to exactly this text there. Return None where no tokens do, as where the
        tokenizer's normaliser changes the text. The spaces of a tokenizer that joins its tokens
        with spaces are not compared.
        """
        # Most tokenizers need no context. Others take a space for granted where a text begins, or
        # after a special token; behind a line break or a letter they do not.
        for context in ("", self._decode(before[-_CONTEXT:]), "\n", "x"):
            placed = self._after(context, text)
            if placed is not None and self._same(self.decode(placed.ids, before), text):
                return placed
        return None

    def _after(self, context: str, text: str) -> Placed | None:
        """Return the tokens of a text behind `context`; None if a token is a part of both."""
        both = self._tokenizer(
            context + text, add_special_tokens=False, return_offsets_mapping=True
        )
        ids, first, start = both["input_ids"], self.encode(context) if context else [], len(context)
        if ids[: len(first)] != first:
            return None
        offsets = both["offset_mapping"][len(first) :]
        return Placed(ids[len(first) :], [(max(a - start, 0), b - start) for a, b in offsets])

    def _same(self, decoded: str, text: str) -> bool:
        if self._joins:
            return "".join(decoded.split()) == "".join(text.split())
        return decoded == text

    def _decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(
            ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return text


def control_tokens(tokenizer: Any) -> dict[int, str]:
    """Return the ids and texts of all tokens that a model obeys: those that the tokenizer marks
    special or names, and other added tokens in brackets that the chat template lays out turns with,
    as DeepSeek's do. The marks of a thinking part are none, nor are tokens that spell a byte."""
    added = tokenizer.added_tokens_decoder
    tokens = {i: token.content for i, token in added.items() if token.special}
    tokens |= dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
    shown = _layout(tokenizer, _ASKED, _ANSWERED, _NEXT, begin=True)
    if shown is None:
        shown = _layout(tokenizer, _ASKED, begin=True)
    for i in set(Spelling(tokenizer).encode(shown or "")) & added.keys() - tokens.keys():
        word = added[i].content.strip()
        if word not in (OPEN, CLOSE) and word[:1] in tuple("<[{") and word[-1:] in tuple(">]}"):
            tokens[i] = added[i].content
    return {i: text for i, text in tokens.items() if not _BYTE.fullmatch(text)}


@dataclass(frozen=True)
class Turn:
    """How a model's turn begins and ends.

    end_id: the token that ends it
    stop_ids: all tokens at which generation stops
    lead: the spaces that its first word stands after, as Mistral's does; they are no part of what
        the model says
    note: what people must know before they sample, if anything
    """

    end_id: int
    stop_ids: list[int]
    lead: str
    spelling: Spelling = field(repr=False, compare=False)
    control: Mapping[int, str] = field(repr=False, compare=False)
    note: str | None = None

    def record(self) -> dict[str, Any]:
        """Return what shards record of it."""
        return {"end_id": self.end_id, "stop_ids": self.stop_ids, "lead": self.lead}

    def recorded(self, metadata: Mapping[str, Any], chat_template: str) -> "Turn":
        """Return the turn of the student whose shards have this metadata. Older ones have no record
        of it: it is then this one where the chat template is this one's too, by its hash."""
        if (saved := metadata.get("turn")) is not None:
            return replace(self, **saved)
        if metadata["chat_template"] == chat_template:
            return self
        return replace(self, end_id=metadata["eos_token_id"], lead="")

    def read(self, ids: Sequence[int], before: Sequence[int]) -> str:
        """Return what a turn says, without the lead. `ids`: its tokens without its end token;
        `before`: its prompt, or the end of it."""
        return self.spelling.decode(ids, before).removeprefix(self.lead)

    def shown(self, ids: Sequence[int], before: Sequence[int]) -> str:
        """Return what `read` does, without control tokens, which another model would obey."""
        return self.read([i for i in ids if i not in self.control], before)

    def write(
        self, prompt: str, prompt_ids: Sequence[int], trace: str
    ) -> tuple[str, list[int]] | None:
        """Return a trace as it stands after the prompt, and its ids there, end token included.
        Return None where it cannot be spelled, or spells a control token, which would end or
        restart the turn as an id."""
        lead = self.lead
        if opens_thinking(prompt):
            # This chat template opens the thinking in the prompt, so the trace begins after it.
            lead, trace = "", trace.removeprefix(OPEN).lstrip()
        placed = self.spelling.place(prompt_ids, lead + trace)
        if placed is None or not {*self.control, *self.stop_ids}.isdisjoint(placed.ids):
            return None
        return trace, [*placed.ids, self.end_id]


def turn_of(model: ModelFiles, tokenizer: Any, trust_remote_code: bool = False) -> Turn:
    """Return how the turns of `model` begin and end.

    The end is what its chat template writes after an assistant's words: the first token there at
    which engines stop, if need be in the next turn's header (GLM-4). Where they stop at none, it is
    the first control token there, and generation stops at that too.
    """
    stop_ids, control = end_tokens(model, tokenizer, trust_remote_code), control_tokens(tokenizer)
    spelling = Spelling(tokenizer)
    last = _layout(tokenizer, _ASKED, _ANSWERED) or ""
    followed = _layout(tokenizer, _ASKED, _ANSWERED, _NEXT) or ""
    after = spelling.encode(last.partition(_ANSWERED)[2])
    until = spelling.encode(followed.partition(_ANSWERED)[2].partition(_NEXT)[0])
    end = next((i for i in [*after, *until] if i in stop_ids), None)
    written = next((i for i in after if i in control and i != tokenizer.unk_token_id), None)
    note = None
    if end is None and written is not None:
        end, stop_ids = written, [*stop_ids, written]
        note = (
            f"{model.name}: its chat template ends a turn with {control[end]!r}, which its"
            " generation_config.json does not name. Generation stops there here, but not in other"
            f" programs: add {end} to eos_token_id in that file. If the model is a base model, it"
            " may never write this token, and all samples will be truncated: use an"
            " instruction-tuned model."
        )
    elif end is None:
        end = tokenizer.eos_token_id
        note = (
            f"{model.name}: its chat template shows no end of an assistant's turn, so traces end"
            f" with {tokenizer.eos_token!r}. If the model is a base model, it may never write this"
            " token, and all samples will be truncated: use an instruction-tuned model, and a chat"
            " template that ends the assistant's turns."
        )
    if tokenizer.chat_template is None:
        note = None  # it is refused wherever turns matter
    return Turn(end, stop_ids, _lead(tokenizer, spelling, last), spelling, control, note)


def _lead(tokenizer: Any, spelling: Spelling, whole: str) -> str:
    """Return the spaces between a prompt and an assistant's first word in `whole`, both turns as
    the template lays them out, or those that the tokenizer puts there."""
    begun = _layout(tokenizer, _ASKED, begin=True)
    if begun is None or not whole.startswith(begun):
        return ""
    lead = whole[len(begun) :].partition(_ANSWERED)[0]
    if not lead:
        ids, before = spelling.encode(whole), spelling.encode(begun)
        if ids[: len(before)] == before:
            lead = spelling.decode(ids[len(before) :], before).partition(_ANSWERED)[0]
    return "" if lead.strip(" ") else lead


def _layout(tokenizer: Any, *turns: str, begin: bool = False) -> str | None:
    """Return turns, the user's first, as the chat template lays them out; `begin` adds the
    beginning of the assistant's turn. Return None where it cannot."""
    from jinja2 import TemplateError

    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]
    try:
        text: str = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=begin
        )
    except (TemplateError, TypeError, ValueError):
        return None
    return text
