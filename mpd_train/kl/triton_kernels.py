"""The elementwise part in Triton, between the matrix products: it reads rows of float32 logits and
writes rows of gradient, with as few reads of each logit as the divergence allows.

One program handles one row. It passes over the row once for the logsumexp and once more to write; a
sparse teacher's buckets are computed between the two. A dense teacher needs a pass between them for
the sums in its gradient; for forward KL without a clip they are known beforehand. With
TRITON_INTERPRET=1 the kernels run on a CPU.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mpd_train.kl.divergence import LOG_FLOOR, NAMES
from mpd_train.kl.objective import Objective
from mpd_train.kl.types import NUM_METRICS, TopK

# Four or eight logits for each thread: its values for them fit its registers.
_CONFIGS = [
    triton.Config({"BLOCK": block}, num_warps=warps)
    for block, warps in ((2048, 8), (1024, 4), (4096, 16), (1024, 8))
]
# The interpreter cannot tune by time. Small blocks, so that small test cases have several.
if triton.knobs.runtime.interpret:
    _CONFIGS = [triton.Config({"BLOCK": 512})]
# Not tuned: the kernel overwrites its input, and cannot run twice.
_SPARSE = _CONFIGS[0]
# A program holds this many ids in registers next to the block; torch computes rows with more.
MOST_IDS = 1023

_FORWARD, _REVERSE, _JSD, _SKEW, _SKEW_REVERSE = (tl.constexpr(i) for i in range(len(NAMES)))
_FLOOR = tl.constexpr(LOG_FLOOR)
_LOG2_E = tl.constexpr(math.log2(math.e))
_LOG_2 = tl.constexpr(math.log(2))
# The peak of no logits, and an exponent whose exp is 0. Both are finite, so that no difference is a
# NaN.
_LOWEST = tl.constexpr(torch.finfo(torch.float32).min)
_FAR = tl.constexpr(1e4)


def write_gradient(
    logits: Tensor, teacher: TopK | Tensor, labels: Tensor | None, factors: Tensor,
    objective: Objective, out: Tensor,
) -> Tensor:  # fmt: skip
    """See `fused.Kernel`. For up to MOST_IDS ids in a row."""
    count, vocab_size = logits.shape
    metrics = logits.new_empty((count, NUM_METRICS))
    labelled = logits if labels is None else labels.contiguous()
    clip = objective.clip or objective.entry_clip or math.inf
    constants = _constants(objective, labels)
    if isinstance(teacher, TopK):
        k = teacher.ids.shape[1]
        _sparse[(count,)](
            logits, *(x.contiguous() for x in teacher), labelled, factors, out, metrics,
            vocab_size, out.stride(0), k, clip, **constants,
            BUCKETS=triton.next_power_of_2(k + 1), **_SPARSE.all_kwargs(),
        )  # fmt: skip
    else:
        _dense[(count,)](
            logits, teacher, labelled, factors, out, metrics, vocab_size, out.stride(0), clip,
            **constants,
        )  # fmt: skip
    return metrics


def _constants(objective: Objective, labels: Tensor | None) -> dict[str, Any]:
    """Return the constants that both kernels are compiled for."""
    divergence = objective.divergence
    parameter = divergence.parameter
    more, at_q = divergence.entry_constants
    # The teacher's share in the mixture; divergences without one ignore the parameter.
    mixes = divergence.name not in ("forward_kl", "reverse_kl")
    teacher_share = parameter if mixes else 0.5
    if divergence.name == "skew_reverse_kl":
        teacher_share = 1 - parameter
    return {
        "KIND": NAMES.index(divergence.name),
        "TEACHER_SHARE": teacher_share,
        "LOG_TEACHER": math.log(teacher_share),
        "LOG_STUDENT": math.log1p(-teacher_share),
        "INVERSE": 1 / objective.temperature,
        "SHARE": (1 - objective.ce_weight) * objective.temperature,
        "CE": objective.ce_weight,
        # 0: none.
        "CAP": objective.softcap or 0.0,
        "TEACHER_CAP": objective.teacher_softcap or 0.0,
        "LABELS": labels is not None,
        "CLIPPED": objective.clip is not None,
        "ENTRIES": objective.entry_clip is not None,
        "MORE": more,
        "AT_Q": at_q,
        "NUM_METRICS": NUM_METRICS,
    }


@triton.jit
def _exp(x):
    """Results below 1e-38 may be 0: keeping them, as tl.exp does, costs three instructions more."""
    return tl.exp2(x * _LOG2_E)


@triton.jit
def _capped(z, CAP: tl.constexpr):
    """As `Objective.capped`; 0: no cap."""
    if CAP > 0:
        x = tl.abs(z) / CAP
        less = _exp(-2 * x)
        # tanh by its series near 0, where the quotient is mostly rounding.
        series = x * (1 + x * x * (-1 / 3 + x * x * (2 / 15 - x * x * (17 / 315))))
        size = CAP * tl.where(x < 0.125, series, (1 - less) / (1 + less))
        z = tl.where(z == float("-inf"), z, tl.where(z < 0, -size, size))
    return z


@triton.jit
def _slope(z, CAP: tl.constexpr):
    """The derivative of `_capped`, exact where that is flat: not 1 - tanh^2."""
    slope = tl.full(z.shape, 1.0, tl.float32)
    if CAP > 0:
        less = _exp(tl.abs(z) * (-2 / CAP))
        slope = 4 * less / ((1 + less) * (1 + less))
    return slope


@triton.jit
def _excess(x):
    """exp(x) - 1 - x, by its series near 0, where the plain difference is rounding alone."""
    series = 1 / 120 + x * (1 / 720 + x * (1 / 5040 + x * (1 / 40320)))
    series = x * x * (0.5 + x * (1 / 6 + x * (1 / 24 + x * series)))
    return tl.where(tl.abs(x) < 0.5, series, _exp(x) - 1 - x)


@triton.jit
def _term(a, b, d):
    """An outcome's term of KL(a | b), d = log(b / a), as in `divergence._kl`: never negative."""
    far = b - a - tl.where(a > 0, a * d, 0.0)
    return tl.where(tl.abs(d) < 0.5, a * _excess(d), far)


