"""Does the gate pass a good round and refuse a bad one? One round of the pocket models with three
seeds, as it is and made bad on purpose:

    python benchmarks/gate.py --out runs/gate

A pipeline that was stopped goes on. Prints a Markdown table: what the gate decided, and the
differences that it saw, in points.
"""

import json
import subprocess
import sys
from pathlib import Path

import click

PIPELINE = Path("pipelines/pocket/pipeline.toml")
SEEDS = 3
# Held-out problems of four samples each, and the margin that they can tell.
SETTINGS = ["rounds=1", "gate={margin=0.05}", "evaluation.0.rollouts.num_prompts=500"]
# Thirty times the learning rate of the pipeline.
RATE = "train.optimizer.learning_rate=1.5e-2"


def _answers_only(folder: Path) -> Path:
    """Write the pipeline's rewrite template with a trace that is the answer alone."""
    text = Path("pipelines/pocket/rewrite.toml").read_text(encoding="utf-8")
    changed = text.replace("<think> {{thinking}} </think>", "<think> </think>")
    assert changed != text
    path = folder / "answers-only.toml"
    path.write_text(changed, encoding="utf-8")
    return path


def _pipeline(folder: Path) -> Path:
    """Write the pipeline with its first evaluation set alone."""
    head, first, *_ = PIPELINE.read_text(encoding="utf-8").split("[[evaluation]]")
    path = folder / "pipeline.toml"
    path.write_text(f"{head}[[evaluation]]{first}", encoding="utf-8")
    return path


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(out: Path) -> None:
    """Run the three kinds of rounds and print the table."""
    out.mkdir(parents=True, exist_ok=True)
    pipeline = _pipeline(out)
    answers = f"rewrite.template={_answers_only(out)}"
    kinds = {
        "as it is": [],
        "learning rate x 30": [RATE],
        # Fine-tuning: a teacher does not believe an answer without its working, and by its
        # probabilities the student goes on to think.
        "fine-tuned on answers alone, 4 epochs": [
            answers,
            "train.epochs=4",
            "train.loss.ce_weight=1.0",
        ],
        "distilled on answers alone, 8 epochs": [answers, "train.epochs=8"],
    }
    print("| round | seed | gate | all problems | the hard third |")
    print("|---|---|---|---|---|")
    for number, (kind, changed) in enumerate(kinds.items()):
        words = [w for setting in SETTINGS + changed for w in ("--set", setting)]
        run = out / str(number)
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "mpd_rounds",
                pipeline,
                "--out",
                run,
                "--seeds",
                str(SEEDS),
                *words,
            ],
            stdout=subprocess.DEVNULL,
            check=False,
        )
        # 4: the gate accepted no round of a seed.
        if done.returncode not in (0, 4):
            sys.exit(done.returncode)
        for seed in range(SEEDS):
            (decision,) = json.loads((run / f"seed{seed}" / "gate.json").read_text())["rounds"]
            cells = [_cell(finding) for finding in decision["findings"]]
            print(f"| {kind} | {seed} | {decision['outcome']} | {' | '.join(cells)} |", flush=True)


def _cell(finding: dict[str, float]) -> str:
    low, high = (100 * finding[name] for name in ("low", "high"))
    return f"{100 * finding['difference']:+.1f} [{low:.1f}, {high:.1f}]"


if __name__ == "__main__":
    main()
