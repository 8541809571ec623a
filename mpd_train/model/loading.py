"""Load the student and the teacher, whole or sharded, and compile their layers."""

import functools
from collections.abc import Callable
from typing import Any

import torch

from mpd_data.common.models import ModelFiles
from mpd_train.config import TrainConfig
from mpd_train.distributed import Ranks
from mpd_train.model import liger, lora
from mpd_train.model.causal_lm import CausalLM, decoder_layers
from mpd_train.model.sharding import load_sharded


def load_models(
    config: TrainConfig, student_files: ModelFiles, teacher_files: ModelFiles | None,
    device: torch.device, dtype: torch.dtype, attn_implementation: str | None, ranks: Ranks,
) -> tuple[CausalLM, CausalLM | None]:  # fmt: skip
    """Return the student in float32, ready to be trained, and the teacher in `dtype`, if there is
    one: on `device`, or sharded over all devices. Raise ConfigError for a model that cannot be
    loaded."""

    def load(
        make: Callable[[torch.device, str | None], CausalLM], offload: bool = False
    ) -> CausalLM:
        def make_on(place: torch.device, attn: str | None = None) -> CausalLM:
            model = make(place, attn)
            if config.compile:
                compile_layers(model.model)
            return model

        if ranks.size == 1 and not offload:
            return make_on(device, attn_implementation)
        model = load_sharded(make_on, device, ranks, offload)
        if attn_implementation is not None:
            model.model.set_attn_implementation(attn_implementation)
        return model

    student = load(lambda place, attn: load_student(config, student_files, place, attn))
    student.model.train()
    if config.activation_offload:
        student.kept = functools.partial(
            torch.autograd.graph.save_on_cpu, pin_memory=device.type == "cuda"
        )
    if config.gradient_checkpointing:
        student.model.gradient_checkpointing_enable({"use_reentrant": False})
    teacher = None
    if teacher_files is not None:
        code = config.trust_remote_code
        teacher = load(
            lambda place, attn: CausalLM(teacher_files, place, dtype, code, attn),
            config.teacher_offload,
        )
        teacher.model.requires_grad_(False)
    if config.liger_kernel:
        # Not before all are loaded: sharded models are read, and tried out, on a CPU.
        for model in (student, teacher):
            if model is not None:
                liger.apply(model.model, model.files.name)
    return student, teacher


def load_student(
    config: TrainConfig, files: ModelFiles, device: torch.device, attn_implementation: str | None
) -> CausalLM:
    """Return the student in float32, with adapters if they are what is trained. Raise ConfigError
    for a model that cannot be loaded and for adapters that it cannot take."""
    code, adapters = config.trust_remote_code, config.lora.lora_r > 0
    student = CausalLM(files, device, torch.float32, code, attn_implementation, not adapters)
    if adapters:
        student.adapted = lora.attach(
            student.model, files, config.lora, config.revision, config.seed
        )
    return student


def compile_layers(model: Any) -> None:
    """Have each layer compiled at its first pass: one graph for all layers that are alike and for
    packs of any length. In place; before `model` is sharded, so that what FSDP does around a layer
    stays around the compiled one."""
    for layer in decoder_layers(model):
        # The method and not the module: hooks and recomputation stay outside, and names the same.
        layer.forward = torch.compile(layer.forward, dynamic=True)
