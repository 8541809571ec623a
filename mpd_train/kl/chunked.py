"""Distillation losses straight from hidden states: head product, softmax, divergence and its
gradient in one pass, a chunk of tokens at a time, so that tokens x vocabulary never exists.

The gradients with respect to hidden states and head are computed while the chunk's logits are
there (in the forward pass) and scaled in the backward pass: no vocabulary product is done
twice. Logits, softmax and the accumulated head gradient are float32 (float64 for float64
inputs) whatever the inputs: with bfloat16 logits the gradient is off by its own size when
teacher and student are close.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mpd_train.kl.divergence import Divergence, logit_gradient

# Rows at a time: the chunk's float32 logits fill about this much.
_CHUNK_BYTES = 64 << 20
# Vocabulary rows upcast at a time where the device has no mixed-precision product.
_VOCAB_BLOCK = 8192


@dataclass(frozen=True)
class KLOutput:
    """`loss`: scalar, sum of weight x loss of the token over the normaliser, differentiable.
    `per_token`: [n] divergences in nats, never clipped, detached, 0 where the weight is 0.
    `cross_entropy`: [n] -log q[label] in nats, detached, 0 where the weight is 0 and everywhere
    where no labels were given."""

    loss: Tensor
    per_token: Tensor
    cross_entropy: Tensor


def sparse_kl(
    hidden: Tensor,
    weight: Tensor,
    topk_ids: Tensor,
    topk_logprobs: Tensor,
    tail_logprobs: Tensor,
    *,
    normalizer: float,
    divergence: Divergence = Divergence(),
    weights: Tensor | None = None,
    divergence_clip: float | None = None,
    labels: Tensor | None = None,
    ce_weight: float = 0.0,
    chunk_size: int | None = None,
) -> KLOutput:
    """Divergence from a teacher known by its top K and the mass outside them.

    hidden [n, H] student states; weight [V, H] student head; topk_ids int [n, K]; topk_logprobs
    [n, K] and tail_logprobs [n] natural logs at temperature 1. The K + 1 buckets are
    renormalised in float32 (their storage may have rounded them), and the student's tail is
    its exact mass outside the K. Where K = V there is no tail and tail_logprobs is ignored.
    The value bounds the full-vocabulary divergence from below.

    weights [n]: per-token factors, default 1. normalizer: what the sum is divided by, the
    number of loss tokens in the whole optimiser step. chunk_size: tokens at a time.

    The loss of a token is (1 - ce_weight) min(F, divergence_clip) + ce_weight (-log q[label]),
    with F its divergence, q the student over the whole vocabulary and labels int64 [n]. Where F
    is above divergence_clip the clamp is flat: the worst tokens get no gradient from the
    divergence at all, only from the cross-entropy where that is mixed in.

    Raises ValueError for shapes that do not fit together, an id that is twice in a row, a
    ce_weight outside [0, 1] or without labels, or a divergence_clip that is not above 0.
    """
    n, k = topk_ids.shape
    if topk_logprobs.shape != (n, k) or tail_logprobs.shape != (n,) or hidden.shape[0] != n:
        raise ValueError(
            f"teacher shapes {tuple(topk_ids.shape)}, {tuple(topk_logprobs.shape)},"
            f" {tuple(tail_logprobs.shape)} do not fit {hidden.shape[0]} hidden states"
        )
    if k > weight.shape[0]:
        raise ValueError(f"K = {k} is over the vocabulary of {weight.shape[0]}")
    in_order = topk_ids.sort(dim=1).values
    if (in_order[:, 1:] == in_order[:, :-1]).any():
        raise ValueError("topk_ids holds an id twice in one row")
    teacher = _TopK(topk_ids.long(), topk_logprobs, tail_logprobs)
    objective = _Objective(divergence, divergence_clip, ce_weight)
    return _apply(hidden, weight, teacher, labels, normalizer, objective, weights, chunk_size)


def dense_kl(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    normalizer: float,
    divergence: Divergence = Divergence(),
    weights: Tensor | None = None,
    divergence_clip: float | None = None,
    labels: Tensor | None = None,
    ce_weight: float = 0.0,
    chunk_size: int | None = None,
) -> KLOutput:
    """Divergence from a teacher over the full vocabulary, given its states and head.

    hidden [n, H], weight [V, H]; teacher_hidden [n, Ht], teacher_weight [V, Ht]; the rest as in
    `sparse_kl`. No gradient reaches the teacher. Raises ValueError where the vocabularies
    differ: slice padding rows off before.
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
    teacher = _Dense(teacher_hidden.detach(), teacher_weight.detach())
    objective = _Objective(divergence, divergence_clip, ce_weight)
    return _apply(hidden, weight, teacher, labels, normalizer, objective, weights, chunk_size)


