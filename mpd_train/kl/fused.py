"""The losses straight from hidden states: head product, softmax, divergence and its gradient in
one pass, some rows at a time, so that tokens x vocabulary never exists.

Gradients are made while a chunk's logits are there, in the forward pass, and scaled in the
backward pass: no vocabulary product is done twice, which on any device costs more than the
memory traffic that it saves. Two sizes of chunk: matrix products want many rows (adding to the
head's gradient moves all of it, for each product), float32 logits want few.

Registered as one custom operator, `mpd::linear_kl`, so that torch.compile and FLOP counters see it.
"""

import functools
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from mpd_train.kl.divergence import Divergence, Name
from mpd_train.kl.objective import Objective
from mpd_train.kl.types import FOUND, Dense, Heads, TopK, accumulation_dtype

# Rows of a product with the head's gradient, and of those the rows that have float32 logits at a
# time: of the student alone, and of both models. Where the gradient takes the logits' place all of
# the product's rows have them.
_ROWS = {"cpu": (512, 256, 256), "cuda": (2048, 2048, 1024)}
# Rows whose ids are checked at a time: each time is a dozen launches with nothing else to do.
_CHECKED_ROWS = 16_384
# Bytes of logits that are reached whatever the vocabulary.
_LEAST_BYTES = 16 << 20
# Vocabulary rows upcast at a time where the device has no mixed-precision product.
_VOCAB_BLOCK = 8192


class Kernels(Protocol):
    """The elementwise part, for rows of one chunk. `logits` [c, V] float32 or float64 are used up.
    Writes the gradient of the summed loss, times `factors` [c, 1], to `out` [c, V], which may lie
    where the logits do (see `_in_place`), and returns [c, FOUND]."""

    def sparse(
        self, logits: Tensor, teacher: TopK, labels: Tensor | None, factors: Tensor,
        objective: Objective, out: Tensor,
    ) -> Tensor: ...  # fmt: skip

    def dense(
        self, logits: Tensor, teacher_logits: Tensor, labels: Tensor | None, factors: Tensor,
        objective: Objective, out: Tensor,
    ) -> Tensor: ...  # fmt: skip


