"""The fused losses against the float64 reference, and what a divergence must satisfy.

Triton's kernels run compiled where there is a GPU; where there is none, by its interpreter, which
wants TRITON_INTERPRET=1 from the start.
"""

import contextlib
import dataclasses
import functools
import math
import os
import re
import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mpd_train.kl import Divergence, dense_kl, sparse_kl
from mpd_train.kl.divergence import NAMES
from mpd_train.kl.fused import linear_kl
from mpd_train.kl.types import accumulation_dtype

CUDA = torch.cuda.is_available()
# The interpreter works in blocks of 512: two of them, the second not full.
N, H, HT, V, K = 7, 16, 24, 611, 8
KINDS = ["dense", "sparse", "sparse_full"]
DIVERGENCES = [Divergence(name) for name in NAMES] + [
    Divergence("jsd", beta=0.1),
    Divergence("skew_kl", alpha=0.7),
]
TARGETS = [("torch", "cpu")]
if CUDA:
    TARGETS += [
        pytest.param((backend, "cuda"), marks=pytest.mark.gpu) for backend in ("torch", "triton")
    ]
else:
    interpreted = pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") != "1",
        reason="without a GPU Triton's kernels need TRITON_INTERPRET=1, set before Python starts",
    )
    TARGETS += [pytest.param(("triton", "cpu"), marks=interpreted)]
of_targets = pytest.mark.parametrize("target", TARGETS, ids=str)
of_kinds = pytest.mark.parametrize("kind", KINDS)
of_divergences = pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)


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


STUDENT = ("hidden", "weight", "bias")
TEACHERS = {
    "dense": ("teacher_hidden", "teacher_weight"),
    "sparse": ("topk_ids", "topk_logprobs", "tail_logprobs"),
}


def run(kind, data, dtype, target, backward=True, within=contextlib.nullcontext, **options):
    """The output and the gradients of hidden, weight and, where `data` has it, bias."""
    backend, device = target
    if kind == "sparse_full":
        data = with_records(data, data["weight"].shape[0], options.get("temperature", 1.0))
    moved = {
        name: x.to(device, dtype if x.is_floating_point() else None, copy=True)
        for name, x in data.items()
    }
    student = [moved[name].requires_grad_() for name in STUDENT if name in moved]
    for name in ("bias", "teacher_bias", "weights", "labels"):
        if name in moved and not (name == "teacher_bias" and kind != "dense"):
            options[name] = moved[name]
    options.setdefault("normalizer", 7.0)
    teacher = [moved[name] for name in TEACHERS[kind.split("_")[0]]]
    loss = dense_kl if kind == "dense" else sparse_kl
    with within():
        out = loss(moved["hidden"], moved["weight"], *teacher, backend=backend, **options)
    if backward:
        out.loss.backward()
    return out, *(x.grad for x in student)


def reference(kind, data, **options):
    return run(kind, data, torch.float64, ("reference", "cpu"), **options)


def relative(found, exact):
    found, exact = (x.detach().cpu().double() for x in (found, exact))
    return ((found - exact).norm() / exact.norm().clamp_min(1e-300)).item()


def assert_close(found, expected, tolerance):
    """Loss, gradients and every diagnostic."""
    for got, want in zip(found[1:], expected[1:], strict=True):
        assert relative(got, want) <= tolerance
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
    "capped_tempered_ce",
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
    if "clip" in name or "tempered_ce" in name:
        options["divergence_clip"] = clip_of(kind, data, **options)
    if "ce" in name:
        data = with_labels(data)
        options["ce_weight"] = 1.0 if name == "ce_alone" else 0.3
    if name == "biased":
        g = torch.Generator().manual_seed(3)
        for key in ("bias", "teacher_bias"):
            data[key] = torch.randn(V, generator=g).double()
    return data, options


@pytest.mark.parametrize("mix", MIXES)
@of_divergences
@of_kinds
@of_targets
def test_equals_reference(target, kind, divergence, mix):
    data, options = mixed(mix, kind, make())
    dtype, tolerance = torch.float64, 1e-12
    if target[0] == "triton":
        dtype, tolerance = torch.float32, 2e-5
    options["divergence"] = divergence
    expected = reference(kind, data, **options)
    assert_close(run(kind, data, dtype, target, chunk_size=5, **options), expected, tolerance)


@pytest.mark.parametrize("gap", [3.0, 0.3, 0.03])
@of_divergences
@of_kinds
@of_targets
def test_float32_error(target, kind, divergence, gap):
    data = make(gap=gap)
    expected = reference(kind, data, divergence=divergence)
    found = run(kind, data, torch.float32, target, divergence=divergence)
    # Logits of 10 have errors of 1e-6, which count against a gap as small as 0.03.
    assert_close(found, expected, 2e-5 if gap > 0.1 else 1e-3)


