"""What only a GPU can answer about the trainer and the engine (benchmarks/kl_gpu.py: the losses):

    PYTHONPATH=. python benchmarks/gpu_checks.py

1. training steps of a Qwen3-1.7B-shaped student with random weights, 8k to 32k tokens, from cached
   top K and from a Qwen3-8B-shaped teacher in the process, with and without recomputed activations,
   compiled layers and, where it is installed, Liger's kernels: tokens/s, MFU, memory;
2. the transformers engine with the pocket student: scores against float64 on the CPU, and samples
   that do not depend on the batch.

`--device cpu --small` runs all of it on toy sizes, to see that the script works. Needs torch and
transformers, and for the last part the project's own dependencies (left out, with a word, where
they are not installed); prints Markdown tables for benchmarks/README.md.
"""

import argparse
import importlib.util
import itertools
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from mpd_train.kl import dense_kl, sparse_kl

ROOT = Path(__file__).resolve().parents[1]
K = 64
# Dense bfloat16 of an H100 SXM or H200.
PEAK_FLOPS = 989e12


def measure(device: torch.device, work: Callable[[], object]) -> tuple[float, float]:
    """Median milliseconds of five runs after a warm-up, and peak GiB above the start."""
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
    times = []
    for _ in range(5):
        begun = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - begun))
    peak = (torch.cuda.max_memory_allocated() - start) / 2**30 if device.type == "cuda" else 0.0
    return statistics.median(times), peak


def qwen3(width: int, inner: int, layers: int, heads: int, vocab: int) -> Any:
    """A Qwen3 with random weights, on the current device."""
    head_dim = 128 if width > 64 else 16
    config = transformers.Qwen3Config(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8 if heads > 8 else 2,
        head_dim=head_dim,
        vocab_size=vocab,
        tie_word_embeddings=width <= 2048,
    )
    return transformers.Qwen3ForCausalLM(config)


def training_step(device: torch.device, small: bool, liger_kernel: bool = False) -> None:
    """Steps of a Qwen3-1.7B-shaped student: from cached records, and from a Qwen3-8B-shaped teacher
    in the process. With `liger_kernel` for the rest of this process's life."""
    vocab, sequence = (2048, 32) if small else (151_936, 2048)
    with torch.device(device):
        student = qwen3(64, 128, 2, 4, vocab) if small else qwen3(2048, 6144, 28, 16, vocab)
        torch.set_default_dtype(torch.bfloat16)
        teacher = qwen3(128, 256, 2, 4, vocab) if small else qwen3(4096, 12_288, 36, 32, vocab)
        torch.set_default_dtype(torch.float32)
    teacher.requires_grad_(False)
    if liger_kernel:
        from liger_kernel.transformers import apply_liger_kernel_to_qwen3

        for model in (student, teacher):
            apply_liger_kernel_to_qwen3(fused_linear_cross_entropy=False, model=model)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5, fused=True)
    parameters = sum(p.numel() for p in student.parameters())
    of_teacher = sum(p.numel() for p in teacher.parameters())
    print(
        f"\nStudent of {parameters / 1e9:.2f} B parameters, teacher of {of_teacher / 1e9:.2f} B,"
        f" sequences of {sequence} tokens; FLOPs: 6 a parameter and token of the student, 2 of the"
        f" teacher; peak above weights and moments; MFU of {PEAK_FLOPS / 1e12:.0f} TFLOP/s."
        "\n\n| tokens | teacher | recompute | compile | ms | tokens/s | TFLOP/s | MFU | peak GiB |"
        "\n|---|---|---|---|---|---|---|---|---|"
    )
    plain = [layer.forward for layer in student.model.layers]
    # As --compile does it.
    compiled = [torch.compile(forward, dynamic=True) for forward in plain]
    for tokens in (64, 128) if small else (8192, 16_384, 32_768):
        ids = torch.randint(0, vocab, (1, tokens), device=device)
        positions = torch.arange(tokens, device=device)[None] % sequence
        record = (
            torch.randperm(vocab, device=device)[:K].expand(tokens, K),
            torch.full((tokens, K), -5.0, device=device),
            torch.full((tokens,), -1.0, device=device),
        )

        def states(model: Any, ids: Tensor = ids, positions: Tensor = positions) -> Tensor:
            found = model.base_model(input_ids=ids, position_ids=positions, use_cache=False)
            return found.last_hidden_state[0].to(torch.bfloat16)

        def step(dense: bool, record: Any = record, states: Any = states) -> None:
            with torch.autocast(device.type, dtype=torch.bfloat16):
                hidden, head = states(student), student.get_output_embeddings().weight
                normalizer = float(len(hidden))
                if dense:
                    with torch.inference_mode():
                        taught = states(teacher)
                    other = teacher.get_output_embeddings().weight
                    out = dense_kl(hidden, head, taught.clone(), other, normalizer=normalizer)
                else:
                    out = sparse_kl(hidden, head, *record, normalizer=normalizer)
            out.loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        student.train()
        for dense, recompute, fast in itertools.product((False, True), repeat=3):
            if recompute:
                student.gradient_checkpointing_enable({"use_reentrant": False})
            else:
                student.gradient_checkpointing_disable()
            for layer, forward in zip(
                student.model.layers, compiled if fast else plain, strict=True
            ):
                layer.forward = forward
            kind = "dense" if dense else "cached"
            again, how = ("yes" if on else "no" for on in (recompute, fast))
            row = f"| {tokens:,} | {kind} | {again} | {how}"
            try:
                ms, peak = measure(device, lambda d=dense, step=step: step(d))
            except torch.OutOfMemoryError:
                optimizer.zero_grad(set_to_none=True)
                torch.cuda.empty_cache()
                print(f"{row} | out of memory | | | | |", flush=True)
                continue
            flops = (6 * parameters + 2 * of_teacher * dense) * tokens / (ms / 1000)
            print(
                f"{row} | {ms:.0f} | {1000 * tokens / ms:,.0f} | {flops / 1e12:.0f}"
                f" | {flops / PEAK_FLOPS:.0%} | {peak:.1f} |",
                flush=True,
            )


def engine() -> bool:
    """Runs the transformers engine where it runs by itself (CUDA if there is one); says whether
    scores are within 1e-4 of float64 and samples the same alone and in company."""
    try:
        from mpd_data.config import EngineConfig, SamplingConfig
        from mpd_data.engine import Completion, Scores, start_engine
        from mpd_data.models import resolve_model
    except ModuleNotFoundError as error:
        print(f"\ntransformers engine: not run, {error.name} is not installed")
        return True
    folder = ROOT / "pipelines" / "pocket" / "models" / "student"
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
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="toy sizes")
    options = parser.parse_args()
    device = torch.device(options.device)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    ).stdout.strip()  # fmt: skip
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()
    print(
        f"{time.strftime('%Y-%m-%d')}, {name}, torch {torch.__version__}, transformers"
        f" {transformers.__version__}, commit {commit or 'unknown'}"
    )
    training_step(device, options.small)
    if device.type == "cuda" and importlib.util.find_spec("liger_kernel"):
        print("\nThe same with Liger's kernels around the products (--liger-kernel):")
        training_step(device, options.small, liger_kernel=True)
    raise SystemExit(not engine())


if __name__ == "__main__":
    main()
