"""Time, peak memory and exactness of the losses on a GPU, beside the bare matrix products and how
others compute them.

    PYTHONPATH=. python benchmarks/kl_gpu.py --out runs/kl_gpu
    PYTHONPATH=. python benchmarks/kl_gpu.py --device cpu --small     # toy sizes: does it run?

At the sizes of Qwen3-1.7B learning from Qwen3-8B, in bfloat16. Needs torch and triton; those of
Liger 0.8.5 and TRL 1.16 that are installed are measured too. Prints Markdown tables and, at 8,192
tokens, how each bar of benchmarks/README.md stands and what a loss spends its time on; ends with
exit code 1 where a result is wrong. The losses take turns; times are medians. All of it takes some
four minutes of an H100.
"""

import argparse
import importlib
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.kl_peers import GPU_LOSSES, LOSSES, Inputs, inputs
from mpd_train.kl import Divergence, dense_kl, sparse_kl
from mpd_train.kl.divergence import NAMES

ROOT = Path(__file__).resolve().parents[1]
K = 64
BAR_TOKENS = 8192
# Rows of a bare product: more do not make it faster.
PRODUCT_ROWS = 2048
# What a peer's loss imports, by the loss's name.
MODULES = {
    "dense, Liger 0.8.5": "liger_kernel.chunked_loss.jsd_loss",
    "dense, Liger 0.8.5, float32 logits": "liger_kernel.ops",
    "dense, TRL 1.16": "trl.kernels.chunked_divergence",
}


def measure(
    device: torch.device, works: dict[str, Callable[[], Any]], turns: int
) -> dict[str, tuple[float, float] | None]:
    """Median milliseconds, and peak GiB above the start, of each; None where memory ran out."""
    peaks: dict[str, float] = {}
    times: dict[str, list[float]] = {name: [] for name in works}
    for name, work in works.items():
        try:
            work()  # compiles and tunes
            timed(device, work)
            start = 0
            if device.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
                start = torch.cuda.memory_allocated()
            timed(device, work)
            if device.type == "cuda":
                peaks[name] = (torch.cuda.max_memory_allocated() - start) / 2**30
            else:
                peaks[name] = float("nan")
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
    for _ in range(turns):
        for name in peaks:
            times[name].append(timed(device, works[name]))
    return {
        name: (statistics.median(times[name]), peaks[name]) if name in peaks else None
        for name in works
    }