@pytest.mark.parametrize("gap", [3.0, 0.3, 0.03])
@of_divergences
@of_kinds
@of_targets
def test_bfloat16_inputs_keep_float32_logits(target, kind, divergence, gap):
    """Half a percent in the gradients; logits in bfloat16 put them off by more than their size
    where student and teacher nearly agree."""
    data = make(gap=gap, std=8.0, dtype=torch.bfloat16)
    if kind == "sparse":
        # So that what is stored is the same for both.
        data["topk_logprobs"] = data["topk_logprobs"].bfloat16().double()
        data["tail_logprobs"] = data["tail_logprobs"].bfloat16().double()
    if kind == "sparse_full":
        return full_vocabulary_in_bfloat16(target, divergence, data)
    expected = reference(kind, data, divergence=divergence)
    found = run(kind, data, torch.bfloat16, target, divergence=divergence)
    for got, want in zip(found[1:], expected[1:], strict=True):
        assert relative(got, want) <= half_a_percent(target)
    return None


def half_a_percent(target):
    # Triton's interpreter cuts off where a GPU rounds to bfloat16: twice the error.
    return 1e-2 if target == ("triton", "cpu") else 5e-3


def full_vocabulary_in_bfloat16(target, divergence, data):
    """Its records are float32: in bfloat16 they would be another teacher."""
    records = with_records(data, V)
    backend, device = target
    gradients = []
    for name, dtype, place in (
        ("reference", torch.float64, "cpu"),
        (backend, torch.bfloat16, device),
    ):
        h, w = (data[x].to(place, dtype, copy=True).requires_grad_() for x in ("hidden", "weight"))
        teacher = [
            records["topk_ids"].to(place),
            records["topk_logprobs"].float().to(place),
            records["tail_logprobs"].float().to(place),
        ]
        out = sparse_kl(h, w, *teacher, normalizer=7.0, divergence=divergence, backend=name)
        out.loss.backward()
        gradients.append((h.grad, w.grad))
    for got, want in zip(gradients[1], gradients[0], strict=True):
        assert relative(got, want) <= half_a_percent(target)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("sure", [0.0, 6.0, 9.0])
@pytest.mark.parametrize("kind", ["dense", "sparse"])
@of_targets
def test_cross_entropy_of_a_sure_student_in_bfloat16(target, kind, sure, temperature):
    """What is left of q - 1 at a label with q near 1, in the top K and in the tail."""
    data = with_labels(make(gap=0.03, dtype=torch.bfloat16))
    logits = data["hidden"] @ data["weight"].T
    away = logits.amax(1) - logits.gather(1, data["labels"][:, None])[:, 0]
    # A wide bias cannot be on the labels of all rows: each row gets a state of its own for it.
    lift = torch.zeros(N, N + H, dtype=torch.float64)
    lift[:, :H], lift[range(N), range(H, N + H)] = data["hidden"], 1.0
    raised = torch.zeros(V, N + H, dtype=torch.float64)
    raised[:, :H] = data["weight"]
    raised[data["labels"], range(H, N + H)] = (away + sure).bfloat16().double()
    data |= {"hidden": lift, "weight": raised, "teacher_hidden": lift, "teacher_weight": raised}
    data = with_records(data, temperature=temperature)
    if kind == "sparse":
        data["topk_logprobs"] = data["topk_logprobs"].bfloat16().double()
        data["tail_logprobs"] = data["tail_logprobs"].bfloat16().double()
        # Half of the labels are to be in the tail: their ids make way for unlikely ones.
        data = without_every_other_label(data)
    options = {"ce_weight": 0.5, "temperature": temperature}
    expected = reference(kind, data, **options)
    found = run(kind, data, torch.bfloat16, target, **options)
    for got, want in zip(found[1:], expected[1:], strict=True):
        assert relative(got, want) <= half_a_percent(target)


def without_every_other_label(data):
    ids, values = data["topk_ids"].clone(), data["topk_logprobs"].clone()
    for row in range(1, N, 2):
        here = (ids[row] == data["labels"][row]).nonzero()
        if len(here):
            at = here[0, 0]
            ids[row] = torch.cat([ids[row, :at], ids[row, at + 1 :], ids[row, :1] * 0 - 1])
            values[row] = torch.cat([values[row, :at], values[row, at + 1 :], values[row, :1]])
    inside = torch.where(ids >= 0, values.exp(), 0.0).sum(1)
    tail = torch.log1p(-inside.clamp(max=1 - 1e-6)).bfloat16().double()
    return data | {"topk_ids": ids, "topk_logprobs": values, "tail_logprobs": tail}


@pytest.mark.parametrize("chunk_size", [1, 5, 64, None])
@of_kinds
@of_targets
def test_chunks_do_not_matter(target, kind, chunk_size):
    data = make()
    dtype, tolerance = (torch.float32, 2e-5) if target[0] == "triton" else (torch.float64, 1e-12)
    found = run(kind, data, dtype, target, chunk_size=chunk_size)
    assert_close(found, reference(kind, data), tolerance)


