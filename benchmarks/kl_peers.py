"""The losses that benchmarks/kl_cpu.py and kl_gpu.py compare: ours, and how others compute them.

Each function takes inputs (see `inputs`), leaves gradients in `hidden.grad` and `weight.grad`, and
returns the loss. Forward KL, divided by the number of tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mpd_train.kl import dense_kl, sparse_kl


@dataclass(frozen=True)
class Inputs:
    """hidden [T, H], weight [V, H]; teacher_hidden [T, Ht], teacher_weight [V, Ht]; topk_ids,
    topk_logprobs [T, K], tail_logprobs [T]."""

    hidden: Tensor
    weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor
    topk_ids: Tensor
    topk_logprobs: Tensor
    tail_logprobs: Tensor

    def to(self, dtype: torch.dtype) -> "Inputs":
        """The models' tensors in `dtype`, the student ready for gradients; the record as it is."""
        return replace(
            self,
            hidden=self.hidden.to(dtype, copy=True).requires_grad_(),
            weight=self.weight.to(dtype, copy=True).requires_grad_(),
            teacher_hidden=self.teacher_hidden.to(dtype),
            teacher_weight=self.teacher_weight.to(dtype),
        )


def inputs(
    tokens: int,
    vocab: int,
    width: int,
    teacher_width: int,
    k: int,
    device: str,
    std: float = 2.0,
    gap: float | None = None,
) -> Inputs:
    """Random models, rounded to bfloat16, in float32. Student logits have a standard deviation of
    `std`; the teacher's are others, or the student's and about `gap` more where that is given."""
    g = torch.Generator(device).manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=g, device=device)

    def rounded(x: Tensor) -> Tensor:
        return x.bfloat16().float()

    hidden, weight = rounded(draw(tokens, width)), rounded(draw(vocab, width) * std / width**0.5)
    if gap is None:
        teacher_hidden = rounded(draw(tokens, teacher_width))
        teacher_weight = rounded(draw(vocab, teacher_width) * std / teacher_width**0.5)
    else:
        more = teacher_width - width
        teacher_hidden = torch.cat([hidden, rounded(draw(tokens, more))], 1)
        teacher_weight = torch.cat([weight, rounded(draw(vocab, more) * gap / more**0.5)], 1)
    found = []
    for t in teacher_hidden.split(256):
        logprobs = (t @ teacher_weight.T).log_softmax(-1)
        top = logprobs.topk(k, dim=1)
        outside = logprobs.scatter(1, top.indices, float("-inf"))
        found.append((top.indices, top.values, outside.logsumexp(1)))
    ids, values, tail = (torch.cat(x) for x in zip(*found, strict=True))
    return Inputs(hidden, weight, teacher_hidden, teacher_weight, ids, values, tail)


def ours_dense(x: Inputs) -> Tensor:
    out = dense_kl(
        x.hidden, x.weight, x.teacher_hidden, x.teacher_weight, normalizer=float(len(x.hidden))
    )
    out.loss.backward()
    return out.loss


def ours_sparse(x: Inputs) -> Tensor:
    record = x.topk_ids, x.topk_logprobs, x.tail_logprobs
    out = sparse_kl(x.hidden, x.weight, *record, normalizer=float(len(x.hidden)))
    out.loss.backward()
    return out.loss


def naive_dense(x: Inputs) -> Tensor:
    """All logits of both at once, kept as a trainer's models keep them in what they return; softmax
    in float32."""
    logits = x.hidden @ x.weight.T
    with torch.no_grad():
        teacher_logits = x.teacher_hidden @ x.teacher_weight.T
        log_p = teacher_logits.float().log_softmax(-1)
    log_q = logits.float().log_softmax(-1)
    kl = torch.nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    loss = kl.sum() / len(x.hidden)
    loss.backward()
    return loss


def naive_sparse(x: Inputs) -> Tensor:
    """All of the student's logits at once, kept as its model keeps them; a tail bucket by
    log(1 - mass)."""
    logits = x.hidden @ x.weight.T
    log_q = logits.float().log_softmax(-1)
    top = log_q.gather(1, x.topk_ids)
    tail = torch.log1p(-top.exp().sum(1).clamp(max=1 - 1e-6))
    loss = (x.topk_logprobs.exp() * (x.topk_logprobs - top)).sum()
    loss = (loss + (x.tail_logprobs.exp() * (x.tail_logprobs - tail)).sum()) / len(x.hidden)
    loss.backward()
    return loss


def veomni_sparse(x: Inputs) -> Tensor:
    """As VeOmni computes it (verl #6511), written anew: chunks of 1,024 whose logits are made again
    for the backward pass; no tail."""

    def part(hidden: Tensor, weight: Tensor, ids: Tensor, logprobs: Tensor) -> Tensor:
        log_q = (hidden @ weight.T).float().log_softmax(-1)
        return (logprobs.exp() * (logprobs - log_q.gather(1, ids))).sum()

    loss = x.hidden.new_zeros((), dtype=torch.float32)
    for rows in torch.arange(len(x.hidden), device=x.hidden.device).split(1024):
        some = slice(int(rows[0]), int(rows[-1]) + 1)
        args = x.hidden[some], x.weight, x.topk_ids[some], x.topk_logprobs[some]
        loss = loss + checkpoint(part, *args, use_reentrant=False)
    loss = loss / len(x.hidden)
    loss.backward()
    return loss


def liger_dense(x: Inputs) -> Tensor:
    """Liger's chunked loss with its defaults: compiled, chunks of 1,024."""
    from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDLoss

    module = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0)
    labels = x.topk_ids[:, 0]
    loss = module(x.hidden, x.weight, x.teacher_hidden, x.teacher_weight, labels)
    loss.backward()
    return loss


def liger_float32_dense(x: Inputs) -> Tensor:
    """Liger's other loss, `LigerFusedLinearJSD`, with the head's gradient summed in float32. On a
    GPU its logits are float32 too; it has no form for a CPU."""
    from liger_kernel.ops import LigerFusedLinearJSDFunction

    beta, ignore_index, temperature = 0.0, -100, 1.0
    options = None, beta, ignore_index, temperature, torch.float32, None, None
    models = x.hidden, x.weight, x.teacher_hidden, x.teacher_weight
    loss: Tensor = LigerFusedLinearJSDFunction.apply(*models, *options)
    loss.backward()
    return loss


def trl_dense(x: Inputs) -> Tensor:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    student, teacher = (x.hidden, x.weight, None), (x.teacher_hidden, x.teacher_weight, None)
    per_token, _ = ChunkedDivergenceFunction.apply(*student, *teacher, 0.0)
    loss = per_token.sum() / len(x.hidden)
    loss.backward()
    return loss


LOSSES: dict[str, Callable[[Inputs], Tensor]] = {
    "dense, naive": naive_dense,
    "dense, Liger 0.8.5": liger_dense,
    "dense, TRL 1.16": trl_dense,
    "dense, ours": ours_dense,
    "sparse, naive": naive_sparse,
    "sparse, VeOmni's way": veomni_sparse,
    "sparse, ours": ours_sparse,
}
GPU_LOSSES = {"dense, Liger 0.8.5, float32 logits": liger_float32_dense}
