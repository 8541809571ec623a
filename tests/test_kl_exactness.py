"""The fused losses equal the float64 reference, and satisfy what a divergence must."""

import math

import kl_cases as cases
import pytest
import torch
from kl_cases import CPU, CUDA, KINDS, LONG, MIXES, N, V

from mpd_train.kl import Divergence, sparse_kl
from mpd_train.kl.reference import terms_of


@pytest.mark.parametrize("mix", MIXES)
@cases.of_all
def test_equals_reference(target, kind, divergence, mix):
    data, options = cases.mixed(mix, kind, cases.make())
    dtype, tolerance = cases.exact(target)
    options["divergence"] = divergence
    expected = cases.reference(kind, data, **options)
    cases.assert_close(
        cases.run(kind, data, dtype, target, chunk_size=5, **options), expected, tolerance
    )


@pytest.mark.parametrize("chunk_size", [1, 5, 64, None])
@cases.of_kinds_and_targets
def test_chunks_do_not_matter(target, kind, chunk_size):
    data = cases.make()
    dtype, tolerance = cases.exact(target)
    found = cases.run(kind, data, dtype, target, chunk_size=chunk_size)
    cases.assert_close(found, cases.reference(kind, data), tolerance)


@cases.of_kinds_and_targets
def test_accumulated_parts_are_the_whole(target, kind):
    data = cases.with_labels(cases.make())
    options = {"ce_weight": 0.2, "divergence": Divergence("jsd")}
    whole = cases.run(kind, data, torch.float32, target, **options)
    of_tokens = [name for name in data if not name.endswith("weight")]
    parts = []
    for rows in (slice(0, 4), slice(4, N)):
        part = data | {name: data[name][rows] for name in of_tokens}
        parts.append(cases.run(kind, part, torch.float32, target, **options))
    assert cases.relative(sum(p[0].loss for p in parts), whole[0].loss.cpu()) <= 1e-6
    assert cases.relative(torch.cat([p[1] for p in parts]), whole[1].cpu()) <= 1e-6
    assert cases.relative(sum(p[2] for p in parts), whole[2].cpu()) <= 1e-6


@pytest.mark.parametrize(
    "mix", ["plain", "clip_ce", "tempered_ce", "capped_tempered_ce", "entries"]
)
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("kind", ["dense", "sparse"])
@cases.of_targets
def test_rows_of_several_blocks(target, kind, name, mix):
    data, options = cases.mixed(mix, kind, cases.make(vocab=LONG))
    options["divergence"] = Divergence(name)
    expected = cases.reference(kind, data, **options)
    cases.assert_close(cases.run(kind, data, torch.float32, target, **options), expected, 2e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="the interpreter has one size of block")
@pytest.mark.parametrize("which", range(4))
@cases.of_divergences
def test_every_size_of_block_is_right(monkeypatch, which, divergence):
    """The tuner's choice alone is looked at elsewhere."""
    from mpd_train.kl import triton_kernels

    monkeypatch.setattr(triton_kernels._dense, "configs", [triton_kernels._CONFIGS[which]])
    monkeypatch.setattr(triton_kernels._dense, "cache", {})
    monkeypatch.setattr(triton_kernels, "_SPARSE", triton_kernels._CONFIGS[which])
    for kind in ("dense", "sparse"):
        data = cases.make(vocab=LONG)
        expected = cases.reference(kind, data, divergence=divergence)
        found = cases.run(kind, data, torch.float32, ("triton", "cuda"), divergence=divergence)
        cases.assert_close(found, expected, 2e-5)


@cases.of_targets
def test_more_ids_than_a_program_of_triton_holds(target):
    data = cases.make(vocab=1200, k=1100)
    expected = cases.reference("sparse", data)
    cases.assert_close(cases.run("sparse", data, torch.float32, target), expected, 2e-5)