@of_kinds
@of_targets
def test_accumulated_parts_are_the_whole(target, kind):
    data = with_labels(make())
    options = {"ce_weight": 0.2, "divergence": Divergence("jsd")}
    whole = run(kind, data, torch.float32, target, **options)
    of_tokens = [name for name in data if not name.endswith("weight")]
    parts = []
    for rows in (slice(0, 4), slice(4, N)):
        part = data | {name: data[name][rows] for name in of_tokens}
        parts.append(run(kind, part, torch.float32, target, **options))
    assert relative(sum(p[0].loss for p in parts), whole[0].loss.cpu()) <= 1e-6
    assert relative(torch.cat([p[1] for p in parts]), whole[1].cpu()) <= 1e-6
    assert relative(sum(p[2] for p in parts), whole[2].cpu()) <= 1e-6


@of_divergences
@of_kinds
@of_targets
def test_a_constant_added_to_the_logits_does_not_matter(target, kind, divergence):
    data = make()
    zero = torch.zeros(V, dtype=torch.float64)
    plain = run(kind, data | {"bias": zero}, torch.float32, target, divergence=divergence)
    moved = run(kind, data | {"bias": zero + 8}, torch.float32, target, divergence=divergence)
    assert_close([x if i == 0 else x.cpu() for i, x in enumerate(moved)],
                 [x if i == 0 else x.cpu() for i, x in enumerate(plain)], 3e-5)  # fmt: skip


@of_divergences
@of_kinds
@of_targets
def test_zero_where_teacher_is_student(target, kind, divergence):
    out, dh, dw = run(kind, make(gap=0.0), torch.float32, target, divergence=divergence)
    assert out.per_token.abs().max() <= 1e-5
    assert dh.abs().max() <= 1e-4
    assert dw.abs().max() <= 1e-4
    # And only there.
    other, *_ = run(kind, make(gap=1.0), torch.float32, target, divergence=divergence)
    assert other.per_token.min() > 1e-4


@of_divergences
@of_kinds
@of_targets
def test_never_negative(target, kind, divergence):
    for seed in range(3):
        out, *_ = run(kind, make(seed, gap=0.01), torch.float32, target, divergence=divergence)
        assert out.per_token.min() >= -1e-6


@of_kinds
@of_targets
def test_a_token_above_the_clip_gets_no_gradient(target, kind):
    data = make()
    clip = clip_of(kind, data)
    out, dh, _ = run(kind, data, torch.float32, target, divergence_clip=clip)
    above = out.per_token > clip
    assert 0 < above.sum() < N
    assert (dh[above] == 0).all()
    assert (dh[~above] != 0).any(1).all()
    assert out.cross_entropy.abs().max() == 0


@of_divergences
@of_kinds
@of_targets
def test_the_squared_temperature_keeps_the_gradient(target, kind, divergence):
    """Far above the logits' spread the divergence falls with the square of the temperature."""
    norms = []
    for temperature in (50.0, 100.0):
        data = make(std=1.0, gap=1.0)
        data = with_records(data, temperature=temperature)
        if kind == "sparse":
            data["tail_logprobs"] = torch.log1p(-data["topk_logprobs"].exp().sum(1))
        _, dh, _ = run(kind, data, torch.float32, target, divergence=divergence,
                       temperature=temperature)  # fmt: skip
        norms.append(dh.norm().item())
    assert norms[0] == pytest.approx(norms[1], rel=0.1)


EDGES = {
    "one_id": lambda: make(k=1),
    "one_row": lambda: make(n=1),
    "small_vocabulary": lambda: make(vocab=97),
    "a_whole_block": lambda: make(vocab=512),
    "no_tail_mass": lambda: certain(make(), "top"),
    "all_tail_mass": lambda: certain(make(), "tail"),
    "impossible_id": lambda: impossible(make()),
    "ragged": lambda: ragged(make()),
    "large_logits": lambda: large(make()),
    "impossible_outside": lambda: impossible_outside(),
}


def certain(data, where):
    """The teacher's mass is all on the first id, or all outside the K."""
    data["topk_logprobs"] = torch.full((N, K), float("-inf"), dtype=torch.float64)
    data["tail_logprobs"] = torch.full((N,), float("-inf"), dtype=torch.float64)
    if where == "top":
        data["topk_logprobs"][:, 0] = 0.0
    else:
        data["tail_logprobs"][:] = 0.0
    return data


def impossible(data):
    data["topk_logprobs"][::2, 2] = float("-inf")
    data["teacher_bias"] = torch.zeros(V, dtype=torch.float64)
    data["teacher_bias"][5:9] = float("-inf")
    return data


