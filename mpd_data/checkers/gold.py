"""Look at the gold answers before the first sample: which of them can the checker not read?"""

import dataclasses
from collections.abc import Iterable, Sequence

from mpd_data.checkers.formats import Checker
from mpd_data.common.errors import ConfigError
from mpd_data.common.text import plain
from mpd_data.prompts.rows import Prompt

_SHOWN, _EXCERPT = 3, 60


def read_gold_answers(prompts: Iterable[Prompt], checker: Checker, name: str) -> list[Prompt]:
    """Return the prompts with the answer that the checker `name` reads in each gold answer, and
    `unreadable` set where it cannot. Raise ConfigError where the checker raises."""
    read = []
    for prompt in prompts:
        if prompt.answer is not None:
            try:
                gold = checker.gold(prompt.answer)
                unreadable = not checker.can_read(gold)
            except Exception as error:  # a user's checker may raise anything
                raise ConfigError(
                    f"{prompt.source}: checker {name!r} raised {type(error).__name__}: {error} for"
                    f" the gold answer {_excerpt(prompt.answer)}. A checker must not raise here."
                ) from error
            prompt = dataclasses.replace(prompt, answer=gold, unreadable=unreadable)
        read.append(prompt)
    return read


def unreadable_answers(prompts: Sequence[Prompt], name: str) -> tuple[float, str | None]:
    """Return the share of the gold answers that the checker `name` cannot read, and a sentence with
    count, share and examples; None if it can read all."""
    answered = [prompt for prompt in prompts if prompt.answer is not None]
    bad = [prompt for prompt in answered if prompt.unreadable]
    if not bad:
        return 0.0, None
    share = len(bad) / len(answered)
    examples = [f"{_excerpt(p.answer or '')} ({p.source})" for p in bad[:_SHOWN]]
    return share, (
        f"The checker {name} cannot read {len(bad):,} of {len(answered):,} gold answers"
        f" ({share:.1%}), such as {', '.join(examples)}. Answers to these problems are neither"
        " right nor wrong."
    )


def require_readable(prompts: Sequence[Prompt], name: str, limit: float) -> None:
    """Raise ConfigError if the checker `name` cannot read more than `limit` of the gold answers."""
    share, sentence = unreadable_answers(prompts, name)
    if sentence is not None and share > limit:
        raise ConfigError(
            f"{sentence} More than --max-unreadable-answers {limit:g} are refused: choose another"
            " --checker or --answer-column, mend the cells or leave them empty, or raise the limit."
        )


def _excerpt(text: str) -> str:
    return repr(plain(text if len(text) <= _EXCERPT else f"{text[:_EXCERPT]}..."))
