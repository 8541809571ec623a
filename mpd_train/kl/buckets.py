"""A sparse teacher's loss in torch: it depends on the student's logits only through those of the K
ids and the logsumexp of the rest, so all but that softmax happens over K + 1 buckets.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mpd_train.kl.objective import Objective
from mpd_train.kl.types import TopK


@dataclass(frozen=True)
class Tail:
    """Over the logits y [c, V] outside the K ids: `peak` max y, `total` sum exp(y - peak), `moment`
    sum exp(y - peak) (y - peak); each [c, 1]. `peak` is finite, `total` 0 where all are -inf."""

    peak: Tensor
    total: Tensor
    moment: Tensor

    @property
    def logsumexp(self) -> Tensor:
        return self.peak + self.total.log()


@dataclass(frozen=True)
class _Exponentials:
    """A softmax between its two uses: exp(y - peak) [c, V]."""

    tail: Tail
    values: Tensor

    def spread(
        self, factors: Tensor, out: Tensor, other: "tuple[_Exponentials, Tensor] | None"
    ) -> None:
        """out [c, V] = factors [c, 1] exp(y - peak), and the same of an `other` softmax of these
        logits, with its factors, added. `out` may lie where the logits did."""
        torch.mul(self.values, factors, out=out)
        if other is not None:
            softmax, its_factors = other
            out.add_((softmax.values * its_factors).to(out.dtype))


def _softmax(logits: Tensor, temperature: float) -> _Exponentials:
    """Uses `logits` up at temperature 1."""
    y = logits if temperature == 1 else logits / temperature
    # Without a single finite logit (every id is in the top K) the maximum must still be a number.
    peak = y.amax(1, keepdim=True).clamp_(min=torch.finfo(y.dtype).min)
    exponentials = y.sub_(peak).exp()
    # Beyond this the exponential is 0, and 0 times -inf would be a NaN.
    moment = y.clamp_(min=-1e4).mul_(exponentials).sum(1, keepdim=True)
    return _Exponentials(Tail(peak, exponentials.sum(1, keepdim=True), moment), exponentials)


def over_buckets(
    logits: Tensor,
    teacher: TopK,
    labels: Tensor | None,
    factors: Tensor,
    objective: Objective,
    out: Tensor,
) -> Tensor:
    """`fused.Kernels.sparse`."""
    inverse, ce_weight = 1 / objective.temperature, objective.ce_weight
    tempered = objective.temperature != 1
    chosen = None if labels is None else logits.gather(1, labels[:, None])

    # -1 stands for no id: it repeats the row's first one, where the same can be gathered and
    # scattered twice, and has no mass.
    ids = teacher.ids.long()
    valid = ids >= 0
    index = torch.where(valid, ids, ids[:, :1])
    top = logits.gather(1, index).masked_fill_(~valid, -torch.inf)
    # The tail's own logsumexp, rather than log(1 - top mass), which cancels.
    logits.scatter_(1, index, -torch.inf)
    rest = _softmax(logits, objective.temperature)
    tail = rest.tail

    log_q = torch.cat([top * inverse, tail.logsumexp], 1)
    log_q = log_q - log_q.logsumexp(1, keepdim=True)
    log_p = _teacher_buckets(teacher, valid, logits.shape[1]).to(log_q.dtype)
    log_p = log_p - log_p.logsumexp(1, keepdim=True)
    value, gradient = objective.value_and_gradient(log_p, log_q)
    q = log_q.exp()

    cross_entropy = torch.zeros_like(value)
    plain = rest
    if chosen is not None:
        if tempered:
            plain = _softmax(logits, 1.0)
        log_total = torch.logaddexp(plain.tail.logsumexp, top.logsumexp(1, keepdim=True))
        cross_entropy = (log_total - chosen)[:, 0]
    of_top = gradient[:, :-1]
    of_tail = gradient[:, -1:]
    if ce_weight > 0:
        assert labels is not None
        of_top = of_top + ce_weight * (top - log_total).exp()
        if not tempered:
            of_tail = of_tail + ce_weight * q[:, -1:]
        # At the label before anything is rounded: where the student is sure of it, what is left
        # of q - 1 is less than bfloat16 tells apart from 1.
        at_label = (index == labels[:, None]) & valid
        of_top = torch.where(at_label, of_top - ce_weight, of_top)
    # A tail token's share of the tail's gradient is its share of the tail's mass.
    other = None
    if ce_weight > 0 and tempered:
        other = (plain, ce_weight * factors * (plain.tail.peak - log_total).exp())
    rest.spread(torch.where(tail.total > 0, of_tail * factors / tail.total, 0.0), out, other)
    of_top = torch.where(valid, of_top, of_top[:, :1])
    out.scatter_(1, index, (of_top * factors).to(out.dtype))
    if ce_weight > 0:
        assert labels is not None and chosen is not None
        of_label = of_tail * (chosen * inverse - tail.logsumexp).exp() - ce_weight
        if tempered:
            of_label = of_label + ce_weight * (chosen - log_total).exp()
        there = out.gather(1, labels[:, None])
        in_tail = ~at_label.any(1, keepdim=True)
        of_label = torch.where(in_tail, (of_label * factors).to(out.dtype), there)
        out.scatter_(1, labels[:, None], of_label)

    # The tail's share of the entropy: its mass times (its own entropy - the log of its mass).
    within = tail.total.log() - tail.moment / tail.total - log_q[:, -1:]
    of_rest = torch.where(q[:, -1:] > 0, q[:, -1:] * within, 0.0)[:, 0]
    best = log_p[:, :-1].argmax(1, keepdim=True)
    strongest = torch.maximum(top.amax(1, keepdim=True) * inverse, tail.peak)
    return torch.stack(
        [
            value,
            cross_entropy,
            of_rest + entropy(log_q[:, :-1]),
            entropy(log_p),
            q[:, :-1].sum(1),
            (top.gather(1, best) * inverse >= strongest)[:, 0].to(q.dtype),
        ],
        1,
    )


def _teacher_buckets(teacher: TopK, valid: Tensor, vocab_size: int) -> Tensor:
    """Log-probabilities [c, K + 1] as they were stored, in float32 or float64."""
    exact = torch.promote_types(teacher.logprobs.dtype, torch.float32)
    no_tail = valid.sum(1) == vocab_size
    tail = teacher.tail.to(exact).masked_fill(no_tail, -torch.inf)
    return torch.cat([teacher.logprobs.to(exact).masked_fill(~valid, -torch.inf), tail[:, None]], 1)


def entropy(log_p: Tensor) -> Tensor:
    """[c, B] -> [c], in nats; 0 log 0 = 0."""
    return -log_p.exp().mul_(log_p.clamp(min=-1e4)).sum(1)