def impossible_outside():
    """All that the student can say is in the top K, with logits below 0."""
    data = make()
    bias = torch.full((V,), float("-inf"), dtype=torch.float64)
    bias[:K] = -40.0
    ids = torch.arange(K).expand(N, K)
    values = torch.randn(N, K, dtype=torch.float64).log_softmax(1)
    return data | {
        "bias": bias, "teacher_bias": bias, "topk_ids": ids, "topk_logprobs": values,
        "tail_logprobs": torch.full((N,), float("-inf"), dtype=torch.float64),
    }  # fmt: skip


def ragged(data):
    data["topk_ids"] = data["topk_ids"].clone()
    for row in range(N):
        data["topk_ids"][row, 1 + row % K :] = -1
    # What stands beside an id of -1 is not looked at.
    data["topk_logprobs"][data["topk_ids"] < 0] = 5.0
    return data


def large(data):
    """Logits up to some 1e4, where a softmax is all on one token."""
    data["hidden"] = data["hidden"] * 1e3
    return data


@pytest.mark.parametrize("ce_weight", [0.0, 0.4])
@pytest.mark.parametrize("edge", EDGES)
@of_divergences
@pytest.mark.parametrize("kind", ["dense", "sparse"])
@of_targets
def test_edges(target, kind, divergence, edge, ce_weight):
    data = EDGES[edge]()
    if ce_weight > 0:
        data["labels"] = torch.arange(len(data["hidden"]))
    options = {"divergence": divergence, "ce_weight": ce_weight}
    dtype, tolerance = (torch.float32, 3e-5) if target[0] == "triton" else (torch.float64, 1e-12)
    found = run(kind, data, dtype, target, **options)
    expected = reference(kind, data, **options)
    for x in found[1:]:
        assert x.isfinite().all()
    if edge == "large_logits":
        # Where q underflows the definitions give 0 / 0 and infinities; ours are finite.
        assert found[0].per_token.isfinite().all()
        return
    assert_close(found, expected, tolerance)


@of_kinds
@of_targets
def test_large_logits_in_float32(target, kind):
    for divergence in DIVERGENCES:
        out, dh, dw = run(kind, large(make()), torch.float32, target, divergence=divergence)
        for x in (*vars(out).values(), dh, dw):
            assert x.isfinite().all(), divergence


@of_kinds
@of_targets
def test_all_masked_gives_a_connected_zero(target, kind):
    data = make() | {"weights": torch.zeros(N)}
    out, dh, dw = run(kind, data, torch.float32, target)
    assert out.loss.item() == 0
    assert out.loss.requires_grad
    assert dh.abs().max() == 0
    assert dw.abs().max() == 0


@of_targets
def test_no_rows_give_a_connected_zero(target):
    data = {name: x[:0] if not name.endswith("weight") else x for name, x in make().items()}
    for kind in ("dense", "sparse"):
        out, dh, dw = run(kind, data, torch.float32, target)
        assert out.loss.item() == 0
        assert dh.shape == (0, H)
        assert dw.abs().max() == 0


@of_kinds
@of_targets
def test_nan_and_nonsense_in_a_masked_row_stay_there(target, kind):
    data = with_labels(make())
    data["weights"] = torch.ones(N)
    data["weights"][3] = 0
    if kind == "sparse_full":
        data = with_records(data, V)
        kind = "sparse"
    clean = run(kind, data, torch.float32, target, ce_weight=0.2)
    for name in ("hidden", "teacher_hidden", "topk_logprobs", "tail_logprobs"):
        data[name] = data[name].clone()
        data[name][3] = float("nan")
    data["topk_ids"], data["labels"] = data["topk_ids"].clone(), data["labels"].clone()
    data["topk_ids"][3], data["labels"][3] = 10 * V, -100
    found = run(kind, data, torch.float32, target, ce_weight=0.2)
    assert found[0].per_token[3] == 0
    for got, want in zip(found[1:], clean[1:], strict=True):
        assert torch.equal(got, want)