@triton.jit
def _value_and_score(
    log_p, log_q, KIND: tl.constexpr, TEACHER_SHARE: tl.constexpr,
    LOG_TEACHER: tl.constexpr, LOG_STUDENT: tl.constexpr,
):  # fmt: skip
    """An outcome's terms of F and of the score, as in `Divergence.terms_and_score`."""
    q = _exp(log_q)
    if KIND == _REVERSE:
        # A NaN of the teacher must reach the loss.
        log_p = tl.maximum(log_p, _FLOOR, propagate_nan=tl.PropagateNan.ALL)
    p = _exp(log_p)
    # Where both are -inf the difference would be a NaN.
    log_ratio = tl.where(log_p == log_q, 0.0, log_p - log_q)
    if KIND == _FORWARD:
        value, score = _term(p, q, -log_ratio), -p
    elif KIND == _REVERSE:
        value, score = _term(q, p, log_ratio), -tl.where(q > 0, q * log_ratio, 0.0)
    else:
        m = TEACHER_SHARE * p + (1 - TEACHER_SHARE) * q
        # log(m / q) and log(m / p) are log(1 + exp(x)) and log(1 + exp(-x)) plus constants.
        x = log_ratio + (LOG_TEACHER - LOG_STUDENT)
        rest = tl.log(1 + _exp(-tl.abs(x)))
        share = tl.maximum(x, 0.0) + rest
        over_p = LOG_TEACHER + tl.maximum(-x, 0.0) + rest
        over_q = LOG_STUDENT + share
        if KIND == _SKEW:
            value, score = _term(p, m, over_p), (TEACHER_SHARE - 1) * p * _exp(-over_q)
        elif KIND == _JSD:
            value = TEACHER_SHARE * _term(p, m, over_p) + (1 - TEACHER_SHARE) * _term(q, m, over_q)
            score = (TEACHER_SHARE - 1) * tl.where(q > 0, q * share, 0.0)
        else:
            tl.static_assert(KIND == _SKEW_REVERSE, "no branch for this divergence")
            value, score = _term(q, m, over_q), -tl.where(q > 0, q * _excess(-share), 0.0)
    return value, score


@triton.jit
def _clip_entries(terms, scores, log_p, log_q, clip, MORE: tl.constexpr, AT_Q: tl.constexpr):
    """As `Divergence.clip_entries`."""
    q = _exp(log_q)
    difference = MORE * (_exp(log_p) - q)
    above = terms + difference > clip
    return tl.where(above, clip - difference, terms), tl.where(above, 0.0, scores + AT_Q * q)


@triton.jit
def _entropy_term(log_p):
    # Beyond the bound p is 0, and 0 times -inf would be a NaN.
    return -_exp(log_p) * tl.maximum(log_p, -_FAR)


