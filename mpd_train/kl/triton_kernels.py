"""The elementwise part in Triton, between the matrix products: rows of float32 logits in, rows of
gradient out, each logit read as few times as the divergence allows.

A row is one program, which passes over it once for its logsumexp and once more to write; a sparse
teacher's buckets fit between the two. A dense teacher needs a pass there, for the sums that its
gradient is made of; forward KL without a clip knows them beforehand. With TRITON_INTERPRET=1 the
kernels run on a CPU.
"""

import math
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from mpd_train.kl.divergence import LOG_FLOOR, NAMES
from mpd_train.kl.fused import FOUND, TopK
from mpd_train.kl.objective import Objective

_CONFIGS = [
    triton.Config({"BLOCK": block}, num_warps=warps)
    for block, warps in ((4096, 8), (8192, 8), (8192, 16), (16384, 16))
]
# The interpreter has no clock to tune by; small blocks, so that small cases have several.
if triton.knobs.runtime.interpret:
    _CONFIGS = [triton.Config({"BLOCK": 512})]
# Not tuned: it writes to what it reads, and cannot be run twice.
_SPARSE_BLOCK = _CONFIGS[0].kwargs["BLOCK"]
# What a program holds in registers beside the block; for more torch does it.
MOST_IDS = 1023

_FORWARD, _REVERSE, _JSD, _SKEW, _SKEW_REVERSE = (tl.constexpr(i) for i in range(len(NAMES)))
_FLOOR = tl.constexpr(LOG_FLOOR)


def sparse(
    logits: Tensor,
    teacher: TopK,
    labels: Tensor | None,
    factors: Tensor,
    objective: Objective,
    out: Tensor,
) -> Tensor:
    """See `fused.Kernels`. For up to MOST_IDS ids in a row."""
    count, vocab_size = logits.shape
    k = teacher.ids.shape[1]
    found = logits.new_empty((count, FOUND))
    _sparse[(count,)](
        logits, teacher.ids.contiguous(), teacher.logprobs.contiguous(), teacher.tail.contiguous(),
        logits if labels is None else labels.contiguous(), factors, out, found,
        vocab_size, out.stride(0), k, math.inf if objective.clip is None else objective.clip,
        **_constants(objective, labels), BUCKETS=triton.next_power_of_2(k + 1),
        BLOCK=_SPARSE_BLOCK, num_warps=8,
    )  # fmt: skip
    return found


def dense(
    logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None,
    factors: Tensor,
    objective: Objective,
    out: Tensor,
) -> Tensor:
    """See `fused.Kernels`."""
    count, vocab_size = logits.shape
    found = logits.new_empty((count, FOUND))
    _dense[(count,)](
        logits, teacher_logits, logits if labels is None else labels.contiguous(), factors, out,
        found, vocab_size, out.stride(0), math.inf if objective.clip is None else objective.clip,
        **_constants(objective, labels),
    )  # fmt: skip
    return found


def _constants(objective: Objective, labels: Tensor | None) -> dict[str, Any]:
    """What both kernels are compiled for."""
    divergence = objective.divergence
    parameter = divergence.parameter
    # Shares of teacher and student in the mixture, for those that have one.
    of_teacher = 1 - parameter if divergence.name == "skew_reverse_kl" else parameter
    return {
        "KIND": NAMES.index(divergence.name),
        "OF_TEACHER": of_teacher,
        "LOG_TEACHER": math.log(of_teacher),
        "LOG_STUDENT": math.log1p(-of_teacher),
        "INVERSE": 1 / objective.temperature,
        "SHARE": (1 - objective.ce_weight) * objective.temperature,
        "CE": objective.ce_weight,
        "LABELS": labels is not None,
        "CLIPPED": objective.clip is not None,
        "FOUND": FOUND,
    }


@triton.jit
def _excess(x):
    """exp(x) - 1 - x, by its series near 0, where the plain difference is rounding alone."""
    series = 1 / 120 + x * (1 / 720 + x * (1 / 5040 + x * (1 / 40320)))
    series = x * x * (0.5 + x * (1 / 6 + x * (1 / 24 + x * series)))
    return tl.where(tl.abs(x) < 0.5, series, tl.exp(x) - 1 - x)


@triton.jit
def _log_add(a, b):
    """log(exp(a) + exp(b)); -inf where both are."""
    higher = tl.maximum(a, b)
    apart = tl.where(higher == float("-inf"), 0.0, tl.minimum(a, b) - higher)
    return higher + tl.log(1 + tl.exp(apart))


@triton.jit
def _term(log_a, log_b):
    """An outcome's term of KL(a | b), as `divergence._kl` has it: never negative."""
    d = tl.where(log_b == log_a, 0.0, log_b - log_a)
    a = tl.exp(log_a)
    far = tl.exp(log_b) - a - tl.where(a > 0, a * d, 0.0)
    return tl.where(tl.abs(d) < 0.5, a * _excess(d), far)


