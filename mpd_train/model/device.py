"""Choose the device and the dtype of computation."""

import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from mpd_data.common.errors import ConfigError


def choose_device(name: str) -> torch.device:
    """Return the device for --device, under torchrun the process's own GPU. Raise ConfigError if
    there is no GPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: this torch sees no CUDA device.")
    # torchrun's processes have a GPU each.
    local = os.environ.get("LOCAL_RANK")
    if name == "cuda" and local is not None:
        torch.cuda.set_device(int(local))
        return torch.device("cuda", int(local))
    return torch.device(name)


def compute_dtype(device: torch.device, name: str) -> torch.dtype:
    """Return the dtype for --dtype: auto is bfloat16 on CUDA and float32 on a CPU."""
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" else "float32"
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[Any]:
    """Return the context of bfloat16 compute over float32 weights, or of plain float32."""
    if dtype == torch.float32:
        return nullcontext()
    # Without the cache, which would keep a copy of each weight until the end of the pass.
    return torch.autocast(device.type, dtype=dtype, cache_enabled=False)
