"""Checkpoints of a running training: everything that its next step depends on.

    out/checkpoints/step-000050/   model.safetensors, optimizer.safetensors, state.json

Written under another name, fsynced, then renamed: a checkpoint that is there is whole. Weights
and moments are safetensors; nothing is ever pickled.
"""

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from mpd_data.shards import fsync_directory, fsync_file

KEEP = 2


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
    progress: Progress | None = None,
) -> None:
    """Commits the state after `step` optimiser steps and drops all but the newest two."""
    final = folder / f"step-{step:06d}"
    staging = folder / ".staging"
    if staging.exists():
        shutil.rmtree(staging)
    staging.mkdir(parents=True)
    weights = {name: p.detach().contiguous() for name, p in _trained(model).items()}
    save_file(weights, staging / "model.safetensors")
    moments = {
        f"{index}.{key}": value.contiguous()
        for index, state in optimizer.state_dict()["state"].items()
        for key, value in state.items()
    }
    save_file(moments, staging / "optimizer.safetensors")
    state = {"step": step, **asdict(progress or Progress())}
    (staging / "state.json").write_text(json.dumps(state) + "\n", encoding="utf-8")
    for file in staging.iterdir():
        fsync_file(file)
    fsync_directory(staging)
    if final.exists():
        shutil.rmtree(final)
    staging.replace(final)
    fsync_directory(folder)
    for old in checkpoints(folder)[:-KEEP]:
        shutil.rmtree(old)


def checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    return sorted(folder.glob("step-*"))


def _trained(model: Any) -> dict[str, torch.nn.Parameter]:
    """What training changes: all parameters, or the adapters alone. state_dict names tied weights
    twice, and safetensors stores a tensor once: parameters do."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def progress_of(path: Path) -> Progress:
    """The validation state that a checkpoint was saved with."""
    state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    return Progress(state["best"], state["misses"])


def save_best(folder: Path, model: Any) -> None:
    """Keeps the weights of the best validation as best.safetensors. A killed run that goes on
    from before them finds the same ones again."""
    folder.mkdir(parents=True, exist_ok=True)
    staging = folder / ".best.staging"
    save_file({name: p.detach().contiguous() for name, p in _trained(model).items()}, staging)
    fsync_file(staging)
    staging.replace(folder / "best.safetensors")
    fsync_directory(folder)


def load_best(folder: Path, model: Any) -> None:
    """Puts the weights of the best validation in place."""
    _place(load_file(folder / "best.safetensors"), model)


def _place(weights: dict[str, torch.Tensor], model: Any) -> None:
    with torch.no_grad():
        for name, parameter in _trained(model).items():
            parameter.copy_(weights[name])


def load(path: Path, model: Any, optimizer: torch.optim.Optimizer) -> int:
    """Puts a checkpoint's weights and moments in place; returns its step."""
    _place(load_file(path / "model.safetensors"), model)
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in load_file(path / "optimizer.safetensors").items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict(
        {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
    )
    step: int = json.loads((path / "state.json").read_text(encoding="utf-8"))["step"]
    return step
