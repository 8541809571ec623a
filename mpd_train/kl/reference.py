"""The losses in their plainest form, in float64 with autograd, as the reference of the tests.

It holds tokens x vocabulary: use it for tests and for inspecting a single batch.
"""

import math
from typing import assert_never

import torch
from torch import Tensor

from mpd_train.kl.divergence import LOG_FLOOR, Divergence
from mpd_train.kl.objective import Objective
from mpd_train.kl.types import NUM_METRICS, Head, TopK


def loss(
    student: Head, teacher: TopK | Head, labels: Tensor | None, factors: Tensor,
    objective: Objective,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Like `fused.loss`, in float64 for all inputs."""
    rows = factors.nonzero().squeeze(1)
    factors, n = factors.double()[rows], len(factors)
    z = _logits(student.take(rows), objective.softcap)
    q = whole = (z / objective.temperature).softmax(-1)
    if isinstance(teacher, TopK):
        p, q = _buckets(teacher.take(rows), q)
        teacher_best = teacher.ids[rows].long().gather(1, p[:, :-1].argmax(1, keepdim=True))[:, 0]
        topk_mass = q[:, :-1].sum(1)
    else:
        t = _logits(teacher.take(rows), objective.teacher_softcap)
        p = (t / objective.temperature).softmax(-1)
        teacher_best = p.argmax(1)
        topk_mass = torch.ones_like(p[:, 0])
    terms = terms_of(objective.divergence, p, q)
    value = clipped = terms.sum(-1)
    if objective.clip is not None:
        clipped = value.clamp(max=objective.clip)
    if objective.entry_clip is not None:
        clipped = terms.clamp(max=objective.entry_clip).sum(-1)
    losses = (1 - objective.ce_weight) * objective.temperature**2 * clipped
    cross_entropy = torch.zeros_like(value)
    if labels is not None:
        cross_entropy = torch.nn.functional.cross_entropy(z, labels[rows], reduction="none")
        losses = losses + objective.ce_weight * cross_entropy
    agreement = (z.argmax(1) == teacher_best).double()
    columns = [value, cross_entropy, _entropy(whole), _entropy(p), topk_mass, agreement, clipped]
    metrics = torch.zeros((n, NUM_METRICS), dtype=torch.float64, device=z.device)
    metrics[rows] = torch.stack(columns, 1).detach()
    return (losses * factors).sum(), metrics


def _logits(head: Head, softcap: float | None) -> Tensor:
    z = head.hidden.double() @ head.weight.double().T
    return Objective.capped(z if head.bias is None else z + head.bias.double(), softcap)


def _buckets(teacher: TopK, q: Tensor) -> tuple[Tensor, Tensor]:
    """Return the probabilities [n, K + 1] of teacher and student: of the K ids (0 for ids of -1),
    and of the rest."""
    vocab_size = q.shape[1]
    valid = teacher.ids >= 0
    ids = teacher.ids.long().clamp(min=0)
    p = torch.where(valid, teacher.logprobs.double().exp(), 0.0)
    inside = torch.zeros_like(q).scatter_add(1, ids, valid.double()) > 0
    q_tail = q.masked_fill(inside, 0.0).sum(1, keepdim=True)
    p_tail = teacher.tail.double().exp()[:, None]
    p_tail = p_tail.masked_fill(valid.sum(1, keepdim=True) == vocab_size, 0.0)
    p = torch.cat([p, p_tail], 1)
    q = torch.cat([torch.where(valid, q.gather(1, ids), 0.0), q_tail], 1)
    return p / p.sum(1, keepdim=True), q


def _entropy(p: Tensor) -> Tensor:
    """[n, B] -> [n], nats."""
    terms: Tensor = torch.special.entr(p)
    return terms.sum(-1)


def terms_of(divergence: Divergence, p: Tensor, q: Tensor) -> Tensor:
    """Return the terms [n, B], whose sum is F, of probabilities p, q [n, B], by the definitions."""

    def kl(a: Tensor, b: Tensor) -> Tensor:
        # Outcomes without probability add nothing; a 1 in their place keeps autograd from NaN.
        some = a > 0
        ratio = torch.where(some, a, 1.0) / torch.where(some, b, 1.0)
        return torch.where(some, a * ratio.log(), 0.0)

    if divergence.name == "forward_kl":
        return kl(p, q)
    if divergence.name == "reverse_kl":
        return kl(q, p.clamp(min=math.exp(LOG_FLOOR)))
    if divergence.name == "jsd":
        m = divergence.beta * p + (1 - divergence.beta) * q
        return divergence.beta * kl(p, m) + (1 - divergence.beta) * kl(q, m)
    if divergence.name == "skew_kl":
        return kl(p, divergence.alpha * p + (1 - divergence.alpha) * q)
    if divergence.name == "skew_reverse_kl":
        return kl(q, (1 - divergence.alpha) * p + divergence.alpha * q)
    assert_never(divergence.name)
