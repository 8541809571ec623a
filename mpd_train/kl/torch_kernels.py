"""The elementwise part in torch, for any device.

Works on a few rows at a time: a dozen passes over what fits in a core's cache cost less than three
over memory, and the temporaries stay small.
"""

import torch
from torch import Tensor

from mpd_train.kl.buckets import entropy, over_buckets
from mpd_train.kl.objective import Objective
from mpd_train.kl.types import TopK

# Bytes of logits at a time: within a core's cache, or enough to fill a GPU.
_TILE_BYTES = {"cpu": 512 << 10, "cuda": 128 << 20}


def sparse(
    logits: Tensor,
    teacher: TopK,
    labels: Tensor | None,
    factors: Tensor,
    objective: Objective,
    out: Tensor,
) -> Tensor:
    """See `fused.Kernels`."""
    found = []
    for rows in _tiles(logits):
        of_labels = None if labels is None else labels[rows]
        z, slope = _capped(logits[rows], objective)
        found.append(
            over_buckets(z, teacher.take(rows), of_labels, factors[rows], objective, out[rows])
        )
        if slope is not None:
            out[rows].mul_(slope)
    return torch.cat(found)


def dense(
    logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None,
    factors: Tensor,
    objective: Objective,
    out: Tensor,
) -> Tensor:
    """See `fused.Kernels`."""
    found = []
    for rows in _tiles(logits):
        of_labels = None if labels is None else labels[rows]
        z, slope = _capped(logits[rows], objective)
        of_teacher = objective.capped(teacher_logits[rows], objective.teacher_softcap)
        found.append(_dense(z, of_teacher, of_labels, factors[rows], objective, out[rows]))
        if slope is not None:
            out[rows].mul_(slope)
    return torch.cat(found)


def _capped(logits: Tensor, objective: Objective) -> tuple[Tensor, Tensor | None]:
    """The student's logits as it gives them out, and the derivative of that."""
    softcap = objective.softcap
    if softcap is None:
        return logits, None
    return objective.capped(logits, softcap), 1 - torch.tanh(logits / softcap).square()


def _tiles(logits: Tensor) -> list[slice]:
    count, vocab_size = logits.shape
    size = max(
        1,
        _TILE_BYTES.get(logits.device.type, _TILE_BYTES["cuda"])
        // (vocab_size * logits.element_size()),
    )
    return [slice(first, first + size) for first in range(0, count, size)]


def _dense(
    logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None,
    factors: Tensor,
    objective: Objective,
    out: Tensor,
) -> Tensor:
    best = teacher_logits.argmax(1, keepdim=True)
    agreement = logits.gather(1, best) >= logits.amax(1, keepdim=True)
    cross_entropy = torch.zeros_like(logits[:, 0])
    inverse = 1 / objective.temperature
    log_q = (logits * inverse).log_softmax(1)
    log_p = (teacher_logits * inverse).log_softmax(1)
    value, gradient = objective.value_and_gradient(log_p, log_q)
    if labels is not None:
        log_plain = log_q if objective.temperature == 1 else logits.log_softmax(1)
        cross_entropy = -log_plain.gather(1, labels[:, None])[:, 0]
        if objective.ce_weight > 0:
            gradient = gradient.add_(log_plain.exp(), alpha=objective.ce_weight)
            pull = torch.full_like(cross_entropy[:, None], -objective.ce_weight)
            gradient.scatter_add_(1, labels[:, None], pull)
    torch.mul(gradient, factors, out=out)
    return torch.stack(
        [
            value,
            cross_entropy,
            entropy(log_q),
            entropy(log_p),
            torch.ones_like(value),
            agreement[:, 0].to(value.dtype),
        ],
        1,
    )
