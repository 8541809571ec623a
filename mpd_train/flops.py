"""Count a training step's FLOPs, for the share of the device's peak that it reaches (MFU)."""

from typing import Any, NamedTuple

import torch

from mpd_train.model.causal_lm import CausalLM

# FLOP/s of dense bfloat16 products with float32 sums, from NVIDIA's data sheets, by a part of the
# device's name; the first that fits counts.
_PEAKS = {
    "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "H800": 989e12,
    "A100": 312e12, "A800": 312e12, "B200": 2250e12, "L40S": 362e12, "RTX 4090": 165e12,
}  # fmt: skip


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Return the most FLOP/s that the device's data sheet gives for `dtype`; None if it is not
    known, as on a CPU."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in _PEAKS.items() if part in name), None)


class StepFlops(NamedTuple):
    """FLOPs of a training step's matrix products: for each token, each loss token, and each pair
    of a token and one that it attends to. Recomputed activations and elementwise work do not count:
    the convention of MFU (arXiv:2204.02311, appendix B)."""

    per_token: float
    per_loss_token: float
    per_pair: float

    def total(self, num_loss_tokens: int, lengths: list[int]) -> float:
        """Return the FLOPs of sequences of these lengths with this many loss tokens together."""
        pairs = sum(length * (length + 1) // 2 for length in lengths)
        return (
            self.per_token * sum(lengths)
            + self.per_loss_token * num_loss_tokens
            + self.per_pair * pairs
        )


def step_flops(student: CausalLM, teacher: CausalLM | None) -> StepFlops | None:
    """Count the student's pass forward and backward and the teacher's forward. Return None for a
    mixture of experts, whose tokens do not all go through all weights. Each token is taken to
    attend to all before it in its sequence, and the teacher's sequences to be the student's."""
    ours = _model_flops(student, True)
    theirs = StepFlops(0, 0, 0) if teacher is None else _model_flops(teacher, False)
    if ours is None or theirs is None:
        return None
    return StepFlops(*map(sum, zip(ours, theirs, strict=True)))


def _model_flops(model: CausalLM, trained: bool) -> StepFlops | None:
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
    """FLOPs for each token: forward, the input's gradient, and the weight's own."""
    return 2 + (2 + 2 * weight.requires_grad) * trained
