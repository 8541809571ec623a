"""Low-rank adapters, through peft: attach new ones to the student, continue or merge those that a
model comes with, save them and merge them for the engine."""

import shutil
from pathlib import Path
from typing import Any

import torch

from mpd_data.common.errors import ConfigError, requires
from mpd_data.common.files import atomic_folder
from mpd_data.common.models import ModelFiles, weight_files
from mpd_data.common.weights import compare_adapter
from mpd_train.config import LoraConfig

# Settings in which a student's adapter may differ from the requested one: its names and its
# initialisation, and how its layers are chosen (the layers themselves are compared).
_FREE = {
    "base_model_name_or_path", "revision", "task_type", "inference_mode", "auto_mapping",
    "peft_version", "init_lora_weights", "fan_in_fan_out", "lora_dropout", "target_modules",
    "exclude_modules", "layers_to_transform", "layers_pattern",
}  # fmt: skip
# Initialisations that leave the base's weights unchanged.
_PLAIN_INITIALISATIONS = (True, False, "gaussian", "orthogonal")


def attach(
    model: Any, files: ModelFiles, config: LoraConfig, revision: str | None, seed: int
) -> Any:
    """Freeze `model`, of the student `files`, put adapters into its layers in place and return
    peft's wrapper, which saves and merges them. For a student that is an adapter on `model` its
    training continues; new adapters are initialised from `seed`, and have no effect at first.

    Raise ConfigError if peft is missing, if a target names no layer, if one is the embedding or the
    head (the loss uses the head's weight directly), and for a student's adapter with other settings
    than the requested ones.
    """
    peft = _peft("--lora-r")
    targets = config.lora_target_modules
    if "all-linear" not in targets:
        for target in targets:
            if not _layers(model, [target]):
                raise ConfigError(
                    f"--lora-target-modules {target}: {files.name} has no layer of that"
                    " name. Give the last parts of layers' names, as q_proj, or all-linear."
                )
    elif len(targets) > 1:
        raise ConfigError("--lora-target-modules: give all-linear alone, or the layers' names.")
    settings = peft.LoraConfig(
        r=config.lora_r,
        lora_alpha=2 * config.lora_r if config.lora_alpha is None else config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules="all-linear" if targets == ["all-linear"] else targets,
        task_type="CAUSAL_LM",
        revision=revision,
    )
    torch.manual_seed(seed)
    if files.adapter is not None:
        adapted, ends_are_free = _further(model, files, settings)
    else:
        try:
            adapted, ends_are_free = _put(model, settings)
        except ValueError as error:
            raise ConfigError(f"--lora-target-modules {' '.join(targets)}: {error}") from error
        adapted.peft_config["default"].base_model_name_or_path = files.name
    if not ends_are_free:
        raise ConfigError(
            "--lora-target-modules: the embedding and the output head cannot have an adapter here."
        )
    return adapted


def merge(model: Any, files: ModelFiles) -> None:
    """Add the adapter of `files` to the weights of `model`, its base, in place: the result is a
    plain model, all of whose weights can be trained. On the meta device nothing is read or added,
    and all else is as elsewhere. Raise ConfigError for an adapter that cannot be merged."""
    shapes = {name: weight.shape for name, weight in model.named_parameters()}
    is_tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    adapted, ends_are_free = _read(model, files, _settings_of(model, files), to_train=False)
    if is_tied and not ends_are_free:
        raise ConfigError(
            f"{files.name}: an adapter of the embedding or the output head, which are one weight in"
            " its base: merged, one's change would be the other's too. Give them a weight each"
            " (tie_word_embeddings false), merge the adapter into that, and give the merged folder."
        )
    adapted.merge_and_unload()
    model.requires_grad_(True)
    if {name: weight.shape for name, weight in model.named_parameters()} != shapes:
        raise ConfigError(
            f"{files.name}: an adapter that adds layers or weights to its base. Only what can be"
            " added to the base's own weights is merged."
        )


def save_and_merge(adapted: Any, folder: Path) -> None:
    """Write the adapters as peft's folder, then merge them into the student's weights in place:
    the student is a plain model again."""
    if folder.exists():
        shutil.rmtree(folder)
    with atomic_folder(folder) as staging:
        adapted.save_pretrained(staging, save_embedding_layers=False)
    adapted.merge_and_unload()


