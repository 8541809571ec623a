"""The operator: gradients, schema, torch.compile, FLOPs, memory, imports, kernels for GPUs."""

import os
import re
import subprocess
import sys

import kl_cases as cases
import pytest
import torch
from kl_cases import CPU, HT, H, N, V
from torch.utils.flop_counter import FlopCounterMode

from mpd_train.kl import sparse_kl
from mpd_train.kl.divergence import NAMES
from mpd_train.kl.fused import Inputs, linear_kl
from mpd_train.kl.types import accumulation_dtype


@pytest.mark.parametrize("cap", [None, 3.0])
@pytest.mark.parametrize("clip", [None, 1.0])
@cases.of_divergences
@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_gradcheck(kind, divergence, clip, cap):
    data = cases.with_labels(cases.make(n=3, vocab=40, std=1.0, gap=1.0, k=5))
    g = torch.Generator().manual_seed(3)
    student = [
        x.clone().requires_grad_()
        for x in (data["hidden"], data["weight"], torch.randn(40, generator=g).double())
    ]

    def loss(hidden, weight, bias):
        return cases.LOSSES[kind](
            hidden, weight, *cases.teacher_of(kind, data), normalizer=3.0, bias=bias,
            divergence=divergence, temperature=1.5, divergence_clip=clip, labels=data["labels"],
            ce_weight=0.2, softcap=cap, weights=torch.tensor([1.0, 0.0, 2.0]),
        ).loss  # fmt: skip

    assert torch.autograd.gradcheck(loss, student)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_the_operator_is_what_it_declares(kind, dtype):
    """Schema, shapes without data, autograd and tracing, by torch's own check of an operator."""
    data = {
        name: x.to(dtype) if x.is_floating_point() else x
        for name, x in cases.make(n=3, vocab=40, k=5).items()
    }
    teacher = cases.teacher_of(kind, data)
    none = [None, None, None]
    student = [data[x].clone().requires_grad_() for x in ("hidden", "weight")]
    inputs = Inputs(
        *student, None, *([*teacher, *none] if kind == "sparse" else [*none, *teacher, None]),
        labels=None, factors=torch.ones(3, dtype=accumulation_dtype(dtype)),
        needs_grad=[True, True, False], divergence="jsd", parameter=0.5, temperature=1.0, clip=None,
        entry_clip=0.01, ce_weight=0.0, softcap=None, teacher_softcap=9.0, backend="torch",
        chunk_size=2,
    )  # fmt: skip
    torch.library.opcheck(linear_kl, inputs)
    schema = torch.ops.mpd.linear_kl.default._schema
    assert [argument.name for argument in schema.arguments] == list(Inputs._fields)


@pytest.mark.parametrize("kind", ["dense", "sparse"])
@cases.of_targets
def test_compiled_surroundings(target, kind):
    backend, device = target
    data = {
        name: x.to(device, torch.float32 if x.is_floating_point() else None)
        for name, x in cases.make().items()
    }
    layer = torch.nn.Linear(H, H, device=device)
    head = data["weight"].clone().requires_grad_()
    loss, teacher = cases.LOSSES[kind], cases.teacher_of(kind, data)

    def step(hidden, scale):
        out = loss(layer(hidden), head, *teacher, normalizer=3.0, backend=backend)
        return out.loss * scale, out.agreement

    results = []
    for function in (step, torch.compile(step, backend="aot_eager", fullgraph=True)):
        value, agreement = function(data["hidden"], 2.0)
        value.backward()
        results.append((value.detach(), agreement, head.grad, layer.weight.grad))
        head.grad = layer.weight.grad = None
    for plain, compiled in zip(*results, strict=True):
        assert torch.equal(plain, compiled)


def test_flops_are_those_of_the_matrix_products():
    data = cases.make()
    for kind, width in (("sparse", 3 * H), ("dense", 3 * H + HT)):
        with FlopCounterMode(display=False) as counter:
            cases.run(kind, data, torch.float32, CPU)
        assert counter.get_total_flops() == 2 * N * V * width


