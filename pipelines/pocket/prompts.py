"""Write the pocket world's problems as JSONL, for distillation and its evaluation.

    python -m pipelines.pocket.prompts --out data/pocket

`train`, `validation` and `test` hold the in-distribution families. `ood` holds the held-out family,
from the "test" split. The same sizes give the same files, and a larger size only adds rows.
"""

import json
import random
from pathlib import Path

import click

from mpd_data.common.files import atomic_file

from .world import (
    IN_DISTRIBUTION,
    OUT_OF_DISTRIBUTION,
    Family,
    Problem,
    Split,
    problems,
)


def distinct(name: str, families: tuple[Family, ...], split: Split, count: int) -> list[Problem]:
    """Return the first `count` distinct problems of a split, in an order that `name` determines."""
    by_text: dict[str, Problem] = {}
    for problem in problems(random.Random(f"prompts {name}"), families, split):
        if len(by_text) == count:
            break
        by_text.setdefault(problem.text, problem)
    return list(by_text.values())


def write(out: Path, train: int, validation: int, test: int, ood: int) -> dict[Path, int]:
    """Write that many problems of each kind into the folder `out`. Return each file's number."""
    out.mkdir(parents=True, exist_ok=True)
    files: list[tuple[str, tuple[Family, ...], Split, int]] = [
        ("train", IN_DISTRIBUTION, "train", train),
        ("validation", IN_DISTRIBUTION, "validation", validation),
        ("test", IN_DISTRIBUTION, "test", test),
        ("ood", OUT_OF_DISTRIBUTION, "test", ood),
    ]
    written = {}
    for name, families, split, count in files:
        rows = [
            {
                "id": f"pocket-{name}-{index:05d}",
                "problem": problem.text,
                "answer": str(problem.answer),
                "family": problem.family,
            }
            for index, problem in enumerate(distinct(name, families, split, count))
        ]
        path = out / f"{name}.jsonl"
        with atomic_file(path) as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        written[path] = len(rows)
    return written


@click.command(help="Write train, validation, test and ood problems as JSONL.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("data/pocket"))
@click.option("--train", default=6000, show_default=True, type=click.IntRange(min=0))
@click.option("--validation", default=600, show_default=True, type=click.IntRange(min=0))
@click.option("--test", default=1200, show_default=True, type=click.IntRange(min=0))
@click.option("--ood", default=600, show_default=True, type=click.IntRange(min=0))
def main(out: Path, train: int, validation: int, test: int, ood: int) -> None:
    for path, count in write(out, train, validation, test, ood).items():
        click.echo(f"{path}: {count} problems")


if __name__ == "__main__":
    main()
