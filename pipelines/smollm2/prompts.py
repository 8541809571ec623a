"""Write word problems that a model of 135 million weights can sometimes solve.

    python -m pipelines.smollm2.prompts --out data/smollm2

The problems take one or two steps with small numbers. They are in the style of GSM8K, but none is
copied. `train` and `test` share the eight kinds of problem and nothing else: no person and no
(kind, numbers) is in both. The same sizes give the same files.
"""

import itertools
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from mpd_data.common.files import atomic_file

_NAMES = {
    "train": ("Anna", "Omar", "Ben", "Lena", "Ravi", "Sofia", "Tom", "Maria"),
    "test": ("Clara", "Hugo", "Nina", "Oscar", "Paula", "Leo"),
}
_THINGS = ("apples", "books", "pencils", "marbles", "stickers", "cookies", "oranges", "coins")

# Text and answer of a problem with the numbers a, b and c.
_KINDS: dict[str, tuple[str, Callable[[int, int, int], int]]] = {
    "buys": (
        "{who} has {a} {what}. {who} buys {b} more. How many {what} does {who} have now?",
        lambda a, b, c: a + b,
    ),
    "gives": (
        "{who} has {a_and_b} {what}. {who} gives {b} of them to a friend."
        " How many {what} does {who} have left?",
        lambda a, b, c: a,
    ),
    "boxes": (
        "{who} has {c} boxes. Each box {who} has holds {b} {what}."
        " How many {what} does {who} have?",
        lambda a, b, c: c * b,
    ),
    "shares": (
        "{who} has {c_times_b} {what}. {who} shares them out among {c} bags."
        " How many {what} does {who} put into each bag?",
        lambda a, b, c: b,
    ),
    "buys and gives": (
        "{who} has {a} {what}. {who} buys {b_and_c} more. Then {who} gives {c} to a friend."
        " How many {what} does {who} have left?",
        lambda a, b, c: a + b,
    ),
    "boxes and more": (
        "{who} has {c} boxes. Each box {who} has holds {b} {what}. {who} finds {a} more."
        " How many {what} does {who} have in all?",
        lambda a, b, c: c * b + a,
    ),
    "money": (
        "{who} buys {b} {what}. {who} pays {c} dollars for each. How many dollars does {who} pay?",
        lambda a, b, c: b * c,
    ),
    "two people": (
        "{who} has {a} {what}. A friend of {who} has {b} more than {who}."
        " How many {what} does the friend of {who} have?",
        lambda a, b, c: a + b,
    ),
}


def _filled(text: str, who: str, what: str, a: int, b: int, c: int) -> str:
    sums = {"a_and_b": a + b, "b_and_c": b + c, "c_times_b": c * b}
    return text.format(who=who, what=what, a=a, b=b, c=c, **sums)


def problems(split: str, count: int) -> list[dict[str, Any]]:
    """Return the first `count` problems of "train" or "test", an even mix of all kinds."""
    numbers = list(itertools.product(range(2, 13), range(2, 13), range(2, 6)))
    groups: list[list[dict[str, Any]]] = []
    for kind, (text, answer) in _KINDS.items():
        # One choice of numbers for each text, so that no two problems of a kind are equal.
        distinct = sorted(
            {_filled(text, "", "", a, b, c): (a, b, c) for a, b, c in numbers}.values()
        )
        # The order is the same for both splits; every third problem is in the test.
        random.Random(f"smollm2 {kind}").shuffle(distinct)
        rng = random.Random(f"smollm2 {kind} {split}")
        group = []
        for i, (a, b, c) in enumerate(distinct):
            if (i % 3 == 0) == (split == "test"):
                who, what = rng.choice(_NAMES[split]), rng.choice(_THINGS)
                problem = _filled(text, who, what, a, b, c)
                group.append({"problem": problem, "answer": str(answer(a, b, c)), "kind": kind})
        groups.append(group)
    mixed = [row for rank in zip(*groups, strict=False) for row in rank][:count]
    return [{"id": f"smollm2-{split}-{i:04d}", **row} for i, row in enumerate(mixed)]


@click.command(help="Write train and test problems as JSONL.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("data/smollm2"))
@click.option("--train", default=192, show_default=True, type=click.IntRange(1))
@click.option("--test", default=96, show_default=True, type=click.IntRange(1))
def main(out: Path, train: int, test: int) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", train), ("test", test)):
        rows = problems(split, count)
        path = out / f"{split}.jsonl"
        with atomic_file(path) as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        click.echo(f"{path}: {len(rows)} problems")


if __name__ == "__main__":
    main()
