"""The processes that train together: one, or those that torchrun started.

FSDP2 (`fully_shard`) does the work: weights, gradients and moments lie in equal parts on all
devices, layers are put together while they are needed, and gradients are averaged. Nothing here
changes the numbers: what a step is made of does not depend on how many do it.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mpd_data.errors import ConfigError, MPDError
from mpd_train.kl import gathered
from mpd_train.models import CausalLM, decoder_layers

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


def load_sharded(
    load: Callable[[torch.device], CausalLM],
    device: torch.device,
    ranks: Ranks,
    offload: bool = False,
) -> CausalLM:
    """What `load` makes, shared out among the processes' devices. The first process alone reads
    weights, into the CPU's memory; each of the others never has more than its part and one weight.
    With `offload` all but the head stays in the CPU's memory, and layers come to the device for
    their passes. Raises what `load` raises, in all processes where it is raised in the first."""
    first: CausalLM | None = None
    failed = float(ranks.first)
    try:
        if ranks.first:
            first, failed = load(torch.device("cpu")), 0.0
    finally:
        # Who waits for weights that never come could not say why.
        failed = ranks.sum([failed])[0]
    if failed:
        raise MPDError("the first process could not load a model; it says why.")
    loaded = load(torch.device("meta"))
    shard(loaded.model, device, ranks, offload)
    _fill(loaded.model, None if first is None else first.model, device)
    # Found out with weights.
    found = [None if first is None else (first.logit_scale, first.softcap)]
    dist.broadcast_object_list(found, device=torch.device("cpu"))
    assert found[0] is not None
    loaded.logit_scale, loaded.softcap = found[0]
    return loaded


def _fill(model: Any, source: Any | None, device: torch.device) -> None:
    """Weights and buffers of the first process's `source` into `model`, sharded, of which it
    is the like."""
    from torch.distributed.tensor import distribute_tensor

    weights = {} if source is None else dict(source.named_parameters())
    for name, part in model.named_parameters():
        if source is None:
            # Not read: the first process scatters.
            weight = torch.empty(part.shape, dtype=part.dtype, device=device)
        else:
            weight = weights[name].detach().to(device)
        with torch.no_grad():
            part.copy_(distribute_tensor(weight, part.device_mesh, part.placements))
    # As they are there, precision included: rotary frequencies are in no file, and stay float32 in
    # a model of bfloat16.
    buffers = [None if source is None else dict(source.named_buffers())]
    dist.broadcast_object_list(buffers, device=torch.device("cpu"))
    for name, buffer in (buffers[0] or {}).items():
        owner, _, leaf = name.rpartition(".")
        model.get_submodule(owner)._buffers[leaf] = buffer.to(device)


def gather(model: Any, like: Any, ranks: Ranks) -> None:
    """Weights and buffers of the sharded `model` into `like`, the same model on the meta device,
    in the CPU's memory of the first process. All have to join in."""
    if ranks.first:
        head, embedding = like.get_output_embeddings(), like.get_input_embeddings()
        tied = head.weight is embedding.weight
        like.to_empty(device=torch.device("cpu"))
        if tied:
            head.weight = embedding.weight
    weights, buffers = dict(like.named_parameters()), dict(like.named_buffers())
    with torch.no_grad():
        for name, part in model.named_parameters():
            weight = whole(part)
            if ranks.first:
                weights[name].copy_(weight)
        for name, buffer in model.named_buffers():
            if ranks.first:
                buffers[name].copy_(buffer)


def shard(model: Any, device: torch.device, ranks: Ranks, offload: bool) -> None:
    """Shares `model`, a transformers causal language model on the meta device, out among the
    processes' devices, layer by layer, with room for its weights and nothing in it. Raises
    ConfigError for a model that does not say what its layers are."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

    mesh = init_device_mesh(device.type, (ranks.size,))
    # Memory from which a GPU reads by itself.
    pinned = CPUOffloadPolicy(pin_memory=device.type == "cuda")
    policy = pinned if offload else OffloadPolicy()
    for layer in decoder_layers(model):
        fully_shard(layer, mesh=mesh, offload_policy=policy)
    decoder, head = model.base_model, model.get_output_embeddings()
    tied = head.weight is model.get_input_embeddings().weight
    fully_shard(decoder, mesh=mesh, reshard_after_forward=True, offload_policy=policy)
    if not tied:
        # The loss takes its weight as it is: no pass goes through it.
        fully_shard(head, mesh=mesh)
    decoder.to_empty(device=torch.device("cpu") if offload else device)
    if not tied:
        head.to_empty(device=device)
        return
    if getattr(head, "bias", None) is not None:
        raise ConfigError(
            f"{type(model).__name__}: an output bias beside an output embedding that is the input's"
            " too. Train it with one process and without --teacher-offload."
        )
    head.weight = model.get_input_embeddings().weight


def whole(parameter: Tensor) -> Tensor:
    """A parameter put together, the same for all processes; all of them have to ask."""
    return gathered(parameter.detach())


def clip_grad_norm(model: nn.Module, largest: float) -> float:
    """Scales the gradients down to a norm of at most `largest`; returns the norm before."""
    return float(whole(nn.utils.clip_grad_norm_(model.parameters(), largest)))
