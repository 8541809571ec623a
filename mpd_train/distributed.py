"""The processes that train together: one, or those that torchrun started.

FSDP2 (`fully_shard`) does the work: weights, gradients and moments lie in equal parts on all
devices, layers are put together while they are needed, and gradients are averaged. Nothing here
changes the numbers: what a step is made of does not depend on how many do it.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among `size` that train together."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this process is the one that speaks and writes for all."""
        return self.rank == 0

    def share(self, things: list[T]) -> list[T | None]:
        """This process's part of `things`, as long as the longest; None where it has none: all
        have to join in each pass through a sharded model."""
        mine: list[T | None] = list(things[self.rank :: self.size])
        longest = -(-len(things) // self.size)
        return mine + [None] * (longest - len(mine))

    def sum(self, values: list[float]) -> list[float]:
        """Each of `values` over all processes, in float64; the same for all of them."""
        if self.size == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        found: list[float] = total.tolist()
        return found

    def wait(self) -> None:
        """Until all processes are here."""
        # A reduction on the CPU: `barrier` would take the GPU's backend.
        self.sum([0.0])


def ranks_asked_for() -> int:
    """How many processes torchrun started, or 1."""
    return int(os.environ["WORLD_SIZE"]) if "TORCHELASTIC_RUN_ID" in os.environ else 1


@contextmanager
def ranks(sharded: bool = False) -> Iterator[Ranks]:
    """The processes of this training, connected while the block runs. With `sharded` one process
    is too, to itself: some of its models are loaded by `load_sharded`."""
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    if ranks_asked_for() > 1:
        dist.init_process_group(backend)
    elif sharded:
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
    else:
        yield Ranks()
        return
    yield Ranks(dist.get_rank(), dist.get_world_size())
    # Not after an error: NCCL would wait for processes that wait for this one, and nobody would
    # read why.
    dist.destroy_process_group()
