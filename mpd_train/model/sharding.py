"""Share a model among processes with FSDP2 (`fully_shard`), load it so, and put it together again.

Weights, gradients and moments lie in equal parts on all devices. Layers are gathered while they are
needed, and gradients are averaged. Sharding does not change the numbers of a step.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

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
    """Return the model that `load` makes, sharded over the processes' devices. Only the first
    process reads weights, into the CPU's memory; each of the others never has more than its part
    and one weight. With `offload` all but the head stays in the CPU's memory, and layers come to
    the device for their passes. Raise what `load` raises; if it does in the first process, all
    processes raise."""
    first: CausalLM | None = None
    failed = float(ranks.first)
    try:
        if ranks.first:
            first, failed = load(torch.device("cpu")), 0.0
    finally:
        # The others would wait for weights for ever.
        failed = ranks.sum([failed])[0]
    if failed:
        raise MPDError("the first process could not load a model; its error says why.")
    loaded = load(torch.device("meta"))
    shard(loaded.model, device, ranks, offload)
    _fill(loaded.model, None if first is None else first.model, device)
    # These can be determined with weights only.
    head = [None if first is None else (first.logit_scale, first.softcap)]
    dist.broadcast_object_list(head, device=torch.device("cpu"))
    assert head[0] is not None
    loaded.logit_scale, loaded.softcap = head[0]
    return loaded


def _fill(model: Any, source: Any | None, device: torch.device) -> None:
    """Copy weights and buffers of the first process's `source` into `model`, the same model,
    sharded."""
    from torch.distributed.tensor import distribute_tensor

    weights = {} if source is None else dict(source.named_parameters())
    for name, part in model.named_parameters():
        if source is None:
            # Its contents are not read: the first process scatters.
            weight = torch.empty(part.shape, dtype=part.dtype, device=device)
        else:
            weight = weights[name].detach().to(device)
        with torch.no_grad():
            part.copy_(distribute_tensor(weight, part.device_mesh, part.placements))
    # With the first process's dtypes: rotary frequencies are in no file, and stay float32 in a
    # bfloat16 model.
    buffers = [None if source is None else dict(source.named_buffers())]
    dist.broadcast_object_list(buffers, device=torch.device("cpu"))
    for name, buffer in (buffers[0] or {}).items():
        owner, _, leaf = name.rpartition(".")
        model.get_submodule(owner)._buffers[leaf] = buffer.to(device)


def gather(model: Any, like: Any, ranks: Ranks) -> None:
    """Copy weights and buffers of the sharded `model` into `like`, the same model on the meta
    device, in the CPU's memory of the first process. All processes have to call this."""
    if ranks.first:
        head, embedding = like.get_output_embeddings(), like.get_input_embeddings()
        tied = head.weight is embedding.weight
        like.to_empty(device=torch.device("cpu"))
        if tied:
            head.weight = embedding.weight
    weights, buffers = dict(like.named_parameters()), dict(like.named_buffers())
    with torch.no_grad():
        for name, part in model.named_parameters():
            weight = gathered(part.detach())
            if ranks.first:
                weights[name].copy_(weight)
        for name, buffer in model.named_buffers():
            if ranks.first:
                buffers[name].copy_(buffer)


def shard(model: Any, device: torch.device, ranks: Ranks, offload: bool) -> None:
    """Shard `model`, a transformers causal language model on the meta device, over the processes'
    devices, layer by layer, with uninitialised weights. Raise ConfigError for a model that does not
    name its layers."""
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
        # The loss uses its weight directly: no forward pass goes through it.
        fully_shard(head, mesh=mesh)
    decoder.to_empty(device=torch.device("cpu") if offload else device)
    if not tied:
        head.to_empty(device=device)
        return
    if getattr(head, "bias", None) is not None:
        raise ConfigError(
            f"{type(model).__name__}: it has an output bias, and its output embedding is tied to"
            " the input's. Train it with one process and without --teacher-offload."
        )
    head.weight = model.get_input_embeddings().weight


def clip_grad_norm(model: nn.Module, largest: float) -> float:
    """Scale the gradients down to a norm of at most `largest`; return the norm before."""
    return float(gathered(nn.utils.clip_grad_norm_(model.parameters(), largest).detach()))
