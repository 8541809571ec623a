"""The elementwise part in torch, for any device.

It works on a few rows at a time: a dozen passes over rows that fit in a core's cache cost less than
three over memory, and the temporaries stay small.
"""

from collections.abc import Callable
from typing import Any

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
    return _by_tiles(over_buckets, logits, teacher.take, labels, factors, objective, out)


def dense(
    logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None,
    factors: Tensor,
    objective: Objective,
    out: Tensor,
) -> Tensor:
    """See `fused.Kernels`."""

    def teacher_rows(rows: slice) -> Tensor:
        return objective.capped(teacher_logits[rows], objective.teacher_softcap)

    return _by_tiles(_dense, logits, teacher_rows, labels, factors, objective, out)


def _by_tiles(
    kernel: Callable[[Tensor, Any, Tensor | None, Tensor, Objective, Tensor], Tensor],
    logits: Tensor,
    teacher_rows: Callable[[slice], TopK | Tensor],
    labels: Tensor | None,
    factors: Tensor,
    objective: Objective,
    out: Tensor,
) -> Tensor:
    """Run `kernel`, which knows nothing of the student's cap, on a few rows at a time."""
    metrics = []
    for rows in _tiles(logits):
        z, slope = _capped(logits[rows], objective)
        tile_labels = None if labels is None else labels[rows]
        teacher = teacher_rows(rows)
        metrics.append(kernel(z, teacher, tile_labels, factors[rows], objective, out[rows]))
        if slope is not None:
            out[rows].mul_(slope)
    return torch.cat(metrics)


def _capped(logits: Tensor, objective: Objective) -> tuple[Tensor, Tensor | None]:
    """Return the student's logits after its cap, and the cap's derivative."""
    softcap = objective.softcap
    if softcap is None:
        return logits, None
    return objective.capped(logits, softcap), 1 - torch.tanh(logits / softcap).square()


def _tiles(logits: Tensor) -> list[slice]:
    count, vocab_size = logits.shape
    tile_bytes = _TILE_BYTES.get(logits.device.type, _TILE_BYTES["cuda"])
    size = max(1, tile_bytes // (vocab_size * logits.element_size()))
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