@triton.jit
def _block(row, start, vocab_size, BLOCK: tl.constexpr):
    """A block of a row of logits, -inf beyond the row's end. The passes load one block ahead:
    otherwise the compiler waits for each load before it begins the next."""
    columns = start + tl.arange(0, BLOCK)
    return tl.load(row + columns, mask=columns < vocab_size, other=float("-inf"))


@triton.jit
def _total_with(total, x, peak, INVERSE):
    """Add x to each element's running sum of exp((x - peak) INVERSE); the peak is then
    max(peak, x). Element by element: no thread waits for another before the end, and one
    exponential serves either order."""
    less = _exp(tl.abs(x - peak) * -INVERSE)
    return tl.where(x > peak, total * less + 1, total + less)


@triton.jit
def _moment_with(moment, total, x, peak, INVERSE):
    """The same for sum exp(y) y, y = (x - peak) INVERSE; `total` is the one without x."""
    distance = tl.minimum(tl.abs(x - peak) * INVERSE, _FAR)
    less = _exp(-distance)
    return tl.where(x > peak, less * (moment - total * distance), moment - less * distance)


@triton.jit
def _over_all(total, peaks, peak, INVERSE):
    """The sum over a block's elements, whose `peaks` differ, relative to the highest `peak`."""
    return tl.sum(total * _exp((peaks - peak) * INVERSE), 0)


@triton.jit
def _log_softmax(x):
    """The log-softmax of a vector with a finite element, and its logsumexp."""
    peak = tl.max(x, 0)
    x -= peak
    total = tl.log(tl.sum(_exp(x), 0))
    # Not x - (peak + total): values near the peak would be rounded as the peak is.
    return x - total, peak + total


