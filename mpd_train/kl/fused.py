"""The losses straight from hidden states: head product, softmax, divergence and its gradient in
one pass, some rows at a time, so that tokens x vocabulary never exists.

Gradients are computed in the forward pass, while a chunk's logits exist, and scaled in the
backward pass: no vocabulary product is done twice, which on any device would cost more than the
memory traffic that it saves. There are two sizes of chunk: matrix products need many rows (adding
to the head's gradient moves all of it, for each product), float32 logits few.

Registered as one custom operator, `mpd::linear_kl`, so that torch.compile and FLOP counters see it.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from mpd_train.kl import torch_kernels
from mpd_train.kl.divergence import Divergence, Name
from mpd_train.kl.objective import Objective
from mpd_train.kl.types import NUM_METRICS, Head, TopK, accumulation_dtype

# By device: rows of a product with the head's gradient, and how many of those have float32 logits
# at a time, with a sparse and with a dense teacher. (All of them, where the gradient takes the
# logits' place.)
_ROWS = {"cpu": (512, 256, 256), "cuda": (2048, 2048, 1024)}
# Rows whose ids are checked at a time: each time is a dozen launches with nothing else to do.
_CHECKED_ROWS = 16_384
# A chunk has at least this many bytes of logits, however small the vocabulary.
_LEAST_BYTES = 16 << 20
# Vocabulary rows upcast at a time where the device has no mixed-precision product.
_VOCAB_BLOCK = 8192


class Kernel(Protocol):
    """The elementwise part, for rows of one chunk. `logits` [c, V] float32 or float64 are used up;
    `teacher`: its records, or its logits [c, V]. Writes the gradient of the summed loss, times
    `factors` [c, 1], to `out` [c, V], which may share the logits' memory (see `_in_place`), and
    returns the metrics [c, NUM_METRICS]."""

    def __call__(
        self, logits: Tensor, teacher: TopK | Tensor, labels: Tensor | None, factors: Tensor,
        objective: Objective, out: Tensor,
    ) -> Tensor: ...  # fmt: skip


class Inputs(NamedTuple):
    """What the operator takes, by name. Operators take flat values alone, so it is called as
    `linear_kl(*inputs)`, and whatever receives its arguments begins with `Inputs(*arguments)`.

    The student's hidden [n, H], weight [V, H], bias [V]; a sparse teacher's topk_ids and
    topk_logprobs [n, K], tail_logprobs [n], or a dense one's hidden [n, Ht], weight [V, Ht],
    bias [V]; labels [n]; factors [n] by which the tokens' losses are multiplied. needs_grad: for
    hidden, weight and bias. parameter: the divergence's. chunk_size: rows, 0 for the default.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    topk_ids: Tensor | None
    topk_logprobs: Tensor | None
    tail_logprobs: Tensor | None
    teacher_hidden: Tensor | None
    teacher_weight: Tensor | None
    teacher_bias: Tensor | None
    labels: Tensor | None
    factors: Tensor
    needs_grad: list[bool]
    divergence: str
    parameter: float
    temperature: float
    clip: float | None
    entry_clip: float | None
    ce_weight: float
    softcap: float | None
    teacher_softcap: float | None
    backend: str
    chunk_size: int

    @property
    def teacher(self) -> TopK | Head:
        if self.topk_ids is not None:
            assert self.topk_logprobs is not None and self.tail_logprobs is not None
            return TopK(self.topk_ids, self.topk_logprobs, self.tail_logprobs)
        assert self.teacher_hidden is not None and self.teacher_weight is not None
        return Head(self.teacher_hidden, self.teacher_weight, self.teacher_bias)

    @property
    def objective(self) -> Objective:
        name: Name = self.divergence  # type: ignore[assignment]
        return Objective(
            Divergence(name, beta=self.parameter, alpha=self.parameter),
            self.temperature, self.clip, self.entry_clip, self.ce_weight, self.softcap,
            self.teacher_softcap,
        )  # fmt: skip

    def gradients(self) -> list[tuple[Tensor | None, torch.dtype]]:
        """Return hidden, weight and bias, None where no gradient is needed, each with the dtype of
        its gradient: the states' own, and for the head the one that it is summed in."""
        exact = accumulation_dtype(self.hidden.dtype)
        parts = (self.hidden, self.weight, self.bias)
        dtypes = (self.hidden.dtype, exact, exact)
        return [
            (x if needed else None, dtype)
            for x, needed, dtype in zip(parts, self.needs_grad, dtypes, strict=True)
        ]


