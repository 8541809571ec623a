"""A head that FSDP2 has sharded: the gradients of two processes are those of one.

This file is also what torchrun runs: `test_kl_sharded.py OUT HEAD`.
"""

import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from mpd_train.kl import dense_kl, sparse_kl

TOKENS, WIDTH, VOCAB, K = 12, 8, 41, 5
# How the head meets FSDP2: in a group of its own, whose forward pass never runs; in the root's,
# and as the embeddings.
HEADS = ("own", "root", "tied")


class Model(nn.Module):
    def __init__(self, tied):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.body = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB, bias=not tied)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.body(self.embed(ids)).tanh()


def make(head):
    torch.manual_seed(0)
    model = Model(head == "tied").double()
    data = {
        "ids": torch.randint(VOCAB, (TOKENS,)),
        "topk_ids": torch.stack([torch.randperm(VOCAB)[:K] for _ in range(TOKENS)]),
        "teacher": torch.randn(TOKENS, 6, dtype=torch.float64),
        "teacher_head": torch.randn(VOCAB, 6, dtype=torch.float64),
    }
    logprobs = torch.randn(TOKENS, K + 1, dtype=torch.float64).log_softmax(1)
    return model, data | {"topk_logprobs": logprobs[:, :K], "tail": logprobs[:, K]}


def backward(model, data, rows, factor):
    """Both losses over `rows`, `factor` times; the normaliser is that of all tokens."""
    hidden = model(data["ids"][rows])
    student = {"bias": model.head.bias, "normalizer": float(TOKENS)}
    record = [data[x][rows] for x in ("topk_ids", "topk_logprobs", "tail")]
    loss = sparse_kl(hidden, model.head.weight, *record, **student).loss
    teacher = data["teacher"][rows], data["teacher_head"]
    loss = loss + dense_kl(hidden, model.head.weight, *teacher, **student).loss
    (factor * loss).backward()


def gradients(model):
    return {
        name: p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
        for name, p in model.named_parameters()
    }


def rank_main(out, head):
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    model, data = make(head)
    if head == "own":
        fully_shard(model.head)
    fully_shard(model, reshard_after_forward=True)
    # FSDP2 averages over the ranks, of which each has a part of one sum.
    backward(model, data, slice(rank, None, world), float(world))
    found = gradients(model)
    if rank == 0:
        torch.save(found, out)
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("head", HEADS)
def test_two_processes_are_one(head, tmp_path):
    out = tmp_path / "gradients.pt"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    subprocess.run([*torchrun, "--nproc-per-node", "2", __file__, str(out), head], check=True)
    model, data = make(head)
    backward(model, data, slice(None), 1.0)
    found, expected = torch.load(out), gradients(model)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.abs().max() > 1e-3, name
        assert torch.allclose(found[name], gradient, rtol=1e-10, atol=1e-14), name


if __name__ == "__main__":
    rank_main(*sys.argv[1:])
    # As mpd-train does, and why (mpd_train/cli.py).
    os._exit(0)