def test_the_kernels_compile_for_gpus_that_are_not_here():
    pytest.importorskip("triton")
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    said = subprocess.run(
        [sys.executable, "tests/compile_kernels.py", "80", "90"],
        env=env, check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    lines = said.splitlines()
    # The dense kernel in four sizes of block, the sparse one in two of buckets.
    assert len(lines) == 2 * (4 + 2) * (len(NAMES) + 1)
    # Bytes that do not fit a thread's registers: of a thousand buckets some; of a block none, but
    # a few of the row's own numbers.
    for line in lines:
        most = 64 if "buckets 1024" in line else 16
        assert int(re.search(r"spilled (\d+)", line)[1]) <= most, line
        assert re.search(r"instructions \d+( \+ \d+)+ a logit$", line), line


@of_targets
def test_more_ids_than_a_program_of_triton_holds(target):
    data = make(vocab=1200, k=1100)
    expected = reference("sparse", data)
    assert_close(run("sparse", data, torch.float32, target), expected, 2e-5)


@pytest.mark.parametrize("options", [{}, {"ce_weight": 1.0}, {"softcap": 60.0}], ids=str)
@pytest.mark.parametrize("kind", ["dense", "sparse_full"])
@of_divergences
@of_targets
def test_a_sure_student_keeps_its_small_gradient(target, divergence, kind, options):
    """Where one token has nearly all of the mass, its gradient is the difference of two numbers
    that are alike, or minus the sum of all others."""
    data = make(n=1)
    logits = 4 * data["hidden"] @ data["weight"].T
    assert 1e-4 < 1 - logits.softmax(-1).max() < 1e-3
    # The product of states and head is not what is judged.
    of_teacher = data["teacher_hidden"] @ data["teacher_weight"].T
    data["hidden"], data["teacher_hidden"] = (x.float().double() for x in (logits, of_teacher))
    data["weight"] = data["teacher_weight"] = torch.eye(V, dtype=torch.float64)
    data["labels"] = logits.argmax(1)
    options = {"divergence": divergence, "normalizer": 1.0, **options}
    exact = reference(kind, data, **options)
    found = run(kind, data, torch.float32, target, **options)
    # Caps of 60 round as numbers of 60 do. The torch backend takes the difference.
    of_triton = 2e-5 if "softcap" in options else 2e-6
    of_torch = 5e-3 if "ce_weight" in options else 1e-3
    assert relative(found[1], exact[1]) < (of_triton if target[0] == "triton" else of_torch)


@of_divergences
@pytest.mark.parametrize("kind", ["dense", "sparse"])
@of_targets
def test_a_flat_student_keeps_each_tokens_gradient(target, kind, divergence):
    """Where none is sure, the sum of all others holds the rounding of them all."""
    vocab = 20_000
    # A bias of one row: its gradient is that of the logits.
    data = make(n=1, vocab=vocab, std=0.5, gap=0.3) | {"bias": torch.zeros(vocab).double()}
    exact = reference(kind, data, divergence=divergence)[3]
    found = run(kind, data, torch.float32, target, divergence=divergence)[3].cpu()
    assert (found - exact).abs().max() <= 1e-5 * exact.abs().max()


# More than any block of the kernels' on a GPU.
LONG = 9001


@pytest.mark.parametrize("mix", ["plain", "clip_ce", "tempered_ce", "capped_tempered_ce"])
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("kind", ["dense", "sparse"])
@of_targets
def test_rows_of_several_blocks(target, kind, name, mix):
    data, options = mixed(mix, kind, make(vocab=LONG))
    options["divergence"] = Divergence(name)
    expected = reference(kind, data, **options)
    assert_close(run(kind, data, torch.float32, target, **options), expected, 2e-5)


@of_divergences
@pytest.mark.parametrize("kind", ["dense", "sparse"])
@of_targets
def test_rows_of_several_blocks_in_bfloat16(target, kind, divergence):
    """Triton writes a sparse teacher's gradient over the logits that it is made from."""
    data = make(gap=0.3, std=8.0, vocab=LONG, dtype=torch.bfloat16)
    if kind == "sparse":
        data["topk_logprobs"] = data["topk_logprobs"].bfloat16().double()
        data["tail_logprobs"] = data["tail_logprobs"].bfloat16().double()
    expected = reference(kind, data, divergence=divergence)
    found = run(kind, data, torch.bfloat16, target, divergence=divergence)
    for got, want in zip(found[1:], expected[1:], strict=True):
        assert relative(got, want) <= half_a_percent(target)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="the interpreter has one size of block")
@pytest.mark.parametrize("which", range(4))
@of_divergences
def test_every_size_of_block_is_right(monkeypatch, which, divergence):
    """The tuner's choice alone is looked at elsewhere."""
    from mpd_train.kl import triton_kernels

    monkeypatch.setattr(triton_kernels._dense, "configs", [triton_kernels._CONFIGS[which]])
    monkeypatch.setattr(triton_kernels._dense, "cache", {})
    monkeypatch.setattr(triton_kernels, "_SPARSE", triton_kernels._CONFIGS[which])
    for kind in ("dense", "sparse"):
        data = make(vocab=LONG)
        expected = reference(kind, data, divergence=divergence)
        found = run(kind, data, torch.float32, ("triton", "cuda"), divergence=divergence)
        assert_close(found, expected, 2e-5)


@of_targets
def test_a_divergence_ignores_what_is_not_its(target):
    data = make()
    plain, other = (
        run("dense", data, torch.float32, target, divergence=Divergence("forward_kl", alpha=alpha))
        for alpha in (0.1, 1.0)
    )
    assert torch.equal(plain[0].loss, other[0].loss)


