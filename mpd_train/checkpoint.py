"""Checkpoints of a running training: everything that its next step depends on.

    out/checkpoints/step-000050/   shard-*.safetensors, state.json
    out/checkpoints/best-000040/   the same, weights alone

torch.distributed.checkpoint writes and reads them: each process writes its part, and any number of
processes can resume from it. A checkpoint is written under another name, fsynced, then renamed: one
that exists is whole. Disks and copies damage files all the same, so state.json has their hashes,
which are compared before one is read. Weights and moments are safetensors; nothing is pickled.
"""

import json
import math
import re
import shutil
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor
from torch.distributed import get_rank, get_world_size
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.state_dict_loader import load as load_shards
from torch.distributed.checkpoint.state_dict_saver import save as save_shards
from torch.distributed.tensor import DTensor

from mpd_data.common.errors import DataError, MPDError
from mpd_data.common.files import DISK_ERRORS, atomic_folder, read_json, sha256_of, staging_of
from mpd_data.common.records import Record, require
from mpd_train.distributed import Ranks

KEEP = 2
_MOMENTS = ("exp_avg", "exp_avg_sq")
_BYTES_PER_FILE = 1 << 30
_HASHED_AT_ONCE = 8
_DELETED = (
    "A training deletes all but its newest two checkpoints, and all of them at its end: give the"
    " run's folder to get its newest."
)


_GO_BACK = (
    "Move this folder away and run the same command again: it resumes from the checkpoint before"
    " it, or begins anew without one."
)


class _State(Record):
    """state.json of a step's checkpoint."""

    step: int = Field(ge=0)
    best: float | None
    best_step: int = Field(ge=0)
    misses: int = Field(ge=0)
    # Of older ones unknown.
    files: dict[str, str] | None = None


@dataclass
class Progress:
    """The best validation loss so far, the number of steps before it, and the validations since
    then without a better one."""

    best: float | None = None
    best_step: int = 0
    misses: int = 0


def save(
    folder: Path, step: int, model: Any, optimizer: torch.optim.Optimizer, progress: Progress,
    ranks: Ranks,
) -> None:  # fmt: skip
    """Commit the state after `step` optimiser steps and delete all but the newest two. Raise
    OSError if it cannot be written."""
    state = {"step": step, **asdict(progress)}
    tensors = weights_of(model) | _moments(model, optimizer, step)
    _write(folder / f"step-{step:06d}", tensors, state, ranks)
    if ranks.first:
        for old in checkpoints(folder)[:-KEEP]:
            shutil.rmtree(old)
        for best in folder.glob("best-*"):
            # A run that resumes here looks for this one.
            if best.name != f"best-{progress.best_step:06d}":
                shutil.rmtree(best)


def newest(folder: Path) -> int:
    """Return the step of the newest checkpoint, 0 without any."""
    folders = checkpoints(folder)
    return _step_of(folders[-1]) if folders else 0


def checkpoints(folder: Path) -> list[Path]:
    """Return the folders of the checkpoints, oldest first."""
    named = (path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{6,}", path.name))
    return sorted(named, key=_step_of)


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def weights_of(model: Any) -> dict[str, Tensor]:
    """Return what training changes, by name: all parameters, or the adapters alone. (Not from
    state_dict, which names tied weights twice, while safetensors stores a tensor once.)"""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def _moments(model: Any, optimizer: torch.optim.Optimizer, step: int) -> dict[str, Tensor]:
    """Return AdamW's moments by the names of their parameters. An optimiser that has done no step
    gets moments of zero, into which a checkpoint's are read, and the checkpoint's step number."""
    moments = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        state = optimizer.state[parameter]
        for moment in _MOMENTS:
            state.setdefault(moment, torch.zeros_like(parameter, requires_grad=False))
            moments[f"{moment}.{name}"] = state[moment]
        state["step"] = torch.tensor(float(step), device=parameter.device)
    return moments


def save_best(folder: Path, step: int, model: Any, ranks: Ranks) -> None:
    """Save the weights of the best validation, after `step` steps, next to earlier ones: a killed
    run resumes from before it, and may not reach it again."""
    _write(folder / f"best-{step:06d}", weights_of(model), {}, ranks)


def load_best(folder: Path, progress: Progress, model: Any) -> int:
    """Load the weights of the best validation into `model`; return the number of steps before it.
    Raise DataError like `load`."""
    _read(folder / f"best-{progress.best_step:06d}", weights_of(model), _GO_BACK)
    return progress.best_step


def load_weights(path: Path, model: Any) -> None:
    """Load the weights of the checkpoint in `path`, a step's or the best, into `model`, which is on
    one device. Raise DataError if a part is missing: a running training may delete it meanwhile."""
    _read(path, weights_of(model), _DELETED)


def load(folder: Path, step: int, model: Any, optimizer: torch.optim.Optimizer) -> Progress:
    """Load weights and moments of a step's checkpoint; return its validation progress. Raise
    DataError for one that is damaged or incomplete."""
    path = folder / f"step-{step:06d}"
    state = _state_of(path, _GO_BACK)
    require(_State, state, str(path / "state.json"), _GO_BACK)
    if state["step"] != step:
        raise DataError(f"{path / 'state.json'}: is of step {state['step']}. {_GO_BACK}")
    _read(path, weights_of(model) | _moments(model, optimizer, step), _GO_BACK)
    return Progress(state["best"], state["best_step"], state["misses"])


def _write(final: Path, tensors: dict[str, Tensor], state: dict[str, Any], ranks: Ranks) -> None:
    if ranks.first:
        for stale in final.parent.glob(".*.staging"):
            shutil.rmtree(stale)
    with atomic_folder(final) if ranks.first else nullcontext(staging_of(final)) as staging:
        ranks.wait()
        writer = HuggingFaceStorageWriter(
            str(staging), fqn_to_index_mapping=_files_of(tensors), save_distributed=True
        )
        with _errors_as_they_are():
            save_shards(tensors, storage_writer=writer, no_dist=ranks.size == 1)
        ranks.wait()
        if ranks.first:
            state = state | {"files": _hashes(sorted(staging.glob("*.safetensors")))}
            (staging / "state.json").write_text(json.dumps(state) + "\n", encoding="utf-8")
            if final.exists():
                shutil.rmtree(final)
    ranks.wait()


def _state_of(folder: Path, remedy: str) -> dict[str, Any]:
    """Return what state.json of a checkpoint holds. Raise DataError, which ends with `remedy`."""
    file = folder / "state.json"
    try:
        return read_json(file, remedy)
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror}). {remedy}") from error