@cases.of_kinds_and_targets
def test_rows_without_weight_and_strides_do_not_matter(target, kind):
    """Where all rows have weight they are taken as they lie, and else copied out."""
    data = cases.with_labels(cases.make())
    data["weights"] = torch.linspace(0.5, 2, N)
    if kind == "sparse_full":
        data, kind = cases.with_records(data, V), "sparse"
    options = {"ce_weight": 0.2, "chunk_size": 3}
    exact = cases.run(kind, data, torch.float32, target, **options)
    backend, device = target
    taught = ("teacher_hidden",) if kind == "dense" else cases.SPARSE
    by_row = ("hidden", "labels", "weights", *taught)
    # Between the rows others, whose ids are none.
    apart = {
        name: torch.stack([data[name], torch.full_like(data[name], -7)], 1).flatten(0, 1)
        for name in by_row
    }
    apart["weights"][1::2] = 0
    with_gaps = cases.run(kind, data | apart, torch.float32, target, **options)
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
    out = cases.LOSSES[kind](
        views["hidden"], views["weight"], *cases.teacher_of(kind, views), labels=views["labels"],
        weights=views["weights"], backend=backend, normalizer=7.0, **options,
    )  # fmt: skip
    out.loss.backward()
    assert cases.relative(out.loss, exact[0].loss) < 1e-6
    for view, want in ((views["hidden"], exact[1]), (views["weight"], exact[2])):
        assert cases.relative(view.grad, want) < 1e-6


@cases.of_all
def test_a_constant_added_to_the_logits_does_not_matter(target, kind, divergence):
    data = cases.make()
    zero = torch.zeros(V, dtype=torch.float64)
    plain = cases.run(kind, data | {"bias": zero}, torch.float32, target, divergence=divergence)
    moved = cases.run(kind, data | {"bias": zero + 8}, torch.float32, target, divergence=divergence)
    cases.assert_close([x if i == 0 else x.cpu() for i, x in enumerate(moved)],
                 [x if i == 0 else x.cpu() for i, x in enumerate(plain)], 3e-5)  # fmt: skip


@cases.of_all
def test_zero_where_teacher_is_student(target, kind, divergence):
    out, dh, dw = cases.run(kind, cases.make(gap=0.0), torch.float32, target, divergence=divergence)
    assert out.per_token.abs().max() <= 1e-5
    assert dh.abs().max() <= 1e-4
    assert dw.abs().max() <= 1e-4
    # And only there.
    other, *_ = cases.run(kind, cases.make(gap=1.0), torch.float32, target, divergence=divergence)
    assert other.per_token.min() > 1e-4


@cases.of_all
def test_never_negative(target, kind, divergence):
    for seed in range(3):
        out, *_ = cases.run(
            kind, cases.make(seed, gap=0.01), torch.float32, target, divergence=divergence
        )
        assert out.per_token.min() >= -1e-6


@cases.of_kinds_and_targets
def test_a_token_above_the_clip_gets_no_gradient(target, kind):
    data = cases.make()
    clip = cases.clip_of(kind, data)
    out, dh, _ = cases.run(kind, data, torch.float32, target, divergence_clip=clip)
    above = out.per_token > clip
    assert 0 < above.sum() < N
    assert (dh[above] == 0).all()
    assert (dh[~above] != 0).any(1).all()
    assert out.cross_entropy.abs().max() == 0


@cases.of_all
def test_clipped_entries_leave_the_negative_ones(target, kind, divergence):
    """Every term of the plain definition above the clip counts as the clip, and has no gradient."""
    data, clip = cases.make(n=1), 1e-4
    data["weight"] = data["teacher_weight"] = torch.eye(V, dtype=torch.float64)
    g = torch.Generator().manual_seed(1)
    data["hidden"], data["teacher_hidden"] = torch.randn(2, 1, V, generator=g).double()
    data = cases.with_records(data, V if kind == "sparse" else 8)
    out, dh, _ = cases.run(
        kind, data, torch.float32, target, divergence=divergence, entry_clip=clip, normalizer=1.0
    )
    z = data["hidden"].clone().requires_grad_()
    p, q = data["teacher_hidden"].softmax(1), z.softmax(1)
    terms = terms_of(divergence, p, q)
    free = torch.where(terms < clip, terms, 0.0).sum()
    free.backward()
    assert 0 < (terms >= clip).sum() < V
    assert cases.relative(dh, z.grad) < 1e-4
    expected = free + clip * (terms >= clip).sum()
    assert out.clipped.item() == pytest.approx(expected.item(), abs=1e-5)
    assert out.loss.item() == pytest.approx(out.clipped.item())
    assert out.clipped < out.per_token
    if divergence.name.endswith("_kl"):
        assert out.clipped < 0


