"""Share a model among processes with FSDP2 (`fully_shard`), load it so, and put it together again.

Weights, gradients and moments lie in equal parts on all devices. Layers are gathered while they are
needed, and gradients are averaged. Sharding does not change the numbers of a step.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mpd_data.common.errors import ConfigError, MPDError
from mpd_train.distributed import Ranks
from mpd_train.kl.losses import gathered
from mpd_train.model.causal_lm import CausalLM, decoder_layers


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