def timed(device: torch.device, work: Callable[[], Any]) -> float:
    """Milliseconds."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - began)


def products(x: Inputs, teacher: bool) -> None:
    """The matrix products that a loss cannot do without, and nothing else."""
    hidden, weight = x.hidden.detach(), x.weight.detach()
    for rows, of_teacher in zip(
        hidden.split(PRODUCT_ROWS), x.teacher_hidden.split(PRODUCT_ROWS), strict=True
    ):
        logits = rows @ weight.T
        if teacher:
            of_teacher @ x.teacher_weight.T
        logits @ weight
        logits.T @ rows


def ours(x: Inputs, teacher: str, **options: Any) -> Tensor:
    options.setdefault("normalizer", float(len(x.hidden)))
    if teacher == "dense":
        models = x.hidden, x.weight, x.teacher_hidden, x.teacher_weight
        out = dense_kl(*models, **options)
    else:
        record = x.topk_ids, x.topk_logprobs, x.tail_logprobs
        out = sparse_kl(x.hidden, x.weight, *record, **options)
    out.loss.backward()
    return out.loss


def correctness(device: torch.device, backends: list[str]) -> bool:
    """Prints the worst relative error of loss, dH and dW; says whether all are in bounds."""
    bounds = {"float64": 1e-11, "float32": 5e-5, "bfloat16": 5e-3}
    columns = [
        (backend, dtype)
        for backend in backends
        for dtype in bounds
        if not (backend == "triton" and dtype == "float64")
    ]
    print("\n| against float64 | " + " | ".join(f"{b}, {d}" for b, d in columns) + " |")
    print("|---" * (1 + len(columns)) + "|")
    good = True
    for gap in (3.0, 0.03):
        data = inputs(300, 5000, 64, 96, K, str(device), std=8.0, gap=gap)
        for name in NAMES:
            for teacher in ("dense", "sparse"):
                options: dict[str, Any] = {"divergence": Divergence(name), "chunk_size": 128}
                exact = data.to(torch.float64)
                wanted = ours(exact, teacher, **options, backend="reference").detach()
                cells = []
                for backend, dtype in columns:
                    x = data.to(getattr(torch, dtype))
                    loss = ours(x, teacher, **options, backend=backend).detach()
                    pairs = [(loss, wanted), (x.hidden.grad, exact.hidden.grad)]
                    pairs.append((x.weight.grad, exact.weight.grad))
                    error = max(relative(a, b) for a, b in pairs)
                    # Float32 logits of 30 have errors of 2e-6, which count against a small gap.
                    bound = 2e-3 if dtype == "float32" and gap < 1 else bounds[dtype]
                    good &= error <= bound
                    cells.append(f"{error:.1e}{'' if error <= bound else ' **over**'}")
                print(f"| {name}, {teacher}, gap {gap} | {' | '.join(cells)} |")
    return good


def relative(found: Tensor | None, exact: Tensor | None) -> float:
    assert found is not None and exact is not None
    return ((found.double() - exact).norm() / exact.norm()).item()


def regimes(device: torch.device) -> None:
    """Everyone's error in the gradient at bfloat16 inputs."""
    print("\n| gradient's error, bfloat16 inputs, logits' deviation 8 | gap 3 | 0.3 | 0.03 |")
    print("|---|---|---|---|")
    found: dict[str, list[str]] = {}
    for gap in (3.0, 0.3, 0.03):
        data = inputs(96, 8192, 256, 1024, K, str(device), std=8.0, gap=gap)
        for name, step in available(device, ("dense", "sparse")).items():
            exact, x = data.to(torch.float64), data.to(torch.bfloat16)
            ours(exact, name.split(",")[0], backend="reference")
            step(x)
            errors = (
                relative(x.hidden.grad, exact.hidden.grad),
                relative(x.weight.grad, exact.weight.grad),
            )
            found.setdefault(name, []).append(f"{max(errors):.2%}")
    for name, cells in found.items():
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def available(
    device: torch.device, teachers: tuple[str, ...]
) -> dict[str, Callable[[Inputs], Tensor]]:
    """Of the teachers' losses, those that run on `device` and whose package is installed."""
    found = {}
    for name, loss in (LOSSES if device.type == "cpu" else LOSSES | GPU_LOSSES).items():
        try:
            importlib.import_module(MODULES.get(name, "torch"))
        except ImportError:
            continue
        if name.startswith(teachers):
            found[name] = loss
    return found


def losses(device: torch.device, small: bool, turns: int, rows: list[dict[str, Any]]) -> None:
    """The tables of times and memory, into `rows` too, and of what the time is spent on."""
    vocab, width, teacher_width = (2048, 64, 128) if small else (151_936, 2048, 4096)
    profiles: dict[str, dict[str, tuple[int, float]]] = {}
    print("\n| T | loss | ms | products alone are | peak GiB | beyond fp32 dW and 5 KiB a token |")
    print("|---|---|---|---|---|---|")
    for tokens in (64, 128) if small else (4096, 8192, 16_384, 32_768):
        x = inputs(tokens, vocab, width, teacher_width, K, str(device)).to(torch.bfloat16)
        for teacher in ("dense", "sparse"):
            works = {name: step(x, loss) for name, loss in available(device, (teacher,)).items()}
            if teacher == "dense":
                for divergence in ("reverse_kl", "jsd"):
                    works[f"dense, ours, {divergence}"] = step(
                        x, lambda x, d=divergence: ours(x, "dense", divergence=Divergence(d))
                    )
                # Whether products of fewer rows, which spare memory, cost time.
                works[f"dense, ours, {PRODUCT_ROWS:,} rows of logits"] = step(
                    x, lambda x: ours(x, "dense", chunk_size=PRODUCT_ROWS)
                )
            else:
                works |= variants(x)
            if device.type == "cuda":
                works[f"{teacher}, ours, torch"] = step(
                    x, lambda x, t=teacher: ours(x, t, backend="torch")
                )
            bare = f"{teacher}, products alone"
            works[bare] = lambda x=x, t=teacher: products(x, t == "dense")
            found = measure(device, works, turns)
            of_bare = found[bare]
            assert of_bare is not None
            for name, result in found.items():
                if result is None:
                    print(f"| {tokens:,} | {name} | out of memory | | | |", flush=True)
                    continue
                ms, peak = result
                beyond = peak - (4 * vocab * width + 5 * 1024 * tokens) / 2**30
                row = {"tokens": tokens, "loss": name, "ms": ms, "gib": peak, "beyond": beyond}
                rows.append(row | {"roofline": of_bare[0] / ms})
                print(
                    f"| {tokens:,} | {name} | {ms:.1f} | {of_bare[0] / ms:.0%} | {peak:.2f}"
                    f" | {beyond:.2f} |",
                    flush=True,
                )
            if tokens == (128 if small else BAR_TOKENS):
                profiles[f"{teacher}, ours"] = profile(device, works[f"{teacher}, ours"])
                profiles[bare] = profile(device, works[bare])
    print("\n| loss | kernel | times | ms |\n|---|---|---|---|")
    for name, kernels in profiles.items():
        for kernel, (times, ms) in kernels.items():
            print(f"| {name} | `{kernel[:90]}` | {times} | {ms:.2f} |")


