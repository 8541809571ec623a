"""Shared cases of tests/test_kl_*.py: teachers, students, targets and the float64 reference.

Triton's kernels run compiled where there is a GPU; elsewhere by its interpreter, which needs
TRITON_INTERPRET=1 before Python starts.
"""

import contextlib
import dataclasses
import os

import pytest
import torch

from mpd_train.kl import Divergence, dense_kl, sparse_kl
from mpd_train.kl.divergence import NAMES

CUDA = torch.cuda.is_available()
# The interpreter works in blocks of 512: two of them, the second not full.
N, H, HT, V, K = 7, 16, 24, 611, 8
# More than any block of the kernels' on a GPU.
LONG = 9001
LOSSES = {"dense": dense_kl, "sparse": sparse_kl, "sparse_full": sparse_kl}
KINDS = list(LOSSES)
DIVERGENCES = [Divergence(name) for name in NAMES]
DIVERGENCES += [Divergence("jsd", beta=0.1), Divergence("skew_kl", alpha=0.7)]
CPU = ("torch", "cpu")
TARGETS = [CPU]
if CUDA:
    TARGETS += [pytest.param((x, "cuda"), marks=pytest.mark.gpu) for x in ("torch", "triton")]
else:
    interpreted = pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") != "1",
        reason="without a GPU Triton's kernels need TRITON_INTERPRET=1, set before Python starts",
    )
    TARGETS += [pytest.param(("triton", "cpu"), marks=interpreted)]
of_targets = pytest.mark.parametrize("target", TARGETS, ids=str)
of_kinds = pytest.mark.parametrize("kind", KINDS)
of_divergences = pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)


def of_kinds_and_targets(test):
    return of_kinds(of_targets(test))


def of_all(test):
    return of_divergences(of_kinds_and_targets(test))


STUDENT = ("hidden", "weight", "bias")
DENSE = ("teacher_hidden", "teacher_weight")
SPARSE = ("topk_ids", "topk_logprobs", "tail_logprobs")


def make(seed=0, gap=3.0, n=N, vocab=V, k=K, std=4.0, dtype=torch.float32):
    """Student and teacher whose logits differ by about `gap`, in float64, rounded to `dtype` so
    that a loss is judged and not the rounding of what it is given."""
    g = torch.Generator().manual_seed(seed)

    def draw(*size):
        return torch.randn(*size, generator=g, dtype=torch.float64)

    extra = HT - H
    hidden = draw(n, H).to(dtype).double()
    weight = (draw(vocab, H) * std / H**0.5).to(dtype).double()
    beside = (draw(n, extra)).to(dtype).double()
    more = (draw(vocab, extra) * gap / extra**0.5).to(dtype).double()
    data = {
        "hidden": hidden,
        "weight": weight,
        "teacher_hidden": torch.cat([hidden, beside], 1),
        "teacher_weight": torch.cat([weight, more], 1),
    }
    return with_records(data, k)


def with_records(data, k=K, temperature=1.0):
    logits = data["teacher_hidden"] @ data["teacher_weight"].T / temperature
    logprobs = logits.log_softmax(-1)
    top = logprobs.topk(k, dim=1)
    outside = logprobs.scatter(1, top.indices, float("-inf"))
    return data | {
        "topk_ids": top.indices,
        "topk_logprobs": top.values,
        "tail_logprobs": outside.logsumexp(1),
    }


def teacher_of(kind, data):
    return [data[name] for name in (DENSE if kind == "dense" else SPARSE)]


