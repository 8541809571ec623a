"""Write word problems that a model of 135 million weights can sometimes solve.

    python -m pipelines.smollm2.prompts --out data/smollm2

The problems need one or two steps with small numbers, in the style of GSM8K; all are written here.
`train` and `test` share the eight kinds of problem, but no person and no (kind, numbers). The same
counts give the same files.
"""

import itertools
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

_NAMES = {
    "train": ("Anna", "Omar", "Ben", "Lena", "Ravi", "Sofia", "Tom", "Maria"),
    "test": ("Clara", "Hugo", "Nina", "Oscar", "Paula", "Leo"),
}
_THINGS = ("apples", "books", "pencils", "marbles", "stickers", "cookies", "oranges", "coins")

# The text of a problem from its person, its things and three numbers, and its answer.
_Kind = tuple[Callable[[str, str, int, int, int], str], Callable[[int, int, int], int]]
_KINDS: dict[str, _Kind] = {
    "buys": (
        lambda who, what, a, b, c: (
            f"{who} has {a} {what}. {who} buys {b} more. How many {what} does {who} have now?"
        ),
        lambda a, b, c: a + b,
    ),
    "gives": (
        lambda who, what, a, b, c: (
            f"{who} has {a + b} {what}. {who} gives {b} of them to a friend."
            f" How many {what} does {who} have left?"
        ),
        lambda a, b, c: a,
    ),
    "boxes": (
        lambda who, what, a, b, c: (
            f"{who} has {c} boxes. Each box {who} has holds {b} {what}."
            f" How many {what} does {who} have?"
        ),
        lambda a, b, c: c * b,
    ),
    "shares": (
        lambda who, what, a, b, c: (
            f"{who} has {c * b} {what}. {who} shares them out among {c} bags."
            f" How many {what} does {who} put into each bag?"
        ),
        lambda a, b, c: b,
    ),
    "buys and gives": (
        lambda who, what, a, b, c: (
            f"{who} has {a} {what}. {who} buys {b + c} more. Then {who} gives {c} to a friend."
            f" How many {what} does {who} have left?"
        ),
        lambda a, b, c: a + b,
    ),
    "boxes and more": (
        lambda who, what, a, b, c: (
            f"{who} has {c} boxes. Each box {who} has holds {b} {what}. {who} finds {a} more."
            f" How many {what} does {who} have in all?"
        ),
        lambda a, b, c: c * b + a,
    ),
    "money": (
        lambda who, what, a, b, c: (
            f"{who} buys {b} {what}. {who} pays {c} dollars for each. How many dollars does {who}"
            " pay?"
        ),
        lambda a, b, c: b * c,
    ),
    "two people": (
        lambda who, what, a, b, c: (
            f"{who} has {a} {what}. A friend of {who} has {b} more than {who}."
            f" How many {what} does the friend of {who} have?"
        ),
        lambda a, b, c: a + b,
    ),
}


def problems(split: str, count: int) -> list[dict[str, Any]]:
    """Return the first `count` problems of "train" or "test", an even mix of all kinds."""
    numbers = list(itertools.product(range(2, 13), range(2, 13), range(2, 6)))
    rows: list[dict[str, Any]] = []
    for kind, (text, answer) in _KINDS.items():
        # Each text once, so that no two problems of a kind are alike.
        shown = {text("", "", a, b, c): (a, b, c) for a, b, c in numbers}
        chosen = sorted(shown.values())
        # Both splits share one order; every third problem is for the test.
        random.Random(f"smollm2 {kind}").shuffle(chosen)
        mine = [n for i, n in enumerate(chosen) if (i % 3 == 0) == (split == "test")]
        rng = random.Random(f"smollm2 {kind} {split}")
        for a, b, c in mine:
            who, what = rng.choice(_NAMES[split]), rng.choice(_THINGS)
            rows.append(
                {
                    "problem": text(who, what, a, b, c),
                    "answer": str(answer(a, b, c)),
                    "kind": kind,
                }
            )
    groups = [[row for row in rows if row["kind"] == kind] for kind in _KINDS]
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
        partial = path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        partial.replace(path)
        click.echo(f"{path}: {len(rows)} problems")


if __name__ == "__main__":
    main()