def profile(device: torch.device, work: Callable[[], Any]) -> dict[str, tuple[int, float]]:
    """How often each kernel runs, and for how many milliseconds in all, longest first; those of
    less than a hundredth of the whole are added up."""
    on_gpu = device.type == "cuda"
    kind = torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[kind]) as profiler:
        timed(device, work)
    found = {
        event.key: (
            event.count,
            (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1000,
        )
        for event in profiler.key_averages()
    }
    whole = sum(ms for _, ms in found.values())
    large = {kernel: x for kernel, x in found.items() if x[1] >= 0.01 * whole}
    rest = [x for kernel, x in found.items() if kernel not in large]
    large = dict(sorted(large.items(), key=lambda item: -item[1][1]))
    large["others"] = (sum(times for times, _ in rest), sum(ms for _, ms in rest))
    return large | {"all": (sum(times for times, _ in large.values()), whole)}


def step(x: Inputs, loss: Callable[[Inputs], Tensor]) -> Callable[[], None]:
    def work() -> None:
        loss(x)
        # Not at the next one's beginning: they would be there when memory begins to count.
        x.hidden.grad = x.weight.grad = None

    return work


def variants(x: Inputs) -> dict[str, Callable[[], None]]:
    """A frozen head."""

    def frozen() -> None:
        record = x.topk_ids, x.topk_logprobs, x.tail_logprobs
        normalizer = float(len(x.hidden))
        sparse_kl(x.hidden, x.weight.detach(), *record, normalizer=normalizer).loss.backward()
        x.hidden.grad = None

    return {"sparse, ours, frozen head": frozen}


def bars(rows: list[dict[str, Any]]) -> None:
    """How the bars stand at BAR_TOKENS."""
    at = {row["loss"]: row for row in rows if row["tokens"] == BAR_TOKENS}
    if not at:
        return
    print(f"\n| bar, T = {BAR_TOKENS:,} | found | wanted |\n|---|---|---|")
    for teacher, most in (("sparse", 1.25), ("dense", 1.85)):
        own = at[f"{teacher}, ours"]
        print(f"| {teacher}: share of the products' roofline | {own['roofline']:.0%} | >= 70% |")
        print(f"| {teacher}: GiB beyond dW and 5 KiB a token | {own['beyond']:.2f} | <= {most} |")
    for teacher, peer, factor in (
        ("dense", "naive", 1.4),
        ("dense", "Liger 0.8.5", 2.5),
        ("dense", "TRL 1.16", 1.3),
        ("sparse", "naive", 1.3),
        ("sparse", "VeOmni's way", 1.5),
    ):
        name = f"{teacher}, {peer}"
        if name not in at:
            print(f"| {teacher}: times as fast as {peer} | not measured | >= {factor} |")
            continue
        faster = at[name]["ms"] / at[f"{teacher}, ours"]["ms"]
        print(f"| {teacher}: times as fast as {peer} | {faster:.2f} | >= {factor} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="toy sizes")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--out", type=Path, help="folder for the figures as JSON")
    options = parser.parse_args()
    device = torch.device(options.device)
    describe = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(describe, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()
    print(
        f"{time.strftime('%Y-%m-%d')}, {name}, torch {torch.__version__}, commit"
        f" {commit or 'unknown'}"
    )
    good = correctness(device, ["triton", "torch"] if device.type == "cuda" else ["torch"])
    regimes(device)
    rows: list[dict[str, Any]] = []
    losses(device, options.small, options.turns, rows)
    bars(rows)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "kl_gpu.json").write_text(json.dumps(rows, indent=1))
    raise SystemExit(not good)


if __name__ == "__main__":
    main()