def _hashes(files: list[Path]) -> dict[str, str]:
    """Return the SHA-256 of each file, by its name."""
    with ThreadPoolExecutor(_HASHED_AT_ONCE) as pool:
        return dict(zip([file.name for file in files], pool.map(sha256_of, files), strict=True))


def _require_as_written(folder: Path, remedy: str) -> None:
    """Raise DataError, which ends with `remedy`, where files of a checkpoint are not what they were
    when it was written. Of several processes each looks at its share."""
    state = _state_of(folder, remedy)
    known = state.get("files") or {}
    is_shared = torch.distributed.is_initialized()
    rank, size = (get_rank(), get_world_size()) if is_shared else (0, 1)
    names = sorted(known)[rank::size]
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise DataError(f"{folder}: {', '.join(missing)} is missing. {remedy}")
    found = _hashes([folder / name for name in names])
    if damaged := [name for name in names if found[name] != known[name]]:
        raise DataError(
            f"{folder}: damaged: {', '.join(damaged)} has another content than when it was"
            f" written. {remedy}"
        )


def _files_of(tensors: dict[str, Tensor]) -> dict[str, int]:
    """Return the number of each tensor's file, from 1. Files are limited in size because each is
    built in memory before it is written."""
    files, size = {}, 0
    for name, tensor in tensors.items():
        size += tensor.numel() * tensor.element_size()
        files[name] = 1 + size // _BYTES_PER_FILE
    return files


def _read(folder: Path, tensors: dict[str, Tensor], remedy: str) -> None:
    """Read into `tensors`, in place. Raise DataError, which ends with `remedy`, if one cannot be
    read or a part of it is missing."""
    _require_as_written(folder, remedy)
    parts = {name: t.to_local() if isinstance(t, DTensor) else t for name, t in tensors.items()}
    for part in parts.values():
        # Otherwise a part that another process wrote, in a file that is missing, would silently
        # stay as it was.
        part.fill_(math.nan)
    try:
        with _errors_as_they_are():
            load_shards(
                tensors,
                storage_reader=HuggingFaceStorageReader(str(folder)),
                no_dist=not torch.distributed.is_initialized(),
            )
    except Exception as error:  # of torch, safetensors or the file system
        reason = f"{type(error).__name__}: {error}"
        raise DataError(f"{folder}: cannot be read ({reason}). {remedy}") from error
    for name, part in parts.items():
        if part.isnan().any():
            raise DataError(f"{folder}: {name} is incomplete. {remedy}")


def stopped_by(error: OSError, out: Path) -> MPDError:
    """Return what to tell the user of an error of the file system that ended the training in
    `out`."""
    remedy = "once this is mended, run the same command again"
    if error.errno in DISK_ERRORS:
        remedy = "free space or fix the permissions, then run the same command again"
    return MPDError(f"{out}: {error}. Steps up to the last checkpoint are safe: {remedy}.")


@contextmanager
def _errors_as_they_are() -> Iterator[None]:
    """Raise the original error, as of a full disk or an interrupt. Torch wraps it in one of its
    own, which is no Exception."""
    with warnings.catch_warnings():
        # A warning that no_dist was given.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            yield
        except CheckpointException as error:
            raise next(iter(error.failures.values()))[0] from error