@cases.of_all
def test_the_squared_temperature_keeps_the_gradient(target, kind, divergence):
    """Far above the logits' spread the divergence falls with the square of the temperature."""
    norms = []
    for temperature in (50.0, 100.0):
        data = cases.make(std=1.0, gap=1.0)
        data = cases.with_records(data, temperature=temperature)
        if kind == "sparse":
            data["tail_logprobs"] = torch.log1p(-data["topk_logprobs"].exp().sum(1))
        _, dh, _ = cases.run(kind, data, torch.float32, target, divergence=divergence,
                       temperature=temperature)  # fmt: skip
        norms.append(dh.norm().item())
    assert norms[0] == pytest.approx(norms[1], rel=0.1)


@cases.of_targets
def test_a_divergence_ignores_what_is_not_its(target):
    data = cases.make()
    plain, other = (
        cases.run(
            "dense", data, torch.float32, target, divergence=Divergence("forward_kl", alpha=alpha)
        )
        for alpha in (0.1, 1.0)
    )
    assert torch.equal(plain[0].loss, other[0].loss)


@cases.of_kinds_and_targets
def test_agreement_is_about_one_token(target, kind):
    """And not about its place in a block: the interpreter's has 512."""
    data = cases.make(n=4)
    for name, places in (("hidden", (5, 517, 5, 517)), ("teacher_hidden", (5, 5, 517, 517))):
        data[name] = torch.randn(4, V, generator=torch.Generator().manual_seed(0)).double()
        data[name][range(4), places] = 9.0
    # Where they disagree, the student's likeliest is in the tail, and the teacher's comes next.
    data["teacher_hidden"][(1, 2), (517, 5)] = -9.0
    data["hidden"][(1, 2), (5, 517)] = 8.0
    data["weight"] = data["teacher_weight"] = torch.eye(V, dtype=torch.float64)
    out, *_ = cases.run(kind, cases.with_records(data), torch.float32, target)
    assert out.agreement.tolist() == [1, 0, 0, 1]


def test_sparse_bounds_dense_from_below_and_meets_it_at_full_k():
    data = cases.make()
    dense, sparse, full = (cases.run(kind, data, torch.float64, CPU)[0].per_token for kind in KINDS)
    assert (sparse <= dense).all()
    assert (sparse < 0.999 * dense).any()
    assert torch.allclose(full, dense, atol=1e-13)


@cases.of_targets
def test_tail_is_punished_under_reverse_kl(target):
    """Mass that the student moves outside the top K must cost something (the missing tail)."""
    data = cases.make()
    data["topk_ids"] = (data["hidden"] @ data["weight"].T).topk(4, dim=1).indices
    data["topk_logprobs"] = torch.full((N, 4), -math.log(4), dtype=torch.float64)
    data["tail_logprobs"] = torch.full((N,), -16.0, dtype=torch.float64)
    options = {"divergence": Divergence("reverse_kl")}
    peaked, flat = (
        cases.run(
            "sparse", data | {"hidden": data["hidden"] * x}, torch.float32, target, **options
        )[0]
        for x in (4.0, 0.0)
    )
    assert (flat.per_token > 10).all()
    assert (flat.per_token > peaked.per_token).all()


def test_a_weight_is_a_geometric_mixture_with_the_student():
    """Under reverse KL: the mixture of teacher and student that docs/kl.md names."""
    generator = torch.Generator().manual_seed(0)
    hidden, head, teacher = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((N, 8), (V, 8), (N, V))
    )
    weights = torch.rand(N, generator=generator, dtype=torch.float64)
    student = hidden.requires_grad_()
    told = {"normalizer": N, "divergence": Divergence("reverse_kl"), "backend": "torch"}
    logp = teacher.log_softmax(-1)
    ids = torch.arange(V).expand(N, V)
    tail = torch.full((N,), -math.inf, dtype=torch.float64)
    out = sparse_kl(student, head, ids, logp, tail, weights=weights, **told)
    (weighted,) = torch.autograd.grad(out.loss, student)
    logq = (student @ head.T).log_softmax(-1)
    w = weights[:, None]
    mixture = (w * logp + (1 - w) * logq.detach()).log_softmax(-1)
    (mixed,) = torch.autograd.grad((logq.exp() * (logq - mixture)).sum() / N, student)
    torch.testing.assert_close(weighted, mixed, rtol=1e-6, atol=1e-9)
