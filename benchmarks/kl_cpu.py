"""Time, peak memory and exactness of the losses on a CPU, beside how others compute them.

    python -m venv /tmp/peers
    /tmp/peers/bin/pip install --index-url https://download.pytorch.org/whl/cpu torch==2.13.0
    /tmp/peers/bin/pip install liger-kernel==0.8.5 trl==1.16.0 matplotlib
    PYTHONPATH=. OMP_NUM_THREADS=1 /tmp/peers/bin/python benchmarks/kl_cpu.py --out runs/kl_cpu

prints Markdown tables, and writes kl_cpu.json and kl_cpu.png to the folder (half an hour). One
process for each loss; they take turns, so that what else the machine does meets all of them. Time:
the median of five turns, three with the large vocabulary. Memory: the process's peak above the
inputs, in a step of its own, gradients included.
"""

import argparse
import ctypes
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.kl_peers import LOSSES, Inputs, inputs
from mpd_train.kl import dense_kl, sparse_kl

ROOT = Path(__file__).resolve().parents[1]
WIDTH, TEACHER_WIDTH, K = 512, 1024, 64
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SIZES = (32_768, 151_936)


def worker(name: str, dtype: str, vocab: int, tokens: int) -> None:
    """Answers each line of standard input with a figure: `time` in seconds, `memory` in MiB."""
    data = inputs(tokens, vocab, WIDTH, TEACHER_WIDTH, K, "cpu").to(DTYPES[dtype])
    step = LOSSES[name]

    def run() -> None:
        data.hidden.grad = data.weight.grad = None
        step(data)

    run()
    for line in sys.stdin:
        if line.strip() == "memory":
            data.hidden.grad = data.weight.grad = None
            ctypes.CDLL("libc.so.6").malloc_trim(0)
            before = of_process("VmRSS")
            Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
            run()
            figure = of_process("VmHWM") - before
        else:
            began = time.perf_counter()
            run()
            figure = time.perf_counter() - began
        print(figure, flush=True)


