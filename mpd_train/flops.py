"""What a training step computes, for the share of the device's peak that it reaches (MFU)."""

from dataclasses import dataclass
from typing import Any

import torch

from mpd_train.model.causal_lm import CausalLM

# Dense bfloat16 with float32 sums, FLOP/s, by what the device's name holds; from NVIDIA's data
# sheets, the first that fits.
_PEAKS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "H800": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "B200": 2250e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
}


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """The most FLOP/s that the device's data sheet gives for `dtype`; None where it is not known,
    as on a CPU."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in _PEAKS.items() if part in name), None)


@dataclass(frozen=True)
class StepFlops:
    """FLOPs of a training step's matrix products: for each token, each loss token, and each pair
    of a token and one that it attends to. Recomputed activations do not count, nor what is not a
    product: the convention of MFU (arXiv:2204.02311, appendix B)."""

    per_token: float
    per_loss_token: float
    per_pair: float

    def of(self, num_loss_tokens: int, lengths: list[int]) -> float:
        """Of sequences of these lengths, which have so many loss tokens together."""
        pairs = sum(length * (length + 1) // 2 for length in lengths)
        return (
            self.per_token * sum(lengths)
            + self.per_loss_token * num_loss_tokens
            + self.per_pair * pairs
        )


def step_flops(student: CausalLM, teacher: CausalLM | None) -> StepFlops | None:
    """Of one pass of the student forward and backward, and of the teacher forward; None for a
    mixture of experts, whose tokens do not all go through all weights. Counted as if each token saw
    all before it in its sequence, and the teacher's sequences were the student's."""
    found = _of(student, True)
    if found is None or teacher is None:
        return found
    other = _of(teacher, False)
    if other is None:
        return None
    return StepFlops(
        found.per_token + other.per_token,
        found.per_loss_token + other.per_loss_token,
        found.per_pair + other.per_pair,
    )


def _of(model: CausalLM, trained: bool) -> StepFlops | None:
    inner = model.model
    per_token = 0.0
    head, embedding = inner.get_output_embeddings().weight, inner.get_input_embeddings().weight
    for weight in inner.parameters():
        if weight.dim() > 2:
            return None
        if weight.dim() == 2 and weight is not head and weight is not embedding:
            per_token += _per_weight(weight, trained) * weight.numel()
    config: Any = inner.config
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    # Two products, of queries with keys and of weights with values, and backward twice as many.
    per_pair = 4.0 * config.num_hidden_layers * heads * width * (3 if trained else 1)
    return StepFlops(per_token, _per_weight(head, trained) * head.numel(), per_pair)


def _per_weight(weight: torch.Tensor, trained: bool) -> int:
    """Forward, the gradient of what comes in, and the weight's own."""
    return 2 + (2 + 2 * weight.requires_grad) * trained