@triton.jit
def _value_and_score(
    log_p, log_q, KIND: tl.constexpr, OF_TEACHER: tl.constexpr,
    LOG_TEACHER: tl.constexpr, LOG_STUDENT: tl.constexpr,
):  # fmt: skip
    """An outcome's terms of F and of the score, as `Divergence.value_and_score` has them."""
    p, q = tl.exp(log_p), tl.exp(log_q)
    if KIND == _FORWARD:
        value, score = _term(log_p, log_q), -p
    elif KIND == _REVERSE:
        log_p = tl.maximum(log_p, _FLOOR)
        value = _term(log_q, log_p)
        score = tl.where(q > 0, q * (log_q - log_p), 0.0)
    else:
        log_m = _log_add(log_p + LOG_TEACHER, log_q + LOG_STUDENT)
        if KIND == _SKEW:
            value = _term(log_p, log_m)
            score = (OF_TEACHER - 1) * tl.where(p > 0, p * tl.exp(log_q - log_m), 0.0)
        else:
            x = tl.where(log_p == log_q, 0.0, log_p - log_q) + (LOG_TEACHER - LOG_STUDENT)
            share = tl.maximum(x, 0.0) + tl.log(1 + tl.exp(-tl.abs(x)))
            if KIND == _JSD:
                value = OF_TEACHER * _term(log_p, log_m) + (1 - OF_TEACHER) * _term(log_q, log_m)
                score = (OF_TEACHER - 1) * tl.where(q > 0, q * share, 0.0)
            else:
                value = _term(log_q, log_m)
                score = -tl.where(q > 0, q * _excess(-share), 0.0)
    return value, score


@triton.jit
def _entropy_term(log_p):
    p = tl.exp(log_p)
    return tl.where(p > 0, -p * log_p, 0.0)


@triton.jit
def _log_softmax(x):
    """Of a vector that is finite somewhere, and its logsumexp."""
    peak = tl.max(x, 0)
    x -= peak
    total = tl.log(tl.sum(tl.exp(x), 0))
    # Not x - (peak + total): what is near the peak would be rounded as the peak is.
    return x - total, peak + total


