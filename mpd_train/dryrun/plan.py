"""Plan a training without running it: steps, memory, disk, time.

The model is built on torch's meta device, from its configuration alone, to count what is trained.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mpd_data.common.models import ModelFiles, load_tokenizer, require_same_tokenizer, resolve_model
from mpd_data.common.weights import skeleton
from mpd_data.dryrun.learned import Learned
from mpd_data.dryrun.plan import StagePlan, make_plan
from mpd_data.dryrun.show import size_text
from mpd_data.store.run_record import read_record
from mpd_data.store.trainings import read_metrics
from mpd_train import checkpoint
from mpd_train.config import TrainConfig
from mpd_train.data.packing import overlong, split_packs
from mpd_train.data.targets import Targets
from mpd_train.dryrun.memory import plan_memory
from mpd_train.export import rehearse
from mpd_train.model import lora
from mpd_train.setup import TrainSetup, check_models, check_settings


def _plan(
    config: TrainConfig, student: ModelFiles, learned: Learned | None, rows: int, num_steps: int,
    details: dict[str, Any], finished: bool = False, **fields: Any,
) -> StagePlan:  # fmt: skip
    """Plan a training of `num_steps`, with the disk that it takes for checkpoints, which are freed
    at its end, and for its export. Raise ConfigError for adapters that do not fit the student."""
    model = skeleton(student, config.trust_remote_code, torch.float32)
    parameters = sum(p.numel() for p in model.parameters())
    if config.lora.lora_r > 0:
        lora.attach(model, student, config.lora, config.revision, config.seed)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    # Weights and two moments in float32; a new one is complete before the oldest is deleted.
    checkpoints = min(max(num_steps - 1, 0) // config.save_steps, checkpoint.KEEP + 1)
    best = 8 * trained if config.validation.early_stopping_patience > 0 else 0
    checkpoint_bytes = checkpoints * 12 * trained + best
    # The export has the precision that the configuration names.
    name = student.config.get("dtype") or student.config.get("torch_dtype") or "float32"
    dtype = getattr(torch, str(name).removeprefix("torch."), torch.float32)
    adapter = 4 * trained if config.lora.lora_r > 0 else 0
    export_bytes = parameters * torch.finfo(dtype).bits // 8 + adapter
    sizes = {
        "parameters": f"{parameters:,}",
        "trained parameters": f"{trained:,}",
        "checkpoints on the way": size_text(checkpoint_bytes),
        "export": size_text(export_bytes),
    }
    return make_plan(
        "mpd-train",
        config,
        config.out,
        learned,
        rows=rows,
        committed=rows if finished else 0,
        remaining=0 if finished else rows,
        disk_bytes=0 if finished else checkpoint_bytes + export_bytes,
        details=details | sizes,
        **fields,
    )


@dataclass(frozen=True)
class RoundAhead:
    """What is known of the kept rows of a round that does not exist yet. `tokenizer`: content hash;
    `score_context`: of all rows; `rows` and `tokens`: at most; `longest_prompt` and
    `longest_rewrite`: in tokens; `expected`: rows and tokens to expect, where earlier rows tell."""

    tokenizer: str
    score_context: str
    rows: int
    tokens: int
    longest_prompt: int
    longest_rewrite: int
    expected: tuple[int, int] | None


def learn_steps(out: Path) -> Learned | None:
    """Return the speed of the steps in a training's metrics.jsonl, None where there are none."""
    steps = [step for step in read_metrics(out) if step.get("tokens")]
    if not steps:
        return None
    details = read_record(out, "training").get("details", {})
    pace = sum(step.get("seconds", 0.0) for step in steps) / sum(step["tokens"] for step in steps)
    device = details.get("device", "device not recorded")
    return Learned(f"{out} ({len(steps):,} steps)", pace, device)


def plan_train_ahead(
    config: TrainConfig, student: ModelFiles, ahead: RoundAhead, learned: Learned | None
) -> StagePlan:
    """Plan the training of a round that does not exist yet. Raise ConfigError where the run would
    raise it whatever the rows are."""
    _, device, dtype = check_settings(config)
    Targets.of(config.loss, ahead.score_context, "this round")
    teacher, code = None, config.trust_remote_code
    if config.teacher is not None:
        teacher = resolve_model(config.teacher, config.teacher_revision, code, weights=False)
        tokenizer = load_tokenizer(teacher, code)
        name = student.name
        require_same_tokenizer(ahead.tokenizer, tokenizer, name, teacher.name, name)
    check_models(config, student, teacher, device, dtype)
    rows, tokens = ahead.rows, None
    at_most = math.ceil(ahead.tokens * config.epochs)
    if ahead.expected is not None:
        rows, tokens = ahead.expected[0], math.ceil(ahead.expected[1] * config.epochs)
    per_step = config.pack_length * config.gradient_accumulation_steps
    steps = -(-(at_most if tokens is None else tokens) // per_step)
    if config.max_steps is not None:
        steps = config.max_steps
        at_most = tokens = steps * per_step
    details = {"sequence, max": ahead.longest_prompt + ahead.longest_rewrite, "steps": steps}
    return _plan(
        config, student, learned, rows, steps, details,
        tokens_expected=tokens, tokens_at_most=at_most,
    )  # fmt: skip


def plan_train(
    setup: TrainSetup, overwrite: bool = False, learned: Learned | None = None
) -> StagePlan:
    """Plan what `train` would do, without a model and without writing anything. `learned`: of
    another training, for one that has no steps."""
    config, shards = setup.config, setup.shards
    finished = (config.out / "model").is_dir() and not overwrite
    if not finished:
        rehearse(setup.student, config.out)
    steps_done = 0
    if not overwrite:
        learned = learn_steps(config.out) or learned
        steps_done = checkpoint.newest(config.out / "checkpoints")
    lengths = shards.lengths()
    details: dict[str, Any] = {
        "sequence, mean": round(sum(lengths) / len(lengths), 1),
        "sequence, max": max(lengths),
        "device": str(setup.device),
    }
    reasons = overlong(shards, config.pack_length)
    tokens, steps = None, 0
    notes = ["This run has finished."] * finished
    if not reasons:
        packs, held_out = split_packs(shards, config)
        size = config.gradient_accumulation_steps
        steps = -(-len(packs) // size)
        remaining = [] if finished else packs[steps_done * size :]
        tokens = sum(pack.num_tokens for pack in remaining)
        total = sum(pack.num_tokens for pack in packs)
        largest = max(packs, key=lambda pack: pack.num_tokens)
        most_loss_tokens = max(pack.num_loss_tokens for pack in packs)
        memory = plan_memory(setup, largest.num_tokens, most_loss_tokens)
        details |= {
            "packs": len(packs),
            "packs filled": f"{total / (len(packs) * config.pack_length):.1%}",
            "steps": steps,
            "steps done": steps_done,
            "rows per step, mean": round(sum(len(pack.rows) for pack in packs) / steps, 1),
            "loss tokens": sum(pack.num_loss_tokens for pack in packs),
            "held-out rows": sum(len(pack.rows) for pack in held_out),
            "tokens per step, mean": round(total / steps),
            **memory.details(),
        }
        notes += memory.advice(config, setup.device)
    refusal = f"Training does not start: the longest row has {max(lengths):,} tokens."
    return _plan(
        config, setup.student, learned, shards.num_rows, steps, details, finished,
        tokens_expected=tokens, tokens_at_most=tokens, reasons=reasons,
        refusal=refusal if reasons else None, notes=notes,
    )  # fmt: skip
