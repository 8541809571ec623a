"""How much of a training's time its steps wait for data, on a CPU.

    PYTHONPATH=. OMP_NUM_THREADS=1 python benchmarks/data_wait.py ROUND

Trains the pocket student, the smallest and so the hungriest there is, on a round's shards, and
reads the seconds from metrics.jsonl. Prints a Markdown row for each length of pack.
"""

import json
import sys
import tempfile
from pathlib import Path

from mpd_train.config import TrainConfig
from mpd_train.loop import train

POCKET = Path(__file__).resolve().parents[1] / "pipelines" / "pocket" / "models" / "student"


def main() -> None:
    shards = Path(sys.argv[1])
    print("| pack_length | steps | tokens/s | s a step | of it waiting, s | share |")
    print("|---|---|---|---|---|---|")
    for pack_length in (1024, 4096):
        with tempfile.TemporaryDirectory() as name:
            out = Path(name) / "run"
            train(
                TrainConfig(
                    shards=[shards], student=str(POCKET), out=out, epochs=4,
                    pack_length=pack_length, dtype="float32",
                )
            )  # fmt: skip
            lines = (out / "metrics.jsonl").read_text().splitlines()
        steps = [json.loads(line) for line in lines]
        seconds, waited = (sum(s[key] for s in steps) for key in ("seconds", "data_seconds"))
        tokens = sum(s["tokens"] for s in steps)
        print(
            f"| {pack_length:,} | {len(steps)} | {tokens / seconds:,.0f}"
            f" | {seconds / len(steps):.3f} | {waited / len(steps):.5f} | {waited / seconds:.2%} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
