"""The fused losses at the edges: no mass, no rows, masked rows, infinite and broken logits."""

import kl_cases as cases
import pytest
import torch
from kl_cases import DIVERGENCES, H, K, N, V


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
    data = cases.make()
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
    # The log-probability of an id of -1 is not looked at.
    data["topk_logprobs"][data["topk_ids"] < 0] = 5.0
    return data


def large(data):
    """Logits up to some 1e4, where a softmax is all on one token."""
    data["hidden"] = data["hidden"] * 1e3
    return data


EDGES = {
    "one_id": lambda: cases.make(k=1),
    "one_row": lambda: cases.make(n=1),
    "small_vocabulary": lambda: cases.make(vocab=97),
    "a_whole_block": lambda: cases.make(vocab=512),
    "no_tail_mass": lambda: certain(cases.make(), "top"),
    "all_tail_mass": lambda: certain(cases.make(), "tail"),
    "impossible_id": lambda: impossible(cases.make()),
    "ragged": lambda: ragged(cases.make()),
    "large_logits": lambda: large(cases.make()),
    "impossible_outside": lambda: impossible_outside(),
}


@pytest.mark.parametrize("ce_weight", [0.0, 0.4])
@pytest.mark.parametrize("edge", EDGES)
@cases.of_divergences
@pytest.mark.parametrize("kind", ["dense", "sparse"])
@cases.of_targets
def test_edges(target, kind, divergence, edge, ce_weight):
    data = EDGES[edge]()
    if ce_weight > 0:
        data["labels"] = torch.arange(len(data["hidden"]))
    options = {"divergence": divergence, "ce_weight": ce_weight}
    dtype, tolerance = (torch.float32, 3e-5) if target[0] == "triton" else (torch.float64, 1e-12)
    found, expected = cases.both(kind, data, dtype, target, **options)
    for x in found[1:]:
        assert x.isfinite().all()
    if edge == "large_logits":
        # Where q underflows the definitions give 0 / 0 and infinities; ours are finite.
        assert found[0].per_token.isfinite().all()
        return
    cases.assert_close(found, expected, tolerance)


@cases.of_kinds_and_targets
def test_large_logits_in_float32(target, kind):
    data = large(cases.make())
    for divergence in DIVERGENCES:
        out, dh, dw = cases.run(kind, data, torch.float32, target, divergence=divergence)
        for x in (*vars(out).values(), dh, dw):
            assert x.isfinite().all(), divergence


@cases.of_kinds_and_targets
def test_all_masked_gives_a_connected_zero(target, kind):
    data = cases.make() | {"weights": torch.zeros(N)}
    out, dh, dw = cases.run(kind, data, torch.float32, target)
    assert out.loss.item() == 0
    assert out.loss.requires_grad
    assert dh.abs().max() == 0
    assert dw.abs().max() == 0


@cases.of_targets
def test_no_rows_give_a_connected_zero(target):
    data = {name: x[:0] if not name.endswith("weight") else x for name, x in cases.make().items()}
    for kind in ("dense", "sparse"):
        out, dh, dw = cases.run(kind, data, torch.float32, target)
        assert out.loss.item() == 0
        assert dh.shape == (0, H)
        assert dw.abs().max() == 0


@cases.of_kinds_and_targets
def test_nan_and_nonsense_in_a_masked_row_stay_there(target, kind):
    data = cases.with_labels(cases.make())
    data["weights"] = torch.ones(N)
    data["weights"][3] = 0
    if kind == "sparse_full":
        data, kind = cases.with_records(data, V), "sparse"
    clean = cases.run(kind, data, torch.float32, target, ce_weight=0.2)
    for name in ("hidden", "teacher_hidden", "topk_logprobs", "tail_logprobs"):
        data[name] = data[name].clone()
        data[name][3] = float("nan")
    data["topk_ids"], data["labels"] = data["topk_ids"].clone(), data["labels"].clone()
    data["topk_ids"][3], data["labels"][3] = 10 * V, -100
    found = cases.run(kind, data, torch.float32, target, ce_weight=0.2)
    assert found[0].per_token[3] == 0
    for got, want in zip(found[1:], clean[1:], strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("whose", ["hidden", "teacher_hidden"])
@cases.of_all
def test_a_nan_reaches_the_loss(target, kind, divergence, whose):
    """Of a model that has broken. A GPU's maximum of it and a number is the number."""
    data = cases.make()
    data[whose][2, 3] = torch.nan
    if whose == "teacher_hidden":
        ids = data["topk_ids"]
        data = cases.with_records(data) | {"topk_ids": ids}
    out, *_ = cases.run(kind, data, torch.float32, target, divergence=divergence)
    assert out.loss.isnan()
    assert out.per_token.isnan().nonzero().tolist() == [[2]]
