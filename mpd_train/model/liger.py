"""Liger's Triton kernels for norms, gated activations and rotary embeddings; not for the loss."""

from typing import Any

import torch

from mpd_data.common.errors import ConfigError, requires


def require(device: torch.device) -> None:
    """Raise ConfigError if `device` cannot run the kernels, or if they are not installed."""
    if device.type != "cuda":
        raise ConfigError(
            "--liger-kernel: its kernels are Triton's and need a CUDA device; training is on"
            f" {device.type}. Leave it out."
        )
    _families()


def apply(model: Any, name: str) -> None:
    """Make the layers of `model`, a transformers causal language model called `name`, use the
    kernels; in place.

    Liger also patches transformers' module of the family: from then on every model of that family
    in this process needs the device. Raise ConfigError for a family that Liger does not support,
    which it would silently leave unchanged.
    """
    known, family = _families(), model.config.model_type
    if family not in known:
        raise ConfigError(
            f"--liger-kernel: {name} is of the family {family}, for which Liger has no kernels"
            f" (it has them for {', '.join(sorted(known))}). Leave it out."
        )
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    _apply_liger_kernel_to_instance(model, cross_entropy=False, fused_linear_cross_entropy=False)


def _families() -> set[str]:
    """Return the families that Liger has kernels for, as models' configurations name them."""
    with requires("liger", "--liger-kernel"):
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN
    return set(MODEL_TYPE_TO_APPLY_LIGER_FN)
