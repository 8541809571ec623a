"""Speed and memory of `mpd-train` beside TRL's GKD trainer and a plain loop, on the same rows, CPU.

    PYTHONPATH=. OMP_NUM_THREADS=1 python benchmarks/trainer_cpu.py --peers /tmp/peers/bin/python

(kl_cpu.py says how to make /tmp/peers.) Forward KL from a teacher in the process over the
whole vocabulary of 32,768, random models, rows of 96 to 1,024 tokens whose lengths have a long
tail. The others pad batches of four; ours packs 2,048 tokens. Each run is a process; they
take turns. Tokens are the rows' own, not padding; the first two steps do not count. Memory is the
process's peak above what it stood at with its libraries, less weights and moments.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
VOCAB, BATCH, PACK, WARM = 32_768, 4, 2048, 2
RATE = 1e-5


def of_process(field: str) -> int:
    """Bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(x for x in lines if x.startswith(field)).split()[1])


def make_round(folder: Path, count: int, vocab: int = VOCAB) -> None:
    """Distill shards of made-up rows, and the same as JSON lines for the others."""
    import numpy as np
    import pyarrow.parquet as pq

    from mpd_data.store.round import RoundDir
    from mpd_data.store.schema import DISTILL_SCHEMA, METADATA_KEY
    from mpd_data.store.writer import ShardWriter

    golden = RoundDir(ROOT / "tests" / "data" / "golden" / "round1").shard_paths("distill")[0]
    table = pq.read_table(golden)
    metadata = json.loads(table.schema.metadata[METADATA_KEY]) | {"vocab_size": vocab}
    for known in ("schema_version", "stage"):
        del metadata[known]
    # Columns that are younger than these shards are null.
    like = dict.fromkeys(DISTILL_SCHEMA.names) | table.slice(0, 1).to_pylist()[0]
    k = metadata["num_logprobs"]
    rng = np.random.default_rng(0)
    rows = []
    for i in range(count):
        length = int(np.clip(np.exp(rng.normal(5.6, 0.7)), 32, 960))
        ids = rng.integers(0, vocab, 64 + length, dtype=np.int32)
        ids[-1] = metadata["eos_token_id"]
        rows.append(
            like
            | {
                "row_id": f"{i:032x}",
                "input_ids": ids,
                "teacher_prompt_ids": None,
                "loss_start": 64,
                "num_rewritten_tokens": length,
                "num_original_tokens": 2 * length,
                "topk_ids": np.tile(np.arange(k, dtype=np.int32), length),
                "topk_logprobs": np.full(length * k, -5.0, np.float16),
                "tail_logprobs": np.full(length, -1.0, np.float16),
            }
        )
    round_dir = RoundDir(folder / "round1")
    with round_dir.lock(), ShardWriter(round_dir, "distill", metadata) as writer:
        for row in rows:
            writer.add(row)
    lines = [json.dumps({"input_ids": row["input_ids"].tolist(), "loss_start": 64}) for row in rows]
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")


def ours(folder: Path, steps: int) -> dict[str, float]:
    from mpd_train import metrics
    from mpd_train.config import TrainConfig
    from mpd_train.loop import train

    before = of_process("VmRSS")
    out = Path(tempfile.mkdtemp(dir=folder))
    config = TrainConfig(
        shards=[folder / "round1"], student=str(folder / "student"), out=out / "run",
        teacher=str(folder / "teacher"), pack_length=PACK, dtype="float32", epochs=9,
        optimizer={"learning_rate": RATE}, max_loss=1e9,
    )  # fmt: skip
    # As many steps as the others do, and no export.
    records: list[dict[str, Any]] = []
    step = metrics.Recorder.step

    class Enough(Exception):
        pass

    def until(self: Any, number: int, record: Any, seconds: float, waited: float) -> None:
        step(self, number, record, seconds, waited)
        records.append(record | {"seconds": seconds})
        if number == steps:
            raise Enough

    metrics.Recorder.step = until  # type: ignore[method-assign]
    with contextlib.suppress(Enough):
        train(config)
    counted = records[WARM:]
    speed = sum(r["tokens"] for r in counted) / sum(r["seconds"] for r in counted)
    return {"speed": speed, "peak": of_process("VmHWM") - before}


def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
    import torch

    longest = max(len(row["input_ids"]) for row in rows)
    ids = torch.zeros((len(rows), longest), dtype=torch.int64)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for i, row in enumerate(rows):
        length = len(row["input_ids"])
        ids[i, :length] = torch.tensor(row["input_ids"])
        mask[i, :length] = 1
        labels[i, row["loss_start"] : length] = ids[i, row["loss_start"] : length]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


