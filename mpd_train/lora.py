"""Low-rank adapters, through peft: put into the student, kept apart, merged for the engine."""

import shutil
from pathlib import Path
from typing import Any

import torch

from mpd_data.errors import ConfigError
from mpd_data.shards import fsync_directory, fsync_file
from mpd_train.config import LoraConfig


def attach(model: Any, name: str, config: LoraConfig, revision: str | None, seed: int) -> Any:
    """Freezes `model`, the student called `name`, puts adapters into its layers in place and
    returns peft's wrapper, which saves and merges them. The adapters start from `seed`, and at
    zero effect.

    Raises ConfigError where peft is missing, where a target names no layer, or where one is the
    embedding or the head: the loss takes the head's weight as it is.
    """
    try:
        import peft
    except ModuleNotFoundError as error:
        raise ConfigError(
            "--lora-r needs peft: pip install 'mixed-policy-distillation[lora]'"
        ) from error
    targets = config.lora_target_modules
    if "all-linear" not in targets:
        layers = [layer for layer, _ in model.named_modules()]
        for target in targets:
            if not any(layer == target or layer.endswith(f".{target}") for layer in layers):
                raise ConfigError(
                    f"--lora-target-modules {target}: {name} has no layer of that"
                    " name. Give the last parts of layers' names, as q_proj, or all-linear."
                )
    elif len(targets) > 1:
        raise ConfigError("--lora-target-modules: all-linear stands alone, or name the layers.")
    settings = peft.LoraConfig(
        r=config.lora_r,
        lora_alpha=2 * config.lora_r if config.lora_alpha is None else config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules="all-linear" if targets == ["all-linear"] else targets,
        task_type="CAUSAL_LM",
        revision=revision,
    )
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    torch.manual_seed(seed)
    try:
        adapted = peft.get_peft_model(model, settings)
    except ValueError as error:
        raise ConfigError(f"--lora-target-modules {' '.join(targets)}: {error}") from error
    found = (model.get_input_embeddings(), model.get_output_embeddings())
    if any(now is not before for now, before in zip(found, ends, strict=True)):
        raise ConfigError(
            "--lora-target-modules: the embedding and the output head cannot have an adapter here."
        )
    adapted.peft_config["default"].base_model_name_or_path = name
    return adapted


def save_and_merge(adapted: Any, folder: Path) -> None:
    """Writes the adapters as peft's folder, then adds them to the student's weights in place:
    the student is a plain model again."""
    staging = folder.with_name(f".{folder.name}.staging")
    for stale in (staging, folder):
        if stale.exists():
            shutil.rmtree(stale)
    adapted.save_pretrained(staging, save_embedding_layers=False)
    for file in staging.iterdir():
        fsync_file(file)
    fsync_directory(staging)
    staging.replace(folder)
    fsync_directory(folder.parent)
    adapted.merge_and_unload()
