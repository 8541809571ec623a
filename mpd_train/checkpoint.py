"""Checkpoints of a running training: everything that its next step depends on.

    out/checkpoints/step-000050/   shard-*.safetensors, state.json
    out/checkpoints/best-000040/   the same, weights alone

torch.distributed.checkpoint writes and reads them: each process writes its part, and any number of
processes goes on from it. Written under another name, fsynced, then renamed: a checkpoint that is
there is whole. Weights and moments are safetensors; nothing is ever pickled.
"""

import json
import math
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.state_dict_loader import load as load_shards
from torch.distributed.checkpoint.state_dict_saver import save as save_shards

from mpd_data.common.errors import DataError
from mpd_data.common.files import atomic_folder, staging_of
from mpd_train.distributed import Ranks

KEEP = 2
_MOMENTS = ("exp_avg", "exp_avg_sq")
_BYTES_PER_FILE = 1 << 30
_DELETED = (
    "A training deletes all but its newest two checkpoints, and all of them at its end: give the"
    " run's folder, for the newest there is."
)


@dataclass
class Progress:
    """The best validation loss so far, the step it was found after, and the validations since
    that did not better it."""

    best: float | None = None
    best_step: int = 0
    misses: int = 0


def save(
    folder: Path,
    step: int,
    model: Any,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    ranks: Ranks,
) -> None:
    """Commits the state after `step` optimiser steps and drops all but the newest two. Raises
    OSError where the disk gives out."""
    state = {"step": step, **asdict(progress)}
    tensors = weights_of(model) | _moments(model, optimizer, step)
    _write(folder / f"step-{step:06d}", tensors, state, ranks)
    if ranks.first:
        for old in checkpoints(folder)[:-KEEP]:
            shutil.rmtree(old)
        for best in folder.glob("best-*"):
            # A restart begins here, and looks for this one.
            if best.name != f"best-{progress.best_step:06d}":
                shutil.rmtree(best)


def newest(folder: Path) -> int:
    """The step of the newest whole checkpoint; 0 where there is none."""
    found = checkpoints(folder)
    return int(found[-1].name.removeprefix("step-")) if found else 0


def checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    return sorted(folder.glob("step-*"))


def weights_of(model: Any) -> dict[str, Tensor]:
    """What training changes, by name: all parameters, or the adapters alone. state_dict names tied
    weights twice, and safetensors stores a tensor once: parameters do."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def _moments(model: Any, optimizer: torch.optim.Optimizer, step: int) -> dict[str, Tensor]:
    """AdamW's moments by the names of their parameters. An optimiser that has done no step gets
    some of zero, into which a checkpoint's can be read; the number of steps is the checkpoint's."""
    found = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        state = optimizer.state[parameter]
        for moment in _MOMENTS:
            state.setdefault(moment, torch.zeros_like(parameter, requires_grad=False))
            found[f"{moment}.{name}"] = state[moment]
        state["step"] = torch.tensor(float(step), device=parameter.device)
    return found


def save_best(folder: Path, step: int, model: Any, ranks: Ranks) -> None:
    """Keeps the weights of the best validation, that after `step`, beside earlier ones: a killed
    run goes on from before it, and may not find it again."""
    _write(folder / f"best-{step:06d}", weights_of(model), {}, ranks)


def load_best(folder: Path, progress: Progress, model: Any) -> None:
    """Puts the weights of the best validation in place."""
    _read(folder / f"best-{progress.best_step:06d}", weights_of(model))


def load_weights(path: Path, model: Any) -> None:
    """Puts the weights of the checkpoint in `path`, a step's or the best, in place; they lie on one
    device. A training that goes on may delete it meanwhile: raises DataError where a part is
    missing."""
    weights = weights_of(model)
    for weight in weights.values():
        # The part of a weight that another process wrote, in a file that is gone, would stay as it
        # was without a word.
        weight.fill_(math.nan)
    try:
        _read(path, weights)
    except Exception as error:  # torch, safetensors and the file system have each their own
        reason = f"{type(error).__name__}: {error}"
        raise DataError(f"{path}: cannot be read ({reason}). {_DELETED}") from error
    for name, weight in weights.items():
        if weight.isnan().any():
            raise DataError(f"{path}: {name} is not all there. {_DELETED}")


def load(folder: Path, step: int, model: Any, optimizer: torch.optim.Optimizer) -> Progress:
    """Puts weights and moments of a step's checkpoint in place; returns how validation stood."""
    path = folder / f"step-{step:06d}"
    state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    _read(path, weights_of(model) | _moments(model, optimizer, step))
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
            (staging / "state.json").write_text(json.dumps(state) + "\n", encoding="utf-8")
            if final.exists():
                shutil.rmtree(final)
    ranks.wait()


def _files_of(tensors: dict[str, Tensor]) -> dict[str, int]:
    """Which file each tensor goes to, from 1: a file is put together in memory before it is
    written."""
    files, size = {}, 0
    for name, tensor in tensors.items():
        size += tensor.numel() * tensor.element_size()
        files[name] = 1 + size // _BYTES_PER_FILE
    return files


def _read(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Into `tensors`, in place."""
    with _errors_as_they_are():
        load_shards(
            tensors,
            storage_reader=HuggingFaceStorageReader(str(folder)),
            no_dist=not torch.distributed.is_initialized(),
        )


@contextmanager
def _errors_as_they_are() -> Iterator[None]:
    """Torch wraps whatever goes wrong, a full disk or an interrupt, in an error of its own, which
    is no Exception."""
    with warnings.catch_warnings():
        # That it was told to work without other processes.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            yield
        except CheckpointException as error:
            raise next(iter(error.failures.values()))[0] from error
