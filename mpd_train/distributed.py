"""The processes that train together: one, or those that torchrun started.

A step's batches and loss do not depend on the number of processes.
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
        """Whether this process is the one that prints and writes for all."""
        return self.rank == 0

    def share(self, things: list[T]) -> list[T | None]:
        """Return this process's part of `things`, padded with None to the longest part: all
        processes have to join in each pass through a sharded model."""
        mine: list[T | None] = list(things[self.rank :: self.size])
        longest = -(-len(things) // self.size)
        return mine + [None] * (longest - len(mine))

    def sum(self, values: list[float]) -> list[float]:
        """Return each of `values` summed over all processes, in float64; all get the same."""
        if self.size == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        sums: list[float] = total.tolist()
        return sums

    def wait(self) -> None:
        """Wait until all processes have called this."""
        # A reduction on the CPU: `barrier` would take the GPU's backend.
        self.sum([0.0])


def ranks_asked_for() -> int:
    """Return the number of processes that torchrun started, or 1."""
    return int(os.environ["WORLD_SIZE"]) if "TORCHELASTIC_RUN_ID" in os.environ else 1


@contextmanager
def ranks(sharded: bool = False) -> Iterator[Ranks]:
    """Connect the processes of this training while the block runs. With `sharded` a single process
    gets a process group too, which `load_sharded` needs."""
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    if ranks_asked_for() == 1:
        if not sharded:
            yield Ranks()
            return
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
        try:
            yield Ranks()
        finally:
            dist.destroy_process_group()
        return
    dist.init_process_group(backend)
    yield Ranks(dist.get_rank(), dist.get_world_size())
    # Not after an error: NCCL would wait for processes that wait for this one, and the error would
    # never be printed.
    dist.destroy_process_group()
