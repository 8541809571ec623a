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

from mpd_data.common.models import ModelFiles
from mpd_data.dryrun.show import size_text
from mpd_train.config import TrainConfig
from mpd_train.data.batches import Batch
from mpd_train.kl.fused import Inputs, workspace_bytes
from mpd_train.loss import pack_loss
from mpd_train.model import lora
from mpd_train.model.attention import attention, is_short
from mpd_train.model.causal_lm import CausalLM, decoder_layers, skeleton
from mpd_train.model.device import autocast
from mpd_train.optimizer import make_optimizer

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
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        self.peak = max(self.peak, self.now)
        if func is torch.ops.aten._to_copy.default:
            source = args[0].untyped_storage()
            if source not in self._numbers:
                self._numbers[source] = next(self._next)
            self.converted[result.untyped_storage()] = self._numbers[source]
        if any(part in str(func) for part in _PRODUCTS):
            outputs = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
            if self.products is not None:
                self.products += outputs
            for tensor in [*tree_leaves(args), *outputs]:
                if isinstance(tensor, Tensor):
                    self.of_products[tensor.untyped_storage()] = True
        if func is torch.ops.mpd.linear_kl.default:
            self.loss = workspace_bytes(Inputs(*args), self._device)
            self.peak = max(self.peak, self.now + self.loss)
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage not in self._known:
            size = storage.nbytes()
            self._known[storage] = size
            self.now += size
            weakref.finalize(storage, self._remove, size)

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


def plan_memory(
    config: TrainConfig,
    student_files: ModelFiles,
    teacher_files: ModelFiles | None,
    shape: tuple[int, int],
    num_logprobs: int,
    vocab_size: int,
    device: torch.device,
    dtype: torch.dtype,
    ranks: int = 1,
) -> MemoryPlan:
    """Plan the memory of packs of `shape` (tokens, loss tokens) on each of `ranks` devices that
    share out weights, gradients and moments. Raises ConfigError for adapters that do not fit the
    student."""
    models = [student_files] if teacher_files is None else [student_files, teacher_files]
    attn_implementation = attention(config, device, dtype, models)
    separate = is_short(attn_implementation)
    code = config.trust_remote_code
    model, taught = skeleton(student_files, code, torch.float32), None
    if config.lora.lora_r > 0:
        lora.attach(model, student_files, config.lora, config.revision, config.seed)
    model.train()
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if teacher_files is not None:
        taught = skeleton(teacher_files, code, dtype).requires_grad_(False)
    if attn_implementation == "eager":
        # Eager attention keeps a square of the pack for each head.
        for each in (model, taught):
            if each is not None:
                each.set_attn_implementation("eager")
    teacher_bytes = 0 if taught is None else _bytes_of(taught.parameters())
    if taught is not None and config.teacher_offload and device.type == "cuda":
        # The head, the layer in use and the next layer.
        layers = [_bytes_of(layer.parameters()) for layer in decoder_layers(taught)]
        head = _bytes_of(taught.get_output_embeddings().parameters())
        teacher_bytes = head + ranks * 2 * max(layers)
    with FakeTensorMode(allow_non_fake_inputs=True):
        student = _Sketch(_on_cpu(model), separate)
        teacher = None if taught is None else _Sketch(_on_cpu(taught), separate)
        optimizer = make_optimizer(model, config.optimizer)
        batch = _batch(shape, num_logprobs)
        counted = [*model.parameters(), *model.buffers()]
        if taught is not None:
            counted += [*taught.parameters(), *taught.buffers()]
        with _Live(device, counted) as live:
            if config.compile and not config.gradient_checkpointing:
                for layer in decoder_layers(model):
                    _keep_as_compiled(layer, live)
            passes = min(2, -(-config.gradient_accumulation_steps // ranks))
            for _ in range(2):
                live.peak = live.now
                for _ in range(passes):
                    with autocast(torch.device("cpu"), dtype):
                        loss = pack_loss(student, teacher, batch, vocab_size, config.loss, 1.0).loss
                    loss.backward()  # type: ignore[no-untyped-call]
                    del loss
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        weights = _bytes_of(model.parameters())
        trained = _bytes_of(p for p in model.parameters() if p.requires_grad)
    moments = 2 * trained
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


def _batch(shape: tuple[int, int], num_logprobs: int) -> Batch:
    tokens, predicted = shape
    ids = torch.zeros((1, tokens), dtype=torch.int64)
    positions = torch.zeros(predicted, dtype=torch.int64)
    logprobs = torch.zeros((predicted, num_logprobs))
    return Batch(
        ids, ids, positions, positions, logprobs.long(), logprobs, logprobs[:, 0],
        ids, ids, positions,
    )  # fmt: skip
