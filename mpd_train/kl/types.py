"""The values that the losses and their kernels exchange."""

from dataclasses import dataclass

import torch
from torch import Tensor

# Columns of what is found about each token; the order of KLOutput's fields after `loss`.
FOUND = 6


@dataclass(frozen=True)
class TopK:
    """A teacher known by top K and tail: ids [n, K] (-1: none), logprobs [n, K], tail [n]."""

    ids: Tensor
    logprobs: Tensor
    tail: Tensor

    def take(self, rows: Tensor | slice) -> "TopK":
        return TopK(self.ids[rows], self.logprobs[rows], self.tail[rows])


@dataclass(frozen=True)
class Dense:
    """A teacher over the full vocabulary: hidden [n, Ht], weight [V, Ht], bias [V]."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None

    def take(self, rows: Tensor | slice) -> "Dense":
        return Dense(self.hidden[rows], self.weight, self.bias)


@dataclass(frozen=True)
class Heads:
    """Where the student's logits come from: hidden [n, H], weight [V, H], bias [V]."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
