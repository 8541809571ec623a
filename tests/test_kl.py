"""The chunked losses against the float64 reference, and what a divergence must satisfy."""

import pytest
import torch

from mpd_train.kl import NAMES, Divergence, dense_kl, sparse_kl
from mpd_train.kl.reference import dense_reference, sparse_reference

N, H, HT, V = 13, 16, 24, 97
KINDS = ["dense", "sparse", "sparse_full"]
DIVERGENCES = [Divergence(name) for name in NAMES] + [
    Divergence("jsd", beta=0.1),
    Divergence("skew_kl", alpha=0.7),
]


def make(seed=0, gap=3.0, k=8):
    """Student and teacher whose logits differ by about `gap`, in float64."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, H, generator=g, dtype=torch.float64)
    weight = torch.randn(V, H, generator=g, dtype=torch.float64)
    noise = torch.randn(N, HT - H, generator=g, dtype=torch.float64) * gap / (HT - H) ** 0.5
    teacher_hidden = torch.cat([hidden, noise], 1)
    extra = torch.randn(V, HT - H, generator=g, dtype=torch.float64)
    teacher_weight = torch.cat([weight, extra], 1)
    logprobs = (teacher_hidden @ teacher_weight.T).log_softmax(-1)
    top = logprobs.topk(k, dim=1)
    outside = torch.ones(N, V, dtype=torch.bool).scatter(1, top.indices, False)
    tail = logprobs.masked_fill(~outside, float("-inf")).logsumexp(1)
    return hidden, weight, teacher_hidden, teacher_weight, top.indices, top.values, tail


def run(kind, data, divergence, weights, normalizer, dtype, chunk_size=None, **mixing):
    hidden, weight, th, tw, ids, logprobs, tail = data
    if kind == "sparse_full":
        full = (th @ tw.T).log_softmax(-1)
        ids = torch.arange(V).expand(N, V)
        logprobs, tail = full, torch.full((N,), float("-inf"), dtype=full.dtype)
    h = hidden.to(dtype, copy=True).requires_grad_()
    w = weight.to(dtype, copy=True).requires_grad_()
    options = {
        "normalizer": normalizer,
        "divergence": divergence,
        "weights": None if weights is None else weights.to(dtype),
        "chunk_size": chunk_size,
        **mixing,
    }
    if kind == "dense":
        out = dense_kl(h, w, th.to(dtype), tw.to(dtype), **options)
    else:
        out = sparse_kl(h, w, ids, logprobs.to(dtype), tail.to(dtype), **options)
    out.loss.backward()
    return out, h.grad, w.grad


def reference(kind, data, divergence, weights, normalizer, **mixing):
    hidden, weight, th, tw, ids, logprobs, tail = data
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    weights = torch.ones(N, dtype=torch.float64) if weights is None else weights
    if kind == "sparse":
        loss = sparse_reference(
            h, w, ids, logprobs, tail, divergence, weights, normalizer, **mixing
        )
    else:
        loss = dense_reference(h, w, th, tw, divergence, weights, normalizer, **mixing)
    loss.backward()
    return loss.detach(), h.grad, w.grad


def relative(a, b):
    return ((a.double() - b).norm() / b.norm().clamp_min(1e-300)).item()


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk_size", [1, 5, 64])
def test_float64_equals_reference(kind, divergence, chunk_size):
    data = make()
    weights = torch.linspace(0, 2, N, dtype=torch.float64)
    expected = reference(kind, data, divergence, weights, 7.0)
    out, dh, dw = run(kind, data, divergence, weights, 7.0, torch.float64, chunk_size)
    for got, want in zip((out.loss.detach(), dh, dw), expected, strict=True):
        assert relative(got, want) <= 1e-12


@pytest.mark.parametrize("ce_weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("clip", [None, "median"])
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_clip_and_cross_entropy_equal_reference(kind, divergence, clip, ce_weight):
    data = make()
    ids = data[4]
    plain, _, _ = run(kind, data, divergence, None, 1.0, torch.float64)
    if clip is not None:
        clip = plain.per_token.median().item() + 1e-9
        assert 0 < (plain.per_token > clip).sum() < N
    # Every other label inside the top K, the rest in the tail.
    outside = torch.ones(N, V, dtype=torch.bool).scatter(1, ids, False).int().argmax(1)
    labels = torch.where(torch.arange(N) % 2 == 0, ids[:, 3], outside)
    weights = torch.linspace(0, 2, N, dtype=torch.float64)
    mixing = {"divergence_clip": clip, "labels": labels, "ce_weight": ce_weight}
    expected = reference(kind, data, divergence, weights, 7.0, **mixing)
    out, dh, dw = run(kind, data, divergence, weights, 7.0, torch.float64, 5, **mixing)
    for got, want in zip((out.loss.detach(), dh, dw), expected, strict=True):
        assert relative(got, want) <= 1e-12
    assert torch.allclose(out.per_token[1:], plain.per_token[1:], rtol=1e-12, atol=0)
    entropy = torch.nn.functional.cross_entropy(data[0] @ data[1].T, labels, reduction="none")
    assert torch.allclose(out.cross_entropy[1:], entropy[1:], rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_above_the_clip_gets_no_gradient(kind):
    plain, _, _ = run(kind, make(), Divergence(), None, 1.0, torch.float64)
    clip = plain.per_token.median().item() + 1e-9
    above = plain.per_token > clip
    out, dh, _ = run(kind, make(), Divergence(), None, 1.0, torch.float64, divergence_clip=clip)
    assert (dh[above] == 0).all()
    assert (dh[~above] != 0).any(1).all()
    assert out.cross_entropy.abs().max() == 0


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_mixing_that_makes_no_sense_is_refused(kind):
    labels = torch.zeros(N, dtype=torch.int64)
    for mixing, message in (
        ({"ce_weight": 0.3}, "needs labels"),
        ({"ce_weight": 1.5, "labels": labels}, "within"),
        ({"divergence_clip": 0.0}, "above 0"),
        ({"ce_weight": 0.3, "labels": labels[1:]}, "do not fit"),
    ):
        with pytest.raises(ValueError, match=message):
            run(kind, make(), Divergence(), None, 1.0, torch.float32, **mixing)


@pytest.mark.parametrize("gap, tolerance", [(3.0, 1e-5), (1.0, 1e-5), (0.03, 1e-3)])
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_float32_error(kind, divergence, gap, tolerance):
    # Inputs rounded to float32 first, so that the loss is judged and not the rounding of them.
    data = tuple(x.float().double() if x.is_floating_point() else x for x in make(gap=gap))
    expected = reference(kind, data, divergence, None, float(N))
    out, dh, dw = run(kind, data, divergence, None, float(N), torch.float32, 4)
    for got, want in zip((out.loss.detach(), dh, dw), expected, strict=True):
        assert relative(got, want) <= tolerance


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_zero_where_teacher_is_student(kind, divergence):
    data = make(gap=0.0)
    out, dh, dw = run(kind, data, divergence, None, 1.0, torch.float32)
    assert out.per_token.abs().max() <= 1e-5
    assert dh.abs().max() <= 1e-4
    assert dw.abs().max() <= 1e-4


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_never_negative(kind, divergence):
    for seed in range(5):
        out, _, _ = run(kind, make(seed, gap=0.01), divergence, None, 1.0, torch.float32)
        assert out.per_token.min() >= -1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_all_masked_gives_a_connected_zero(kind):
    out, dh, dw = run(kind, make(), Divergence(), torch.zeros(N), 1.0, torch.float32)
    assert out.loss.item() == 0
    assert out.loss.requires_grad
    assert dh.abs().max() == 0
    assert dw.abs().max() == 0


@pytest.mark.parametrize("kind", KINDS)
def test_nan_in_a_masked_row_stays_there(kind):
    data = list(make())
    data[0][3] = float("nan")
    weights = torch.ones(N)
    weights[3] = 0
    out, dh, dw = run(kind, data, Divergence(), weights, 1.0, torch.float32)
    assert out.loss.isfinite()
    assert dw.isfinite().all()
    assert dh.isfinite().all()
    assert out.per_token[3] == 0


def test_sparse_bounds_dense_from_below_and_meets_it_at_full_k():
    data = make()
    dense, _, _ = run("dense", data, Divergence(), None, 1.0, torch.float64)
    sparse, _, _ = run("sparse", data, Divergence(), None, 1.0, torch.float64)
    full, _, _ = run("sparse_full", data, Divergence(), None, 1.0, torch.float64)
    assert (sparse.per_token <= dense.per_token).all()
    assert (sparse.per_token < 0.999 * dense.per_token).any()
    assert torch.allclose(full.per_token, dense.per_token, atol=1e-13)


def test_tail_is_punished_under_reverse_kl():
    """Mass that the student moves outside the top K must cost something (the missing tail)."""
    hidden, weight, *_ = make()
    logits = hidden @ weight.T
    ids = logits.topk(4, dim=1).indices
    kept = torch.full((N, 4), -1.3862944, dtype=torch.float64)
    tail = torch.full((N,), -16.0, dtype=torch.float64)
    divergence = Divergence("reverse_kl")
    options = {"normalizer": 1.0, "divergence": divergence}
    peaked = sparse_kl(hidden * 4, weight, ids, kept, tail, **options).per_token
    flat = sparse_kl(hidden * 0.0, weight, ids, kept, tail, **options).per_token
    assert (flat > 10).all()
    assert (flat > peaked).all()


def test_extreme_logits_stay_finite():
    hidden, weight, th, tw, ids, logprobs, tail = make()
    data = (hidden * 1e3, weight, th * 1e3, tw, ids, logprobs, tail)
    for divergence in DIVERGENCES:
        for kind in ("dense", "sparse"):
            out, dh, dw = run(kind, data, divergence, None, 1.0, torch.float32)
            assert out.per_token.isfinite().all(), (divergence, kind)
            assert dh.isfinite().all(), (divergence, kind)
            assert dw.isfinite().all(), (divergence, kind)


def test_bfloat16_inputs_keep_float32_logits():
    """Rounding the logits to bfloat16 would put the gradient off by more than its size here."""
    g = torch.Generator().manual_seed(1)
    hidden = torch.randn(64, 64, generator=g).bfloat16()
    weight = torch.randn(512, 64, generator=g).bfloat16()
    teacher_weight = (weight.float() + 0.004 * torch.randn(512, 64, generator=g)).bfloat16()
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    dense_kl(h, w, hidden, teacher_weight, normalizer=1.0).loss.backward()
    hd, wd = hidden.double().requires_grad_(), weight.double().requires_grad_()
    ones = torch.ones(64, dtype=torch.float64)
    dense_reference(
        hd, wd, hidden.double(), teacher_weight.double(), Divergence(), ones, 1.0
    ).backward()
    assert relative(h.grad, hd.grad) <= 5e-3
    assert relative(w.grad, wd.grad) <= 5e-3


def test_autocast_does_not_round_the_logits():
    data = make(gap=0.03)
    outside, dh, dw = run("dense", data, Divergence(), None, 1.0, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside, dh_inside, dw_inside = run("dense", data, Divergence(), None, 1.0, torch.float32)
    assert torch.equal(outside.per_token, inside.per_token)
    assert torch.equal(dh, dh_inside)
    assert torch.equal(dw, dw_inside)


def test_never_holds_tokens_times_vocabulary():
    n, vocab = 4096, 16384
    hidden = torch.randn(n, 8, requires_grad=True)
    weight = torch.randn(vocab, 8, requires_grad=True)
    ids = torch.arange(4).expand(n, 4)
    logprobs = torch.full((n, 4), -2.0)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                largest = max(largest, result.numel())
            return result

    with Watch():
        sparse_kl(hidden, weight, ids, logprobs, logprobs[:, 0], normalizer=1.0).loss.backward()
    assert largest <= n * vocab // 4


def test_bad_shapes_and_doubled_ids_are_refused():
    hidden, weight, th, tw, ids, logprobs, tail = make()
    with pytest.raises(ValueError, match="twice"):
        sparse_kl(hidden, weight, ids.clone().fill_(3), logprobs, tail, normalizer=1.0)
    with pytest.raises(ValueError, match="fit"):
        sparse_kl(hidden[:-1], weight, ids, logprobs, tail, normalizer=1.0)
    with pytest.raises(ValueError, match="slice the padding"):
        dense_kl(hidden, weight, th, tw[:-1], normalizer=1.0)
    with pytest.raises(ValueError, match="beta"):
        Divergence("jsd", beta=1.0)


def test_double_backward_is_refused():
    hidden, weight, _, _, ids, logprobs, tail = make()
    h = hidden.requires_grad_()
    loss = sparse_kl(h, weight, ids, logprobs, tail, normalizer=1.0).loss
    (gradient,) = torch.autograd.grad(loss, h, create_graph=True)
    with pytest.raises(RuntimeError):
        gradient.sum().backward()