def loss(
    heads: Heads,
    teacher: TopK | Dense,
    labels: Tensor | None,
    factors: Tensor,
    objective: Objective,
    backend: str,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """Scalar loss, sum of factors [n] x loss of the token, and what was found [n, FOUND].
    chunk_size 0: by the device and the vocabulary."""
    student = (heads.hidden, heads.weight, heads.bias)
    grads = torch.is_grad_enabled()
    needs = [grads and x is not None and x.requires_grad for x in student]
    none = (None, None, None)
    known: tuple[Tensor | None, ...]
    if isinstance(teacher, TopK):
        known = (teacher.ids, teacher.logprobs, teacher.tail, *none)
    else:
        known = (*none, teacher.hidden, teacher.weight, teacher.bias)
    divergence = objective.divergence
    total, found, *_ = linear_kl(
        *student, *known, labels, factors, needs, divergence.name, divergence.parameter,
        objective.temperature, objective.clip, objective.ce_weight, objective.softcap,
        objective.teacher_softcap, backend, chunk_size,
    )  # fmt: skip
    return total, found


# It asks the device for numbers, which a CUDA graph cannot hold.
@torch.library.custom_op("mpd::linear_kl", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def linear_kl(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    topk_ids: Tensor | None,
    topk_logprobs: Tensor | None,
    tail_logprobs: Tensor | None,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    labels: Tensor | None,
    factors: Tensor,
    needs: list[bool],
    divergence: str,
    parameter: float,
    temperature: float,
    clip: float | None,
    ce_weight: float,
    softcap: float | None,
    teacher_softcap: float | None,
    backend: str,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, what was found [n, FOUND], and the loss' gradients with respect to the first three,
    empty where `needs` has none."""
    heads = Heads(hidden, weight, bias)
    teacher: TopK | Dense
    if topk_ids is not None and topk_logprobs is not None and tail_logprobs is not None:
        teacher = TopK(topk_ids, topk_logprobs, tail_logprobs)
    else:
        assert teacher_hidden is not None and teacher_weight is not None
        teacher = Dense(teacher_hidden, teacher_weight, teacher_bias)
    objective = Objective(
        _divergence(divergence, parameter), temperature, clip, ce_weight, softcap, teacher_softcap
    )
    # Autocast would round the float32 products in here to bfloat16; Triton launches on the current
    # device, whichever the tensors are on.
    on_its_device = torch.cuda.device_of(hidden)  # type: ignore[no-untyped-call]
    with torch.autocast(hidden.device.type, enabled=False), on_its_device:
        return _forward(heads, teacher, labels, factors, needs, objective, backend, chunk_size)


def _divergence(name: str, parameter: float) -> Divergence:
    known: Name = name  # type: ignore[assignment]
    return Divergence(known, beta=parameter, alpha=parameter)


@linear_kl.register_fake
def _shapes(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *others: Any,
) -> tuple[Tensor, ...]:
    needs = others[8]
    exact = accumulation_dtype(hidden.dtype)
    student = (hidden, weight, bias)
    return (
        hidden.new_empty((), dtype=exact),
        hidden.new_empty((hidden.shape[0], FOUND), dtype=exact),
        *(
            hidden.new_empty(0)
            if x is None or not need
            else x.new_empty(x.shape, dtype=_gradient_dtype(hidden, i))
            for i, (x, need) in enumerate(zip(student, needs, strict=True))
        ),
    )


def _gradient_dtype(hidden: Tensor, i: int) -> torch.dtype:
    """States' gradients are in the states' type, heads' in the one that they accumulate in."""
    return hidden.dtype if i == 0 else accumulation_dtype(hidden.dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[2:])
    ctx.dtypes = [None if x is None else x.dtype for x in inputs[:3]]
    ctx.needs, ctx.num_inputs = inputs[11], len(inputs)


def _backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "sparse_kl and dense_kl can be differentiated once: call backward without"
            " create_graph=True"
        )
    gradients: list[Tensor | None] = [None] * ctx.num_inputs
    if grad_loss is None:
        return tuple(gradients)
    # The normaliser is within, so the factor is 1 nearly always. To ask costs a wait for the
    # device, and spares a second copy of the head's gradient.
    traced = torch.compiler.is_compiling() or type(grad_loss) is not Tensor
    scaled = traced or bool(grad_loss != 1)
    for i, gradient in enumerate(ctx.saved_tensors):
        if ctx.needs[i]:
            if scaled:
                wide = accumulation_dtype(gradient.dtype)
                gradient = (gradient.to(wide) * grad_loss.to(wide)).to(gradient.dtype)
            gradients[i] = gradient.to(ctx.dtypes[i])
    return tuple(gradients)


linear_kl.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.mpd.linear_kl)
def _flops(
    hidden: tuple[int, int],
    weight: tuple[int, int],
    bias: Any,
    *others: Any,
    **_: Any,
) -> int:
    """Of the matrix products: forward and both gradients, and the teacher's; as if all rows had
    weight."""
    teacher_hidden: tuple[int, int] | None = others[3]
    needs: list[bool] = others[8]
    per_width = 2 * hidden[0] * weight[0]
    total = per_width * hidden[1] * (1 + needs[0] + needs[1])
    if teacher_hidden is not None:
        total += per_width * teacher_hidden[1]
    return total


def _forward(
    heads: Heads,
    teacher: TopK | Dense,
    labels: Tensor | None,
    factors: Tensor,
    needs: list[bool],
    objective: Objective,
    backend: str,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    hidden, vocab_size = heads.hidden, heads.weight.shape[0]
    n, device = hidden.shape[0], hidden.device
    exact = accumulation_dtype(hidden.dtype)
    if backend == "triton" and isinstance(teacher, TopK) and not _fits_triton(teacher):
        backend = "torch"
    kernels = _kernels(backend)
    in_place = _in_place(backend, isinstance(teacher, TopK), hidden)
    weight = heads.weight.to(hidden.dtype)
    teacher_weight = None
    if isinstance(teacher, Dense):
        teacher_weight = teacher.weight.to(teacher.hidden.dtype)

    student = (hidden, heads.weight, heads.bias)
    count = _check(factors, teacher, labels, vocab_size)
    # Rows without weight leave before the product: a NaN there must not reach the head's gradient,
    # and multiplying it by zero would not stop it. Where all have some, nothing is copied.
    rows = None if count == n else factors.nonzero().squeeze(1)
    written = (1,) if rows is not None else (0, 1)
    gradients = [
        # Rows that are left out have a gradient of 0; what is summed over rows the first chunk
        # writes: filling a head's gradient and reading it once is time that can be measured.
        (torch.empty if i in written and count > 0 else torch.zeros)(
            x.shape, dtype=_gradient_dtype(hidden, i), device=device
        )
        if need and x is not None
        else hidden.new_empty(0)
        for i, (x, need) in enumerate(zip(student, needs, strict=True))
    ]
    d_hidden, d_weight, d_bias = gradients
    found = torch.zeros((n, FOUND), dtype=exact, device=device)

    size, logit_rows = _chunk_sizes(device, vocab_size, chunk_size, isinstance(teacher, Dense))
    for start in range(0, count, size):
        stop = min(start + size, count)
        chunk = _picked(rows, start, stop)
        states = hidden[chunk]
        if in_place:
            all_logits = _logits(states, weight, heads.bias)
            gradient = all_logits
            if backend == "triton" and hidden.dtype != exact:
                # Each row of it at the start of the row of logits that it is made from.
                gradient = all_logits.view(hidden.dtype)[:, :vocab_size]
        else:
            gradient = hidden.new_empty((stop - start, vocab_size))
        for first in range(start, stop, logit_rows):
            last = min(first + logit_rows, stop)
            part = slice(first - start, last - start)
            out = gradient[part]
            logits = all_logits[part] if in_place else _logits(states[part], weight, heads.bias)
            picked = _picked(rows, first, last)
            of_labels = None if labels is None else labels[picked]
            scale = factors[picked, None]
            if isinstance(teacher, TopK):
                values = kernels.sparse(
                    logits, teacher.take(picked), of_labels, scale, objective, out
                )
            else:
                assert teacher_weight is not None
                of_teacher = _logits(teacher.hidden[picked], teacher_weight, teacher.bias)
                values = kernels.dense(
                    logits, of_teacher.to(exact), of_labels, scale, objective, out
                )
                del of_teacher
            found[picked] = values
            # Before the next part's: two of them would be the peak.
            del logits
        if needs[0]:
            d_hidden[chunk] = _times_head(gradient, weight).to(hidden.dtype)
        if needs[1]:
            _add_outer(d_weight, gradient, states, start == 0)
        if needs[2]:
            d_bias += gradient.sum(0, dtype=exact)
        del gradient, out
        if in_place:
            del all_logits
    everywhere = _picked(rows, 0, count)
    losses = objective.loss(found[everywhere, 0], found[everywhere, 1])
    total = (losses * factors[everywhere]).sum()
    return total, found, d_hidden, d_weight, d_bias


def _picked(rows: Tensor | None, first: int, last: int) -> Tensor | slice:
    """Some of the rows that have weight: `rows`, or all there are."""
    return slice(first, last) if rows is None else rows[first:last]


def workspace_bytes(
    tokens: int,
    head: tuple[int, int],
    teacher_head: tuple[int, int] | None,
    dtype: torch.dtype,
    weight_dtype: torch.dtype,
    device: torch.device,
) -> int:
    """What the loss of `tokens` states in `dtype` takes at most beside its inputs and the gradients
    that it returns. head, teacher_head: [V, H] of each, in `weight_dtype` and in `dtype`."""
    vocab_size, exact, short = head[0], accumulation_dtype(dtype).itemsize, dtype.itemsize
    rows, logit_rows = (
        min(x, tokens) for x in _chunk_sizes(device, vocab_size, 0, teacher_head is not None)
    )
    total = rows * vocab_size * exact
    if device.type == "cuda" and teacher_head is not None:
        total = rows * vocab_size * short + logit_rows * vocab_size * exact
    if teacher_head is not None:
        total += logit_rows * vocab_size * exact
    if weight_dtype != dtype:
        total += head[0] * head[1] * short
    if device.type != "cuda" and dtype == torch.bfloat16:
        total += 2 * _VOCAB_BLOCK * max(head[1], teacher_head[1] if teacher_head else 0) * exact
    return total


def _in_place(backend: str, sparse: bool, hidden: Tensor) -> bool:
    """Whether the gradient takes the logits' place, which spares a buffer: in torch where both have
    the same type, in Triton for a sparse teacher. (The autotuner runs the dense kernel several
    times, and it must not write to what it reads.)"""
    if backend == "triton":
        return sparse
    return not hidden.is_cuda or _is_exact(hidden)


def _chunk_sizes(
    device: torch.device, vocab_size: int, chunk_size: int, dense: bool
) -> tuple[int, int]:
    """Rows of a product with the head's gradient and rows of float32 logits."""
    if chunk_size > 0:
        return chunk_size, chunk_size
    least = _LEAST_BYTES // (4 * vocab_size)
    rows, of_student, of_both = _ROWS.get(device.type, _ROWS["cuda"])
    logit_rows = of_both if dense else of_student
    return max(rows, least), max(logit_rows, least)


def _check(factors: Tensor, teacher: TopK | Dense, labels: Tensor | None, vocab_size: int) -> int:
    """The number of rows with weight. Raises ValueError for ids that none of them may have. One
    wait for the device."""
    weighted = factors != 0
    problems = {}
    if isinstance(teacher, TopK):
        doubled = torch.zeros((), dtype=torch.bool, device=factors.device)
        outside, headless = doubled.clone(), doubled.clone()
        parts = (torch.split(x, _CHECKED_ROWS) for x in (teacher.ids, weighted))
        for ids, counts in zip(*parts, strict=True):
            outside |= (((ids < -1) | (ids >= vocab_size)) & counts[:, None]).any()
            headless |= ((ids[:, 0] < 0) & counts).any()
            in_order = ids.sort(dim=1).values
            twice = (in_order[:, 1:] == in_order[:, :-1]) & (in_order[:, 1:] >= 0)
            doubled |= (twice & counts[:, None]).any()
        problems["topk_ids holds an id twice in one row"] = doubled
        problems[f"topk_ids holds ids outside the vocabulary of {vocab_size}"] = outside
        problems["topk_ids has a row that does not begin with an id"] = headless
    if labels is not None:
        problems[f"labels are outside the vocabulary of {vocab_size} in rows with weight"] = (
            ((labels < 0) | (labels >= vocab_size)) & weighted
        ).any()
    count, *found = torch.stack(
        [weighted.sum(), *(bad.long() for bad in problems.values())]
    ).tolist()
    for message, bad in zip(problems, found, strict=True):
        if bad:
            raise ValueError(message)
    return int(count)


def _fits_triton(teacher: TopK) -> bool:
    from mpd_train.kl.triton_kernels import MOST_IDS

    return teacher.ids.shape[1] <= MOST_IDS


def _kernels(backend: str) -> Kernels:
    if backend == "triton":
        from mpd_train.kl import triton_kernels

        return triton_kernels
    from mpd_train.kl import torch_kernels

    return torch_kernels


def _is_exact(x: Tensor) -> bool:
    return x.dtype in (torch.float32, torch.float64)


def _vocab_blocks(vocab_size: int) -> Iterator[slice]:
    for first in range(0, vocab_size, _VOCAB_BLOCK):
        yield slice(first, first + _VOCAB_BLOCK)


def _logits(hidden: Tensor, head: Tensor, bias: Tensor | None) -> Tensor:
    """[c, H] x [V, H] -> [c, V] in float32 or float64, never rounded to a shorter type."""
    if _is_exact(hidden):
        logits = hidden @ head.T
    elif hidden.is_cuda:
        logits = torch.mm(hidden, head.T, out_dtype=torch.float32)
    else:
        size = (hidden.shape[0], head.shape[0])
        logits = torch.empty(size, dtype=torch.float32, device=hidden.device)
        wide = hidden.float()
        for block in _vocab_blocks(head.shape[0]):
            logits[:, block] = wide @ head[block].float().T
    return logits if bias is None else logits.add_(bias.to(logits.dtype))


def _times_head(gradient: Tensor, head: Tensor) -> Tensor:
    """[c, V] x [V, H] -> [c, H], accumulated in float32."""
    if _is_exact(head):
        return gradient @ head
    if head.is_cuda:
        return torch.mm(gradient, head, out_dtype=torch.float32)
    size = (gradient.shape[0], head.shape[1])
    out = torch.zeros(size, dtype=torch.float32, device=head.device)
    for block in _vocab_blocks(head.shape[0]):
        out.addmm_(gradient[:, block].float(), head[block].float())
    return out


def _add_outer(total: Tensor, gradient: Tensor, hidden: Tensor, first: bool) -> None:
    """total [V, H] += gradient [c, V]^T x hidden [c, H]; = where it is the `first`."""
    if _is_exact(hidden) or hidden.is_cuda:
        _add_product(total, gradient.T, hidden, first)
        return
    wide = hidden.float()
    for block in _vocab_blocks(total.shape[0]):
        _add_product(total[block], gradient[:, block].float().T, wide, first)


def _add_product(total: Tensor, left: Tensor, right: Tensor, first: bool) -> None:
    """total [a, c] += left [a, b] x right [b, c], in the type of `total`, float32 or float64;
    = where it is the `first`: what `total` held then is not looked at."""
    beta = 0 if first else 1
    if left.dtype == total.dtype:
        total.addmm_(left, right, beta=beta)
    elif not left.is_cuda:
        total.addmm_(left.float(), right.float(), beta=beta)
    elif _adds_to_float32(left.device):
        torch.addmm(total, left, right, beta=beta, out_dtype=torch.float32, out=total)
    else:
        # Some rows at a time: the whole product would be as large as the total.
        for rows in _vocab_blocks(total.shape[0]):
            product = torch.mm(left[rows], right, out_dtype=torch.float32)
            total[rows] = product if first else total[rows] + product


@functools.cache
def _adds_to_float32(device: torch.device) -> bool:
    """Whether this torch adds a bfloat16 product to a float32 matrix within the product, which
    spares reading and writing the head's gradient once more; some releases want the addend in
    bfloat16."""
    # A sum that bfloat16 cannot hold: to be taken is not enough.
    total = torch.full((16, 16), 1 + 2.0**-12, dtype=torch.float32, device=device)
    short = torch.ones((16, 16), dtype=torch.bfloat16, device=device)
    try:
        torch.addmm(total, short, short, out_dtype=torch.float32, out=total)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError):
        return False
    return bool((total == 17 + 2.0**-12).all())