def _apply(
    hidden: Tensor,
    weight: Tensor,
    teacher: "_TopK | _Dense",
    labels: Tensor | None,
    normalizer: float,
    objective: "_Objective",
    weights: Tensor | None,
    chunk_size: int | None,
) -> KLOutput:
    n = hidden.shape[0]
    if objective.ce_weight > 0 and labels is None:
        raise ValueError(f"ce_weight = {objective.ce_weight} needs labels")
    if labels is not None and labels.shape != (n,):
        raise ValueError(f"labels {tuple(labels.shape)} do not fit {n} hidden states")
    if chunk_size is None:
        chunk_size = max(1, _CHUNK_BYTES // (4 * weight.shape[0]))
    # torch leaves Function.apply untyped.
    fused: Callable[..., tuple[Tensor, Tensor, Tensor]] = _LinearKL.apply
    if weights is None:
        return KLOutput(
            *fused(hidden, weight, teacher, labels, None, normalizer, objective, chunk_size)
        )
    # Rows without weight leave before the product: a NaN there must not reach the head's
    # gradient, and multiplying it by zero would not stop it.
    rows = weights.nonzero().squeeze(1)
    loss, *kept = fused(
        hidden[rows],
        weight,
        teacher.take(rows),
        None if labels is None else labels[rows],
        weights[rows],
        normalizer,
        objective,
        chunk_size,
    )
    divergences, entropies = (x.new_zeros(n).index_copy(0, rows, x) for x in kept)
    return KLOutput(loss, divergences, entropies)


@dataclass(frozen=True)
class _Objective:
    """What a token's loss is made of: a divergence, its clip and the share of cross-entropy."""

    divergence: Divergence
    clip: float | None
    ce_weight: float

    def __post_init__(self) -> None:
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"divergence_clip needs to be above 0, found {self.clip}")
        if not 0 <= self.ce_weight <= 1:
            raise ValueError(f"ce_weight needs to be within [0, 1], found {self.ce_weight}")

    def value_and_gradient(self, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        """For log_p, log_q [c, B]: F [c] and the loss' gradient [c, B] with respect to the
        buckets' logits, all but the cross-entropy's -ce_weight at the label."""
        value, score = self.divergence.value_and_score(log_p, log_q)
        gradient = logit_gradient(log_q, score)
        if self.clip is not None:
            gradient = torch.where(value[:, None] > self.clip, 0.0, gradient)
        if self.ce_weight > 0:
            gradient = self.ce_weight * log_q.exp() + self._rest(gradient)
        return value, gradient

    def loss(self, value: Tensor, cross_entropy: Tensor) -> Tensor:
        """The tokens' losses [c] from F [c] and -log q[label] [c]."""
        if self.clip is not None:
            value = value.clamp(max=self.clip)
        if self.ce_weight == 0:
            return value
        return self._rest(value) + self.ce_weight * cross_entropy

    def _rest(self, x: Tensor) -> Tensor:
        # Not by a factor of 0: an infinite divergence that has no weight would be a NaN.
        return torch.zeros_like(x) if self.ce_weight == 1 else (1 - self.ce_weight) * x


@dataclass(frozen=True)
class _TopK:
    """A chunk-wise view of a teacher known by top K and tail."""

    ids: Tensor
    logprobs: Tensor
    tail: Tensor

    def take(self, rows: Tensor | slice) -> "_TopK":
        return _TopK(self.ids[rows], self.logprobs[rows], self.tail[rows])

    def backward_into(
        self, logits: Tensor, objective: _Objective, labels: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Replaces student logits [c, V] by the loss' gradient in place; returns F [c] and
        -log q[label] [c], 0 without labels."""
        tops = logits.gather(1, self.ids)
        chosen = None if labels is None else logits.gather(1, labels[:, None])
        has_tail = self.ids.shape[1] < logits.shape[1]
        log_p = self.logprobs.to(logits.dtype)
        if has_tail:
            # The tail's own logsumexp, rather than log(1 - top mass), which cancels.
            logits.scatter_(1, self.ids, float("-inf"))
            tail = logits.logsumexp(1, keepdim=True)
            buckets = torch.cat([tops, tail], 1)
            log_p = torch.cat([log_p, self.tail.to(logits.dtype)[:, None]], 1)
        else:
            buckets = tops
        log_p = log_p - log_p.logsumexp(1, keepdim=True)
        total = buckets.logsumexp(1, keepdim=True)
        value, gradient = objective.value_and_gradient(log_p, buckets - total)
        if has_tail:
            # A tail token's share of the tail's gradient is its share of the tail's mass.
            logits.sub_(tail).exp_().mul_(gradient[:, -1:])
            gradient = gradient[:, :-1]
        logits.scatter_(1, self.ids, gradient)
        _pull(logits, objective, labels)
        return value, torch.zeros_like(value) if chosen is None else (total - chosen)[:, 0]


@dataclass(frozen=True)
class _Dense:
    """A chunk-wise view of a full-vocabulary teacher."""

    hidden: Tensor
    weight: Tensor

    def take(self, rows: Tensor | slice) -> "_Dense":
        return _Dense(self.hidden[rows], self.weight)

    def backward_into(
        self, logits: Tensor, objective: _Objective, labels: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Replaces student logits [c, V] by the loss' gradient in place; returns F [c] and
        -log q[label] [c], 0 without labels."""
        log_p = _logits(self.hidden, self.weight).to(logits.dtype).log_softmax(1)
        log_q = logits.log_softmax(1)
        value, gradient = objective.value_and_gradient(log_p, log_q)
        logits.copy_(gradient)
        _pull(logits, objective, labels)
        if labels is None:
            return value, torch.zeros_like(value)
        return value, -log_q.gather(1, labels[:, None])[:, 0]


def _pull(gradient: Tensor, objective: _Objective, labels: Tensor | None) -> None:
    """The cross-entropy's gradient at the labels, beyond its q: -ce_weight, in place."""
    if labels is not None and objective.ce_weight > 0:
        pull = gradient.new_full((len(labels), 1), -objective.ce_weight)
        gradient.scatter_add_(1, labels[:, None], pull)


class _LinearKL(torch.autograd.Function):
    """Loss and gradients of a chunked head product; differentiable once."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        teacher: _TopK | _Dense,
        labels: Tensor | None,
        weights: Tensor | None,
        normalizer: float,
        objective: _Objective,
        chunk_size: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        # Autocast would round the float32 products in here to bfloat16.
        with torch.autocast(hidden.device.type, enabled=False):
            return _forward(
                ctx, hidden, weight, teacher, labels, weights, normalizer, objective, chunk_size
            )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight = ctx.saved_tensors
        if d_hidden is not None:
            d_hidden = d_hidden * grad_loss.to(d_hidden.dtype)
        if d_weight is not None:
            d_weight = (d_weight * grad_loss).to(ctx.weight_dtype)
        return d_hidden, d_weight, None, None, None, None, None, None


def _forward(
    ctx: Any,
    hidden: Tensor,
    weight: Tensor,
    teacher: _TopK | _Dense,
    labels: Tensor | None,
    weights: Tensor | None,
    normalizer: float,
    objective: _Objective,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    n = hidden.shape[0]
    head = weight.to(hidden.dtype)
    exact = _accumulation_dtype(hidden)
    need_hidden, need_weight = ctx.needs_input_grad[:2]
    d_hidden = torch.empty_like(hidden) if need_hidden else None
    d_weight = torch.zeros(weight.shape, dtype=exact, device=weight.device) if need_weight else None
    per_token = torch.zeros(n, dtype=exact, device=hidden.device)
    cross_entropy = torch.zeros_like(per_token)
    for first in range(0, n, chunk_size):
        rows = slice(first, min(first + chunk_size, n))
        chunk = hidden[rows]
        buffer = _logits(chunk, head)
        per_token[rows], cross_entropy[rows] = teacher.take(rows).backward_into(
            buffer, objective, None if labels is None else labels[rows]
        )
        scale = torch.full((buffer.shape[0], 1), 1 / normalizer, dtype=exact, device=buffer.device)
        if weights is not None:
            scale = scale * weights[rows, None].to(exact)
        buffer.mul_(scale)
        if d_hidden is not None:
            d_hidden[rows] = _times_head(buffer, head)
        if d_weight is not None:
            _add_outer(d_weight, buffer, chunk)
    ctx.save_for_backward(d_hidden, d_weight)
    ctx.weight_dtype = weight.dtype
    ctx.mark_non_differentiable(per_token, cross_entropy)
    total = objective.loss(per_token, cross_entropy)
    if weights is not None:
        total = total * weights.to(exact)
    return total.sum() / normalizer, per_token, cross_entropy


def _accumulation_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _is_exact(x: Tensor) -> bool:
    return x.dtype in (torch.float32, torch.float64)


def _logits(hidden: Tensor, head: Tensor) -> Tensor:
    """[c, H] x [V, H] -> [c, V] in float32 or float64, never rounded to a shorter type."""
    if _is_exact(hidden):
        return hidden @ head.T
    if hidden.is_cuda:
        return torch.mm(hidden, head.T, out_dtype=torch.float32)
    logits = torch.empty(hidden.shape[0], head.shape[0], dtype=torch.float32)
    wide = hidden.float()
    for v in range(0, head.shape[0], _VOCAB_BLOCK):
        logits[:, v : v + _VOCAB_BLOCK] = wide @ head[v : v + _VOCAB_BLOCK].float().T
    return logits


def _times_head(gradient: Tensor, head: Tensor) -> Tensor:
    """[c, V] x [V, H] -> [c, H], accumulated in float32."""
    if _is_exact(head):
        return gradient @ head
    if head.is_cuda:
        return gradient.to(head.dtype) @ head
    out = torch.zeros(gradient.shape[0], head.shape[1], dtype=torch.float32)
    for v in range(0, head.shape[0], _VOCAB_BLOCK):
        out.addmm_(gradient[:, v : v + _VOCAB_BLOCK], head[v : v + _VOCAB_BLOCK].float())
    return out


def _add_outer(total: Tensor, gradient: Tensor, hidden: Tensor) -> None:
    """total [V, H] += gradient [c, V] ^T x hidden [c, H]."""
    if hidden.is_cuda and not _is_exact(hidden):
        total += torch.mm(gradient.to(hidden.dtype).T, hidden, out_dtype=torch.float32)
    else:
        total.addmm_(gradient.T, hidden.to(total.dtype))
