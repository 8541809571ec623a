"""How much of a pipeline's time is work of its models? Of a finished run:

    python benchmarks/round.py runs/demo

Prints a Markdown table: each step's wall-clock, and of it the seconds in which an engine had
requests (of a worker: the one that ended last) or a training made steps. The rest is imports,
starts, checks and files.
"""

import json
import sys
from pathlib import Path
from typing import Any


def _seconds_of_work(command: list[str]) -> float:
    option = "--shards" if command[1] == "rewrite" else "--out"
    folder = Path(command[command.index(option) + 1])
    if command[0] == "mpd-train":
        return sum(step["seconds"] for step in _lines(folder / "metrics.jsonl"))
    stages = json.loads((folder / "run.json").read_text(encoding="utf-8"))["stages"]
    stage = "distill" if command[1] == "rewrite" else "rollouts"
    return float(stages[stage]["speed"]["seconds"])


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def main(run: Path) -> None:
    """Print the table of `run`."""
    print("| step | wall-clock, s | models at work, s | share |")
    print("|---|---|---|---|")
    rows = [
        (step["label"], step["seconds"], _seconds_of_work(step["command"]))
        for step in _lines(run / "finished.jsonl")
    ]
    rows.append(("all", *(sum(row[i] for row in rows) for i in (1, 2))))
    for label, wall, work in rows:
        print(f"| {label} | {wall:.1f} | {work:.1f} | {work / wall:.2f} |")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