def test_frozen_parts_get_no_gradient_and_cost_no_product():
    data = cases.make()
    h = data["hidden"].float().requires_grad_()
    teacher = cases.teacher_of("sparse", data)
    with FlopCounterMode(display=False) as counter:
        sparse_kl(h, data["weight"].float(), *teacher, normalizer=7.0).loss.backward()
    assert counter.get_total_flops() == 2 * N * V * 2 * H
    assert cases.relative(h.grad, cases.reference("sparse", data)[1]) <= 2e-5
    with torch.no_grad():
        out = sparse_kl(h, data["weight"].float(), *teacher, normalizer=7.0)
    assert not out.loss.requires_grad


def test_a_tied_head_gets_both_gradients():
    data = cases.make()
    teacher, gradients = cases.teacher_of("sparse", data), []
    for backend in ("torch", "reference"):
        weight = data["weight"].clone().requires_grad_()
        sparse_kl(weight[:N], weight, *teacher, normalizer=7.0, backend=backend).loss.backward()
        gradients.append(weight.grad)
    assert cases.relative(*gradients) <= 1e-12


def test_products_elsewhere_are_as_exact_as_before():
    """In bfloat16 a CPU may round the products within the operator alone, also where it fails."""
    setting = torch.backends.mkldnn.matmul
    data = cases.make(n=2)
    head, states = data["weight"].bfloat16(), data["hidden"].bfloat16()
    ids, *record = cases.teacher_of("sparse", data)
    for before in ("none", "ieee"):
        setting.fp32_precision = before
        try:
            sparse_kl(states, head, ids, *record, normalizer=2.0)
            assert setting.fp32_precision == before
            with pytest.raises(ValueError, match="outside the vocabulary"):
                sparse_kl(states, head, ids + len(head), *record, normalizer=2.0)
            assert setting.fp32_precision == before
        finally:
            setting.fp32_precision = "none"


def test_a_scaled_loss_and_a_second_backward():
    data = cases.make()
    _, dh, dw = cases.run("sparse", data, torch.float64, CPU)
    h, w = (data[name].clone().requires_grad_() for name in ("hidden", "weight"))
    out = sparse_kl(h, w, *cases.teacher_of("sparse", data), normalizer=7.0)
    out.loss.backward(retain_graph=True)
    (3 * out.loss).backward()
    assert cases.relative(h.grad, 4 * dh) <= 1e-14
    assert cases.relative(w.grad, 4 * dw) <= 1e-14


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
        cases.LOSSES[kind](hidden, weight, *teacher, normalizer=1.0)
    assert 0 < largest <= n * vocab // 4


@pytest.mark.slow
def test_the_kernels_compile_for_gpus_that_are_not_here():
    pytest.importorskip("triton")
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    said = subprocess.run(
        [sys.executable, "tests/compile_kernels.py", "80", "90"],
        env=env, check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    lines = said.splitlines()
    # The dense kernel in four sizes of block, the sparse one in two of buckets. Each divergence,
    # one mixed with cross-entropy, one with clipped entries.
    assert len(lines) == 2 * (4 + 2) * (len(NAMES) + 2)
    # Bytes that do not fit a thread's registers: of a thousand buckets some; of a block none, but
    # a few of the row's own numbers.
    for line in lines:
        most = 64 if "buckets 1024" in line else 16
        assert int(re.search(r"spilled (\d+)", line)[1]) <= most, line
        assert re.search(r"instructions \d+( \+ \d+)+ a logit$", line), line


def test_imports_torch_alone():
    code = (
        "import sys, mpd_train.kl;"
        "bad = {'transformers', 'vllm', 'pydantic', 'polars', 'pyarrow', 'click'};"
        "sys.exit(str(bad & set(sys.modules)) if bad & set(sys.modules) else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