def models(folder: Path) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM

    student, teacher = (
        AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32)
        for name in ("student", "teacher")
    )
    return student, teacher.requires_grad_(False)


def gkd(folder: Path, steps: int) -> dict[str, float]:
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    before = of_process("VmRSS")
    student, teacher = models(folder)
    tokens: list[int] = []
    seconds: list[float] = []

    def counted(rows: list[dict[str, Any]]) -> dict[str, Any]:
        tokens.append(sum(len(row["input_ids"]) for row in rows))
        return collate(rows)

    class Timer(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds.append(time.perf_counter() - self.began)

    config = GKDConfig(
        output_dir=tempfile.mkdtemp(dir=folder), per_device_train_batch_size=BATCH,
        max_steps=steps, lmbda=0.0, beta=0.0, temperature=1.0, learning_rate=RATE, use_cpu=True,
        bf16=False, gradient_checkpointing=False, report_to=[], save_strategy="no",
        optim="adamw_torch_fused", dataloader_pin_memory=False, disable_tqdm=True,
    )  # fmt: skip
    trainer = GKDTrainer(
        model=student, teacher_model=teacher, args=config, data_collator=counted,
        train_dataset=Dataset.from_list(rows_of(folder)), callbacks=[Timer()],
        processing_class=AutoTokenizer.from_pretrained(folder / "student"),
    )  # fmt: skip
    trainer.train()
    speed = sum(tokens[WARM:steps]) / sum(seconds[WARM:])
    return {"speed": speed, "peak": of_process("VmHWM") - before}


def plain(folder: Path, steps: int) -> dict[str, float]:
    import torch

    before = of_process("VmRSS")
    student, teacher = models(folder)
    optimizer = torch.optim.AdamW(student.parameters(), lr=RATE, fused=True)
    rows, tokens, seconds = rows_of(folder), 0, 0.0
    for step in range(steps):
        began = time.perf_counter()
        some = [rows[(BATCH * step + i) % len(rows)] for i in range(BATCH)]
        batch = collate(some)
        labels = batch.pop("labels")[:, 1:]
        logits = student(**batch).logits[:, :-1]
        with torch.no_grad():
            taught = teacher(**batch).logits[:, :-1].log_softmax(-1)
        kl = torch.nn.functional.kl_div(
            logits.log_softmax(-1), taught, reduction="none", log_target=True
        ).sum(-1)
        loss = kl[labels != -100].mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        del logits, taught, kl, loss
        if step >= WARM:
            seconds += time.perf_counter() - began
            tokens += sum(len(row["input_ids"]) for row in some)
    return {"speed": tokens / seconds, "peak": of_process("VmHWM") - before}


WORKERS = {"mpd-train": ours, "TRL 1.16 GKD": gkd, "plain loop": plain}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--peers", default=sys.executable, help="Python that has trl")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        name, folder = options.worker
        print(json.dumps(WORKERS[name](Path(folder), options.steps)))
        return
    from benchmarks.memory import make_model

    found: dict[str, list[dict[str, float]]] = {name: [] for name in WORKERS}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(folder / "student", 256, 8)
        make_model(folder / "teacher", 512, 8)
        make_round(folder, 128)
        static = sum(
            size * (folder / model / "model.safetensors").stat().st_size
            for model, size in (("student", 3), ("teacher", 1))
        )
        for _ in range(options.pairs):
            for worker, results in found.items():
                python = options.peers if "TRL" in worker else sys.executable
                command = [
                    python,
                    __file__,
                    "--worker",
                    worker,
                    name,
                    "--steps",
                    str(options.steps),
                ]
                said = subprocess.run(
                    command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ
                ).stdout
                results.append(json.loads(said.splitlines()[-1]))
    print("| | tokens/s | mpd-train is | peak MiB | mpd-train's is |\n|---|---|---|---|---|")
    mine = found["mpd-train"]
    for worker, results in found.items():
        pairs = list(zip(mine, results, strict=True))
        faster = statistics.median(a["speed"] / b["speed"] for a, b in pairs)
        share = statistics.median((a["peak"] - static) / (b["peak"] - static) for a, b in pairs)
        speed = statistics.median(r["speed"] for r in results)
        peak = statistics.median(r["peak"] - static for r in results) / 2**20
        print(f"| {worker} | {speed:,.0f} | {faster:.2f} x | {peak:,.0f} | {share:.2f} |")


if __name__ == "__main__":
    main()
