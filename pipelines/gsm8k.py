"""Split GSM8K's training problems into train, validation and test files.

    python -m pipelines.gsm8k 'hf://openai/gsm8k?split=train&config=main' --out data/gsm8k
    python -m pipelines.gsm8k train.jsonl --out data/gsm8k      # the same file, without a hub

The official test set stays untouched, so that others can measure on it. The split goes by the hash
of a problem's place in the source: a problem is in the same file on every machine.
"""

import hashlib
import json
from pathlib import Path

import click

from mpd_data.common.errors import ConfigError
from mpd_data.common.files import atomic_file
from mpd_data.prompts.sources import read_rows

SIZES = {"test": 500, "validation": 300}


def split(source: str) -> dict[str, list[dict[str, str]]]:
    """Return the rows of each split. Raise ConfigError for a source with fewer problems than the
    held-out splits take."""
    rows = []
    for number, (place, row, flaw) in enumerate(read_rows(source, ["question", "answer"])):
        if flaw is not None or not all(isinstance(cell, str) for cell in row.values()):
            raise ConfigError(f"{place}: {flaw or 'no text in question or answer'}.")
        answer = row["answer"].rpartition("####")[2].strip().replace(",", "")
        rows.append(
            {"id": f"gsm8k-train-{number}", "problem": row["question"], "answer": answer}
            | {"solution": row["answer"]}
        )
    if len(rows) <= sum(SIZES.values()):
        raise ConfigError(f"{source}: {len(rows)} problems, expected some thousands.")
    rows.sort(key=lambda row: hashlib.sha256(f"split0:{row['id']}".encode()).digest())
    result, start = {}, 0
    for name, size in SIZES.items():
        result[name] = rows[start : start + size]
        start += size
    result["train"] = rows[start:]
    return result


@click.command(help="Write test.jsonl, validation.jsonl and train.jsonl of the problems in SOURCE.")
@click.argument("source")
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(source: str, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for name, rows in split(source).items():
        with atomic_file(out / f"{name}.jsonl") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        click.echo(f"{out / name}.jsonl: {len(rows)} problems")


if __name__ == "__main__":
    main()
