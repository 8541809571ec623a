"""The losses as plain as they can be written, in float64 with autograd: what tests compare to.

Holds tokens x vocabulary; never used in training.
"""

import torch
from torch import Tensor

from mpd_train.kl.divergence import Divergence


def divergence_of(divergence: Divergence, p: Tensor, q: Tensor) -> Tensor:
    """F [n] of probabilities p, q [n, B], straight from the definitions."""

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(a > 0, a * (a / b).log(), 0.0).sum(-1)

    if divergence.name == "forward_kl":
        return kl(p, q)
    if divergence.name == "reverse_kl":
        return kl(q, p)
    if divergence.name == "jsd":
        m = divergence.beta * p + (1 - divergence.beta) * q
        return divergence.beta * kl(p, m) + (1 - divergence.beta) * kl(q, m)
    if divergence.name == "skew_kl":
        return kl(p, divergence.alpha * p + (1 - divergence.alpha) * q)
    return kl(q, (1 - divergence.alpha) * p + divergence.alpha * q)


def dense_reference(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    divergence: Divergence,
    weights: Tensor,
    normalizer: float,
    divergence_clip: float | None = None,
    labels: Tensor | None = None,
    ce_weight: float = 0.0,
) -> Tensor:
    """The scalar loss of `dense_kl` on float64 inputs."""
    p = (teacher_hidden @ teacher_weight.T).softmax(-1)
    q = (hidden @ weight.T).softmax(-1)
    value = _mixed(divergence_of(divergence, p, q), q, divergence_clip, labels, ce_weight)
    return (value * weights).sum() / normalizer


def sparse_reference(
    hidden: Tensor,
    weight: Tensor,
    topk_ids: Tensor,
    topk_logprobs: Tensor,
    tail_logprobs: Tensor,
    divergence: Divergence,
    weights: Tensor,
    normalizer: float,
    divergence_clip: float | None = None,
    labels: Tensor | None = None,
    ce_weight: float = 0.0,
) -> Tensor:
    """The scalar loss of `sparse_kl` on float64 inputs."""
    q = whole = (hidden @ weight.T).softmax(-1)
    q_top = q.gather(1, topk_ids)
    p = topk_logprobs.exp()
    if topk_ids.shape[1] < weight.shape[0]:
        inside = torch.zeros_like(q, dtype=torch.bool).scatter(1, topk_ids, True)
        q_tail = q.masked_fill(inside, 0.0).sum(1, keepdim=True)
        q = torch.cat([q_top, q_tail], 1)
        p = torch.cat([p, tail_logprobs.exp()[:, None]], 1)
    else:
        q = q_top
    value = divergence_of(divergence, p / p.sum(1, keepdim=True), q)
    value = _mixed(value, whole, divergence_clip, labels, ce_weight)
    return (value * weights).sum() / normalizer


def _mixed(
    value: Tensor, q: Tensor, clip: float | None, labels: Tensor | None, ce_weight: float
) -> Tensor:
    """(1 - ce_weight) min(F, clip) + ce_weight (-log q[label]), [n]."""
    if clip is not None:
        value = value.clamp(max=clip)
    if labels is None:
        return value
    return (1 - ce_weight) * value - ce_weight * q.gather(1, labels[:, None])[:, 0].log()
