"""The two losses that callers use: their inputs, what they refuse, and their output."""

import os
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from mpd_train.kl import fused, reference
from mpd_train.kl.divergence import Divergence
from mpd_train.kl.objective import Objective
from mpd_train.kl.types import Head, TopK, accumulation_dtype

Backend = Literal["triton", "torch", "reference"]
_DTYPES = (torch.float64, torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class KLOutput:
    """A loss and its metrics. All but `loss` are detached, one number for each token (float32, or
    float64 for float64 inputs), and 0 where the token's weight is 0.

    loss: scalar, differentiable: sum of weight x loss of the token over the normaliser.
    per_token: [n] divergences in nats, neither clipped nor multiplied by the squared temperature.
    clipped: [n] the same after the clip.
    cross_entropy: [n] -log q[label] in nats at temperature 1; 0 everywhere without labels.
    student_entropy, teacher_entropy: [n] nats, at the loss' temperature. A sparse teacher's is
    that of its K + 1 buckets, which bounds its whole entropy from below.
    topk_mass: [n] the student's probability on the teacher's K ids; 1 for a dense teacher.
    agreement: [n] 1 where the student's likeliest token is the teacher's, else 0.
    """

    loss: Tensor
    per_token: Tensor
    cross_entropy: Tensor
    student_entropy: Tensor
    teacher_entropy: Tensor
    topk_mass: Tensor
    agreement: Tensor
    clipped: Tensor


def sparse_kl(
    hidden: Tensor, weight: Tensor, topk_ids: Tensor, topk_logprobs: Tensor, tail_logprobs: Tensor,
    *, normalizer: float | Tensor, bias: Tensor | None = None,
    divergence: Divergence = Divergence(), temperature: float = 1.0, weights: Tensor | None = None,
    divergence_clip: float | None = None, entry_clip: float | None = None,
    labels: Tensor | None = None, ce_weight: float = 0.0,
    softcap: float | None = None, backend: Backend | None = None, chunk_size: int | None = None,
) -> KLOutput:  # fmt: skip
    """Return the divergence from a teacher known by its top K and the mass outside them.

    hidden [n, H] student states; weight [V, H], bias [V] student head; topk_ids int [n, K];
    topk_logprobs [n, K] and tail_logprobs [n] natural logs. The K + 1 buckets are renormalised in
    float32 (their storage may have rounded them), and the student's tail is its exact mass
    outside the K. A row with fewer than K ids is padded with ids of -1, whose log-probabilities are
    ignored; a row has at least one id. A row with V ids has no tail, and its tail_logprobs is
    ignored. The value bounds the full-vocabulary divergence from below.

    temperature: the student's logits are divided by it. A record cannot be brought to another
    temperature (its tail is a sum), so topk_logprobs and tail_logprobs must be those of the
    teacher at this temperature. The divergence's part of the loss is multiplied by
    temperature^2, which keeps its gradient at the size it has at 1 (arXiv:1503.02531, section 2).

    weights [n]: per-token factors, default 1. normalizer: the sum is divided by it; give the number
    of loss tokens in the whole optimiser step.

    The loss of a token is (1 - ce_weight) temperature^2 min(F, divergence_clip)
    + ce_weight (-log q[label]), with F its divergence and q the student at temperature 1 over the
    whole vocabulary, labels int64 [n]. Where F is above divergence_clip the clamp is flat: such
    tokens get no gradient from the divergence, only from the cross-entropy if it is mixed in.
    entry_clip clamps instead each bucket's term of F, such as p log(p / q), before they are added
    up, as OPSD does (arXiv:2601.18734): clamped terms have no gradient, negative terms stay, and
    the sum may be below 0.

    softcap: the student's logits are softcap tanh(z / softcap) of z = hidden weight^T + bias, as
    Gemma's are (arXiv:2408.00118, section 2); a z of -inf stays -inf. For a model that multiplies
    its logits by a number, multiply its hidden states by it before.

    backend: "triton" (default on CUDA; not for float64; compiled anew for each temperature,
    ce_weight, cap and parameter of the divergence), "torch" (default elsewhere), or "reference":
    float64, plain, holds n x V. chunk_size: rows whose logits exist at a time, for less memory; the
    default depends on device and vocabulary, and results do not depend on it beyond rounding.

    Inputs are float64, float32 or bfloat16; logits, softmax and the head's accumulated gradient
    are float64 for the first and float32 for the others, under autocast too (float32 inputs are
    multiplied as torch.set_float32_matmul_precision says). The head may be
    trainable, frozen or tied, or a DTensor of FSDP2 (gathered here; its gradient is the mean over
    the ranks, as FSDP2's own). Differentiable once.

    Raise ValueError for shapes or types that do not fit together, an id that is twice in a row
    or outside the vocabulary, a ce_weight outside [0, 1] or without labels, a clip, temperature or
    cap that is not above 0, or both clips; RuntimeError on backward(create_graph=True).
    """
    if topk_ids.dim() != 2 or topk_ids.is_floating_point():
        raise ValueError(
            f"topk_ids {tuple(topk_ids.shape)} {topk_ids.dtype}; expected integers [n, K]"
        )
    n, k = topk_ids.shape
    if not 0 < k <= weight.shape[0]:
        raise ValueError(f"K = {k} with a vocabulary of {weight.shape[0]}")
    if topk_logprobs.shape != (n, k) or tail_logprobs.shape != (n,) or hidden.shape[0] != n:
        raise ValueError(
            f"teacher shapes {tuple(topk_ids.shape)}, {tuple(topk_logprobs.shape)},"
            f" {tuple(tail_logprobs.shape)} do not fit {hidden.shape[0]} hidden states"
        )
    teacher = TopK(topk_ids, topk_logprobs.detach(), tail_logprobs.detach())
    objective = Objective(divergence, temperature, divergence_clip, entry_clip, ce_weight, softcap)
    student = Head(hidden, weight, bias)
    return _apply(student, teacher, labels, weights, normalizer, objective, backend, chunk_size)


def dense_kl(
    hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor,
    *, normalizer: float | Tensor, bias: Tensor | None = None, teacher_bias: Tensor | None = None,
    divergence: Divergence = Divergence(), temperature: float = 1.0, weights: Tensor | None = None,
    divergence_clip: float | None = None, entry_clip: float | None = None,
    labels: Tensor | None = None, ce_weight: float = 0.0,
    softcap: float | None = None, teacher_softcap: float | None = None,
    backend: Backend | None = None, chunk_size: int | None = None,
) -> KLOutput:  # fmt: skip
    """Return the divergence from a teacher over the full vocabulary, given its states and head.

    hidden [n, H], weight [V, H], bias [V]; teacher_hidden [n, Ht], teacher_weight [V, Ht],
    teacher_bias [V]; each model's logits go through its cap where it has one, and are divided by
    the temperature; the rest as in `sparse_kl`. No gradient reaches the teacher. Raise ValueError
    if the vocabularies differ: slice padding rows off before.
    """
    if teacher_weight.shape[0] != weight.shape[0]:
        raise ValueError(
            f"teacher head has {teacher_weight.shape[0]} rows, student head {weight.shape[0]};"
            " slice the padding rows off the larger one"
        )
    if teacher_hidden.shape[0] != hidden.shape[0]:
        raise ValueError(
            f"{teacher_hidden.shape[0]} teacher states, {hidden.shape[0]} student states"
        )
    _require_head("teacher ", teacher_hidden, teacher_weight, teacher_bias)
    teacher = Head(
        teacher_hidden.detach(),
        gathered(teacher_weight.detach()),
        None if teacher_bias is None else gathered(teacher_bias.detach()),
    )
    objective = Objective(
        divergence, temperature, divergence_clip, entry_clip, ce_weight, softcap, teacher_softcap
    )
    student = Head(hidden, weight, bias)
    return _apply(student, teacher, labels, weights, normalizer, objective, backend, chunk_size)


def _apply(
    student: Head, teacher: TopK | Head, labels: Tensor | None, weights: Tensor | None,
    normalizer: float | Tensor, objective: Objective, backend: Backend | None,
    chunk_size: int | None,
) -> KLOutput:  # fmt: skip
    hidden = student.hidden
    n = hidden.shape[0]
    if hidden.dtype not in _DTYPES:
        raise ValueError(
            f"hidden is {hidden.dtype}; expected float64, float32 or bfloat16 (float16 has too"
            " little range for gradients that are divided by a token count)"
        )
    _require_head("", hidden, student.weight, student.bias)
    if objective.ce_weight > 0 and labels is None:
        raise ValueError(f"ce_weight = {objective.ce_weight} needs labels")
    for name, values in (("labels", labels), ("weights", weights)):
        if values is not None and values.shape != (n,):
            raise ValueError(f"{name} {tuple(values.shape)} do not fit {n} hidden states")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size needs to be above 0, found {chunk_size}")
    if backend is None:
        backend = "triton" if hidden.is_cuda and hidden.dtype != torch.float64 else "torch"
    if backend == "triton" and hidden.dtype == torch.float64:
        raise ValueError("the triton backend computes in float32; for float64 take torch")
    if backend not in ("triton", "torch", "reference"):
        raise ValueError(f"backend {backend!r}: expected triton, torch or reference")
    if backend == "triton" and not (hidden.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"):
        raise ValueError(
            f"the triton backend needs a CUDA device; the states are on {hidden.device}"
        )
    if isinstance(normalizer, float | int) and not normalizer > 0:
        raise ValueError(f"normalizer needs to be above 0, found {normalizer}")

    exact = accumulation_dtype(hidden.dtype)
    factors = hidden.new_ones(n, dtype=exact) if weights is None else weights.detach().to(exact)
    # An empty batch may have a normaliser of 0.
    factors = torch.where(factors != 0, factors / normalizer, 0.0)
    bias = None if student.bias is None else gathered(student.bias)
    student = Head(hidden, gathered(student.weight), bias)
    if backend == "reference":
        loss, metrics = reference.loss(student, teacher, labels, factors, objective)
    else:
        loss, metrics = fused.loss(
            student, teacher, labels, factors, objective, backend, chunk_size or 0
        )
    return KLOutput(loss, *metrics.unbind(1))


def _require_head(whose: str, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"{whose}hidden {tuple(hidden.shape)} and {whose}weight {tuple(weight.shape)} do not"
            " fit; expected [n, H] and [V, H]"
        )
    if bias is not None and bias.shape != (weight.shape[0],):
        raise ValueError(
            f"{whose}bias {tuple(bias.shape)} does not fit {weight.shape[0]} head rows"
        )


def gathered(weight: Tensor) -> Tensor:
    """Return a tensor that FSDP2 has sharded in full; any other unchanged. Its gradient is averaged
    over the ranks, as FSDP2 averages the others: with a plain `full_tensor()` each rank would take
    its own gradient's shard for the mean."""
    # Without torch.distributed there are no DTensors, and importing them takes a second.
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return weight
    from torch.distributed.tensor import DTensor, Partial

    if not isinstance(weight, DTensor):
        return weight
    placements: list[Any] = [Partial("avg")] * weight.device_mesh.ndim
    return weight.full_tensor(grad_placements=placements)