def of_process(field: str) -> float:
    """MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(x for x in lines if x.startswith(field)).split()[1]) / 1024


def measure(
    names: list[str],
    dtype: str,
    vocab: int,
    tokens: int,
    turns: int,
    settings: dict[str, str] | None = None,
) -> dict[str, tuple[float, float]]:
    """Median seconds and peak MiB of each loss, in processes with these environment settings."""
    workers = {}
    for name in names:
        command = [sys.executable, __file__, "--worker", name, dtype, str(vocab), str(tokens)]
        workers[name] = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | (settings or {}),
        )

    def ask(name: str, what: str) -> float:
        process = workers[name]
        assert process.stdin is not None and process.stdout is not None
        print(what, file=process.stdin, flush=True)
        answer = process.stdout.readline()
        if not answer:
            raise SystemExit(f"{name}, {dtype}, V = {vocab}, T = {tokens}: ended without an answer")
        return float(answer)

    memory = {name: ask(name, "memory") for name in names}
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(turns):
        for name in names:
            times[name].append(ask(name, "time"))
    for process in workers.values():
        process.communicate()
    return {name: (statistics.median(times[name] or [math.nan]), memory[name]) for name in names}


def table(turns: int, sizes: list[int], results: list[dict[str, Any]]) -> None:
    print("\n| T = 2,048 | V | inputs | s | of naive | peak MiB | naive's is |")
    print("|---|---|---|---|---|---|---|")
    for vocab in sizes:
        for dtype in DTYPES:
            for teacher in ("dense", "sparse"):
                names = [name for name in LOSSES if name.startswith(teacher)]
                found = measure(names, dtype, vocab, 2048, turns if vocab < 100_000 else 3)
                naive_s, naive_mib = found[f"{teacher}, naive"]
                for name, (seconds, mib) in found.items():
                    row = {"loss": name, "vocab": vocab, "dtype": dtype, "tokens": 2048}
                    results.append(row | {"seconds": seconds, "mib": mib})
                    print(
                        f"| {name} | {vocab:,} | {dtype} | {seconds:.2f} | {seconds / naive_s:.2f}"
                        f" | {mib:.0f} | {naive_mib / mib:.1f} x |",
                        flush=True,
                    )


def growth(results: list[dict[str, Any]]) -> None:
    """Against T at V = 32,768 in float32."""
    names = ["dense, naive", "dense, TRL 1.16", "dense, Liger 0.8.5", "dense, ours"]
    names += ["sparse, naive", "sparse, ours"]
    for tokens in (512, 1024, 2048, 4096):
        found = measure(names, "float32", 32_768, tokens, 3)
        # What is alive, without what glibc keeps of what was freed: a few MiB decide here.
        alive = measure(names, "float32", 32_768, tokens, 0, {"MALLOC_MMAP_THRESHOLD_": "65536"})
        for name, (seconds, _) in found.items():
            mib = alive[name][1]
            row = {"loss": name, "vocab": 32_768, "dtype": "float32", "tokens": tokens}
            results.append(row | {"seconds": seconds, "mib": mib, "growth": True})
    print("\n| V = 32,768, float32 | KiB a token above 1,024 | of dH's 2 KiB |\n|---|---|---|")
    for name in names:
        at = {r["tokens"]: r["mib"] for r in results if r.get("growth") and r["loss"] == name}
        each = (at[4096] - at[1024]) * 1024 / 3072
        print(f"| {name} | {each:.2f} | {each / (WIDTH * 4 / 1024):.2f} |")


def exactness() -> None:
    """The larger relative error of dH and dW against float64."""
    print("\n| gradient's error, bfloat16 inputs, logits' deviation 8 | gap 3 | 0.3 | 0.03 |")
    print("|---|---|---|---|")
    found: dict[str, list[str]] = {}
    chunked = 0.0
    for gap in (3.0, 0.3, 0.03):
        data = inputs(96, 8192, 256, TEACHER_WIDTH, K, "cpu", std=8.0, gap=gap)
        for name, step in LOSSES.items():
            teacher = name.split(",")[0]
            error = max(relative(gradients(step, data, torch.bfloat16), reference(teacher, data)))
            found.setdefault(name, []).append(f"{error:.2%}")
        for teacher in ("dense", "sparse"):
            exact = reference(teacher, data)
            for size in (1, 7, 64, 512):
                got = gradients(lambda x, t=teacher, s=size: chunks(t, x, s), data, torch.float64)
                chunked = max(chunked, *relative(got, exact))
    for name, cells in found.items():
        print(f"| {name} | {' | '.join(cells)} |")
    print(f"\nOurs in float64, in chunks of 1, 7, 64 and 512: at most {chunked:.1e}.")
    print("(VeOmni's way lacks the tail: its error is that of another loss.)")


def call(teacher: str, x: Inputs, **options: Any) -> torch.Tensor:
    options["normalizer"] = float(len(x.hidden))
    if teacher == "dense":
        out = dense_kl(x.hidden, x.weight, x.teacher_hidden, x.teacher_weight, **options)
    else:
        record = x.topk_ids, x.topk_logprobs, x.tail_logprobs
        out = sparse_kl(x.hidden, x.weight, *record, **options)
    out.loss.backward()
    return out.loss


def chunks(teacher: str, x: Inputs, size: int) -> torch.Tensor:
    return call(teacher, x, chunk_size=size)


def reference(teacher: str, data: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    return gradients(lambda x: call(teacher, x, backend="reference"), data, torch.float64)


def gradients(step: Any, data: Inputs, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    x = data.to(dtype)
    step(x)
    assert x.hidden.grad is not None and x.weight.grad is not None
    return x.hidden.grad, x.weight.grad


def relative(found: tuple[torch.Tensor, ...], exact: tuple[torch.Tensor, ...]) -> list[float]:
    return [((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, exact, strict=True)]


def plot(results: list[dict[str, Any]], out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [r for r in results if r.get("growth")]
    figure, panels = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    names = list(dict.fromkeys(r["loss"] for r in rows))
    colours = dict(zip(names, plt.get_cmap("tab10").colors, strict=False))
    for axes, field, label in zip(
        panels, ("mib", "seconds"), ("peak above the inputs, MiB", "seconds a step"), strict=True
    ):
        for name in names:
            points = sorted((r["tokens"], r[field]) for r in rows if r["loss"] == name)
            ours = name.endswith("ours")
            axes.plot(
                *zip(*points, strict=True), label=name, color=colours[name],
                marker="o", linewidth=2.5 if ours else 1.2, linestyle="-" if ours else "--",
            )  # fmt: skip
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks([512, 1024, 2048, 4096], ["512", "1,024", "2,048", "4,096"])
        axes.set_xlabel("tokens")
        axes.set_title(label, fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].legend(frameon=False, fontsize=8)
    figure.savefig(out, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder for the figures")
    parser.add_argument("--turns", type=int, default=5, help="with the small vocabulary")
    parser.add_argument("--vocab", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--only", choices=("table", "growth", "exactness"))
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        name, dtype, vocab, tokens = options.worker
        return worker(name, dtype, int(vocab), int(tokens))
    describe = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(describe, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    print(
        f"{time.strftime('%Y-%m-%d')}, {platform.machine()}, {os.cpu_count()} cores,"
        f" {torch.get_num_threads()} thread, torch {torch.__version__}, commit {commit}"
    )
    results: list[dict[str, Any]] = []
    if options.only in (None, "exactness"):
        exactness()
    if options.only in (None, "table"):
        table(options.turns, options.vocab, results)
    if options.only in (None, "growth"):
        growth(results)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "kl_cpu.json").write_text(json.dumps(results, indent=1))
        if options.only in (None, "growth"):
            plot(results, options.out / "kl_cpu.png")
    return None


if __name__ == "__main__":
    main()
