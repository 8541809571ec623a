"""Wall-clock until a student is short: rounds of this toolkit beside TRL's on-policy trainers, with
the same student, teacher, prompts and machine, on a CPU.

    PYTHONPATH=. python benchmarks/time_to_result.py --peers /tmp/peers/bin/python --out runs/time

(kl_cpu.py says how to make /tmp/peers; `make demo` writes data/pocket.) The pocket student learns
from a teacher that is concise when it solves: the pocket teacher after a round of compressing
itself, which is made first and does not count. On-policy trainers need such a teacher; ours also
runs with the verbose one. What counts is generation and training with all starts, not the
evaluations. The result is reached when the student uses at most 60% of the base's tokens and the
interval of the accuracy difference lies above -2 points. A trainer of TRL stops after four times
the seconds that ours took. Run again, it goes on.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click

PIPELINE = "pipelines/pocket/pipeline.toml"
POCKET = Path("pipelines/pocket/models")
TRAIN, TEST = "data/pocket/train.jsonl", "data/pocket/test.jsonl"
# As many as a round of ours has updates, and about as many tokens in each; then some more.
PROMPTS, MOST_STEPS, SAVE_STEPS, MOST_TOKENS = 32, 120, 8, 400
RATE = 5e-4
SHARE, LOSS = 0.6, -0.02
# Beyond the bar of three.
TIMES = 4


def run(*command: Any) -> None:
    """Run a command of the toolkit. It says nothing."""
    subprocess.run(
        [sys.executable, "-m", *map(str, command)],
        check=True,
        stdout=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )


def rounds(out: Path, teacher: Path, number: int, *more: str) -> list[tuple[float, Path]]:
    """Run a pipeline of `number` rounds. Return the seconds until each student, and the student."""
    # A pipeline needs an evaluation. Its seconds count: the rollouts use its engine.
    few = (
        f"prompts=['{TEST}'],num_prompts=2,id_column='id',answer_column='answer'"
        f",sampling={{max_tokens={MOST_TOKENS}}},parts={{workers=2}}"
        ",engine={dtype='float32',max_num_seqs=256}"
    )
    evaluation = f"evaluation=[{{name='few',rollouts={{{few}}}}}]"
    told = [f"rounds={number}", f"teacher={teacher}", evaluation, *more]
    run("mpd_rounds", PIPELINE, "--out", out, *(w for setting in told for w in ("--set", setting)))
    seconds, found = 0.0, []
    for line in (out / "finished.jsonl").read_text(encoding="utf-8").splitlines():
        step = json.loads(line)
        seconds += step["seconds"]
        if step["command"][0] == "mpd-train":
            found.append((seconds, out / "train" / f"round{len(found) + 1}" / "model"))
    return found


def peer(
    out: Path, python: str, trainer: str, teacher: Path, most: float
) -> list[tuple[float, Path]]:
    """Train with a trainer of TRL, for `most` seconds. Return the seconds until each saved student,
    and the student."""
    times = out / "times.json"
    if not times.exists():
        out.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, "OMP_NUM_THREADS": str(os.cpu_count())}
        command = [python, __file__, "--worker", trainer, teacher, most, "--out", out]
        subprocess.run(list(map(str, command)), check=True, env=environment)
    return [(seconds, out / f"step{step}") for step, seconds in json.loads(times.read_text())]


def train(out: Path, trainer: str, teacher: Path, most: float) -> None:
    """Train for `most` seconds in TRL's environment: a step for each batch of on-policy samples."""
    began = time.monotonic()
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    tokenizer = AutoTokenizer.from_pretrained(POCKET / "student", padding_side="left")
    student, taught = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        for path in (POCKET / "student", teacher)
    )
    lines = Path(TRAIN).read_text(encoding="utf-8").splitlines()
    problems = [json.loads(line)["problem"] for line in lines]
    prompts = [[{"role": "user", "content": problem}] for problem in problems]
    common: dict[str, Any] = {
        "output_dir": str(out / "trainer"), "per_device_train_batch_size": PROMPTS,
        "max_steps": MOST_STEPS, "learning_rate": RATE, "lr_scheduler_type": "constant",
        "warmup_steps": 2, "temperature": 1.0, "beta": 1.0, "use_cpu": True, "bf16": False,
        "gradient_checkpointing": False, "report_to": [], "save_strategy": "no",
        "dataloader_pin_memory": False, "disable_tqdm": True, "logging_steps": 8,
    }  # fmt: skip
    saved: list[tuple[int, float]] = []
    paused = 0.0

    class Save(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            nonlocal paused
            if state.global_step % SAVE_STEPS == 0:
                now = time.monotonic()
                saved.append((state.global_step, now - began - paused))
                for part in (student, tokenizer):
                    part.save_pretrained(out / f"step{state.global_step}")
                paused += time.monotonic() - now
                control.should_training_stop = saved[-1][1] > most

    made: Any
    if trainer == "DistillationTrainer":
        from trl import DistillationConfig, DistillationTrainer

        made = DistillationTrainer(
            model=student, teacher_model=taught, processing_class=tokenizer, callbacks=[Save()],
            args=DistillationConfig(**common, max_completion_length=MOST_TOKENS, top_k=0),
            train_dataset=Dataset.from_dict({"prompt": prompts}),
        )  # fmt: skip
    else:
        from trl.experimental.gkd import GKDConfig, GKDTrainer

        def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
            asked = tokenizer([row["text"] for row in rows], return_tensors="pt", padding=True)
            ids, mask = asked["input_ids"], asked["attention_mask"]
            # With lmbda = 1 the trainer replaces ids and labels by its own samples.
            return {
                "input_ids": ids, "attention_mask": mask, "labels": ids.clone(),
                "prompts": ids, "prompt_attention_mask": mask,
            }  # fmt: skip

        texts = [
            tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
            for prompt in prompts
        ]
        made = GKDTrainer(
            model=student, teacher_model=taught, processing_class=tokenizer, callbacks=[Save()],
            args=GKDConfig(**common, lmbda=1.0, max_new_tokens=MOST_TOKENS), data_collator=collate,
            train_dataset=Dataset.from_dict({"text": texts}),
        )  # fmt: skip
    made.train()
    (out / "times.json").write_text(json.dumps(saved))


def evaluated(model: Path, folder: Path) -> Path:
    """Sample the test problems, four times each."""
    settings = {
        "--model": model, "--prompts": TEST, "--out": folder, "--num-prompts": 500,
        "--num-samples": 4, "--id-column": "id", "--answer-column": "answer",
        "--max-tokens": MOST_TOKENS, "--dtype": "float32", "--workers": 2,
    }  # fmt: skip
    run("mpd_data", "rollouts", *(word for pair in settings.items() for word in pair))
    return folder


def until_it_is_reached(name: str, students: list[tuple[float, Path]], out: Path) -> float:
    """Evaluate the students of a method until one reaches the result. Print a table's rows. Return
    the seconds until the last of them."""
    from mpd_data.inspect.compare import compare

    for number, (seconds, model) in enumerate(students, start=1):
        found = compare(out / "base", evaluated(model, out / f"{name}-{number}"))
        lost, low = found["accuracy_difference"], found["accuracy_difference_interval"][0]
        tokens = found["new"]["mean_tokens"]
        reached = tokens <= SHARE * found["base"]["mean_tokens"] and low > LOSS
        print(
            f"| {name} | {seconds:.0f} | {tokens:.1f} | {100 * lost:+.1f} | {100 * low:.1f} |"
            f" {'yes' if reached else 'no'} |",
            flush=True,
        )
        if reached:
            break
    return seconds


@click.command()
@click.option("--peers", default=sys.executable, help="Python that has trl.")
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--worker", type=(str, click.Path(path_type=Path), float), hidden=True)
def main(peers: str, out: Path, worker: tuple[str, Path, float] | None) -> None:
    """Make the teacher, train with each method and print the table."""
    if worker is not None:
        train(out, *worker)
        return
    verbose = POCKET / "teacher"
    itself = (f"student={verbose}", "train.loss.ce_weight=1.0")
    concise = rounds(out / "teacher", verbose, 1, *itself)[0][1]
    evaluated(POCKET / "student", out / "base")
    print("| method | seconds | tokens | accuracy, points | its lower end | reached |")
    print("|---|---|---|---|---|---|")
    ours = [
        until_it_is_reached(name, rounds(out / f"runs-{name}", teacher, 2), out)
        for name, teacher in (("ours", concise), ("ours, verbose teacher", verbose))
    ]
    for trainer in ("DistillationTrainer", "GKDTrainer"):
        students = peer(out / trainer, peers, trainer, concise, TIMES * ours[0])
        until_it_is_reached(trainer, students, out)


if __name__ == "__main__":
    main()