def run(kind, data, dtype, target, backward=True, within=contextlib.nullcontext, **options):
    """The output and the gradients of hidden, weight and, where `data` has it, bias."""
    (backend, device), dtypes = target, {}
    if kind == "sparse_full":
        # Its records stay float32: in bfloat16 they would be another teacher.
        data = with_records(data, data["weight"].shape[0], options.get("temperature", 1.0))
        wide = torch.promote_types(dtype, torch.float32)
        dtypes = {"topk_logprobs": wide, "tail_logprobs": wide}
    moved = {
        name: x.to(device, dtypes.get(name, dtype) if x.is_floating_point() else None, copy=True)
        for name, x in data.items()
    }
    student = [moved[name].requires_grad_() for name in STUDENT if name in moved]
    for name in ("bias", "teacher_bias", "weights", "labels"):
        if name in moved and not (name == "teacher_bias" and kind != "dense"):
            options[name] = moved[name]
    options.setdefault("normalizer", 7.0)
    teacher = teacher_of(kind, moved)
    with within():
        out = LOSSES[kind](moved["hidden"], moved["weight"], *teacher, backend=backend, **options)
    if backward:
        out.loss.backward()
    return out, *(x.grad for x in student)


def reference(kind, data, **options):
    return run(kind, data, torch.float64, ("reference", "cpu"), **options)


def both(kind, data, dtype, target, **options):
    """What `target` gives in `dtype`, and the reference."""
    return run(kind, data, dtype, target, **options), reference(kind, data, **options)


def relative(found, exact):
    found, exact = (x.detach().cpu().double() for x in (found, exact))
    return ((found - exact).norm() / exact.norm().clamp_min(1e-300)).item()


def assert_gradients_close(found, expected, tolerance):
    for got, want in zip(found[1:], expected[1:], strict=True):
        assert relative(got, want) <= tolerance


def assert_close(found, expected, tolerance):
    """Loss, gradients and every metric."""
    assert_gradients_close(found, expected, tolerance)
    for field in dataclasses.fields(found[0]):
        got, want = (getattr(x[0], field.name) for x in (found, expected))
        assert relative(got, want) <= tolerance, field.name


def clip_of(kind, data, **options):
    """Between the divergences of two tokens, about half of them above."""
    target = ("torch", "cpu")
    values = run(kind, data, torch.float64, target, backward=False, **options)[0].per_token
    middle = values.sort().values[N // 2 - 1 : N // 2 + 1]
    return middle.mean().item()


def with_labels(data):
    """Every other label inside the top K, the rest in the tail."""
    n, vocab = len(data["hidden"]), len(data["weight"])
    outside = torch.ones(n, vocab).scatter(1, data["topk_ids"], 0.0).argmax(1)
    labels = torch.where(torch.arange(n) % 2 == 0, data["topk_ids"][:, 3], outside)
    return data | {"labels": labels}


MIXES = [
    "plain", "clip", "ce", "ce_alone", "clip_ce", "tempered", "tempered_ce", "biased", "capped",
    "capped_tempered_ce", "entries", "entries_tempered_ce",
]  # fmt: skip


def mixed(name, kind, data):
    data, options = data | {"weights": torch.linspace(0, 2, N, dtype=torch.float64)}, {}
    if "capped" in name:
        # Logits have a deviation of 4: some are far into what is flat.
        options["softcap"] = 5.0
        if kind == "dense":
            options["teacher_softcap"] = 7.0
    if "tempered" in name:
        options["temperature"] = 2.5
        data = with_records(data, temperature=2.5)
    if "entries" in name:
        options["entry_clip"] = 0.02
    elif "clip" in name or "tempered_ce" in name:
        options["divergence_clip"] = clip_of(kind, data, **options)
    if "ce" in name:
        data = with_labels(data)
        options["ce_weight"] = 1.0 if name == "ce_alone" else 0.3
    if name == "biased":
        g = torch.Generator().manual_seed(3)
        for key in ("bias", "teacher_bias"):
            data[key] = torch.randn(V, generator=g).double()
    return data, options


def exact(target):
    """The dtype that a target is compared with the reference in, and the tolerance."""
    return (torch.float32, 2e-5) if target[0] == "triton" else (torch.float64, 1e-12)


def half_a_percent(target):
    # Triton's interpreter cuts off where a GPU rounds to bfloat16: twice the error.
    return 1e-2 if target == ("triton", "cpu") else 5e-3
