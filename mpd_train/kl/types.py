"""The values that the losses and their kernels exchange."""

from typing import NamedTuple

import torch
from torch import Tensor

# Columns of a token's metrics, in the order of KLOutput's fields after `loss`.
NUM_METRICS = 7


class TopK(NamedTuple):
    """A teacher known by its top K and tail: ids [n, K] (-1: none), logprobs [n, K], tail [n]."""

    ids: Tensor
    logprobs: Tensor
    tail: Tensor

    def take(self, rows: Tensor | slice) -> "TopK":
        return TopK(self.ids[rows], self.logprobs[rows], self.tail[rows])


class Head(NamedTuple):
    """Logits [n, V] before they are computed, of the student or of a dense teacher: hidden [n, H],
    weight [V, H], bias [V]."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None

    def take(self, rows: Tensor | slice) -> "Head":
        return Head(self.hidden[rows], self.weight, self.bias)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of logits, sums and head gradients for states of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32
