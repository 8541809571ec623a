"""Checkpoints of a running training: everything that its next step depends on.

    out/checkpoints/step-000050/   shard-*.safetensors, state.json
    out/checkpoints/best-000040/   the same, weights alone

torch.distributed.checkpoint writes and reads them: each process writes its part, and any number of
processes goes on from it. Written under another name, fsynced, then renamed: a checkpoint that is
there is whole. Weights and moments are safetensors; nothing is ever pickled.
"""

import json
import shutil
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.state_dict_loader import load as load_shards
from torch.distributed.checkpoint.state_dict_saver import save as save_shards

from mpd_data.shards import fsync_directory, fsync_file
from mpd_train.parallel import Ranks

KEEP = 2
_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class Progress:
    """The best validation loss so far, and the validations since that did not better it."""

    best: float | None = None
    misses: int = 0


def save(
    folder: Path,
    step: int,
    model: Any,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    ranks: Ranks,
) -> None:
    """Commits the state after `step` optimiser steps and drops all but the newest two."""
    state = {"step": step, **asdict(progress)}
    tensors = weights_of(model) | _moments(model, optimizer, step)
    _write(folder / f"step-{step:06d}", tensors, state, ranks)
    if ranks.first:
        for old in checkpoints(folder)[:-KEEP]:
            shutil.rmtree(old)


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


def progress_of(path: Path) -> Progress:
    """The validation state that a checkpoint was saved with."""
    state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    return Progress(state["best"], state["misses"])


def save_best(folder: Path, step: int, model: Any, ranks: Ranks) -> None:
    """Keeps the weights of the best validation, that after `step`. A killed run that goes on from
    before them finds the same ones again."""
    _write(folder / f"best-{step:06d}", weights_of(model), {}, ranks)
    if ranks.first:
        for old in sorted(folder.glob("best-*"))[:-1]:
            shutil.rmtree(old)


def load_best(folder: Path, model: Any) -> None:
    """Puts the weights of the best validation in place."""
    _read(max(folder.glob("best-*")), weights_of(model))


def load(path: Path, model: Any, optimizer: torch.optim.Optimizer) -> int:
    """Puts a checkpoint's weights and moments in place; returns its step."""
    step: int = json.loads((path / "state.json").read_text(encoding="utf-8"))["step"]
    _read(path, weights_of(model) | _moments(model, optimizer, step))
    return step


def place(weights: dict[str, Tensor], model: Any) -> None:
    """Puts weights, as `weights_of` names them, into a model that is in one piece."""
    with torch.no_grad():
        for name, parameter in weights_of(model).items():
            parameter.copy_(weights[name])


def _write(final: Path, tensors: dict[str, Tensor], state: dict[str, Any], ranks: Ranks) -> None:
    staging = final.with_name(".staging")
    if ranks.first:
        if staging.exists():
            shutil.rmtree(staging)
        staging.mkdir(parents=True)
    ranks.wait()
    writer = HuggingFaceStorageWriter(str(staging), save_distributed=True)
    with warnings.catch_warnings():
        # That it was told to work without other processes.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        save_shards(tensors, storage_writer=writer, no_dist=ranks.size == 1)
    ranks.wait()
    if ranks.first:
        (staging / "state.json").write_text(json.dumps(state) + "\n", encoding="utf-8")
        for file in staging.iterdir():
            fsync_file(file)
        fsync_directory(staging)
        if final.exists():
            shutil.rmtree(final)
        staging.replace(final)
        fsync_directory(final.parent)
    ranks.wait()


def _read(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Into `tensors`, in place."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        load_shards(
            tensors,
            storage_reader=HuggingFaceStorageReader(str(folder)),
            no_dist=not torch.distributed.is_initialized(),
        )
