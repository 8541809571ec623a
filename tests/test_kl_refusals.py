"""What the fused losses refuse."""

import math

import kl_cases as cases
import pytest
import torch
from kl_cases import CPU, N, V

from mpd_train.kl import Divergence, sparse_kl


@cases.of_targets
def test_ids_that_no_row_may_have_are_refused(target):
    data = cases.make()
    for message, change in {
        "twice": lambda ids: ids.fill_(3),
        "outside the vocabulary": lambda ids: ids[2, 4].fill_(V),
        "not begin with an id": lambda ids: ids[2, 0].fill_(-1),
    }.items():
        ids = data["topk_ids"].clone()
        change(ids)
        with pytest.raises(ValueError, match=message):
            cases.run("sparse", data | {"topk_ids": ids}, torch.float32, target)
    labels = torch.full((N,), -100)
    with pytest.raises(ValueError, match="labels are outside"):
        cases.run("sparse", data | {"labels": labels}, torch.float32, target, ce_weight=0.5)


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_settings_that_make_no_sense_are_refused(kind):
    data = cases.make()
    labels = torch.zeros(N, dtype=torch.int64)
    for more, options, message in (
        ({}, {"ce_weight": 0.3}, "needs labels"),
        ({"labels": labels}, {"ce_weight": 1.5}, "within"),
        ({}, {"divergence_clip": 0.0}, "above 0"),
        ({}, {"entry_clip": 0.0}, "above 0"),
        ({}, {"divergence_clip": 1.0, "entry_clip": 1.0}, "one of the two"),
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
            cases.run(kind, data | more, torch.float32, CPU, **options)
    with pytest.raises(ValueError, match="float16"):
        cases.run(kind, data, torch.float16, CPU)
    with pytest.raises(ValueError, match="float32"):
        cases.run(kind, data, torch.float64, ("triton", "cpu"))
    with pytest.raises(ValueError, match="expected triton"):
        cases.run(kind, data, torch.float32, ("cuda", "cpu"))
    with pytest.raises(ValueError, match="beta"):
        Divergence("jsd", beta=1.0)


def test_teachers_that_do_not_fit_are_refused():
    data = cases.make()
    for kind, changed, message in (
        ("sparse", {"hidden": data["hidden"][:-1]}, "fit"),
        ("sparse", {"topk_ids": data["topk_ids"].double()}, "integers"),
        ("sparse", {"weight": data["weight"][:4]}, "vocabulary of 4"),
        ("dense", {"teacher_weight": data["teacher_weight"][:-1]}, "slice the padding"),
        ("dense", {"teacher_hidden": data["teacher_hidden"][:-1]}, "teacher states"),
        ("dense", {"teacher_hidden": data["teacher_hidden"][:, 1:]}, "do not fit"),
    ):
        with pytest.raises(ValueError, match=message):
            cases.run(kind, data | changed, torch.float32, CPU)


def test_double_backward_is_refused():
    data = cases.make()
    h = data["hidden"].requires_grad_()
    teacher = cases.teacher_of("sparse", data)
    loss = sparse_kl(h, data["weight"], *teacher, normalizer=1.0).loss
    with pytest.raises(RuntimeError, match="differentiated once"):
        torch.autograd.grad(loss, h, create_graph=True)
