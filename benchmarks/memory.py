"""The memory plan of `mpd-train --dry-run` beside what a training takes, on a CPU.

    PYTHONPATH=. OMP_NUM_THREADS=1 MALLOC_MMAP_THRESHOLD_=65536 python benchmarks/memory.py

A process for each row: random models of V = 32,768, three steps on random packs; measured is the
process's peak above where it stood with the models loaded. Prints a Markdown table. Without the
setting glibc keeps much of what is freed: that is not the training's, but a process's size.
"""

import ctypes
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers

from mpd_data.common.models import resolve_model
from mpd_train.config import TrainConfig
from mpd_train.data.batches import Batch
from mpd_train.dryrun.memory import plan_memory
from mpd_train.loss import pack_loss
from mpd_train.model.causal_lm import CausalLM
from mpd_train.model.device import autocast
from mpd_train.model.loading import compile_layers, load_student
from mpd_train.optimizer import make_optimizer
from mpd_train.setup import TrainSetup

ROOT = Path(__file__).resolve().parents[1]
VOCAB, K = 32_768, 64
CASES: dict[str, tuple[dict[str, Any], tuple[int, int]]] = {
    "cached": ({}, (2048, 1536)),
    "cached, 4,096 tokens": ({}, (4096, 3072)),
    "cached, two packs a step": ({"gradient_accumulation_steps": 2}, (2048, 1536)),
    "cached, gradient checkpointing": ({"gradient_checkpointing": True}, (4096, 3072)),
    "cached, compiled": ({"compile": True}, (2048, 1536)),
    "cached, compiled, bfloat16": ({"compile": True, "dtype": "bfloat16"}, (2048, 1536)),
    "cached, bfloat16": ({"dtype": "bfloat16"}, (2048, 1536)),
    "cached, adapters": ({"lora": {"lora_r": 16}}, (2048, 1536)),
    "cached, eager attention": ({"attn_implementation": "eager"}, (2048, 1536)),
    "teacher in the process": ({"teacher": "teacher"}, (2048, 1536)),
}


def make_model(folder: Path, width: int, layers: int) -> None:
    config = transformers.Qwen3Config(
        hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
        num_attention_heads=width // 64, num_key_value_heads=2, head_dim=64, vocab_size=VOCAB,
        tie_word_embeddings=True,
    )  # fmt: skip
    transformers.Qwen3ForCausalLM(config).save_pretrained(folder)
    pocket = ROOT / "pipelines" / "pocket" / "models" / "student"
    transformers.AutoTokenizer.from_pretrained(pocket).save_pretrained(folder)


def of_process(field: str) -> int:
    """Bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(x for x in lines if x.startswith(field)).split()[1])


def batch_of(tokens: int, predicted: int) -> Batch:
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(0, VOCAB, (1, tokens), generator=g)
    positions = torch.arange(tokens)[None] % 512
    chosen = torch.randperm(tokens - 1, generator=g)[:predicted].sort().values
    top = torch.rand(predicted, VOCAB // 64, generator=g).topk(K, dim=1).indices
    logprobs = torch.rand(predicted, K + 1, generator=g).log_softmax(1)
    return Batch(
        ids, positions, chosen, ids[0, chosen + 1], top, logprobs[:, :K], logprobs[:, K],
        ids, positions, chosen, torch.ones(predicted), torch.zeros(predicted),
    )  # fmt: skip


def run(name: str, folder: Path) -> None:
    """Prints plan and peak as JSON."""
    changed, shape = CASES[name]
    student_files = resolve_model(str(folder / "student"))
    config = TrainConfig(
        shards=[folder], student=str(folder / "student"), out=folder / "run",
        **{k: v for k, v in changed.items() if k != "teacher"},
    )  # fmt: skip
    dtype, cpu = getattr(torch, changed.get("dtype", "float32")), torch.device("cpu")
    teacher_files = resolve_model(str(folder / "teacher")) if "teacher" in changed else None
    shards: Any = SimpleNamespace(metadata={"num_logprobs": K})  # all that the plan asks them
    setup = TrainSetup(
        config, student_files, teacher_files, cpu, dtype, config.attn_implementation, shards, VOCAB,
        {}, {},
    )  # fmt: skip
    plan = plan_memory(setup, *shape)
    student = load_student(config, student_files, cpu, config.attn_implementation)
    if config.compile:
        compile_layers(student.model)
    student.model.train()
    if config.gradient_checkpointing:
        student.model.gradient_checkpointing_enable({"use_reentrant": False})
    teacher = None
    if teacher_files is not None:
        teacher = CausalLM(teacher_files, cpu, dtype, False)
        teacher.model.requires_grad_(False)
    optimizer = make_optimizer(student.model, config.optimizer)
    # What a first pass loads and keeps (libraries, threads) is not the training's.
    with autocast(cpu, dtype):
        pack_loss(student, teacher, batch_of(64, 32), VOCAB, config.loss, 1.0).loss.backward()  # type: ignore[no-untyped-call]
    optimizer.zero_grad(set_to_none=True)
    batch = batch_of(*shape)
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = of_process("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    for _ in range(3):
        for _ in range(config.gradient_accumulation_steps):
            with autocast(cpu, dtype):
                loss = pack_loss(student, teacher, batch, VOCAB, config.loss, 1.0).loss
            loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(student.model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    found = {"planned": plan.moments + plan.step, "measured": of_process("VmHWM") - before}
    print(json.dumps(found))


def main() -> None:
    if len(sys.argv) > 1:
        return run(sys.argv[1], Path(sys.argv[2]))
    print("| | planned, MiB | measured | plan / measured |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(folder / "student", 256, 8)
        make_model(folder / "teacher", 512, 8)
        for case in CASES:
            said = subprocess.run(
                [sys.executable, __file__, case, name],
                check=True,
                stdout=subprocess.PIPE,
                text=True,
            ).stdout
            found = json.loads(said.splitlines()[-1])
            mib = {key: value / 2**20 for key, value in found.items()}
            ratio = mib["planned"] / mib["measured"]
            print(
                f"| {case} | {mib['planned']:,.0f} | {mib['measured']:,.0f} | {ratio:.2f} |",
                flush=True,
            )
    return None


if __name__ == "__main__":
    main()
