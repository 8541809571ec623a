"""Check and prepare a training, for the run and for the dry run, and claim its folder."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mpd_data.common.errors import ConfigError
from mpd_data.common.machine import provenance
from mpd_data.common.models import ModelFiles, load_tokenizer, require_same_tokenizer, resolve_model
from mpd_data.common.weights import require_whole
from mpd_data.store.run_record import read_record, require_kind, require_same_settings, write_record
from mpd_train.config import TrainConfig
from mpd_train.data.shard_set import ShardSet
from mpd_train.model import liger
from mpd_train.model.attention import attention
from mpd_train.model.causal_lm import CausalLM
from mpd_train.model.device import choose_device, compute_dtype
from mpd_train.model.loading import load_student
from mpd_train.tracking import load_trackers

# Settings that may differ on resuming: paths, and models, which are identified by their content.
_NOT_IDENTITY = {
    "out", "shards", "student", "teacher", "save_steps", "device", "report_to", "max_loss",
    "activation_offload", "compile", "liger_kernel", "teacher_offload",
}  # fmt: skip


@dataclass(frozen=True)
class TrainSetup:
    """What a run knows before it loads a model. A dry run has the same without weights."""

    config: TrainConfig
    student: ModelFiles
    teacher: ModelFiles | None
    device: torch.device
    dtype: torch.dtype
    attn_implementation: str | None
    shards: ShardSet
    vocab_size: int
    tracker_modules: dict[str, Any]
    identity: dict[str, Any]


def check_settings(config: TrainConfig) -> tuple[dict[str, Any], torch.device, torch.dtype]:
    """Return the trackers' modules, the device and the compute dtype. Raise ConfigError for
    settings that contradict each other or the machine."""
    validation = config.validation
    if validation.early_stopping_patience > 0 and validation.validation_fraction == 0:
        raise ConfigError(
            "--early-stopping-patience needs held-out prompts: give --validation-fraction too."
        )
    if config.teacher_offload and config.teacher is None:
        raise ConfigError("--teacher-offload: give --teacher too, the model to offload.")
    if not config.loss.tail and config.teacher is not None:
        raise ConfigError(
            "--no-tail: with --teacher the whole vocabulary is used, which has no tail. Leave out"
            " one of the two."
        )
    if not config.loss.tail and config.loss.divergence == "reverse_kl":
        raise ConfigError(
            "--no-tail cannot be used with --divergence reverse_kl: without the tail the teacher"
            " has zero probability outside the top K, so the divergence is infinite. Give another"
            " --divergence, or keep the tail."
        )
    if config.loss.divergence_clip is not None and config.loss.entry_clip is not None:
        raise ConfigError("--divergence-clip and --entry-clip are two clips: give one of them.")
    targets = config.loss.targets
    if config.loss.leak_nats is not None and not config.loss.by_token:
        raise ConfigError("--leak-nats: give --targets mixed or masked too, which depend on it.")
    if targets == "mixed" and config.teacher is not None:
        raise ConfigError(
            "--targets mixed: with --teacher each token has one distribution, that of the teacher"
            " in the process. Leave out --teacher, or give --targets masked."
        )
    tracker_modules = load_trackers(list(config.report_to))
    device = choose_device(config.device)
    if config.liger_kernel:
        liger.require(device)
    return tracker_modules, device, compute_dtype(device, config.dtype)


def check_models(
    config: TrainConfig, student: ModelFiles, teacher: ModelFiles | None, device: torch.device,
    dtype: torch.dtype,
) -> str | None:  # fmt: skip
    """Return the attention to load both models with (`attention`), from their configurations and
    the headers of their files. Raise ConfigError for a quantised student, for adapters, to be
    trained or to be merged, that do not fit their models, for files that are not the whole model
    (`require_whole`), and for attention that the models do not have."""
    name = "quantization_config"
    # A model of several modalities may have it for the text alone.
    quantised = student.config.get(name) or student.text_config.get(name)
    # Adapters on a quantised base are refused in lora.py.
    if quantised is not None and student.adapter is None:
        raise ConfigError(
            f"{student.name}: a quantised model ({quantised.get('quant_method', 'unknown')}), whose"
            " weights are too coarse to be trained. Give the model that it was made from, and"
            " quantise the trained one."
        )
    meta = torch.device("meta")
    if config.lora.lora_r > 0 or student.adapter is not None:
        load_student(config, student, meta, None)
    if teacher is not None and teacher.adapter is not None:
        CausalLM(teacher, meta, torch.float32, config.trust_remote_code)
    models = [student] if teacher is None else [student, teacher]
    for model in models:
        require_whole(model, config.trust_remote_code)
    return attention(config, device, dtype, models)


def setup(config: TrainConfig, weights: bool = True, overwrite: bool = False) -> TrainSetup:
    """Check everything that can be checked without a model. Raise ConfigError or DataError.

    Without `weights`, for a dry run, no weights are fetched or hashed, and the folder must have
    been started with these settings unless `overwrite`, as a run finds when it claims the folder.
    """
    code, resuming_dry = config.trust_remote_code, not weights and not overwrite
    require_kind(config.out, "training")
    student = resolve_model(config.student, config.revision, code, weights)
    teacher = None
    if config.teacher is not None:
        teacher = resolve_model(config.teacher, config.teacher_revision, code, weights)
    if resuming_dry and (saved := read_record(config.out, "training").get("identity")):
        student = student.as_saved(saved.get("student"))
        teacher = teacher and teacher.as_saved(saved.get("teacher"))
    tracker_modules, device, dtype = check_settings(config)
    shards = ShardSet(config.shards, config.loss, load_tokenizer(student, code))
    vocab_size = int(shards.metadata["vocab_size"])
    recorded, temperature = shards.metadata["score_temperature"], config.loss.kl_temperature
    if teacher is None and temperature != recorded:
        raise ConfigError(
            f"--kl-temperature {temperature:g}: the shards' records are the teacher's at"
            f" {recorded:g}, and a tail cannot be brought to another temperature. Give --teacher,"
            " whose full vocabulary is then used."
        )
    for files in (student, teacher):
        if files is not None:
            if files.vocab_size < vocab_size:
                raise ConfigError(
                    f"{files.name}: has {files.vocab_size} embedding rows, the shards are scored"
                    f" over {vocab_size}. Use the models that the shards were made with."
                )
            tokenizer = load_tokenizer(files, code)
            require_same_tokenizer(
                shards.metadata["tokenizer"], tokenizer, str(config.shards[0]), files.name,
                shards.metadata["teacher"]["name"],
            )  # fmt: skip
            _require_room(shards, files)
    attn_implementation = check_models(config, student, teacher, device, dtype)
    identity: dict[str, Any] = {
        "config": config.model_dump(mode="json", exclude=_NOT_IDENTITY),
        "shards": shards.identity(),
        "student": student.identity(),
        "teacher": None if teacher is None else teacher.identity(),
        # Increased when the same settings give other packs than before.
        "packing": 2,
    }
    if config.loss.by_token:
        # Changed when the same settings make other targets than before.
        identity["given_away"] = "numbers"
    if resuming_dry:
        check_claim(config.out, identity)
    return TrainSetup(
        config, student, teacher, device, dtype, attn_implementation, shards, vocab_size,
        tracker_modules, identity,
    )  # fmt: skip


def _require_room(shards: ShardSet, files: ModelFiles) -> None:
    """Raise ConfigError for a kept row that is longer than the context of a model."""
    for group in shards.groups:
        over = np.flatnonzero((group.num_loss_tokens > 0) & (group.num_tokens > files.context))
        if over.size:
            row = int(over[0])
            raise ConfigError(
                f"{group.path}, row {row} of row group {group.index}: {group.num_tokens[row]}"
                f" tokens, and the context of {files.name} is {files.context_text}. Leave such rows"
                " out (mpd-gen rewrite --refilter with a lower --max-ratio), or make the round anew"
                " with shorter drafts (--max-tokens)."
            )


def check_claim(out: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """Return what run.json holds of the training in `out`, {} where it is new. Raise ConfigError
    where it began with other settings."""
    saved = read_record(out, "training")
    remedy = (
        "For other settings give another --out, or run mpd-train with --overwrite, which deletes"
        " what this training has written."
    )
    has_results = any((out / name).exists() for name in ("model", "checkpoints"))
    require_same_settings(out, "mpd-train", saved.get("identity"), identity, remedy, has_results)
    return saved


def claim(
    out: Path,
    identity: dict[str, Any],
    config: TrainConfig,
    device: str,
    steps: int,
    overwrite: bool,
) -> None:
    """Record settings, device and number of steps. Raise ConfigError like `check_claim`."""
    require_kind(out, "training")
    doomed = out / ".discarded"
    if doomed.exists():
        shutil.rmtree(doomed)
    if overwrite:
        doomed.mkdir(parents=True)
        # Away at once under their names, the model first: a kill leaves no half of it behind.
        folders = ("model", "adapter", "tensorboard", "checkpoints", "rows")
        for name in (*folders, "metrics.jsonl", "tracker.json", "run.json"):
            if (out / name).exists():
                (out / name).replace(doomed / name)
        shutil.rmtree(doomed)
    if not check_claim(out, identity):
        about = {"device": device, "steps": steps, **provenance()}
        details = {"config": config.model_dump(mode="json"), **about}
        write_record(out, "training", {"identity": identity, "details": details})
