"""A sparse teacher's loss in torch. It depends on the student's logits only through those of the K
ids and the logsumexp of the rest, so all but that softmax is computed over K + 1 buckets.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from mpd_train.kl.objective import Objective
from mpd_train.kl.types import TopK


class Tail(NamedTuple):
    """Over the logits y [c, V] outside the K ids: `peak` max y, `total` sum exp(y - peak), `moment`
    sum exp(y - peak) (y - peak); each [c, 1]. `peak` is finite, `total` 0 where all are -inf."""

    peak: Tensor
    total: Tensor
    moment: Tensor

    @property
    def logsumexp(self) -> Tensor:
        return self.peak + self.total.log()


def _softmax(logits: Tensor, temperature: float) -> tuple[Tail, Tensor]:
    """Return the sums over the logits and exp(y - peak) [c, V]. Overwrite `logits` at
    temperature 1."""
    y = logits if temperature == 1 else logits / temperature
    # With no finite logit (every id is in the top K) the peak must still be finite.
    peak = y.amax(1, keepdim=True).clamp_(min=torch.finfo(y.dtype).min)
    exponentials = y.sub_(peak).exp()
    # Below this the exponential is 0, and 0 times -inf would be a NaN.
    moment = y.clamp_(min=-1e4).mul_(exponentials).sum(1, keepdim=True)
    return Tail(peak, exponentials.sum(1, keepdim=True), moment), exponentials


def over_buckets(
    logits: Tensor, teacher: TopK, labels: Tensor | None, factors: Tensor, objective: Objective,
    out: Tensor,
) -> Tensor:  # fmt: skip
    """See `fused.Kernel`."""
    temperature, ce_weight = objective.temperature, objective.ce_weight
    inverse = 1 / temperature
    label_logits = None if labels is None else logits.gather(1, labels[:, None])

    # An id of -1 is none: it repeats the row's first one, where the same can be gathered and
    # scattered twice, and has no mass.
    ids = teacher.ids.long()
    valid = ids >= 0
    index = torch.where(valid, ids, ids[:, :1])
    top = logits.gather(1, index).masked_fill_(~valid, -torch.inf)
    # The tail's own logsumexp, rather than log(1 - top mass), which cancels.
    logits.scatter_(1, index, -torch.inf)
    tail, exponentials = _softmax(logits, temperature)

    log_q = torch.cat([top * inverse, tail.logsumexp], 1)
    log_q = log_q - log_q.logsumexp(1, keepdim=True)
    log_p = _teacher_buckets(teacher, valid, logits.shape[1]).to(log_q.dtype)
    log_p = log_p - log_p.logsumexp(1, keepdim=True)
    value, clipped, gradient = objective.value_and_gradient(log_p, log_q)
    top_gradient, tail_gradient = gradient[:, :-1], gradient[:, -1:]
    q = log_q.exp()

    # Cross-entropy is of the student at temperature 1.
    cross_entropy = torch.zeros_like(value)
    if label_logits is not None:
        plain_tail, plain_exponentials = tail, exponentials
        if temperature != 1:
            plain_tail, plain_exponentials = _softmax(logits, 1.0)
        log_total = torch.logaddexp(plain_tail.logsumexp, top.logsumexp(1, keepdim=True))
        cross_entropy = (log_total - label_logits)[:, 0]
    if ce_weight > 0:
        assert labels is not None
        top_gradient = top_gradient + ce_weight * (top - log_total).exp()
        if temperature == 1:
            tail_gradient = tail_gradient + ce_weight * q[:, -1:]
        # Subtracted at the label before rounding: where the student is sure of it, q - 1 is smaller
        # than bfloat16's step at 1.
        is_label = (index == labels[:, None]) & valid
        top_gradient = torch.where(is_label, top_gradient - ce_weight, top_gradient)

    # A tail token's share of the tail's gradient is its share of the tail's mass.
    tail_factors = torch.where(tail.total > 0, tail_gradient * factors / tail.total, 0.0)
    torch.mul(exponentials, tail_factors, out=out)
    if ce_weight > 0 and temperature != 1:
        plain_factors = ce_weight * factors * (plain_tail.peak - log_total).exp()
        out.add_((plain_exponentials * plain_factors).to(out.dtype))
    top_gradient = torch.where(valid, top_gradient, top_gradient[:, :1])
    out.scatter_(1, index, (top_gradient * factors).to(out.dtype))
    if ce_weight > 0:
        # Of a label in the tail; one in the top K is written already.
        assert labels is not None and label_logits is not None
        label_gradient = tail_gradient * (label_logits * inverse - tail.logsumexp).exp() - ce_weight
        if temperature != 1:
            label_gradient = label_gradient + ce_weight * (label_logits - log_total).exp()
        in_tail = ~is_label.any(1, keepdim=True)
        written = out.gather(1, labels[:, None])
        label_gradient = torch.where(in_tail, (label_gradient * factors).to(out.dtype), written)
        out.scatter_(1, labels[:, None], label_gradient)

    best = log_p[:, :-1].argmax(1, keepdim=True)
    highest = torch.maximum(top.amax(1, keepdim=True) * inverse, tail.peak)
    agreement = (top.gather(1, best) * inverse >= highest)[:, 0].to(q.dtype)
    student_entropy = _tail_entropy(tail, log_q[:, -1]) + entropy(log_q[:, :-1])
    topk_mass = q[:, :-1].sum(1)
    columns = [value, cross_entropy, student_entropy, entropy(log_p), topk_mass, agreement]
    return torch.stack([*columns, clipped], 1)


def _teacher_buckets(teacher: TopK, valid: Tensor, vocab_size: int) -> Tensor:
    """Return the stored log-probabilities [c, K + 1], in float32 or float64."""
    exact = torch.promote_types(teacher.logprobs.dtype, torch.float32)
    no_tail = valid.sum(1) == vocab_size
    tail = teacher.tail.to(exact).masked_fill(no_tail, -torch.inf)
    return torch.cat([teacher.logprobs.to(exact).masked_fill(~valid, -torch.inf), tail[:, None]], 1)


def _tail_entropy(tail: Tail, log_mass: Tensor) -> Tensor:
    """Return the tail's share [c] of the student's entropy, in nats: its mass, of which `log_mass`
    [c] is the log, times (its own entropy - that log)."""
    mass = log_mass.exp()
    within = (tail.total.log() - tail.moment / tail.total)[:, 0] - log_mass
    return torch.where(mass > 0, mass * within, 0.0)


def entropy(log_p: Tensor) -> Tensor:
    """[c, B] -> [c], in nats; 0 log 0 = 0."""
    return -log_p.exp().mul_(log_p.clamp(min=-1e4)).sum(1)
