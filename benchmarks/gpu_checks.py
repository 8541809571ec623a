"""What only a GPU can answer about the losses and the trainer, in one command:

    python benchmarks/gpu_checks.py

1. correctness: the chunked losses on CUDA against the float64 reference, in float64, float32 and
   bfloat16, every divergence and both teachers;
2. roofline: time and peak memory at Qwen3-1.7B <- Qwen3-8B sizes beside the time that the bare
   matrix products take in the same run, and beside the plain loss that holds all logits;
3. a training step: a Qwen3-1.7B-shaped student with random weights, 8k tokens, cached top K;
4. the transformers engine with the pocket student: scores against float64 on the CPU, and samples
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
from torch import Tensor

from mpd_train.kl import NAMES, Divergence, dense_kl, sparse_kl
from mpd_train.kl.reference import dense_reference, sparse_reference

ROOT = Path(__file__).resolve().parents[1]
K = 64


def top_k(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, log-probabilities and exact log tail mass of a teacher's logits [n, V]."""
    logprobs = logits.log_softmax(-1)
    top = logprobs.topk(min(K, logits.shape[1] - 1), dim=1)
    outside = logprobs.scatter(1, top.indices, float("-inf"))
    return top.indices, top.values, outside.logsumexp(1)


def relative(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def correctness(device: torch.device) -> bool:
    """Prints the worst relative error of loss, dH and dW; says whether all are in bounds."""
    print("\n| divergence | teacher | float64 | float32 | bfloat16 |\n|---|---|---|---|---|")
    bounds = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 2e-2}
    generator = torch.Generator().manual_seed(0)
    sizes = {"h": (300, 64), "w": (5000, 64), "th": (300, 96), "tw": (5000, 96)}
    drawn = {
        name: torch.randn(size, generator=generator).bfloat16().double().to(device)
        for name, size in sizes.items()
    }
    ids, logprobs, tail = top_k(drawn["th"] @ drawn["tw"].T)
    ones = torch.ones(300, dtype=torch.float64, device=device)
    good = True
    for name in NAMES:
        for teacher in ("dense", "sparse"):
            divergence = Divergence(name)
            h, w = (drawn[x].clone().requires_grad_() for x in ("h", "w"))
            if teacher == "dense":
                exact = dense_reference(h, w, drawn["th"], drawn["tw"], divergence, ones, 300.0)
            else:
                exact = sparse_reference(h, w, ids, logprobs, tail, divergence, ones, 300.0)
            exact.backward()
            errors = []
            for dtype, bound in bounds.items():
                a, b = (drawn[x].to(dtype, copy=True).requires_grad_() for x in ("h", "w"))
                options = {"normalizer": 300.0, "divergence": divergence, "chunk_size": 128}
                if teacher == "dense":
                    th, tw = drawn["th"].to(dtype), drawn["tw"].to(dtype)
                    loss = dense_kl(a, b, th, tw, **options).loss
                else:
                    loss = sparse_kl(a, b, ids, logprobs, tail, **options).loss
                loss.backward()
                error = max(
                    relative(loss.detach(), exact.detach()),
                    relative(a.grad, h.grad),
                    relative(b.grad, w.grad),
                )
                good = good and error <= bound
                errors.append(f"{error:.1e}{'' if error <= bound else ' **over**'}")
            print(f"| {name} | {teacher} | {' | '.join(errors)} |")
    return good


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


def roofline(device: torch.device, small: bool) -> None:
    vocab, hs, ht = (2048, 64, 128) if small else (151_936, 2048, 4096)
    head = torch.randn(vocab, hs, device=device, dtype=torch.bfloat16).mul_(0.02).requires_grad_()
    teacher_head = torch.randn(vocab, ht, device=device, dtype=torch.bfloat16).mul_(0.02)
    print(
        "\n| T | loss | ms | products alone, ms | share of roofline | naive, ms | peak GiB |"
        " naive GiB |\n|---|---|---|---|---|---|---|---|"
    )
    for tokens in [64] if small else [4096, 8192, 16384, 32768]:
        hidden = torch.randn(tokens, hs, device=device, dtype=torch.bfloat16).requires_grad_()
        teacher_hidden = torch.randn(tokens, ht, device=device, dtype=torch.bfloat16)
        with torch.no_grad():
            parts = [top_k((t @ teacher_head.T).float()) for t in teacher_hidden.split(512)]
            records = [torch.cat(part) for part in zip(*parts, strict=True)]

        def products(teacher: bool, hidden: Tensor = hidden, th: Tensor = teacher_hidden) -> None:
            for x, t in zip(hidden.detach().split(2048), th.split(2048), strict=True):
                g = x @ head.detach().T
                if teacher:
                    t @ teacher_head.T
                g @ head.detach()
                g.T @ x

        def naive(teacher: bool, hidden: Tensor = hidden, th: Tensor = teacher_hidden,
                  records: list[Tensor] = records) -> None:  # fmt: skip
            logq = (hidden @ head.T).float().log_softmax(-1)
            if teacher:
                logp = (th @ teacher_head.T).float().log_softmax(-1)
                loss = (logp.exp() * (logp - logq)).sum() / len(hidden)
            else:
                ids, logp, tail = records
                q = logq.gather(1, ids)
                q_tail = torch.log1p(-q.exp().sum(1).clamp(max=1 - 1e-6))
                loss = (logp.exp() * (logp - q)).sum() + (tail.exp() * (tail - q_tail)).sum()
            loss.backward()
            hidden.grad = head.grad = None

        def fused(teacher: bool, hidden: Tensor = hidden, th: Tensor = teacher_hidden,
                  records: list[Tensor] = records) -> None:  # fmt: skip
            if teacher:
                out = dense_kl(hidden, head, th, teacher_head, normalizer=float(len(hidden)))
            else:
                out = sparse_kl(hidden, head, *records, normalizer=float(len(hidden)))
            out.loss.backward()
            hidden.grad = head.grad = None

        for teacher in (False, True):
            label = "dense" if teacher else f"sparse, K={K}"
            ms, peak = measure(device, lambda t=teacher: fused(t))
            bare, _ = measure(device, lambda t=teacher: products(t))
            try:
                plain, plain_peak = measure(device, lambda t=teacher: naive(t))
                plain_cells = f"{plain:.1f} | {peak:.2f} | {plain_peak:.2f}"
            except torch.cuda.OutOfMemoryError:
                plain_cells = f"out of memory | {peak:.2f} | -"
            print(
                f"| {tokens} | {label} | {ms:.1f} | {bare:.1f} | {bare / ms:.0%} | {plain_cells} |"
            )


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
    good = correctness(device)
    roofline(device, options.small)
    training_step(device, options.small)
    good &= engine()
    raise SystemExit(not good)


if __name__ == "__main__":
    main()