@triton.jit
def _sparse(
    logits, ids, logprobs, tails, labels, factors, out, metrics, vocab_size, out_stride, k, clip,
    KIND: tl.constexpr, TEACHER_SHARE: tl.constexpr, LOG_TEACHER: tl.constexpr,
    LOG_STUDENT: tl.constexpr, INVERSE: tl.constexpr, SHARE: tl.constexpr, CE: tl.constexpr,
    CAP: tl.constexpr, TEACHER_CAP: tl.constexpr, LABELS: tl.constexpr, CLIPPED: tl.constexpr,
    ENTRIES: tl.constexpr, MORE: tl.constexpr, AT_Q: tl.constexpr,
    NUM_METRICS: tl.constexpr, BUCKETS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row, as in `buckets.over_buckets`. `out` may begin where the row of logits does: an
    element written is at most as wide as one read."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * vocab_size
    out += row * out_stride
    metrics += row * NUM_METRICS
    factor = tl.load(factors + row)

    # K buckets of one id each, then the tail's. An id of -1 is none.
    slots = tl.arange(0, BUCKETS)
    is_tail = slots == k
    index = tl.load(ids + row * k + slots, mask=slots < k, other=-1).to(tl.int64)
    is_top = index >= 0
    top = tl.load(logits + index, mask=is_top, other=float("-inf"))
    gradient_scale = factor * _slope(top, CAP)
    top = _capped(top, CAP)
    label = tl.full((), -1, tl.int64)
    chosen = tl.full((), 0.0, tl.float32)
    label_scale = factor
    if LABELS:
        label = tl.load(labels + row).to(tl.int64)
        chosen = tl.load(logits + label)
        label_scale = factor * _slope(chosen, CAP)
        chosen = _capped(chosen, CAP)
    # The tail's own logsumexp, rather than log(1 - top mass), which cancels. The first barrier: all
    # threads have read; the second: they see what was written.
    tl.debug_barrier()
    tl.store(logits + index, tl.full((BUCKETS,), float("-inf"), tl.float32), mask=is_top)
    tl.debug_barrier()
    peaks = tl.full((BLOCK,), _LOWEST, tl.float32)
    totals = tl.zeros((BLOCK,), tl.float32)
    # sum exp(y - peak) (y - peak), for the tail's entropy.
    moments = tl.zeros((BLOCK,), tl.float32)
    plain_totals = tl.zeros((BLOCK,), tl.float32)
    next_z = _block(logits, 0, vocab_size, BLOCK)
    for start in range(0, vocab_size, BLOCK):
        z = _capped(next_z, CAP)
        next_z = _block(logits, start + BLOCK, vocab_size, BLOCK)
        moments = _moment_with(moments, totals, z, peaks, INVERSE)
        totals = _total_with(totals, z, peaks, INVERSE)
        if LABELS and INVERSE != 1:
            plain_totals = _total_with(plain_totals, z, peaks, 1.0)
        peaks = tl.maximum(peaks, z)
    peak = tl.max(peaks, 0)
    below = tl.minimum((peak - peaks) * INVERSE, _FAR)
    moment = tl.sum(_exp(-below) * (moments - totals * below), 0)
    total = _over_all(totals, peaks, peak, INVERSE)
    plain_total = _over_all(plain_totals, peaks, peak, 1.0)

    tail_logit = peak * INVERSE + tl.log(total)
    log_q, log_total = _log_softmax(tl.where(is_tail, tail_logit, top * INVERSE))
    p_tail = tl.load(tails + row).to(tl.float32)
    p_tail = tl.where(tl.sum(is_top.to(tl.int32), 0) == vocab_size, float("-inf"), p_tail)
    log_p = tl.load(logprobs + row * k + slots, mask=is_top, other=float("-inf")).to(tl.float32)
    log_p, _ = _log_softmax(tl.where(is_tail, p_tail, log_p))
    terms, scores = _value_and_score(log_p, log_q, KIND, TEACHER_SHARE, LOG_TEACHER, LOG_STUDENT)
    value = tl.sum(terms, 0)
    clipped = value
    scale = tl.full((), SHARE, tl.float32)
    if CLIPPED:
        scale = tl.where(value > clip, 0.0, scale)
        clipped = tl.minimum(value, clip, propagate_nan=tl.PropagateNan.ALL)
    if ENTRIES:
        terms, scores = _clip_entries(terms, scores, log_p, log_q, clip, MORE, AT_Q)
        clipped = tl.sum(terms, 0)
    q = _exp(log_q)
    gradient = tl.where(scale == 0, 0.0, scale * (scores - q * tl.sum(scores, 0)))

    cross_entropy = tl.full((), 0.0, tl.float32)
    at_label = is_top & (index == label)
    gradient_sum = tl.full((), 0.0, tl.float32)
    tempered_gradient = tl.zeros((BUCKETS,), tl.float32)
    if LABELS:
        plain = log_q
        if INVERSE != 1:
            plain, log_total = _log_softmax(tl.where(is_tail, peak + tl.log(plain_total), top))
        cross_entropy = log_total - chosen
        if CE > 0:
            # Subtracted at the label before rounding: where the student is sure of it, q - 1 is
            # smaller than bfloat16's step at 1.
            more = CE * _exp(plain) - tl.where(at_label, CE, 0.0)
            if INVERSE == 1:
                gradient += more
                # A label in the tail is subtracted below.
                gradient_sum += tl.where(tl.sum(at_label.to(tl.int32), 0) == 0, CE, 0.0)
            else:
                # The cross-entropy's part has another shape in a tempered tail: added below.
                tempered_gradient = tl.where(is_tail, 0.0, more)
    # The gradients sum to a known number. Where the student is sure of a bucket its own difference
    # is mostly rounding: take that number less the others. (Elsewhere that would carry the rounding
    # of all the others.)
    surest = (slots == tl.argmax(log_q, 0)) & (q > 0.5)
    other_gradients = tl.sum(tl.where(surest, 0.0, gradient), 0)
    gradient = tl.where(surest, gradient_sum - other_gradients, gradient) + tempered_gradient

    # A tail token's share of the tail's gradient is its share of the tail's mass.
    tail_gradient = tl.sum(tl.where(is_tail, gradient, 0.0), 0)
    shape = tl.where(total > 0, tail_gradient / total, 0.0)
    for start in range(0, vocab_size, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        z = _block(logits, start, vocab_size, BLOCK)
        scales = factor * _slope(z, CAP)
        z = _capped(z, CAP)
        token_gradient = shape * _exp((z - peak) * INVERSE)
        if CE > 0 and INVERSE != 1:
            token_gradient += CE * _exp(z - log_total)
        # Wait until all of the block has been read.
        tl.debug_barrier()
        tl.store(out + columns, scales * token_gradient, mask=columns < vocab_size)
    tl.debug_barrier()
    tl.store(out + index, gradient_scale * gradient, mask=is_top)
    if LABELS and CE > 0:
        label_gradient = shape * _exp((chosen - peak) * INVERSE) - CE
        if INVERSE != 1:
            label_gradient += CE * _exp(chosen - log_total)
        tl.store(
            out + label, label_scale * label_gradient, mask=tl.sum(at_label.to(tl.int32), 0) == 0
        )

    q_tail = tl.sum(tl.where(is_tail, q, 0.0), 0)
    within = tl.log(total) - moment / total - tl.sum(tl.where(is_tail, log_q, 0.0), 0)
    tail_entropy = tl.where(q_tail > 0, q_tail * within, 0.0)
    best = tl.argmax(tl.where(is_tail, float("-inf"), log_p), 0)
    at_best = tl.sum(tl.where(slots == best, top, 0.0), 0)
    tl.store(metrics, value)
    tl.store(metrics + 1, cross_entropy)
    tl.store(metrics + 2, tail_entropy + tl.sum(tl.where(is_tail, 0.0, _entropy_term(log_q)), 0))
    tl.store(metrics + 3, tl.sum(_entropy_term(log_p), 0))
    tl.store(metrics + 4, tl.sum(tl.where(is_top, q, 0.0), 0))
    tl.store(metrics + 5, tl.where(at_best >= tl.maximum(tl.max(top, 0), peak), 1.0, 0.0))
    tl.store(metrics + 6, clipped)


@triton.autotune(_CONFIGS, key=["vocab_size", "KIND"])
@triton.jit
def _dense(
    students, teachers, labels, factors, out, metrics, vocab_size, out_stride, clip,
    KIND: tl.constexpr, TEACHER_SHARE: tl.constexpr, LOG_TEACHER: tl.constexpr,
    LOG_STUDENT: tl.constexpr, INVERSE: tl.constexpr, SHARE: tl.constexpr, CE: tl.constexpr,
    CAP: tl.constexpr, TEACHER_CAP: tl.constexpr, LABELS: tl.constexpr, CLIPPED: tl.constexpr,
    ENTRIES: tl.constexpr, MORE: tl.constexpr, AT_Q: tl.constexpr,
    NUM_METRICS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    students += row.to(tl.int64) * vocab_size
    teachers += row.to(tl.int64) * vocab_size
    out += row.to(tl.int64) * out_stride
    metrics += row * NUM_METRICS
    factor = tl.load(factors + row)

    # The softmax of both models, and of the student at temperature 1 for cross-entropy.
    q_peaks = tl.full((BLOCK,), _LOWEST, tl.float32)
    p_peaks = tl.full((BLOCK,), _LOWEST, tl.float32)
    q_totals = tl.zeros((BLOCK,), tl.float32)
    p_totals = tl.zeros((BLOCK,), tl.float32)
    plain_totals = tl.zeros((BLOCK,), tl.float32)
    # Columns of the student's peaks, and its logits at the teacher's peaks.
    places = tl.zeros((BLOCK,), tl.int32)
    at_peaks = tl.full((BLOCK,), float("-inf"), tl.float32)
    next_z = _block(students, 0, vocab_size, BLOCK)
    next_t = _block(teachers, 0, vocab_size, BLOCK)
    for start in range(0, vocab_size, BLOCK):
        z, t = _capped(next_z, CAP), _capped(next_t, TEACHER_CAP)
        next_z = _block(students, start + BLOCK, vocab_size, BLOCK)
        next_t = _block(teachers, start + BLOCK, vocab_size, BLOCK)
        columns = start + tl.arange(0, BLOCK)
        q_totals = _total_with(q_totals, z, q_peaks, INVERSE)
        p_totals = _total_with(p_totals, t, p_peaks, INVERSE)
        if LABELS and INVERSE != 1:
            plain_totals = _total_with(plain_totals, z, q_peaks, 1.0)
        places = tl.where(z > q_peaks, columns, places)
        at_peaks = tl.where(t > p_peaks, z, at_peaks)
        q_peaks, p_peaks = tl.maximum(q_peaks, z), tl.maximum(p_peaks, t)
    q_peak, p_peak = tl.max(q_peaks, 0), tl.max(p_peaks, 0)
    q_log = tl.log(_over_all(q_totals, q_peaks, q_peak, INVERSE))
    p_log = tl.log(_over_all(p_totals, p_peaks, p_peak, INVERSE))
    surest = tl.min(tl.where(q_peaks == q_peak, places, vocab_size), 0)
    at_best = tl.max(tl.where(p_peaks == p_peak, at_peaks, float("-inf")), 0)
    plain_log = q_log
    cross_entropy = 0.0
    label = -1
    if LABELS:
        if INVERSE != 1:
            plain_log = tl.log(_over_all(plain_totals, q_peaks, q_peak, 1.0))
        label = tl.load(labels + row)
        cross_entropy = plain_log - (_capped(tl.load(students + label), CAP) - q_peak)

    values = tl.zeros((BLOCK,), tl.float32)
    clipped_values = tl.zeros((BLOCK,), tl.float32)
    q_entropies = tl.zeros((BLOCK,), tl.float32)
    p_entropies = tl.zeros((BLOCK,), tl.float32)
    scale = tl.full((), SHARE, tl.float32)
    # Forward KL's scores sum to -1.
    score_sum = tl.full((), -1.0, tl.float32)
    ONE_PASS: tl.constexpr = KIND == _FORWARD and not CLIPPED and not ENTRIES
    if not ONE_PASS:
        score_sums = tl.zeros((BLOCK,), tl.float32)
        next_z = _block(students, 0, vocab_size, BLOCK)
        next_t = _block(teachers, 0, vocab_size, BLOCK)
        for start in range(0, vocab_size, BLOCK):
            z, t = _capped(next_z, CAP), _capped(next_t, TEACHER_CAP)
            next_z = _block(students, start + BLOCK, vocab_size, BLOCK)
            next_t = _block(teachers, start + BLOCK, vocab_size, BLOCK)
            log_q, log_p = (z - q_peak) * INVERSE - q_log, (t - p_peak) * INVERSE - p_log
            terms, scores = _value_and_score(
                log_p, log_q, KIND, TEACHER_SHARE, LOG_TEACHER, LOG_STUDENT
            )
            values += terms
            if ENTRIES:
                terms, scores = _clip_entries(terms, scores, log_p, log_q, clip, MORE, AT_Q)
                clipped_values += terms
            score_sums += scores
            q_entropies += _entropy_term(log_q)
            p_entropies += _entropy_term(log_p)
        score_sum = tl.sum(score_sums, 0)
        if CLIPPED:
            scale = tl.where(tl.sum(values, 0) > clip, 0.0, scale)

    others = tl.zeros((BLOCK,), tl.float32)
    next_z = _block(students, 0, vocab_size, BLOCK)
    next_t = _block(teachers, 0, vocab_size, BLOCK)
    for start in range(0, vocab_size, BLOCK):
        scales = factor * _slope(next_z, CAP)
        z, t = _capped(next_z, CAP), _capped(next_t, TEACHER_CAP)
        next_z = _block(students, start + BLOCK, vocab_size, BLOCK)
        next_t = _block(teachers, start + BLOCK, vocab_size, BLOCK)
        log_q, log_p = (z - q_peak) * INVERSE - q_log, (t - p_peak) * INVERSE - p_log
        terms, scores = _value_and_score(
            log_p, log_q, KIND, TEACHER_SHARE, LOG_TEACHER, LOG_STUDENT
        )
        columns = start + tl.arange(0, BLOCK)
        if ENTRIES:
            terms, scores = _clip_entries(terms, scores, log_p, log_q, clip, MORE, AT_Q)
        if ONE_PASS:
            values += terms
            q_entropies += _entropy_term(log_q)
            p_entropies += _entropy_term(log_p)
        gradient = tl.where(scale == 0, 0.0, scale * (scores - _exp(log_q) * score_sum))
        if LABELS and CE > 0:
            more = CE * _exp(z - q_peak - plain_log)
            gradient += more - tl.where(columns == label, CE, 0.0)
        others += tl.where(columns == surest, 0.0, gradient)
        tl.store(out + columns, scales * gradient, mask=columns < vocab_size)
    # As in `_sparse`: the gradients sum to 0. The barrier orders this after the store above.
    tl.debug_barrier()
    inside = (surest < vocab_size) & (tl.maximum(q_log, plain_log) < _LOG_2)
    factor *= _slope(tl.load(students + surest, mask=inside, other=0.0), CAP)
    tl.store(out + surest, -factor * tl.sum(others, 0), mask=inside)

    value = tl.sum(values, 0)
    clipped = value
    if CLIPPED:
        clipped = tl.minimum(value, clip, propagate_nan=tl.PropagateNan.ALL)
    if ENTRIES:
        clipped = tl.sum(clipped_values, 0)
    tl.store(metrics, value)
    tl.store(metrics + 1, cross_entropy)
    tl.store(metrics + 2, tl.sum(q_entropies, 0))
    tl.store(metrics + 3, tl.sum(p_entropies, 0))
    tl.store(metrics + 4, 1.0)
    tl.store(metrics + 5, tl.where(at_best >= q_peak, 1.0, 0.0))
    tl.store(metrics + 6, clipped)