@of_kinds
@of_targets
def test_agreement_is_about_one_token(target, kind):
    """And not about its place in a block: the interpreter's has 512."""
    data = make(n=4)
    for name, places in (("hidden", (5, 517, 5, 517)), ("teacher_hidden", (5, 5, 517, 517))):
        data[name] = torch.randn(4, V, generator=torch.Generator().manual_seed(0)).double()
        data[name][range(4), places] = 9.0
    data["weight"] = data["teacher_weight"] = torch.eye(V, dtype=torch.float64)
    out, *_ = run(kind, with_records(data), torch.float32, target)
    assert out.agreement.tolist() == [1, 0, 0, 1]


@pytest.mark.parametrize("whose", ["hidden", "teacher_hidden"])
@of_divergences
@of_kinds
@of_targets
def test_a_nan_reaches_the_loss(target, kind, divergence, whose):
    """Of a model that has broken. A GPU's maximum of it and a number is the number."""
    data = make()
    data[whose][2, 3] = torch.nan
    if whose == "teacher_hidden":
        ids = data["topk_ids"]
        data = with_records(data) | {"topk_ids": ids}
    out, *_ = run(kind, data, torch.float32, target, divergence=divergence)
    assert out.loss.isnan()
    assert out.per_token.isnan().nonzero().tolist() == [[2]]


@of_kinds
@of_targets
def test_rows_without_weight_and_strides_do_not_matter(target, kind):
    """Where all rows have weight they are taken as they lie, and else copied out."""
    data = with_labels(make())
    data["weights"] = torch.linspace(0.5, 2, N)
    if kind == "sparse_full":
        data, kind = with_records(data, V), "sparse"
    options = {"ce_weight": 0.2, "chunk_size": 3}
    exact = run(kind, data, torch.float32, target, **options)
    backend, device = target
    names = ("hidden", "labels", "weights", *TEACHERS[kind])
    by_row = [name for name in names if name != "teacher_weight"]
    # Between the rows others, whose ids are none.
    apart = {
        name: torch.stack([data[name], torch.full_like(data[name], -7)], 1).flatten(0, 1)
        for name in by_row
    }
    apart["weights"][1::2] = 0
    with_gaps = run(kind, data | apart, torch.float32, target, **options)
    assert torch.equal(with_gaps[0].loss, exact[0].loss)
    assert torch.equal(with_gaps[1][::2], exact[1])
    assert torch.equal(with_gaps[2], exact[2])
    # The same rows, all with weight, as a view with the gaps in it.
    views = {
        name: x.to(device, torch.float32 if x.is_floating_point() else None)
        for name, x in (data | apart).items()
    }
    views |= {name: views[name][::2] for name in by_row}
    views["hidden"].requires_grad_()
    views["weight"].requires_grad_()
    teacher = [views[name] for name in TEACHERS[kind]]
    loss = dense_kl if kind == "dense" else sparse_kl
    out = loss(
        views["hidden"], views["weight"], *teacher, labels=views["labels"],
        weights=views["weights"], backend=backend, normalizer=7.0, **options,
    )  # fmt: skip
    out.loss.backward()
    assert relative(out.loss, exact[0].loss) < 1e-6
    for view, want in ((views["hidden"], exact[1]), (views["weight"], exact[2])):
        assert relative(view.grad, want) < 1e-6


@of_targets
def test_ids_that_no_row_may_have_are_refused(target):
    data = make()
    for message, change in {
        "twice": lambda ids: ids.fill_(3),
        "outside the vocabulary": lambda ids: ids[2, 4].fill_(V),
        "not begin with an id": lambda ids: ids[2, 0].fill_(-1),
    }.items():
        ids = data["topk_ids"].clone()
        change(ids)
        with pytest.raises(ValueError, match=message):
            run("sparse", data | {"topk_ids": ids}, torch.float32, target)
    labels = torch.full((N,), -100)
    with pytest.raises(ValueError, match="labels are outside"):
        run("sparse", data | {"labels": labels}, torch.float32, target, ce_weight=0.5)


CPU = ("torch", "cpu")


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_settings_that_make_no_sense_are_refused(kind):
    data = make()
    labels = torch.zeros(N, dtype=torch.int64)
    for more, options, message in (
        ({}, {"ce_weight": 0.3}, "needs labels"),
        ({"labels": labels}, {"ce_weight": 1.5}, "within"),
        ({}, {"divergence_clip": 0.0}, "above 0"),
        ({}, {"temperature": 0.0}, "temperature"),
        ({}, {"softcap": 0.0}, "softcap"),
        ({}, {"softcap": math.inf}, "softcap"),
        ({}, {"chunk_size": 0}, "chunk_size"),
        ({"labels": labels[1:]}, {"ce_weight": 0.3}, "do not fit"),
        ({"weights": torch.ones(N + 1)}, {}, "do not fit"),
        ({"weight": data["weight"][:, 1:]}, {}, "do not"),
        ({"bias": torch.zeros(3)}, {}, "bias"),
        ({}, {"normalizer": 0.0}, "normalizer"),
    ):
        with pytest.raises(ValueError, match=message):
            run(kind, data | more, torch.float32, CPU, **options)
    with pytest.raises(ValueError, match="float16"):
        run(kind, data, torch.float16, CPU)
    with pytest.raises(ValueError, match="float32"):
        run(kind, data, torch.float64, ("triton", "cpu"))
    with pytest.raises(ValueError, match="expected triton"):
        run(kind, data, torch.float32, ("cuda", "cpu"))
    with pytest.raises(ValueError, match="beta"):
        Divergence("jsd", beta=1.0)