@triton.jit
def _sparse(
    logits, ids, logprobs, tails, labels, factors, out, found, vocab_size, out_stride, k, clip,
    KIND: tl.constexpr, OF_TEACHER: tl.constexpr, LOG_TEACHER: tl.constexpr,
    LOG_STUDENT: tl.constexpr, INVERSE: tl.constexpr, SHARE: tl.constexpr, CE: tl.constexpr,
    LABELS: tl.constexpr, CLIPPED: tl.constexpr, FOUND: tl.constexpr, BUCKETS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """A row, as `buckets.over_buckets` has it. `out` may begin where the row of logits does: what
    is written is at most as wide as what has been read."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * vocab_size
    out += row * out_stride
    found += row * FOUND
    factor = tl.load(factors + row)

    # K buckets of one id each, and behind them the tail's. An id of -1 is none.
    slots = tl.arange(0, BUCKETS)
    is_tail = slots == k
    index = tl.load(ids + row * k + slots, mask=slots < k, other=-1).to(tl.int64)
    is_top = index >= 0
    top = tl.load(logits + index, mask=is_top, other=float("-inf"))
    label = tl.full((), -1, tl.int64)
    chosen = tl.full((), 0.0, tl.float32)
    if LABELS:
        label = tl.load(labels + row).to(tl.int64)
        chosen = tl.load(logits + label)
    # The tail's own logsumexp, rather than log(1 - top mass), which cancels. The barriers: until
    # all has been read, and until the others see what was written.
    tl.debug_barrier()
    tl.store(logits + index, tl.full((BUCKETS,), float("-inf"), tl.float32), mask=is_top)
    tl.debug_barrier()
    peak = tl.full((), float("-inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    # sum exp(y - peak) (y - peak), for the tail's entropy.
    moment = tl.full((), 0.0, tl.float32)
    plain_total = tl.full((), 0.0, tl.float32)
    for start in range(0, vocab_size, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        z = tl.load(logits + columns, mask=columns < vocab_size, other=float("-inf"))
        higher = tl.maximum(peak, tl.max(z, 0))
        # While all are -inf there is nothing to shift by.
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        shift = tl.where(peak == float("-inf"), 0.0, (peak - safe) * INVERSE)
        shrink = tl.exp((peak - safe) * INVERSE)
        y = (z - safe) * INVERSE
        e = tl.exp(y)
        moment = shrink * (moment + total * shift) + tl.sum(tl.where(e > 0, e * y, 0.0), 0)
        total = shrink * total + tl.sum(e, 0)
        if LABELS and INVERSE != 1:
            plain_total = plain_total * tl.exp(peak - safe) + tl.sum(tl.exp(z - safe), 0)
        peak = higher

    of_tail = peak * INVERSE + tl.log(total)
    log_q, log_total = _log_softmax(tl.where(is_tail, of_tail, top * INVERSE))
    p_tail = tl.load(tails + row).to(tl.float32)
    p_tail = tl.where(tl.sum(is_top.to(tl.int32), 0) == vocab_size, float("-inf"), p_tail)
    log_p = tl.load(logprobs + row * k + slots, mask=is_top, other=float("-inf")).to(tl.float32)
    log_p, _ = _log_softmax(tl.where(is_tail, p_tail, log_p))
    terms, scores = _value_and_score(log_p, log_q, KIND, OF_TEACHER, LOG_TEACHER, LOG_STUDENT)
    value = tl.sum(terms, 0)
    scale = tl.full((), SHARE, tl.float32)
    if CLIPPED:
        scale = tl.where(value > clip, 0.0, scale)
    q = tl.exp(log_q)
    gradient = tl.where(scale == 0, 0.0, scale * (scores - q * tl.sum(scores, 0)))
    # It sums to 0, and where the student is sure of a bucket the difference is mostly rounding
    # there: minus the others is exact.
    surest = slots == tl.argmax(log_q, 0)
    gradient = tl.where(surest, -tl.sum(tl.where(surest, 0.0, gradient), 0), gradient)

    cross_entropy = tl.full((), 0.0, tl.float32)
    at_label = is_top & (index == label)
    if LABELS:
        plain = log_q
        if INVERSE != 1:
            plain, log_total = _log_softmax(tl.where(is_tail, peak + tl.log(plain_total), top))
        cross_entropy = log_total - chosen
        if CE > 0:
            # A tempered tail has two shapes, and gets the second one's part below. At the label
            # before anything is rounded: where the student is sure of it, what is left of q - 1 is
            # less than bfloat16 tells apart from 1.
            more = CE * tl.exp(plain) - tl.where(at_label, CE, 0.0)
            gradient += tl.where(is_tail, 0.0, more) if INVERSE != 1 else more

    # A tail token's share of the tail's gradient is its share of the tail's mass.
    tail_gradient = tl.sum(tl.where(is_tail, gradient, 0.0), 0)
    shape = tl.where(total > 0, tail_gradient / total, 0.0)
    safe = tl.where(peak == float("-inf"), 0.0, peak)
    for start in range(0, vocab_size, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < vocab_size
        z = tl.load(logits + columns, mask=inside, other=float("-inf"))
        of_token = shape * tl.exp((z - safe) * INVERSE)
        if CE > 0 and INVERSE != 1:
            of_token += CE * tl.exp(z - log_total)
        # Until all of the block has been read.
        tl.debug_barrier()
        tl.store(out + columns, factor * of_token, mask=inside)
    tl.debug_barrier()
    tl.store(out + index, factor * gradient, mask=is_top)
    if LABELS and CE > 0:
        of_label = shape * tl.exp((chosen - safe) * INVERSE) - CE
        if INVERSE != 1:
            of_label += CE * tl.exp(chosen - log_total)
        tl.store(out + label, factor * of_label, mask=tl.sum(at_label.to(tl.int32), 0) == 0)

    q_tail = tl.sum(tl.where(is_tail, q, 0.0), 0)
    within = tl.log(total) - moment / total - tl.sum(tl.where(is_tail, log_q, 0.0), 0)
    of_rest = tl.where(q_tail > 0, q_tail * within, 0.0)
    best = tl.argmax(tl.where(is_tail, float("-inf"), log_p), 0)
    at_best = tl.sum(tl.where(slots == best, top, 0.0), 0)
    tl.store(found, value)
    tl.store(found + 1, cross_entropy)
    tl.store(found + 2, of_rest + tl.sum(tl.where(is_tail, 0.0, _entropy_term(log_q)), 0))
    tl.store(found + 3, tl.sum(_entropy_term(log_p), 0))
    tl.store(found + 4, tl.sum(tl.where(is_top, q, 0.0), 0))
    tl.store(found + 5, tl.where(at_best >= tl.maximum(tl.max(top, 0), peak), 1.0, 0.0))


@triton.autotune(_CONFIGS, key=["vocab_size", "KIND"])
@triton.jit
def _dense(
    students, teachers, labels, factors, out, found, vocab_size, out_stride, clip,
    KIND: tl.constexpr, OF_TEACHER: tl.constexpr, LOG_TEACHER: tl.constexpr,
    LOG_STUDENT: tl.constexpr, INVERSE: tl.constexpr, SHARE: tl.constexpr, CE: tl.constexpr,
    LABELS: tl.constexpr, CLIPPED: tl.constexpr, FOUND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    students += row.to(tl.int64) * vocab_size
    teachers += row.to(tl.int64) * vocab_size
    out += row.to(tl.int64) * out_stride
    found += row * FOUND
    factor = tl.load(factors + row)

    # The logsumexp of both, and of the student at temperature 1 for cross-entropy.
    q_peak = tl.full((), float("-inf"), tl.float32)
    p_peak = tl.full((), float("-inf"), tl.float32)
    q_total = tl.full((), 0.0, tl.float32)
    p_total = tl.full((), 0.0, tl.float32)
    plain_total = tl.full((), 0.0, tl.float32)
    at_best = tl.full((), float("-inf"), tl.float32)
    for start in range(0, vocab_size, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < vocab_size
        z = tl.load(students + columns, mask=inside, other=float("-inf"))
        t = tl.load(teachers + columns, mask=inside, other=float("-inf"))
        q_higher = tl.maximum(q_peak, tl.max(z, 0))
        safe = tl.where(q_higher == float("-inf"), 0.0, q_higher)
        q_total = q_total * tl.exp((q_peak - safe) * INVERSE) + tl.sum(
            tl.exp((z - safe) * INVERSE), 0
        )
        if LABELS and INVERSE != 1:
            plain_total = plain_total * tl.exp(q_peak - safe) + tl.sum(tl.exp(z - safe), 0)
        q_peak = q_higher
        strongest = tl.max(t, 0)
        here = tl.max(tl.where(t == strongest, z, float("-inf")), 0)
        at_best = tl.where(strongest > p_peak, here, at_best)
        p_higher = tl.maximum(p_peak, strongest)
        safe = tl.where(p_higher == float("-inf"), 0.0, p_higher)
        p_total = p_total * tl.exp((p_peak - safe) * INVERSE) + tl.sum(
            tl.exp((t - safe) * INVERSE), 0
        )
        p_peak = p_higher
    q_log = q_peak * INVERSE + tl.log(q_total)
    p_log = p_peak * INVERSE + tl.log(p_total)
    plain_log = q_log
    cross_entropy = 0.0
    label = -1
    if LABELS:
        if INVERSE != 1:
            plain_log = q_peak + tl.log(plain_total)
        label = tl.load(labels + row)
        cross_entropy = plain_log - tl.load(students + label)

    value = tl.full((), 0.0, tl.float32)
    score_sum = tl.full((), 0.0, tl.float32)
    q_entropy = tl.full((), 0.0, tl.float32)
    p_entropy = tl.full((), 0.0, tl.float32)
    scale = tl.full((), SHARE, tl.float32)
    # Forward KL's scores sum to -1.
    ONE_PASS: tl.constexpr = KIND == _FORWARD and not CLIPPED
    if ONE_PASS:
        score_sum = score_sum - 1.0
    else:
        for start in range(0, vocab_size, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            inside = columns < vocab_size
            z = tl.load(students + columns, mask=inside, other=float("-inf"))
            t = tl.load(teachers + columns, mask=inside, other=float("-inf"))
            log_q, log_p = z * INVERSE - q_log, t * INVERSE - p_log
            terms, scores = _value_and_score(
                log_p, log_q, KIND, OF_TEACHER, LOG_TEACHER, LOG_STUDENT
            )
            value += tl.sum(terms, 0)
            score_sum += tl.sum(scores, 0)
            q_entropy += tl.sum(_entropy_term(log_q), 0)
            p_entropy += tl.sum(_entropy_term(log_p), 0)
        if CLIPPED:
            scale = tl.where(value > clip, 0.0, scale)

    for start in range(0, vocab_size, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < vocab_size
        z = tl.load(students + columns, mask=inside, other=float("-inf"))
        t = tl.load(teachers + columns, mask=inside, other=float("-inf"))
        log_q, log_p = z * INVERSE - q_log, t * INVERSE - p_log
        terms, scores = _value_and_score(log_p, log_q, KIND, OF_TEACHER, LOG_TEACHER, LOG_STUDENT)
        if ONE_PASS:
            value += tl.sum(terms, 0)
            q_entropy += tl.sum(_entropy_term(log_q), 0)
            p_entropy += tl.sum(_entropy_term(log_p), 0)
        gradient = tl.where(scale == 0, 0.0, scale * (scores - tl.exp(log_q) * score_sum))
        if LABELS and CE > 0:
            gradient += CE * tl.exp(z - plain_log) - tl.where(columns == label, CE, 0.0)
        tl.store(out + columns, factor * gradient, mask=inside)

    tl.store(found, value)
    tl.store(found + 1, cross_entropy)
    tl.store(found + 2, q_entropy)
    tl.store(found + 3, p_entropy)
    tl.store(found + 4, 1.0)
    tl.store(found + 5, tl.where(at_best >= q_peak, 1.0, 0.0))
