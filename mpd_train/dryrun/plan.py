"""`mpd-train --dry-run`: what a training would do, found without weights and without writing.

The model is built on torch's meta device, from its configuration alone, to count what is trained;
time is that of a training whose metrics.jsonl lies in this run's folder or beside it.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mpd_data.common.models import (
    ModelFiles,
    load_tokenizer,
    require_same_tokenizer,
    resolve_model,
)
from mpd_data.common.options import arguments
from mpd_data.dryrun.learned import siblings
from mpd_data.dryrun.plan import StagePlan
from mpd_data.dryrun.show import first_reasons, size_text
from mpd_train import checkpoint
from mpd_train.config import TrainConfig
from mpd_train.data.packing import overlong, split_packs
from mpd_train.distributed import ranks_asked_for
from mpd_train.dryrun.memory import plan_memory
from mpd_train.model import lora
from mpd_train.model.causal_lm import skeleton
from mpd_train.setup import TrainSetup, check_models, check_settings

# What a token's time depends on beside the model and the machine.
_PACE = (
    "pack_length",
    "gradient_checkpointing",
    "compile",
    "liger_kernel",
    "teacher_offload",
    "dtype",
    "lora",
    "teacher_revision",
    "gradient_accumulation_steps",
)


@dataclass(frozen=True)
class Footprint:
    """Parameters of the student, those that are trained, and the bytes that a run leaves on the
    way (`checkpoint_bytes`, freed at its end) and for good (`export_bytes`)."""

    parameters: int
    trained: int
    checkpoint_bytes: int
    export_bytes: int

    @property
    def disk_bytes(self) -> int:
        return self.checkpoint_bytes + self.export_bytes

    def details(self) -> dict[str, str]:
        return {
            "parameters": f"{self.parameters:,}",
            "trained parameters": f"{self.trained:,}",
            "checkpoints on the way": str(size_text(self.checkpoint_bytes)),
            "export": str(size_text(self.export_bytes)),
        }


def footprint(config: TrainConfig, student: ModelFiles, num_steps: int) -> Footprint:
    """What the run takes on disk. Raises ConfigError for adapters that the student cannot take."""
    model = skeleton(student, config.trust_remote_code, torch.float32)
    parameters = sum(p.numel() for p in model.parameters())
    if config.lora.lora_r > 0:
        lora.attach(model, student, config.lora, config.revision, config.seed)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    # Weights and two moments in float32; a new one is whole before the oldest goes.
    kept = min(max(num_steps - 1, 0) // config.save_steps, checkpoint.KEEP + 1)
    best = 8 * trained if config.validation.early_stopping_patience > 0 else 0
    adapter = 4 * trained if config.lora.lora_r > 0 else 0
    return Footprint(
        parameters,
        trained,
        kept * 12 * trained + best,
        parameters * _bytes_of_weight(student) + adapter,
    )


def _bytes_of_weight(student: ModelFiles) -> int:
    """Of the precision that the configuration names, in which the student is exported."""
    values = json.loads((student.path / "config.json").read_text(encoding="utf-8"))
    name = values.get("dtype") or values.get("torch_dtype") or "float32"
    return torch.finfo(getattr(torch, str(name).removeprefix("torch."), torch.float32)).bits // 8


def pace(config: TrainConfig) -> dict[str, Any] | None:
    """`seconds_per_token`, `device` and `folder` of the steps in this run's metrics.jsonl, else of
    the newest training beside it with the same student, packs and adapters. A round's student is
    the one before, trained: where the name differs the settings decide. None where there is
    none."""
    by_settings: dict[str, Any] | None = None
    for folder in siblings(config.out, "metrics.jsonl"):
        try:
            saved = json.loads((folder / "run.json").read_text(encoding="utf-8"))["details"]
            steps = list(_steps(folder / "metrics.jsonl"))
            given = saved["config"]
            seconds, tokens = sum(s["seconds"] for s in steps), sum(s["tokens"] for s in steps)
        except (OSError, ValueError, KeyError):
            # What cannot be read teaches nothing.
            continue
        now = config.model_dump(mode="json", include=set(_PACE) | {"teacher"})
        if not tokens or now != {name: given.get(name) for name in now}:
            continue
        found = {
            "seconds_per_token": seconds / tokens,
            "device": saved.get("device", "device not recorded"),
            "folder": f"{folder} ({len(steps):,} steps)",
        }
        if folder == config.out or given["student"] == config.student:
            return found
        by_settings = by_settings or found
    return by_settings


def plan_train_ahead(
    config: TrainConfig,
    student: ModelFiles,
    tokenizer: str,
    rows: int,
    longest: int,
    expected: tuple[int, int] | None,
    at_most: int,
) -> StagePlan:
    """The same for a round that is not there yet. `tokenizer`: content hash; `rows`: the most
    that can be kept; `longest`: tokens of the longest row; `expected`: rows and tokens to expect
    where that is known; `at_most`: tokens of all rows at their longest."""
    _, device, dtype = check_settings(config)
    teacher = None
    if config.teacher is not None:
        code = config.trust_remote_code
        teacher = resolve_model(config.teacher, config.teacher_revision, code, weights=False)
        require_same_tokenizer(tokenizer, load_tokenizer(teacher, code), student.name, teacher.name)
    check_models(config, student, teacher, device, dtype)
    per_step = config.pack_length * config.gradient_accumulation_steps
    if config.max_steps is None:
        at_most *= config.epochs
        tokens = None if expected is None else expected[1] * config.epochs
        steps = -(-(at_most if tokens is None else tokens) // per_step)
    else:
        steps = config.max_steps
        at_most = tokens = steps * per_step
    size_of = footprint(config, student, steps)
    known = pace(config)
    return StagePlan(
        command="mpd-train",
        out=str(config.out),
        settings=arguments(config),
        rows=rows if expected is None else expected[0],
        committed=0,
        owed=rows if expected is None else expected[0],
        tokens_expected=tokens,
        tokens_at_most=at_most,
        disk_bytes=size_of.disk_bytes,
        seconds=None if known is None or tokens is None else tokens * known["seconds_per_token"],
        device=None if known is None else known["device"],
        learned_from=None if known is None else known["folder"],
        details={"sequence, max": longest, "steps": steps, **size_of.details()},
    )


def _steps(path: Path) -> Iterator[dict[str, Any]]:
    # The last line may be torn by a kill.
    for line in path.read_text(encoding="utf-8").split("\n")[:-1]:
        record = json.loads(line)
        if "tokens" in record:
            yield record


def plan_train(prepared: TrainSetup, overwrite: bool = False) -> StagePlan:
    """Plan what `train` would do, without a model and without writing anything."""
    config, student, shards = prepared.config, prepared.student, prepared.shards
    finished = (config.out / "model").is_dir() and not overwrite
    committed, owed = (shards.num_rows, 0) if finished else (0, shards.num_rows)
    details: dict[str, Any] = {"device": str(prepared.device)}
    reasons = overlong(shards, config.pack_length)
    lengths = shards.lengths()
    tokens = seconds = None
    steps = 0
    found = pace(config)
    notes: list[str] = []
    if not reasons:
        packs, held_out = split_packs(shards, config)
        size = config.gradient_accumulation_steps
        steps = -(-len(packs) // size)
        done = 0
        if not overwrite:
            done = checkpoint.newest(config.out / "checkpoints")
        tokens = 0 if finished else sum(pack.num_tokens for pack in packs[done * size :])
        total = sum(pack.num_tokens for pack in packs)
        rows = sum(len(pack.rows) for pack in packs)
        details |= {
            "packs": len(packs),
            "packs filled": f"{total / (len(packs) * config.pack_length):.1%}",
            "steps": steps,
            "steps done": done,
            "rows per step, mean": round(rows / steps, 1),
            "loss tokens": sum(pack.num_loss_tokens for pack in packs),
            "held-out rows": sum(len(pack.rows) for pack in held_out),
        }
        if found is not None:
            seconds = round(tokens * found["seconds_per_token"], 1)
        largest = max(packs, key=lambda pack: pack.num_tokens)
        memory = plan_memory(
            config,
            student,
            prepared.teacher,
            (largest.num_tokens, max(pack.num_loss_tokens for pack in packs)),
            int(shards.metadata["num_logprobs"]),
            prepared.vocab_size,
            prepared.device,
            prepared.dtype,
            ranks_asked_for(),
        )
        details |= {"tokens per step, mean": round(total / steps), **memory.details()}
        notes += memory.advice(config, prepared.device)
    size_of = footprint(config, student, steps)
    return StagePlan(
        command="mpd-train",
        out=str(config.out),
        settings=arguments(config),
        rows=shards.num_rows,
        committed=committed,
        owed=owed,
        prompt_tokens=None,
        tokens_expected=tokens,
        tokens_at_most=tokens,
        failing=len(reasons),
        reasons=first_reasons(reasons),
        disk_bytes=0 if finished else size_of.disk_bytes,
        seconds=seconds,
        device=None if found is None else found["device"],
        learned_from=None if found is None else found["folder"],
        details={"sequence, mean": round(sum(lengths) / len(lengths), 1)}
        | {"sequence, max": max(lengths), **details, **size_of.details()},
        notes=notes
        + ["This run has finished."] * finished
        + ["The real run refuses to start while a row does not fit."] * bool(reasons),
    )