def test_teachers_that_do_not_fit_are_refused():
    data = make()
    for kind, changed, message in (
        ("sparse", {"hidden": data["hidden"][:-1]}, "fit"),
        ("sparse", {"topk_ids": data["topk_ids"].double()}, "integers"),
        ("sparse", {"weight": data["weight"][:4]}, "vocabulary of 4"),
        ("dense", {"teacher_weight": data["teacher_weight"][:-1]}, "slice the padding"),
        ("dense", {"teacher_hidden": data["teacher_hidden"][:-1]}, "teacher states"),
        ("dense", {"teacher_hidden": data["teacher_hidden"][:, 1:]}, "do not fit"),
    ):
        with pytest.raises(ValueError, match=message):
            run(kind, data | changed, torch.float32, CPU)


def test_sparse_bounds_dense_from_below_and_meets_it_at_full_k():
    data = make()
    dense, sparse, full = (run(kind, data, torch.float64, CPU)[0].per_token for kind in KINDS)
    assert (sparse <= dense).all()
    assert (sparse < 0.999 * dense).any()
    assert torch.allclose(full, dense, atol=1e-13)


@of_targets
def test_tail_is_punished_under_reverse_kl(target):
    """Mass that the student moves outside the top K must cost something (the missing tail)."""
    data = make()
    data["topk_ids"] = (data["hidden"] @ data["weight"].T).topk(4, dim=1).indices
    data["topk_logprobs"] = torch.full((N, 4), -math.log(4), dtype=torch.float64)
    data["tail_logprobs"] = torch.full((N,), -16.0, dtype=torch.float64)
    options = {"divergence": Divergence("reverse_kl")}
    peaked, flat = (
        run("sparse", data | {"hidden": data["hidden"] * x}, torch.float32, target, **options)[0]
        for x in (4.0, 0.0)
    )
    assert (flat.per_token > 10).all()
    assert (flat.per_token > peaked.per_token).all()


@pytest.mark.parametrize("cap", [None, 3.0])
@pytest.mark.parametrize("clip", [None, 1.0])
@of_divergences
@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_gradcheck(kind, divergence, clip, cap):
    data = with_labels(make(n=3, vocab=40, std=1.0, gap=1.0, k=5))
    g = torch.Generator().manual_seed(3)
    student = [
        x.clone().requires_grad_()
        for x in (data["hidden"], data["weight"], torch.randn(40, generator=g).double())
    ]

    def loss(hidden, weight, bias):
        function = dense_kl if kind == "dense" else sparse_kl
        return function(
            hidden, weight, *(data[name] for name in TEACHERS[kind]), normalizer=3.0, bias=bias,
            divergence=divergence, temperature=1.5,
            divergence_clip=clip, labels=data["labels"], ce_weight=0.2, softcap=cap,
            weights=torch.tensor([1.0, 0.0, 2.0]),
        ).loss  # fmt: skip

    assert torch.autograd.gradcheck(loss, student)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_the_operator_is_what_it_declares(kind, dtype):
    """Schema, shapes without data, autograd and tracing, by torch's own check of an operator."""
    data = {
        name: x.to(dtype) if x.is_floating_point() else x
        for name, x in make(n=3, vocab=40, k=5).items()
    }
    factors = torch.ones(3, dtype=accumulation_dtype(dtype))
    teacher = [data[name] for name in TEACHERS[kind]]
    records = (
        [*teacher, None, None, None] if kind == "sparse" else [None, None, None, *teacher, None]
    )
    student = [data[x].clone().requires_grad_() for x in ("hidden", "weight")]
    torch.library.opcheck(
        linear_kl,
        (*student, None, *records, None, factors, [True, True, False],
         "jsd", 0.5, 1.0, None, 0.0, None, 9.0, "torch", 2),
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["dense", "sparse"])
@of_targets
def test_compiled_surroundings(target, kind):
    backend, device = target
    data = {
        name: x.to(device, torch.float32 if x.is_floating_point() else None)
        for name, x in make().items()
    }
    layer = torch.nn.Linear(H, H, device=device)
    head = data["weight"].clone().requires_grad_()
    loss = dense_kl if kind == "dense" else sparse_kl

    def step(hidden, scale):
        out = loss(
            layer(hidden), head, *(data[x] for x in TEACHERS[kind]), normalizer=3.0, backend=backend
        )
        return out.loss * scale, out.agreement  # fmt: skip

    results = []
    for function in (step, torch.compile(step, backend="aot_eager", fullgraph=True)):
        value, agreement = function(data["hidden"], 2.0)
        value.backward()
        results.append((value.detach(), agreement, head.grad, layer.weight.grad))
        head.grad = layer.weight.grad = None
    for plain, compiled in zip(*results, strict=True):
        assert torch.equal(plain, compiled)


