"""Export the student for transformers and vLLM, after a training or from one of its checkpoints.

OUT/model/     the whole model
OUT/adapter/   peft's folder, where adapters are what is trained; model/ has them merged
"""

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from mpd_data.common.errors import ConfigError, DataError
from mpd_data.common.files import atomic_folder
from mpd_data.common.hub import push_command
from mpd_data.common.models import ModelFiles, resolve_model
from mpd_data.common.options import parse
from mpd_data.common.weights import model_files, stored_tensors
from mpd_data.dryrun.show import size_text
from mpd_data.store.run_record import read_record, require_kind
from mpd_train import checkpoint
from mpd_train.card import Trained, write_card
from mpd_train.config import TrainConfig
from mpd_train.model import lora
from mpd_train.model.causal_lm import CausalLM
from mpd_train.model.loading import load_student


def export(student: CausalLM, out: Path, trained: Trained) -> None:
    """Write `out`/model, and `out`/adapter if adapters were trained; they are merged in place. Each
    has a card that says how it was `trained`. Raise OSError where they cannot be written."""
    with _system_errors(out):
        if student.adapted is not None:
            lora.save_and_merge(student.adapted, out / "adapter")
            write_card(out / "adapter", student.files, trained)
        _write_model(student, out / "model")
        write_card(out / "model", student.files, trained)


@contextmanager
def _system_errors(out: Path) -> Iterator[None]:
    """Raise an OSError where safetensors cannot write; its own error is none, and has the number
    in its text."""
    try:
        yield
    except SafetensorError as error:
        if (found := re.search(r"os error (\d+)", str(error))) is None:
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1])), str(out)) from error


def export_checkpoint(given: Path, out: Path, student: str | None = None) -> Path:
    """Export a checkpoint into `out`, which appears when it is complete; return the checkpoint's
    folder. `given`: that folder, or a run's for its newest. `student`: the folder or hub id of the
    run's student, if it has moved. The run is not changed.

    Raise ConfigError if `given` is neither, for another student and if `out` is not empty;
    and like `rehearse`; DataError for an incomplete run.json or checkpoint.
    """
    run, chosen = _find(given)
    out = out.resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        is_model = (out / "model" / "config.json").is_file()
        raise ConfigError(
            f"{out}: not empty, and an export overwrites nothing. Give another --out, or remove it."
            + is_model * f" To upload the model that is in it: {push_command(out / 'model')}"
        )
    config, identity, planned = _read_run(run / "run.json")
    files = _resolve_student(run, config, identity, student)
    rehearse(files, out)
    with atomic_folder(out) as staging:
        loaded = load_student(config, files, torch.device("cpu"), None)
        checkpoint.load_weights(chosen, loaded.model)
        step = int(chosen.name.partition("-")[2])
        export(loaded, staging, Trained(config, out.name, step, planned))
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
                f" {given / 'model'}. To upload it: {push_command(given / 'model')}"
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


def _read_run(path: Path) -> tuple[TrainConfig, dict[str, str], int | None]:
    """Return a run's settings, the identity of its student, and its planned steps, which an older
    one did not record."""
    try:
        saved = read_record(path.parent, "training")
        details, identity = saved["details"], saved["identity"]["student"]
        settings, planned = details["config"], details.get("steps")
    except (KeyError, TypeError) as error:
        raise DataError(
            f"{path}: expected the settings and the student that mpd-train records"
            f" ({type(error).__name__}: {error})."
        ) from error
    return parse(TrainConfig, settings, str(path)), identity, planned


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


def rehearse(files: ModelFiles, out: Path) -> None:
    """Write what an export of the student `files` copies into a folder beside `out`, and delete it.
    Raise ConfigError where a file cannot be read or written, or where the disk has no room for the
    model: before the first step, not after the last."""
    place = out.absolute()
    while not place.is_dir():
        place = place.parent
    try:
        with tempfile.TemporaryDirectory(prefix=".rehearsal-", dir=place) as folder:
            _copy_descriptions(files, Path(folder))
        free = shutil.disk_usage(place).free
    except OSError as error:
        raise ConfigError(
            f"{out}: the model could not be written there at the end: {error}. Fix the permissions"
            " or free space, or give another --out."
        ) from error
    if not any(files.path.glob("*.safetensors")):
        # Of the hub, in a dry run.
        return
    stored = stored_tensors(model_files(files.path)).values()
    needed = sum(tensor.end - tensor.begin for tensor in stored)
    if free < needed:
        raise ConfigError(
            f"{out}: the model needs {size_text(needed)} of disk at the end, and {size_text(free)}"
            " are free. Free space, or give another --out."
        )


def _write_model(student: CausalLM, folder: Path) -> None:
    """Write the student as a model folder for transformers and vLLM: safetensors, each tensor in
    the dtype that it came in; with its config.json, which training does not change, its tokenizer,
    chat template and generation config as they came."""
    with atomic_folder(folder) as staging:
        _write_weights(student, staging)
        _copy_descriptions(student.files, staging)


def _write_weights(student: CausalLM, folder: Path) -> None:
    """Write the weights under the names, and in the dtypes, that the student's files have."""
    from transformers import GenerationConfig

    stored = stored_tensors(model_files(student.files.path))
    dtypes = {name: _DTYPES.get(tensor.dtype, torch.float32) for name, tensor in stored.items()}
    # A checkpoint may lack the prefix of the decoder, which the model's names have.
    prefix = student.model.base_model_prefix
    dtypes = {f"{prefix}.{name}": dtype for name, dtype in dtypes.items()} | dtypes
    usual = torch.float32
    if len(found := set(dtypes.values())) == 1:
        (usual,) = found
    # Parameters name a tied weight once, state_dict twice: converted separately, both copies would
    # be written.
    parameters = student.model.named_parameters()
    state = {name: p.detach().to(dtypes.get(name, usual)) for name, p in parameters}
    persistent = student.model.state_dict()
    state |= {name: b for name, b in student.model.named_buffers() if name in persistent}
    # transformers would check the student's own, which is copied as it came.
    student.model.generation_config = GenerationConfig()
    student.model.save_pretrained(folder, state_dict=state)
    for made in ("config.json", "generation_config.json"):
        (folder / made).unlink(missing_ok=True)
    for file in sorted(folder.glob("*.safetensors")):
        # In some families transformers has other names inside, and joins tensors.
        written = stored_tensors([file])
        names = written.keys() & stored.keys()
        if any(written[name].dtype != stored[name].dtype for name in names):
            tensors = {name: x.to(dtypes.get(name, x.dtype)) for name, x in load_file(file).items()}
            save_file(tensors, file, metadata={"format": "pt"})


def _copy_descriptions(files: ModelFiles, folder: Path) -> None:
    """Copy all but weights: config.json, generation config and code of the model; tokenizer and
    chat template, which an adapter may have of its own."""
    for source in dict.fromkeys((files.path, files.tokenizer_path)):
        for file in source.iterdir():
            described = file.suffix in (".json", ".jinja", ".model", ".txt", ".py")
            of_weights = file.name.endswith(".index.json") or file.name == "adapter_config.json"
            if described and not of_weights and file.is_file():
                shutil.copyfile(file, folder / file.name)


# safetensors' names of what a model is trained and stored in.
_DTYPES = {"F64": torch.float64, "BF16": torch.bfloat16, "F16": torch.float16}
