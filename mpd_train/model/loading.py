"""Load the student, choose device and dtypes, compile layers."""

from typing import Any

import torch

from mpd_data.common.models import ModelFiles
from mpd_train.config import TrainConfig
from mpd_train.model import lora
from mpd_train.model.causal_lm import CausalLM, decoder_layers


def load_student(
    config: TrainConfig, files: ModelFiles, device: torch.device, attn_implementation: str | None
) -> CausalLM:
    """The student in float32, with adapters where they are what is trained. Raises ConfigError for
    a model that cannot be loaded and for adapters that it cannot take."""
    code, adapters = config.trust_remote_code, config.lora.lora_r > 0
    student = CausalLM(files, device, torch.float32, code, attn_implementation, not adapters)
    if adapters:
        student.adapted = lora.attach(
            student.model, files, config.lora, config.revision, config.seed
        )
    return student


def compile_layers(model: Any) -> None:
    """Has each layer compiled at its first pass: one graph for all that are alike and for packs
    of any length. In place; before `model` is sharded, so that what FSDP does around a layer
    stays around the compiled one."""
    for layer in decoder_layers(model):
        # The method and not the module: hooks and recomputation stay outside, and names the same.
        layer.forward = torch.compile(layer.forward, dynamic=True)