def test_flops_are_those_of_the_matrix_products():
    data = make()
    for kind, width in (("sparse", 3 * H), ("dense", 3 * H + HT)):
        with FlopCounterMode(display=False) as counter:
            run(kind, data, torch.float32, CPU)
        assert counter.get_total_flops() == 2 * N * V * width


def test_frozen_parts_get_no_gradient_and_cost_no_product():
    data = make()
    h = data["hidden"].float().requires_grad_()
    with FlopCounterMode(display=False) as counter:
        teacher = [data[x] for x in TEACHERS["sparse"]]
        sparse_kl(h, data["weight"].float(), *teacher, normalizer=7.0).loss.backward()
    assert counter.get_total_flops() == 2 * N * V * 2 * H
    assert relative(h.grad, reference("sparse", data)[1]) <= 2e-5
    with torch.no_grad():
        out = sparse_kl(h, data["weight"].float(), *teacher, normalizer=7.0)
    assert not out.loss.requires_grad


def test_a_tied_head_gets_both_gradients():
    data = make()
    ids = torch.arange(N)
    gradients = []
    for backend, dtype in (("torch", torch.float64), ("reference", torch.float64)):
        weight = data["weight"].to(dtype, copy=True).requires_grad_()
        teacher = [data[x] for x in TEACHERS["sparse"]]
        sparse_kl(weight[ids], weight, *teacher, normalizer=7.0, backend=backend).loss.backward()
        gradients.append(weight.grad)
    assert relative(*gradients) <= 1e-12


def test_a_scaled_loss_and_a_second_backward():
    data = make()
    _, dh, dw = run("sparse", data, torch.float64, CPU)
    out, *_ = run("sparse", data, torch.float64, CPU, backward=False)
    h = data["hidden"].clone().requires_grad_()
    w = data["weight"].clone().requires_grad_()
    out = sparse_kl(h, w, *(data[x] for x in TEACHERS["sparse"]), normalizer=7.0)
    out.loss.backward(retain_graph=True)
    (3 * out.loss).backward()
    assert relative(h.grad, 4 * dh) <= 1e-14
    assert relative(w.grad, 4 * dw) <= 1e-14


def test_double_backward_is_refused():
    h = make()["hidden"].requires_grad_()
    data = make()
    loss = sparse_kl(h, data["weight"], *(data[x] for x in TEACHERS["sparse"]), normalizer=1.0).loss
    with pytest.raises(RuntimeError, match="differentiated once"):
        torch.autograd.grad(loss, h, create_graph=True)


@of_targets
def test_autocast_does_not_round_the_logits(target):
    data = make(gap=0.03)
    outside = run("dense", data, torch.float32, target)
    autocast = functools.partial(torch.autocast, target[1], dtype=torch.bfloat16)
    inside = run("dense", data, torch.float32, target, within=autocast)
    assert torch.equal(outside[0].per_token, inside[0].per_token)
    for plain, cast in zip(outside[1:], inside[1:], strict=True):
        assert torch.equal(plain, cast)


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_never_holds_tokens_times_vocabulary(kind):
    n, vocab = 4096, 16384
    hidden = torch.randn(n, 8, requires_grad=True)
    weight = torch.randn(vocab, 8, requires_grad=True)
    teacher = [torch.randn(n, 8), torch.randn(vocab, 8)]
    if kind == "sparse":
        teacher = [torch.arange(4).expand(n, 4), torch.full((n, 4), -2.0), torch.full((n,), -2.0)]
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            if func is torch.ops.mpd.linear_kl.default:
                # Below the operator, to what it is made of.
                with self:
                    return linear_kl._init_fn(*args)
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                largest = max(largest, result.numel())
            return result

    with Watch():
        (dense_kl if kind == "dense" else sparse_kl)(hidden, weight, *teacher, normalizer=1.0)
    assert 0 < largest <= n * vocab // 4


def test_imports_torch_alone():
    code = (
        "import sys, mpd_train.kl;"
        "bad = {'transformers', 'vllm', 'pydantic', 'polars', 'pyarrow', 'click'};"
        "sys.exit(str(bad & set(sys.modules)) if bad & set(sys.modules) else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
