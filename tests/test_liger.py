"""Liger's kernels around the products: the same numbers, and refusals where they cannot run."""

import json
import sys

import pytest
import torch
from conftest import STUDENT, environment, invoke, python
from transformers import GPT2Config, GPT2LMHeadModel

from mpd_data.common.errors import ConfigError
from mpd_train.cli import cli
from mpd_train.model import liger

# What a GPU computes, by Triton's interpreter, which needs to be told two things that a GPU knows:
# that a kernel's float is a scalar of float32, and what CUDA's library calls rsqrt.
SAME = """
import json, sys
from pathlib import Path
import numpy as np, torch, triton.language as tl
from triton.runtime import interpreter
from mpd_data.common.models import resolve_model
from mpd_train.model import liger
from mpd_train.config import LossConfig
from mpd_train.loss import pack_loss
from mpd_train.model.causal_lm import CausalLM
from mpd_train.data.batches import load_pack
from mpd_train.data.shard_set import Pack, ShardSet

convert = interpreter._implicit_cvt
def with_floats(x):
    if isinstance(x, float):
        handle = interpreter.TensorHandle(np.array([x], np.float32), tl.float32)
        return tl.tensor(handle, tl.float32)
    return convert(x)
interpreter._implicit_cvt = with_floats
import liger_kernel.ops.rms_norm as norm
norm.rsqrt = lambda x: tl.math.rsqrt(x)

student = CausalLM(resolve_model(sys.argv[1]), torch.device("cpu"), torch.float32, False)
shards = ShardSet([Path(sys.argv[2])])
rows = [
    (length, g, r)
    for g, group in enumerate(shards.groups)
    for r, (length, kept) in enumerate(zip(group.num_tokens, group.num_loss_tokens))
    if kept
]
batch = load_pack(shards, Pack(tuple((g, r) for _, g, r in sorted(rows)[:2]), 0, 0))
vocab = shards.metadata["vocab_size"]

def run():
    student.model.zero_grad()
    out = pack_loss(student, None, batch, vocab, LossConfig(), float(len(batch.labels)))
    out.loss.backward()
    return out.loss.item(), {n: p.grad.clone() for n, p in student.model.named_parameters()}

plain, before = run()
forward = student.model.forward
liger.apply(student.model, "student")
fused, after = run()
layer = student.model.model.layers[0]
print(json.dumps({
    "plain": plain, "fused": fused,
    "error": max(float((after[n] - g).norm() / g.norm()) for n, g in before.items()),
    "kernels": [layer.input_layernorm.forward.__module__, layer.mlp.forward.__module__],
    "whole": student.model.forward == forward,
}))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux")
def test_the_kernels_compute_the_same(round_dir):
    """Loss and all gradients of a pack of the two shortest rows. The model's own forward, into
    which Liger would put its loss, stays as it is."""
    pytest.importorskip("liger_kernel")
    done = python(SAME, STUDENT, round_dir, env=environment() | {"TRITON_INTERPRET": "1"})
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["fused"] == pytest.approx(found["plain"], rel=1e-5)
    assert found["error"] < 1e-4
    assert all(name.startswith("liger_kernel.") for name in found["kernels"])
    assert found["whole"]


def test_a_cpu_cannot_run_the_kernels(round_dir, tmp_path):
    arguments = ["--shards", round_dir, "--student", STUDENT, "--out", tmp_path / "run"]
    with pytest.raises(ConfigError, match="need a CUDA device; training is on cpu"):
        invoke(cli, *arguments, "--device", "cpu", "--liger-kernel")


def test_a_family_that_liger_does_not_know_is_refused():
    pytest.importorskip("liger_kernel")
    config = GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=16, n_positions=16)
    with pytest.raises(ConfigError, match="mine is of the family gpt2, .* qwen3"):
        liger.apply(GPT2LMHeadModel(config), "mine")


def test_what_to_install_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.monkey_patch", None)
    with pytest.raises(ConfigError, match=r"mixed-policy-distillation\[liger\]"):
        liger.require(torch.device("cuda"))
