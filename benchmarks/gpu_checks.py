"""What only a GPU can answer about the trainer and the engine (benchmarks/kl_gpu.py: the losses):

    PYTHONPATH=. python benchmarks/gpu_checks.py [--only attention,pocket,engine,train,steps,dense]

* `attention`: --attn-implementation varlen beside one sequence at a time;
* `pocket`: `mpd-train` on the pocket models with the options for a GPU, against float32 on a CPU;
* `engine`: the transformers engine with the pocket student: scores against float64 on the CPU, and
  samples that do not depend on the batch;
* `train`: `mpd-train` itself on a Qwen3-1.7B-shaped student with random weights and made-up shards;
* `steps`: training steps of such a student from cached top K, 8k to 32k tokens, with and without
  recomputed activations, compiled layers and, where it is installed, Liger's kernels: tokens/s,
  MFU, memory, and what `mpd-train --dry-run` plans for it;
* `dense`: the same from a Qwen3-8B-shaped teacher in the process.

`--device cpu --small` runs all of it but `attention` on toy sizes, to see that the script works.
Needs torch, transformers, pyarrow and pydantic; prints Markdown tables for benchmarks/README.md.
"""

import argparse
import importlib.util
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from torch import Tensor

from benchmarks.trainer_cpu import make_round
from mpd_data.common.models import ModelFiles
from mpd_train.config import TrainConfig
from mpd_train.data.batches import Batch
from mpd_train.dryrun.memory import plan_memory
from mpd_train.flops import peak_flops, step_flops
from mpd_train.loss import pack_loss
from mpd_train.model import attention, liger
from mpd_train.model.causal_lm import CausalLM
from mpd_train.model.device import autocast
from mpd_train.model.loading import compile_layers
from mpd_train.optimizer import make_optimizer
from mpd_train.setup import TrainSetup

ROOT = Path(__file__).resolve().parents[1]
POCKET = ROOT / "pipelines" / "pocket" / "models"
K = 64
GIB = 2**30


def qwen3(small: bool, teacher: bool) -> Any:
    """A Qwen3 of the sizes of 1.7B, or of 8B for the teacher, with random weights, on the current
    device."""
    width, inner, layers, heads = (4096, 12_288, 36, 32) if teacher else (2048, 6144, 28, 16)
    if small:
        width, inner, layers, heads = (128, 256, 2, 4) if teacher else (64, 128, 2, 4)
    config = transformers.Qwen3Config(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=2 if small else 8,
        head_dim=16 if small else 128,
        vocab_size=2048 if small else 151_936,
        tie_word_embeddings=not teacher,
        max_position_embeddings=40_960,
    )
    return transformers.Qwen3ForCausalLM(config)


class Made(CausalLM):
    """A model that was on no disk; its configuration is, for the memory plan."""

    def __init__(self, model: Any, folder: Path) -> None:
        model.config.save_pretrained(folder)
        vocab_size = model.config.vocab_size
        self.files = ModelFiles(folder.name, folder, "made", vocab_size, 40_960)
        self.model, self.adapted, self.kept = model, None, nullcontext


def config_of(folder: Path, **changed: Any) -> TrainConfig:
    return TrainConfig(shards=[folder], student="student", out=folder / "run", **changed)


def batch_of(tokens: int, sequence: int, vocab: int, device: torch.device) -> Batch:
    """Sequences of which the first eighth is a prompt."""
    ids = torch.randint(0, vocab, (1, tokens), device=device)
    positions = torch.arange(tokens, device=device)[None] % sequence
    chosen = (positions[0] >= sequence // 8).nonzero()[:-1, 0]
    n = len(chosen)
    top = torch.randperm(vocab, device=device)[:K].expand(n, K)
    logprobs = torch.full((n, K), -5.0, device=device)
    tails = torch.full((n,), -1.0, device=device)
    labels = ids[0, chosen + 1]
    return Batch(
        ids, positions, chosen, labels, top, logprobs, tails, ids, positions, chosen,
        torch.ones(n, device=device), torch.zeros(n, device=device),
    )  # fmt: skip


def measure(device: torch.device, work: Callable[[], object]) -> tuple[float, float]:
    """Median seconds of three runs after two for warming up, and peak GiB of all that is there."""
    work()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(3):
        begun = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begun)
    peak = torch.cuda.max_memory_allocated() / GIB if device.type == "cuda" else float("nan")
    return statistics.median(times), peak


