"""The fused losses in float32 and bfloat16 lose no more than rounding."""

import functools

import kl_cases as cases
import pytest
import torch
from kl_cases import LONG, H, N, V


@pytest.mark.parametrize("gap", [3.0, 0.3, 0.03])
@cases.of_all
def test_float32_error(target, kind, divergence, gap):
    data = cases.make(gap=gap)
    found, expected = cases.both(kind, data, torch.float32, target, divergence=divergence)
    # Logits of 10 have errors of 1e-6, which count against a gap as small as 0.03.
    cases.assert_close(found, expected, 2e-5 if gap > 0.1 else 1e-3)


@pytest.mark.parametrize("gap", [3.0, 0.3, 0.03])
@cases.of_all
def test_bfloat16_inputs_keep_float32_logits(target, kind, divergence, gap):
    """Half a percent in the gradients; logits in bfloat16 put them off by more than their size
    where student and teacher nearly agree."""
    data = rounded(cases.make(gap=gap, std=8.0, dtype=torch.bfloat16))
    found, expected = cases.both(kind, data, torch.bfloat16, target, divergence=divergence)
    cases.assert_gradients_close(found, expected, cases.half_a_percent(target))


def rounded(data):
    """With records as bfloat16 stores them, so that both losses have the same teacher."""
    names = ("topk_logprobs", "tail_logprobs")
    return data | {name: data[name].bfloat16().double() for name in names}


@cases.of_divergences
@pytest.mark.parametrize("kind", ["dense", "sparse"])
@cases.of_targets
def test_rows_of_several_blocks_in_bfloat16(target, kind, divergence):
    """Triton writes a sparse teacher's gradient over the logits that it is made from."""
    data = rounded(cases.make(gap=0.3, std=8.0, vocab=LONG, dtype=torch.bfloat16))
    found, expected = cases.both(kind, data, torch.bfloat16, target, divergence=divergence)
    cases.assert_gradients_close(found, expected, cases.half_a_percent(target))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("sure", [0.0, 6.0, 9.0])
@pytest.mark.parametrize("kind", ["dense", "sparse"])
@cases.of_targets
def test_cross_entropy_of_a_sure_student_in_bfloat16(target, kind, sure, temperature):
    """What is left of q - 1 at a label with q near 1, in the top K and in the tail."""
    data = cases.with_labels(cases.make(gap=0.03, dtype=torch.bfloat16))
    logits = data["hidden"] @ data["weight"].T
    away = logits.amax(1) - logits.gather(1, data["labels"][:, None])[:, 0]
    # A wide bias cannot be on the labels of all rows: each row gets a state of its own for it.
    lift = torch.zeros(N, N + H, dtype=torch.float64)
    lift[:, :H], lift[range(N), range(H, N + H)] = data["hidden"], 1.0
    raised = torch.zeros(V, N + H, dtype=torch.float64)
    raised[:, :H] = data["weight"]
    raised[data["labels"], range(H, N + H)] = (away + sure).bfloat16().double()
    data |= {"hidden": lift, "weight": raised, "teacher_hidden": lift, "teacher_weight": raised}
    data = rounded(cases.with_records(data, temperature=temperature))
    # Half of the labels are to be in the tail: none take their places.
    data = without_every_other_label(data)
    options = {"ce_weight": 0.5, "temperature": temperature}
    found, expected = cases.both(kind, data, torch.bfloat16, target, **options)
    cases.assert_gradients_close(found, expected, cases.half_a_percent(target))


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


@pytest.mark.parametrize("options", [{}, {"ce_weight": 1.0}, {"softcap": 60.0}], ids=str)
@pytest.mark.parametrize("kind", ["dense", "sparse_full"])
@cases.of_divergences
@cases.of_targets
def test_a_sure_student_keeps_its_small_gradient(target, divergence, kind, options):
    """Where one token has nearly all of the mass, its gradient is the difference of two numbers
    that are alike, or minus the sum of all others."""
    data = cases.make(n=1)
    logits = 4 * data["hidden"] @ data["weight"].T
    assert 1e-4 < 1 - logits.softmax(-1).max() < 1e-3
    # The product of states and head is not what is judged.
    of_teacher = data["teacher_hidden"] @ data["teacher_weight"].T
    data["hidden"], data["teacher_hidden"] = (x.float().double() for x in (logits, of_teacher))
    data["weight"] = data["teacher_weight"] = torch.eye(V, dtype=torch.float64)
    data["labels"] = logits.argmax(1)
    options = {"divergence": divergence, "normalizer": 1.0, **options}
    exact = cases.reference(kind, data, **options)
    found = cases.run(kind, data, torch.float32, target, **options)
    # Caps of 60 round as numbers of 60 do. The torch backend takes the difference.
    of_triton = 2e-5 if "softcap" in options else 2e-6
    of_torch = 5e-3 if "ce_weight" in options else 1e-3
    assert cases.relative(found[1], exact[1]) < (of_triton if target[0] == "triton" else of_torch)


@cases.of_divergences
@pytest.mark.parametrize("kind", ["dense", "sparse"])
@cases.of_targets
def test_a_flat_student_keeps_each_tokens_gradient(target, kind, divergence):
    """Where none is sure, the sum of all others holds the rounding of them all."""
    vocab = 20_000
    # A bias of one row: its gradient is that of the logits.
    data = cases.make(n=1, vocab=vocab, std=0.5, gap=0.3) | {"bias": torch.zeros(vocab).double()}
    exact = cases.reference(kind, data, divergence=divergence)[3]
    found = cases.run(kind, data, torch.float32, target, divergence=divergence)[3].cpu()
    assert (found - exact).abs().max() <= 1e-5 * exact.abs().max()


@cases.of_targets
def test_autocast_does_not_round_the_logits(target):
    data = cases.make(gap=0.03)
    outside = cases.run("dense", data, torch.float32, target)
    autocast = functools.partial(torch.autocast, target[1], dtype=torch.bfloat16)
    inside = cases.run("dense", data, torch.float32, target, within=autocast)
    assert torch.equal(outside[0].per_token, inside[0].per_token)
    for plain, cast in zip(outside[1:], inside[1:], strict=True):
        assert torch.equal(plain, cast)
