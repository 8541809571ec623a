"""Export the student for transformers and vLLM, after a training or from one of its checkpoints.

OUT/model/     the whole model
OUT/adapter/   peft's folder, where adapters are what is trained; model/ has them merged
"""

import re
import shutil
from pathlib import Path

import torch

from mpd_data.common.errors import ConfigError, DataError
from mpd_data.common.files import atomic_folder, read_json
from mpd_data.common.models import ModelFiles, resolve_model
from mpd_data.common.options import parse
from mpd_data.store.run_record import require_kind
from mpd_train import checkpoint
from mpd_train.config import TrainConfig
from mpd_train.model import lora
from mpd_train.model.causal_lm import CausalLM
from mpd_train.model.loading import load_student


def export(student: CausalLM, out: Path) -> None:
    """Write `out`/model, and `out`/adapter if adapters were trained; they are merged in place."""
    if student.adapted is not None:
        lora.save_and_merge(student.adapted, out / "adapter")
    _write_model(student, out / "model")


def export_checkpoint(given: Path, out: Path, student: str | None = None) -> Path:
    """Export a checkpoint into `out`, which appears when it is complete; return the checkpoint's
    folder. `given`: that folder, or a run's for its newest. `student`: the folder or hub id of the
    run's student, if it has moved. The run is not changed.

    Raise ConfigError if `given` is neither, for another student and if `out` is not empty;
    DataError for an incomplete run.json or checkpoint.
    """
    run, chosen = _find(given)
    out = out.resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(
            f"{out}: not empty, and an export overwrites nothing. Give another --out, or remove it."
        )
    config, identity = _read_run(run / "run.json")
    files = _resolve_student(run, config, identity, student)
    # Made before what takes long, so that a place that cannot be written is told at once.
    with atomic_folder(out) as staging:
        loaded = load_student(config, files, torch.device("cpu"), None)
        checkpoint.load_weights(chosen, loaded.model)
        export(loaded, staging)
    return chosen


def _find(given: Path) -> tuple[Path, Path]:
    """Return the folders of a run and of its checkpoint."""
    require_kind(given, "training")
    if (given / "run.json").is_file():
        if found := checkpoint.checkpoints(given / "checkpoints"):
            return given, found[-1]
        if (given / "model").is_dir():
            raise ConfigError(
                f"{given}: this run has finished, and has no checkpoints any more. Its model is in"
                f" {given / 'model'}."
            )
        raise ConfigError(
            f"{given}: no checkpoint of a training in {given / 'checkpoints'}. The first is written"
            " after --save-steps optimiser steps."
        )
    path = given.resolve()
    whole = re.fullmatch(r"(step|best)-\d+", path.name) and (path / "state.json").is_file()
    if not whole:
        raise ConfigError(
            f"{given}: not a checkpoint. Expected a folder such as RUN/checkpoints/step-000050 with"
            " state.json and *.safetensors, or RUN, the --out of mpd-train."
        )
    run = path.parent.parent
    if not (run / "run.json").is_file():
        raise ConfigError(
            f"{run / 'run.json'}: does not exist, and says which run {given} belongs to. Give a"
            " checkpoint in the folder of its run (RUN/run.json, RUN/checkpoints/step-000050)."
        )
    return run, path


def _read_run(path: Path) -> tuple[TrainConfig, dict[str, str]]:
    """Return a run's settings, and the identity of its student."""
    try:
        saved = read_json(path)
        settings, identity = saved["details"]["config"], saved["identity"]["student"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path}: expected the settings and the student that mpd-train records"
            f" ({type(error).__name__}: {error})."
        ) from error
    return parse(TrainConfig, settings, str(path)), identity


def _resolve_student(
    run: Path, config: TrainConfig, identity: dict[str, str], moved: str | None
) -> ModelFiles:
    """Return the files of the run's student. Raise ConfigError for another one."""
    name = config.student if moved is None else moved
    try:
        files = resolve_model(name, config.revision, config.trust_remote_code)
    except ConfigError as error:
        raise ConfigError(
            f"{error}\n{run} was started with the student {config.student}. If it has moved, give"
            " its new place with --student."
        ) from error
    if files.identity() != identity:
        raise ConfigError(
            f"{name}: not the student that {run} was started with (content"
            f" {files.version[:12]}, expected {identity.get('version', '')[:12]}). Give the folder"
            " or hub id of that one with --student."
        )
    return files


def _write_model(student: CausalLM, folder: Path) -> None:
    """Write the student as a model folder for transformers and vLLM: safetensors in the dtype that
    it was loaded from, with its tokenizer, chat template and generation config."""
    from safetensors import safe_open

    first_file = min(student.files.path.glob("*.safetensors"))
    with safe_open(str(first_file), framework="pt") as weights:
        stored = weights.get_slice(next(iter(weights.keys()))).get_dtype()
    dtype = {"BF16": torch.bfloat16, "F16": torch.float16}.get(stored, torch.float32)
    # Parameters name a tied weight once, state_dict twice: converted separately, both copies would
    # be written.
    state = {name: p.detach().to(dtype) for name, p in student.model.named_parameters()}
    persistent = student.model.state_dict()
    state |= {name: b for name, b in student.model.named_buffers() if name in persistent}
    config = student.model.config
    with atomic_folder(folder) as staging:
        student.model.save_pretrained(staging, state_dict=state)
        config.dtype = dtype
        config.save_pretrained(staging)
        for file in student.files.tokenizer_path.iterdir():
            # Everything but weights and config: tokenizer, chat template, generation config.
            described = file.suffix in (".json", ".jinja", ".model", ".txt")
            of_weights = file.name.endswith(".index.json") or file.name == "adapter_config.json"
            if described and not of_weights and not (staging / file.name).exists():
                shutil.copyfile(file, staging / file.name)