def _further(model: Any, files: ModelFiles, requested: Any) -> tuple[Any, bool]:
    """`_put` the adapter of `files`, to continue its training. Raise ConfigError unless it has the
    `requested` settings."""
    settings = _settings_of(model, files)
    wanted = _layers(model, requested.target_modules)
    old, new = settings.to_dict(), requested.to_dict()
    unlike = [
        f"{name} {old.get(name)!r}, requested {new[name]!r}"
        for name in sorted(new.keys() - _FREE)
        if old.get(name) != new[name]
    ]
    settings.lora_dropout = requested.lora_dropout
    adapted, ends_are_free = _read(model, files, settings, to_train=True)
    layers = {name for name, module in model.named_modules() if hasattr(module, "lora_A")}
    if layers != wanted:
        unlike.append(f"layers {_last_parts(layers)}, requested {_last_parts(wanted)}")
    if unlike:
        raise ConfigError(
            f"{files.name}: an adapter, whose training --lora-r continues only with the same"
            f" settings; it has {'; '.join(unlike)}. Give its settings (--lora-r, --lora-alpha,"
            " --lora-target-modules), or leave out --lora-r: it is then merged into its base, and"
            " all weights are trained."
        )
    return adapted, ends_are_free


def _settings_of(model: Any, files: ModelFiles) -> Any:
    """Return peft's settings of the adapter of `files`."""
    peft = _peft(f"{files.name}: an adapter")
    if getattr(model.config, "quantization_config", None) is not None:
        raise ConfigError(
            f"{files.name}: an adapter on a quantised base, whose weights cannot take it up without"
            " rounding it. Give an adapter on the base as it was before (in its"
            " adapter_config.json: base_model_name_or_path), or merge the two yourself."
        )
    try:
        settings = peft.LoraConfig.from_pretrained(str(files.adapter))
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{files.adapter}: cannot be read by peft: {error}") from error
    if settings.init_lora_weights not in _PLAIN_INITIALISATIONS:
        raise ConfigError(
            f"{files.name}: an adapter that began by {settings.init_lora_weights!r}, which changes"
            " the base's own weights. Merge it with peft as its makers say, and give the merged"
            " folder."
        )
    settings.init_lora_weights, settings.inference_mode = True, False
    return settings


def _read(model: Any, files: ModelFiles, settings: Any, to_train: bool) -> tuple[Any, bool]:
    """`_put`, then load the weights of the adapter of `files` (none on the meta device). One
    `to_train` further must consist of adapters alone."""
    assert files.adapter is not None
    from peft import set_peft_model_state_dict
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    name = settings.base_model_name_or_path
    # peft would warn that the base is called otherwise here.
    settings.base_model_name_or_path = None
    try:
        adapted, ends_are_free = _put(model, settings)
        settings.base_model_name_or_path = name
        if next(model.parameters()).device.type == "meta":
            return adapted, ends_are_free
        compare_adapter(files, adapted, alone=to_train)
        tensors: dict[str, torch.Tensor] = {}
        for file in weight_files(files.adapter):
            tensors |= load_file(file)
        set_peft_model_state_dict(adapted, tensors)
    except ConfigError:
        raise
    except (ValueError, RuntimeError, SafetensorError) as error:
        raise ConfigError(f"{files.name}: does not fit its base {name}: {error}") from error
    return adapted, ends_are_free


def _put(model: Any, settings: Any) -> tuple[Any, bool]:
    """Put adapters into `model` in place; return peft's wrapper, and whether embedding and output
    head have none. Raise ValueError if the settings fit no layer."""
    from peft import get_peft_model

    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    adapted = get_peft_model(model, settings)
    now = (model.get_input_embeddings(), model.get_output_embeddings())
    return adapted, all(new is old for new, old in zip(now, ends, strict=True))


def _layers(model: Any, targets: Any) -> set[str]:
    """Return the layers of `model`, which has no adapters, that peft would give one."""
    if targets != "all-linear":
        ends = tuple(f".{target}" for target in targets)
        return {name for name, _ in model.named_modules() if f".{name}".endswith(ends)}
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    return {
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and module is not head
    }


def _last_parts(layers: set[str]) -> str:
    parts = sorted({layer.rpartition(".")[2] for layer in layers})
    return f"{' '.join(parts)} ({len(layers)} in all)"


def _peft(what: str) -> Any:
    with requires("lora", what):
        import peft
    return peft
