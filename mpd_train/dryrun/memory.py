"""Plan a training's memory without weights, data or a device.

Two optimiser steps run on fake tensors, which have shapes and no contents, and every live storage
is counted. The workspace of the fused loss is added from its chunk sizes. Layers are not compiled,
but keep for the backward pass what compiled layers keep.
"""

import itertools
import math
import os
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from mpd_data.common.weights import skeleton
from mpd_data.dryrun.show import size_text
from mpd_train.config import TrainConfig
from mpd_train.data.batches import Batch
from mpd_train.distributed import ranks_asked_for
from mpd_train.kl.fused import Inputs, workspace_bytes
from mpd_train.loss import pack_loss
from mpd_train.model import lora
from mpd_train.model.attention import is_short
from mpd_train.model.causal_lm import CausalLM, decoder_layers
from mpd_train.model.device import autocast
from mpd_train.optimizer import make_optimizer
from mpd_train.setup import TrainSetup

# Operators whose results are kept for the backward pass and never computed again.
_PRODUCTS = ("aten.mm", "aten.addmm", "aten.bmm", "scaled_dot_product")


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on one device: the student's weights, its optimiser's moments, the weights of a teacher
    in the process, and the most that a step takes in addition (activations, gradients, the loss),
    of which `loss` is the workspace of the loss."""

    weights: int
    moments: int
    teacher: int
    step: int
    loss: int

    @property
    def total(self) -> int:
        return self.weights + self.moments + self.teacher + self.step

    def details(self) -> dict[str, str]:
        return {
            "memory": size_text(self.total),
            "of it weights and moments": size_text(self.weights + self.moments),
            "of it the teacher's weights": size_text(self.teacher),
            "of it a step": size_text(self.step),
            "of a step the loss": size_text(self.loss),
        }

    def advice(self, config: TrainConfig, device: torch.device) -> list[str]:
        """Return what to change if the device has too little memory, else nothing."""
        if device.type == "cuda":
            available = torch.cuda.get_device_properties(device).total_memory
        else:
            available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
            available //= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        # The rest is the allocator's, the libraries' and the system's.
        if self.total <= 0.92 * available:
            return []
        ways = []
        if not config.gradient_checkpointing:
            ways.append("--gradient-checkpointing")
        if self.step > available // 8:
            ways.append("a lower --pack-length (and more --gradient-accumulation-steps)")
        if config.lora.lora_r == 0:
            ways.append("--lora-r 64")
        if self.teacher:
            offloaded = "" if config.teacher_offload else "--teacher-offload, or "
            ways.append(f"{offloaded}the shards' cached top K in place of --teacher")
        ways.append("more devices (torchrun)")
        return [
            f"{size_text(self.total)} of memory are needed, {size_text(available)} are available."
            f" Give {', or '.join(ways)}."
        ]


class _Sketch(CausalLM):
    """A model of fake tensors."""

    def __init__(self, model: Any, separate: bool) -> None:
        """`separate`: its attention computes each sequence of a pack by itself."""
        self.model, self.adapted, self._separate = model, None, separate

    def states(self, input_ids: Tensor, position_ids: Tensor | None) -> Tensor:
        size = input_ids.shape[1]
        # Other attention separates sequences by a mask. A mask given here keeps transformers from
        # reading positions, which have no contents.
        mask = torch.ones((1, 1, 1 if self._separate else size, size), dtype=torch.bool)
        output = self.model.base_model(
            input_ids=input_ids, position_ids=position_ids, attention_mask=mask, use_cache=False
        )
        states: Tensor = output.last_hidden_state
        return states


class _Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of all live storages that operators made."""

    def __init__(self, device: torch.device, counted: list[Tensor]) -> None:
        """`counted`: tensors that are counted elsewhere."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = self.loss = 0
        # Results of products, while they are collected, and the storages that went in or came out.
        self.products: list[Tensor] | None = None
        self.of_products = WeakIdKeyDictionary()
        # For a converted storage, the number of the storage that it was converted from.
        self.converted = WeakIdKeyDictionary()
        self._numbers, self._next = WeakIdKeyDictionary(), itertools.count()
        self._device = device
        self._known = WeakIdKeyDictionary({x.untyped_storage(): 0 for x in counted})

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        outputs = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        for storage in (x.untyped_storage() for x in outputs):
            if storage not in self._known:
                self._known[storage] = storage.nbytes()
                self.now += storage.nbytes()
                weakref.finalize(storage, self._remove, storage.nbytes())
        self.peak = max(self.peak, self.now)
        if func is torch.ops.aten._to_copy.default:
            source = args[0].untyped_storage()
            if source not in self._numbers:
                self._numbers[source] = next(self._next)
            self.converted[result.untyped_storage()] = self._numbers[source]
        if any(part in str(func) for part in _PRODUCTS):
            if self.products is not None:
                self.products += outputs
            for tensor in [*tree_leaves(args), *outputs]:
                if isinstance(tensor, Tensor):
                    self.of_products[tensor.untyped_storage()] = True
        if func is torch.ops.mpd.linear_kl.default:
            self.loss = workspace_bytes(Inputs(*args), self._device)
            self.peak = max(self.peak, self.now + self.loss)
        return result

    def _remove(self, size: int) -> None:
        self.now -= size


def _keep_as_compiled(layer: Any, live: _Live) -> None:
    """Make `layer` keep for its backward pass what torch.compile's partitioner keeps: its inputs,
    and the inputs and results of products. Everything else is computed again."""
    forward = layer.forward

    def pass_through(*args: Any, **kwargs: Any) -> Any:
        boxes: list[list[Any]] = []
        # Lives as long as one of the boxes: until the layer's backward pass is over.
        kept: list[Tensor] = []
        given = {x.untyped_storage() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}

        def pack(x: Tensor) -> list[Any]:
            boxes.append([x, kept])
            return boxes[-1]

        def unpack(box: list[Any]) -> Tensor:
            x = box[0]
            return x if isinstance(x, Tensor) else torch.empty_strided(x[0], x[1], dtype=x[2])

        live.products = []
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            output = forward(*args, **kwargs)
        # The last product is the layer's output, which its backward pass does not read.
        kept += live.products[:-1]
        live.products = None
        firsts: dict[tuple[int, torch.Size, torch.dtype], torch.UntypedStorage] = {}
        for box in boxes:
            x = box[0]
            storage = x.untyped_storage()
            recomputed = not (x.is_leaf or storage in given or storage in live.of_products)
            if storage in live.converted:
                # Each product converts its inputs itself; compiled, one conversion serves all.
                key = live.converted[storage], x.shape, x.dtype
                recomputed |= firsts.setdefault(key, storage) is not storage
            if recomputed:
                box[0] = x.shape, x.stride(), x.dtype
        return output

    layer.forward = pass_through


def plan_memory(setup: TrainSetup, num_tokens: int, num_loss_tokens: int) -> MemoryPlan:
    """Plan the memory of packs of `num_tokens` tokens on each of the run's devices, which share out
    weights, gradients and moments. Raise ConfigError for adapters that do not fit the student."""
    config, device, dtype, ranks = setup.config, setup.device, setup.dtype, ranks_asked_for()
    separate, code = is_short(setup.attn_implementation), config.trust_remote_code
    model = skeleton(setup.student, code, torch.float32)
    if config.lora.lora_r > 0:
        lora.attach(model, setup.student, config.lora, config.revision, config.seed)
    model.train()
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    models, teacher_bytes = [model], 0
    if setup.teacher is not None:
        taught = skeleton(setup.teacher, code, dtype).requires_grad_(False)
        models.append(taught)
        teacher_bytes = _bytes_of(taught.parameters())
        if config.teacher_offload and device.type == "cuda":
            # The head, the layer in use and the next layer.
            layers = [_bytes_of(layer.parameters()) for layer in decoder_layers(taught)]
            head = _bytes_of(taught.get_output_embeddings().parameters())
            teacher_bytes = head + ranks * 2 * max(layers)
    if setup.attn_implementation == "eager":
        # Eager attention keeps a square of the pack for each head.
        for each in models:
            each.set_attn_implementation("eager")
    with FakeTensorMode(allow_non_fake_inputs=True):
        student, *teachers = [_Sketch(_on_cpu(each), separate) for each in models]
        teacher = teachers[0] if teachers else None
        optimizer = make_optimizer(model, config.optimizer)
        batch = _batch(num_tokens, num_loss_tokens, int(setup.shards.metadata["num_logprobs"]))
        counted = [x for each in models for x in (*each.parameters(), *each.buffers())]
        with _Live(device, counted) as live:
            if config.compile and not config.gradient_checkpointing:
                for layer in decoder_layers(model):
                    _keep_as_compiled(layer, live)
            passes = min(2, -(-config.gradient_accumulation_steps // ranks))
            for _ in range(2):
                live.peak = live.now
                for _ in range(passes):
                    with autocast(torch.device("cpu"), dtype):
                        loss = pack_loss(
                            student, teacher, batch, setup.vocab_size, config.loss, 1.0
                        ).loss
                    loss.backward()  # type: ignore[no-untyped-call]
                    del loss
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        weights = _bytes_of(model.parameters())
        moments = 2 * _bytes_of(p for p in model.parameters() if p.requires_grad)
    step = live.peak - moments
    if ranks > 1:
        # Gathered head and embedding. The real peak is lower, since gradients are shared out layer
        # by layer; by how much depends on where the peak is.
        step += 2 * _bytes_of([student.head()])
    return MemoryPlan(
        math.ceil(weights / ranks), math.ceil(moments / ranks), math.ceil(teacher_bytes / ranks),
        step, live.loss,
    )  # fmt: skip


def _on_cpu(model: Any) -> Any:
    """Turn a model on the meta device, in place, into one of fake tensors on a CPU, where autocast
    works."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, x in tensors.items():
                if x is None:
                    continue
                if id(x) not in made:
                    empty = torch.empty(x.shape, dtype=x.dtype)
                    is_weight = isinstance(x, torch.nn.Parameter)
                    made[id(x)] = torch.nn.Parameter(empty, x.requires_grad) if is_weight else empty
                # A tied weight stays tied.
                tensors[name] = made[id(x)]
    return model


def _bytes_of(tensors: Any) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def _batch(num_tokens: int, num_loss_tokens: int, num_logprobs: int) -> Batch:
    ids = torch.zeros((1, num_tokens), dtype=torch.int64)
    positions = torch.zeros(num_loss_tokens, dtype=torch.int64)
    logprobs = torch.zeros((num_loss_tokens, num_logprobs))
    return Batch(
        ids, ids, positions, positions, logprobs.long(), logprobs, logprobs[:, 0],
        ids, ids, positions, logprobs[:, 0], logprobs[:, 0],
    )  # fmt: skip