def steps(device: torch.device, small: bool, folder: Path, dense: bool) -> None:
    sequence = 32 if small else 2048
    dtype = torch.bfloat16
    sizes = (64, 128) if small else (8192, 16_384, 32_768)
    # tokens, recomputed, compiled, Liger's kernels
    rows = [(size, True, True, False) for size in sizes]
    if not dense:
        rows = [(sizes[0], again, fast, False) for again in (False, True) for fast in (False, True)]
        rows += [(size, again, True, False) for size in sizes[1:] for again in (False, True)]
        rows.append((sizes[-1], True, False, False))
        if device.type == "cuda" and importlib.util.find_spec("liger_kernel"):
            rows += [(sizes[0], False, fast, True) for fast in (False, True)]
    name = attention.attention(config_of(folder), device, dtype)
    with torch.device(device):
        student = Made(qwen3(small, False), folder / "student")
    optimizer = make_optimizer(student.model, config_of(folder).optimizer)
    student.model.train()
    if name is not None:
        student.model.set_attn_implementation(name)
    plain = [layer.forward for layer in student.model.model.layers]
    compile_layers(student.model)
    compiled = [layer.forward for layer in student.model.model.layers]
    teacher = None
    if dense:
        torch.set_default_dtype(dtype)
        with torch.device(device):
            teacher = Made(qwen3(small, True), folder / "teacher")
        torch.set_default_dtype(torch.float32)
        teacher.model.requires_grad_(False)
        if name is not None:
            teacher.model.set_attn_implementation(name)
        compile_layers(teacher.model)
    flops = step_flops(student, teacher)
    assert flops is not None
    parameters = sum(p.numel() for p in student.model.parameters())
    peak_rate = peak_flops(device, dtype) or float("nan")
    print(
        f"\nStudent of {parameters / 1e9:.2f} B parameters in float32 under bfloat16, sequences of"
        f" {sequence} tokens, loss on seven eighths of them, attention {name}; MFU of"
        f" {peak_rate / 1e12:.0f} TFLOP/s.\n\n| tokens | teacher | recompute | compile | Liger | ms"
        " | tokens/s | MFU | peak GiB | step's own | planned | plan / measured |"
        "\n|---|---|---|---|---|---|---|---|---|---|---|---|"
    )
    liger_applied = False
    for tokens, recompute, fast, with_liger in rows:
        if with_liger and not liger_applied:
            liger.apply(student.model, "student")
            liger_applied = True
            plain = [type(layer).forward.__get__(layer) for layer in student.model.model.layers]
        if recompute:
            student.model.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            student.model.gradient_checkpointing_disable()
        for layer, forward in zip(
            student.model.model.layers, compiled if fast else plain, strict=True
        ):
            layer.forward = forward
        config = config_of(
            folder, gradient_checkpointing=recompute, teacher="teacher" if dense else None
        )
        vocab = student.files.vocab_size
        batch = batch_of(tokens, sequence, vocab, device)
        count = len(batch.loss_positions)

        def step(config: TrainConfig = config, batch: Batch = batch, vocab: int = vocab) -> None:
            with autocast(device, dtype):
                out = pack_loss(student, teacher, batch, vocab, config.loss, 1.0)
            out.loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(student.model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        row = f"| {tokens:,} | {'dense' if dense else 'cached'}" + "".join(
            f" | {'yes' if on else 'no'}" for on in (recompute, fast, with_liger)
        )
        try:
            seconds, peak = measure(device, step)
        except torch.OutOfMemoryError:
            optimizer.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
            print(f"{row} | out of memory | | | | | | |", flush=True)
            continue
        shards: Any = SimpleNamespace(metadata={"num_logprobs": K})  # all that the plan asks them
        setup = TrainSetup(
            config, student.files, None if teacher is None else teacher.files, device, dtype, name,
            shards, vocab, {}, {},
        )  # fmt: skip
        plan = plan_memory(setup, tokens, count)
        rate = flops.total(count, [sequence] * (tokens // sequence)) / seconds
        there = plan.weights + plan.moments + plan.teacher
        own = peak - there / GIB
        print(
            f"{row} | {1000 * seconds:.0f} | {tokens / seconds:,.0f} | {rate / peak_rate:.0%}"
            f" | {peak:.1f} | {own:.2f} | {plan.step / GIB:.2f} | {plan.step / GIB / own:.2f} |",
            flush=True,
        )


def attention_alone(device: torch.device, folder: Path) -> bool:
    """Packed sequences by varlen in bfloat16 against each alone, by sdpa in float32: output and
    gradient of the embedding, whose own rounding sdpa in bfloat16 shows."""
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        hidden_size=256, intermediate_size=512, num_hidden_layers=3, num_attention_heads=8,
        num_key_value_heads=2, head_dim=64, vocab_size=1024, attn_implementation="sdpa",
    )  # fmt: skip
    with torch.device(device):
        made = Made(transformers.Qwen3ForCausalLM(config), folder / "attention")
    lengths = [1, 700, 33, 290]
    ids = torch.randint(0, 1024, (1, sum(lengths)), device=device)
    positions = torch.cat([torch.arange(n) for n in lengths])[None].to(device)
    weights = torch.randn(ids.shape[1], 256, device=device)

    def results(short: bool, alone: bool) -> list[Tensor]:
        embedding = made.model.get_input_embeddings().weight
        embedding.grad = None
        with autocast(device, torch.bfloat16 if short else torch.float32):
            if alone:
                parts = zip(ids.split(lengths, 1), positions.split(lengths, 1), strict=True)
                states = torch.cat([made.states(*part) for part in parts], 1)
            else:
                states = made.states(ids, positions)
        (states[0].float() * weights).sum().backward()  # type: ignore[no-untyped-call]
        assert embedding.grad is not None
        return [states.detach().float(), embedding.grad]

    exact = results(False, True)
    found = {"sdpa, one by one, bfloat16": results(True, True)}
    chosen = attention.attention(
        config_of(folder, attn_implementation="varlen"), device, torch.bfloat16
    )
    made.model.set_attn_implementation(chosen)
    found["varlen, packed, bfloat16"] = results(True, False)
    compile_layers(made.model)
    found["varlen, packed, bfloat16, compiled"] = results(True, False)
    print("\n| attention, against float32 | states | gradient |\n|---|---|---|")
    errors = []
    for name, values in found.items():
        error = [float((a - b).norm() / b.norm()) for a, b in zip(values, exact, strict=True)]
        errors.append(max(error))
        print(f"| {name} | {error[0]:.2e} | {error[1]:.2e} |")
    return max(errors) <= 1.5 * errors[0]


def mpd_train(out: Path, *options: object) -> list[dict[str, Any]]:
    """Runs the command; its steps in metrics.jsonl."""
    command = [sys.executable, "-m", "mpd_train.cli", "--out", out, *options]
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        list(map(str, command)), env=env, cwd=ROOT, capture_output=True, text=True
    )  # fmt: skip
    if done.returncode:
        print(
            f"\n{' '.join(map(str, command))}: exit code {done.returncode}\n{done.stderr[-3000:]}"
        )
        return []
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if "tokens" in line]


