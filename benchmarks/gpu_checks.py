"""What only a GPU can answer about the trainer and the engine (benchmarks/kl_gpu.py: the losses):

    PYTHONPATH=. python benchmarks/gpu_checks.py

1. a training step: a Qwen3-1.7B-shaped student with random weights, 8k tokens, cached top K;
2. the transformers engine with the pocket student: scores against float64 on the CPU, and samples
   that do not depend on the batch.

`--device cpu --small` runs all of it on toy sizes, to see that the script works. Needs torch and
transformers, and for the last part the project's own dependencies (left out, with a word, where
they are not installed); prints Markdown tables for benchmarks/README.md.
"""

import argparse
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers

from mpd_train.kl import sparse_kl

ROOT = Path(__file__).resolve().parents[1]
K = 64


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


def training_step(device: torch.device, small: bool) -> None:
    shape = (
        {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 2048}
        if small
        else {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28,
              "vocab_size": 151_936}
    )  # fmt: skip
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16} if small else {
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128}  # fmt: skip
    config = transformers.Qwen3Config(**shape, **heads, tie_word_embeddings=True)
    with torch.device(device):
        model = transformers.Qwen3ForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    tokens, sequence = (128, 32) if small else (8192, 2048)
    ids = torch.randint(0, config.vocab_size, (1, tokens), device=device)
    positions = torch.arange(tokens, device=device)[None] % sequence
    k_ids = torch.randperm(config.vocab_size, device=device)[:K].expand(tokens, K)
    logprobs = torch.full((tokens, K), -5.0, device=device)
    tail = torch.full((tokens,), -1.0, device=device)

    def step() -> None:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            states = model.base_model(input_ids=ids, position_ids=positions, use_cache=False)
            hidden = states.last_hidden_state[0].to(torch.bfloat16)
            head = model.get_output_embeddings().weight
            loss = sparse_kl(hidden, head, k_ids, logprobs, tail, normalizer=float(tokens)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    ms, peak = measure(device, step)
    parameters = sum(p.numel() for p in model.parameters())
    flops = 6 * parameters * tokens / (ms / 1000)
    print(
        f"\ntraining step: {parameters / 1e9:.2f} B parameters, {tokens} tokens: {ms:.0f} ms,"
        f" {1000 * tokens / ms:,.0f} tokens/s, {flops / 1e12:.0f} TFLOP/s (6 N per token), peak"
        f" {peak:.1f} GiB above weights and moments"
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
    raise SystemExit(not engine())


if __name__ == "__main__":
    main()
