"""The elementwise part in torch, for any device.

It works on a few rows at a time: a dozen passes over rows that fit in a core's cache cost less than
three over memory, and the temporaries stay small.
"""

import torch
from torch import Tensor

from mpd_train.kl.buckets import entropy, over_buckets
from mpd_train.kl.objective import Objective
from mpd_train.kl.types import TopK

# Bytes of logits at a time: within a core's cache, or enough to fill a GPU.
_TILE_BYTES = {"cpu": 512 << 10, "cuda": 128 << 20}


def write_gradient(
    logits: Tensor, teacher: TopK | Tensor, labels: Tensor | None, factors: Tensor,
    objective: Objective, out: Tensor,
) -> Tensor:  # fmt: skip
    """See `fused.Kernel`."""
    count, vocab_size = logits.shape
    tile_bytes = _TILE_BYTES.get(logits.device.type, _TILE_BYTES["cuda"])
    size = max(1, tile_bytes // (vocab_size * logits.element_size()))
    softcap, metrics = objective.softcap, []
    for first in range(0, count, size):
        rows = slice(first, first + size)
        # The functions for a tile know nothing of caps.
        z, slope = objective.capped(logits[rows], softcap), None
        if softcap is not None:
            slope = 1 - torch.tanh(logits[rows] / softcap).square()
        tile_labels = None if labels is None else labels[rows]
        rest = tile_labels, factors[rows], objective, out[rows]
        if isinstance(teacher, TopK):
            metrics.append(over_buckets(z, teacher.take(rows), *rest))
        else:
            t = objective.capped(teacher[rows], objective.teacher_softcap)
            metrics.append(_over_vocabulary(z, t, *rest))
        if slope is not None:
            out[rows].mul_(slope)
    return torch.cat(metrics)


def _over_vocabulary(
    logits: Tensor, teacher_logits: Tensor, labels: Tensor | None, factors: Tensor,
    objective: Objective, out: Tensor,
) -> Tensor:  # fmt: skip
    best = teacher_logits.argmax(1, keepdim=True)
    agreement = logits.gather(1, best) >= logits.amax(1, keepdim=True)
    cross_entropy = torch.zeros_like(logits[:, 0])
    inverse = 1 / objective.temperature
    log_q = (logits * inverse).log_softmax(1)
    log_p = (teacher_logits * inverse).log_softmax(1)
    value, clipped, gradient = objective.value_and_gradient(log_p, log_q)
    if labels is not None:
        log_plain = log_q if objective.temperature == 1 else logits.log_softmax(1)
        cross_entropy = -log_plain.gather(1, labels[:, None])[:, 0]
        if objective.ce_weight > 0:
            gradient = gradient.add_(log_plain.exp(), alpha=objective.ce_weight)
            pull = torch.full_like(cross_entropy[:, None], -objective.ce_weight)
            gradient.scatter_add_(1, labels[:, None], pull)
    torch.mul(gradient, factors, out=out)
    topk_mass, agrees = torch.ones_like(value), agreement[:, 0].to(value.dtype)
    columns = [value, cross_entropy, entropy(log_q), entropy(log_p), topk_mass, agrees, clipped]
    return torch.stack(columns, 1)