def train(device: torch.device, small: bool, folder: Path) -> bool:
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = qwen3(small, False)
    torch.set_default_dtype(torch.float32)
    student = folder / "saved"
    model.save_pretrained(student)
    vocab = model.config.vocab_size
    del model
    if device.type == "cuda":
        torch.cuda.empty_cache()
    transformers.AutoTokenizer.from_pretrained(POCKET / "student").save_pretrained(student)
    shards = folder / "shards"
    make_round(shards, 64 if small else 1024, vocab)
    print(
        "\n| mpd-train | steps | tokens/s | MFU | waiting for data | peak GiB | loss, first, last |"
        "\n|---|---|---|---|---|---|---|"
    )
    good = True
    length = 1024 if small else 16_384
    for name, options in (("", []), ("--compile", ["--compile"])):
        found = mpd_train(
            folder / f"train{name}", "--shards", shards / "round1", "--student", student,
            "--pack-length", length, "--device", device.type, "--dtype", "bfloat16",
            "--learning-rate", 1e-5, "--max-loss", 1e9, *options,
        )  # fmt: skip
        good &= bool(found)
        if not found:
            continue
        later = found[len(found) // 3 :]
        seconds = sum(r["seconds"] for r in later)
        pace = sum(r["tokens"] for r in later) / seconds
        mfu = statistics.median(r.get("mfu", float("nan")) for r in later)
        waited = sum(r["data_seconds"] for r in later) / seconds
        print(
            f"| packs of {length:,} {name} | {len(found)} | {pace:,.0f} | {mfu:.1%} | {waited:.2%}"
            f" | {found[-1]['peak_memory_gib']:.1f} | {found[0]['loss']:.3f},"
            f" {found[-1]['loss']:.3f} |",
            flush=True,
        )
        shutil.rmtree(folder / f"train{name}")
    return good


def pocket(device: torch.device, folder: Path) -> bool:
    """The golden round's training, on the device, against float32 on a CPU."""
    shards = ROOT / "tests" / "data" / "golden" / "round1"
    common = ["--shards", shards, "--student", POCKET / "student", "--pack-length", 1000,
              "--learning-rate", 1e-3, "--epochs", 4]  # fmt: skip
    taught = ["--teacher", POCKET / "teacher"]
    cases: dict[str, tuple[list[object], bool, float]] = {
        "float32": ([], False, 1e-3),
        "bfloat16": (["--dtype", "bfloat16"], False, 0.02),
        "bfloat16, --compile": (["--dtype", "bfloat16", "--compile"], False, 0.02),
        "bfloat16, --activation-offload, --gradient-checkpointing": (
            ["--dtype", "bfloat16", "--activation-offload", "--gradient-checkpointing"],
            False, 0.02,
        ),
        "float32, --teacher": ([], True, 1e-3),
        "float32, --teacher, --teacher-offload": (["--teacher-offload"], True, 1e-3),
        "bfloat16, --lora-r 16": (["--dtype", "bfloat16", "--lora-r", 16], False, 0.02),
    }  # fmt: skip
    if importlib.util.find_spec("liger_kernel") and device.type == "cuda":
        cases["bfloat16, --liger-kernel"] = (["--dtype", "bfloat16", "--liger-kernel"], False, 0.02)
    if importlib.util.find_spec("peft") is None:
        del cases["bfloat16, --lora-r 16"]
    exact: dict[tuple[bool, bool], list[float]] = {}
    print(
        "\n| mpd-train, pocket models | first loss | last | first, off CPU's float32 by | mean |"
        "\n|---|---|---|---|---|"
    )
    good = True
    for number, (name, (options, with_teacher, bound)) in enumerate(cases.items()):
        more = taught if with_teacher else []
        kind = (with_teacher, "lora" in name)
        if kind not in exact:
            alike = ["--lora-r", 16] if kind[1] else []
            run = mpd_train(
                folder / f"cpu{number}", *common, *more, *alike, "--device", "cpu", "--dtype",
                "float32",
            )  # fmt: skip
            exact[kind] = [r["loss"] for r in run]
        if "--dtype" not in options:
            options = [*options, "--dtype", "float32"]
        run = mpd_train(folder / f"run{number}", *common, *more, "--device", device.type, *options)
        losses = [r["loss"] for r in run]
        if not losses or len(losses) != len(exact[kind]):
            print(f"| {name} | failed | | | |", flush=True)
            good = False
            continue
        pairs = (losses[0], exact[kind][0]), (sum(losses), sum(exact[kind]))
        off = [abs(a - b) / b for a, b in pairs]
        good &= max(off) <= bound
        over = "" if max(off) <= bound else " **over**"
        ends = f"{losses[0]:.4f} | {losses[-1]:.4f}"
        print(f"| {name} | {ends} | {off[0]:.1e} | {off[1]:.1e}{over} |", flush=True)
    return good


def engine() -> bool:
    """Runs the transformers engine where it runs by itself (CUDA if there is one); says whether
    scores are within 1e-4 of float64 and samples the same alone and in company."""
    from mpd_data.common.models import resolve_model
    from mpd_data.config import EngineConfig, SamplingConfig
    from mpd_data.engines.protocol import Completion, Scores
    from mpd_data.engines.start import start_engine

    folder = POCKET / "student"
    files = resolve_model(str(folder))
    generator = torch.Generator().manual_seed(0)
    prompts = [
        torch.randint(4, files.vocab_size, (length,), generator=generator).tolist()
        for length in range(5, 69, 4)
    ]
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    samples: list[dict[str, list[int]]] = []
    worst = 0.0
    for together in (len(prompts), 3):
        settings = EngineConfig(backend="transformers", dtype="float32", max_num_seqs=together)
        started = start_engine(files, settings)
        for index, ids in enumerate(prompts):
            started.submit_generate(f"{index}", ids, SamplingConfig(max_tokens=40), index)
            started.submit_score(f"score {index}", ids[:3], ids[3:], 8)
        found: dict[str, list[int]] = {}
        while started.in_flight:
            for result in started.step():
                if isinstance(result, Completion):
                    found[result.key] = result.token_ids
                    continue
                assert isinstance(result, Scores)
                ids = prompts[int(result.key.split()[1])]
                with torch.no_grad():
                    exact = plain(torch.tensor([ids])).logits[0, 2:-1].log_softmax(-1)
                best = exact.topk(8).values.numpy()
                worst = max(worst, float(abs(result.topk_logprobs - best).max()))
        samples.append(found)
    same = sum(samples[0][key] == samples[1][key] for key in samples[0])
    print(
        f"\ntransformers engine: largest error of a log-probability {worst:.1e};"
        f" {same} of {len(prompts)} samples the same in batches of {len(prompts)} and of 3"
    )
    return worst <= 1e-4 and same >= len(prompts) - 1


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="toy sizes")
    parser.add_argument("--only", default="attention,pocket,engine,train,steps,dense")
    options = parser.parse_args()
    device, only = torch.device(options.device), options.only.split(",")
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    ).stdout.strip()  # fmt: skip
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()
    print(
        f"{time.strftime('%Y-%m-%d')}, {name}, torch {torch.__version__}, transformers"
        f" {transformers.__version__}, commit {commit or 'unknown'}",
        flush=True,
    )
    good = True
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        if "attention" in only and device.type == "cuda":
            good &= attention_alone(device, folder)
        if "pocket" in only:
            good &= pocket(device, folder)
        if "engine" in only:
            good &= engine()
        if "train" in only:
            good &= train(device, options.small, folder)
        if "steps" in only:
            steps(device, options.small, folder, False)
        if "dense" in only:
            steps(device, options.small, folder, True)
    raise SystemExit(not good)


if __name__ == "__main__":
    main()