# The names and types of `Inputs`; returned are the loss, the metrics [n, NUM_METRICS] and the
# loss' gradients with respect to hidden, weight and bias, empty where they are not needed.
_SCHEMA = """(
    Tensor hidden, Tensor weight, Tensor? bias,
    Tensor? topk_ids, Tensor? topk_logprobs, Tensor? tail_logprobs,
    Tensor? teacher_hidden, Tensor? teacher_weight, Tensor? teacher_bias,
    Tensor? labels, Tensor factors, bool[] needs_grad,
    str divergence, float parameter, float temperature, float? clip, float? entry_clip,
    float ce_weight, float? softcap, float? teacher_softcap, str backend, SymInt chunk_size
) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"""


def loss(
    student: Head, teacher: TopK | Head, labels: Tensor | None, factors: Tensor,
    objective: Objective, backend: str, chunk_size: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the sum of factors [n] x the tokens' losses, a scalar, and their metrics
    [n, NUM_METRICS]. chunk_size 0: by the device and the vocabulary."""
    none = (None, None, None)
    enabled = torch.is_grad_enabled()
    total, metrics, *_ = linear_kl(
        *student,
        *(teacher if isinstance(teacher, TopK) else none),
        *(none if isinstance(teacher, TopK) else teacher),
        labels, factors, [enabled and x is not None and x.requires_grad for x in student],
        objective.divergence.name, objective.divergence.parameter, objective.temperature,
        objective.clip, objective.entry_clip, objective.ce_weight, objective.softcap,
        objective.teacher_softcap, backend, chunk_size,
    )  # fmt: skip
    return total, metrics


# It asks the device for numbers, which a CUDA graph cannot hold.
@torch.library.custom_op(
    "mpd::linear_kl", mutates_args=(), schema=_SCHEMA, tags=(torch.Tag.cudagraph_unsafe,)
)
def linear_kl(*arguments: Any) -> tuple[Tensor, ...]:
    inputs = Inputs(*arguments)
    # Autocast would round the float32 products in here to bfloat16; Triton launches on the current
    # device, whichever the tensors are on.
    on_its_device = torch.cuda.device_of(inputs.hidden)  # type: ignore[no-untyped-call]
    with (
        torch.autocast(inputs.hidden.device.type, enabled=False),
        on_its_device,
        _short_products(inputs.hidden),
    ):
        return _forward(inputs)


@linear_kl.register_fake
def _shapes(*arguments: Any) -> tuple[Tensor, ...]:
    inputs = Inputs(*arguments)
    hidden, exact = inputs.hidden, accumulation_dtype(inputs.hidden.dtype)
    return (
        hidden.new_empty((), dtype=exact),
        hidden.new_empty((hidden.shape[0], NUM_METRICS), dtype=exact),
        *(
            hidden.new_empty(0) if x is None else x.new_empty(x.shape, dtype=dtype)
            for x, dtype in inputs.gradients()
        ),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    given = Inputs(*inputs)
    _, metrics, *gradients = output
    ctx.mark_non_differentiable(metrics, *gradients)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*gradients)
    parts = (given.hidden, given.weight, given.bias)
    ctx.dtypes = [None if x is None else x.dtype for x in parts]
    ctx.needs_grad = given.needs_grad


def _backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "sparse_kl and dense_kl can be differentiated once: call backward without"
            " create_graph=True"
        )
    gradients: dict[str, Tensor] = {}
    if grad_loss is not None:
        # The normaliser is within, so the factor is 1 nearly always. To ask costs a wait for the
        # device, and spares a second copy of the head's gradient.
        traced = torch.compiler.is_compiling() or type(grad_loss) is not Tensor
        scaled = traced or bool(grad_loss != 1)
        parts = zip(
            ("hidden", "weight", "bias"), ctx.saved_tensors, ctx.needs_grad, ctx.dtypes, strict=True
        )
        for name, gradient, needed, dtype in parts:
            if needed:
                if scaled:
                    wide = accumulation_dtype(gradient.dtype)
                    gradient = (gradient.to(wide) * grad_loss.to(wide)).to(gradient.dtype)
                gradients[name] = gradient.to(dtype)
    return tuple(gradients.get(name) for name in Inputs._fields)


linear_kl.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.mpd.linear_kl)
def _flops(*shapes: Any, **_: Any) -> int:
    """Count the matrix products: forward, both gradients and the teacher's, as if all rows had
    weight. A tensor comes as its shape."""
    inputs: Any = Inputs(*shapes)
    n, width = map(int, inputs.hidden)
    to_hidden, to_weight, _to_bias = inputs.needs_grad
    total: int = width * (1 + to_hidden + to_weight)
    if inputs.teacher_hidden is not None:
        total += inputs.teacher_hidden[1]
    vocab_size, _ = inputs.weight
    return 2 * n * int(vocab_size) * total


def _forward(inputs: Inputs) -> tuple[Tensor, ...]:
    """Raise ValueError for ids or labels that a row with weight may not have."""
    hidden, factors, objective = inputs.hidden, inputs.factors, inputs.objective
    vocab_size = inputs.weight.shape[0]
    count = _check(factors, inputs.teacher, inputs.labels, vocab_size)
    # Rows without weight leave before the product: a NaN there must not reach the head's
    # gradient, and multiplying it by zero would not stop it. Where all have some, nothing is
    # copied.
    weighted = None if count == len(hidden) else factors.nonzero().squeeze(1)
    chunks = _Chunks(_in_the_states_dtype(inputs), weighted)
    written = (weighted is None, True, False)
    gradients = [
        # Rows that are left out have a gradient of 0; what is summed over rows the first chunk
        # writes: filling a head's gradient and reading it once is time that can be measured.
        hidden.new_empty(0)
        if x is None
        else (torch.empty if whole and count > 0 else torch.zeros)(
            x.shape, dtype=dtype, device=hidden.device
        )
        for (x, dtype), whole in zip(inputs.gradients(), written, strict=True)
    ]
    d_hidden, d_weight, d_bias = gradients
    to_hidden, to_weight, to_bias = inputs.needs_grad
    exact = accumulation_dtype(hidden.dtype)
    metrics = torch.zeros((len(hidden), NUM_METRICS), dtype=exact, device=hidden.device)
    size, logit_rows = _chunk_sizes(
        hidden.device, vocab_size, inputs.chunk_size, inputs.teacher_hidden is not None
    )
    for start in range(0, count, size):
        rows = chunks.picked(start, min(start + size, count))
        states = hidden[rows]
        gradient = chunks.logit_gradient(states, start, logit_rows, metrics)
        if to_hidden:
            d_hidden[rows] = _times_head(gradient, chunks.inputs.weight).to(hidden.dtype)
        if to_weight:
            _add_outer(d_weight, gradient, states, start == 0)
        if to_bias:
            d_bias += gradient.sum(0, dtype=exact)
        # Before the next chunk's: two of them would be the peak.
        del gradient
    rows = chunks.picked(0, count)
    losses = objective.loss(metrics[rows, 6], metrics[rows, 1])
    return (losses * factors[rows]).sum(), metrics, d_hidden, d_weight, d_bias


def _in_the_states_dtype(inputs: Inputs) -> Inputs:
    """Return `inputs` with the heads in their states' dtypes, and with a backend for its ids."""
    backend, taught = inputs.backend, inputs.teacher_weight
    if backend == "triton" and inputs.topk_ids is not None:
        from mpd_train.kl.triton_kernels import MOST_IDS

        backend = "triton" if inputs.topk_ids.shape[1] <= MOST_IDS else "torch"
    if taught is not None and inputs.teacher_hidden is not None:
        taught = taught.to(inputs.teacher_hidden.dtype)
    weight = inputs.weight.to(inputs.hidden.dtype)
    return inputs._replace(weight=weight, teacher_weight=taught, backend=backend)


@dataclass(frozen=True)
class _Chunks:
    """The rows with weight of a call, whose logits exist some rows at a time. `rows`: their
    indices, None where all rows have weight. Heads are in their states' dtype."""

    inputs: Inputs
    rows: Tensor | None

    def picked(self, first: int, last: int) -> Tensor | slice:
        """Return the rows of the batch that are those with weight from `first` to below `last`."""
        return slice(first, last) if self.rows is None else self.rows[first:last]

    def logit_gradient(
        self, states: Tensor, start: int, logit_rows: int, metrics: Tensor
    ) -> Tensor:
        """Return the loss' gradient [c, V] with respect to the logits of `states` [c, H], the rows
        from `start` on, in the states' dtype or wider; fill in their rows of `metrics`
        [n, NUM_METRICS]. `logit_rows` of them have logits at a time."""
        weight, bias, backend = self.inputs.weight, self.inputs.bias, self.inputs.backend
        count, vocab_size = len(states), len(weight)
        whole = None
        if _in_place(backend, self.inputs.topk_ids is not None, states):
            gradient = whole = _logits(states, weight, bias)
            if backend == "triton" and states.dtype != whole.dtype:
                # Each row of it at the start of the row of logits that it is made from.
                gradient = whole.view(states.dtype)[:, :vocab_size]
        else:
            gradient = states.new_empty((count, vocab_size))
        for first in range(0, count, logit_rows):
            last = min(first + logit_rows, count)
            part = slice(first, last)
            logits = _logits(states[part], weight, bias) if whole is None else whole[part]
            rows = self.picked(start + first, start + last)
            metrics[rows] = self._write_gradient(logits, rows, gradient[part])
            # Before the next part's: two of them would be the peak.
            del logits
        return gradient

    def _write_gradient(self, logits: Tensor, rows: Tensor | slice, out: Tensor) -> Tensor:
        """As `Kernel`, for the batch's `rows`."""
        labels = None if self.inputs.labels is None else self.inputs.labels[rows]
        factors, objective = self.inputs.factors[rows, None], self.inputs.objective
        teacher: TopK | Head | Tensor = self.inputs.teacher.take(rows)
        if isinstance(teacher, Head):
            teacher = _logits(*teacher).to(logits.dtype)
        return _kernel(self.inputs.backend)(logits, teacher, labels, factors, objective, out)


def workspace_bytes(inputs: Inputs, device: torch.device) -> int:
    """Return what the operator takes at most on `device` beside its inputs and outputs."""
    hidden, weight, teacher_weight = inputs.hidden, inputs.weight, inputs.teacher_weight
    tokens, (vocab_size, width), dtype = len(hidden), weight.shape, hidden.dtype
    exact, short = accumulation_dtype(dtype).itemsize, dtype.itemsize
    dense = teacher_weight is not None
    rows, logit_rows = (min(x, tokens) for x in _chunk_sizes(device, vocab_size, 0, dense))
    total = rows * vocab_size * exact
    if device.type == "cuda" and dense:
        total = rows * vocab_size * short + logit_rows * vocab_size * exact
    if dense:
        total += logit_rows * vocab_size * exact
    if weight.dtype != dtype:
        total += vocab_size * width * short
    if device.type != "cuda" and dtype == torch.bfloat16:
        widest = max(width, 0 if teacher_weight is None else teacher_weight.shape[1])
        total += 2 * _VOCAB_BLOCK * widest * exact
    return total


def _in_place(backend: str, sparse: bool, hidden: Tensor) -> bool:
    """Return whether the gradient takes the logits' place, which spares a buffer: in torch where
    both have the same type, in Triton for a sparse teacher. (The autotuner runs the dense kernel
    several times, and it must not write to what it reads.)"""
    if backend == "triton":
        return sparse
    return not hidden.is_cuda or _is_exact(hidden)


def _chunk_sizes(
    device: torch.device, vocab_size: int, chunk_size: int, dense: bool
) -> tuple[int, int]:
    """Return the rows of a product with the head's gradient and the rows of float32 logits."""
    if chunk_size > 0:
        return chunk_size, chunk_size
    least = _LEAST_BYTES // (4 * vocab_size)
    rows, sparse_rows, dense_rows = _ROWS.get(device.type, _ROWS["cuda"])
    logit_rows = dense_rows if dense else sparse_rows
    return max(rows, least), max(logit_rows, least)


def _check(factors: Tensor, teacher: TopK | Head, labels: Tensor | None, vocab_size: int) -> int:
    """Return the number of rows with weight. Raise ValueError for ids or labels that none of them
    may have. One wait for the device."""
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
    count, *failed = torch.stack(
        [weighted.sum(), *(rows.long() for rows in problems.values())]
    ).tolist()
    for message, rows in zip(problems, failed, strict=True):
        if rows:
            raise ValueError(message)
    return int(count)


def _kernel(backend: str) -> Kernel:
    if backend == "triton":
        from mpd_train.kl import triton_kernels

        return triton_kernels.write_gradient
    return torch_kernels.write_gradient


@contextmanager
def _short_products(hidden: Tensor) -> Iterator[None]:
    """Let a CPU with AMX multiply float32 matrices as bfloat16 where the states are bfloat16, which
    is several times faster. Sums and results stay float32. States and heads, upcast because torch
    has no product here with a float32 result, lose nothing; the logits' gradient is rounded, as on
    a GPU. A CPU without AMX multiplies in float32."""
    if hidden.is_cuda or hidden.dtype != torch.bfloat16:
        yield
        return
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


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
    """total [V, H] += gradient [c, V]^T x hidden [c, H]; = for the `first`."""
    if _is_exact(hidden) or hidden.is_cuda:
        _add_product(total, gradient.T, hidden, first)
        return
    wide = hidden.float()
    for block in _vocab_blocks(total.shape[0]):
        _add_product(total[block], gradient[:, block].float().T, wide, first)


def _add_product(total: Tensor, left: Tensor, right: Tensor, first: bool) -> None:
    """total [a, c] += left [a, b] x right [b, c], in the dtype of `total`, float32 or float64;
    = for the `first`, which does not read `total`."""
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
    """Return whether this torch adds a bfloat16 product to a float32 matrix within the product,
    which spares reading and writing the head's gradient once more; some releases want the addend
    in bfloat16."""
    # A sum that bfloat16 cannot hold: that the call is accepted is not enough.
    total = torch.full((16, 16), 1 + 2.0**-12, dtype=torch.float32, device=device)
    short = torch.ones((16, 16), dtype=torch.bfloat16, device=device)
    try:
        torch.addmm(total, short, short, out_dtype=torch.float32, out=total)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError):
        return False
    return bool((total == 17 + 2.0**-12).all())
