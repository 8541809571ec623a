"""The training loop: plan, load, loss, step, record. Reads from top to bottom."""

import json
import math
import shutil
import sys
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from mpd_data.errors import ConfigError, MPDError
from mpd_data.locks import exclusive
from mpd_data.models import (
    ModelFiles,
    device_name,
    load_tokenizer,
    provenance,
    require_same_tokenizer,
    require_whole,
    resolve_model,
)
from mpd_data.schema import differences
from mpd_data.shards import write_json_atomic
from mpd_train import checkpoint, lora
from mpd_train.config import OptimizerConfig, TrainConfig
from mpd_train.evaluate import Sums, pack_loss, validate
from mpd_train.models import CausalLM, autocast, choose_device, compute_dtype, export
from mpd_train.stream import Pack, ShardSet, load_pack, split_packs
from mpd_train.tracking import Trackers, load_trackers

_SECONDS_PER_LINE = 15.0
# What may differ on resuming: places, and models, which are identified by their content.
_NOT_IDENTITY = {"out", "shards", "student", "teacher", "save_steps", "device", "report_to"}


def train(config: TrainConfig, overwrite: bool = False) -> Path:
    """Trains the student on the shards and returns the exported model's folder.

    Resumes from the newest checkpoint in `config.out`, and returns at once where the run has
    finished. Raises ConfigError or DataError for input that cannot be trained on, MPDError where
    the loss, the memory or the disk gives out.
    """
    with exclusive(config.out):
        try:
            return _train(config, overwrite)
        except torch.OutOfMemoryError as error:
            raise MPDError(
                f"out of memory on the device ({error}). Lower --pack-length (and raise"
                " --gradient-accumulation-steps), or give --gradient-checkpointing; other settings"
                " need another --out or --overwrite."
            ) from error
        except OSError as error:
            raise MPDError(
                f"{config.out}: {error}. Steps up to the last checkpoint are safe: mend it (space,"
                " permissions), then run the same command again."
            ) from error


@dataclass(frozen=True)
class Prepared:
    """All that a run settles before it loads a model."""

    device: torch.device
    dtype: torch.dtype
    shards: ShardSet
    vocab_size: int
    tracker_modules: dict[str, Any]
    identity: dict[str, Any]


def check_settings(config: TrainConfig) -> tuple[dict[str, Any], torch.device, torch.dtype]:
    """Trackers' modules, device and compute precision. Raises ConfigError for settings that
    contradict each other or the machine."""
    validation = config.validation
    if validation.early_stopping_patience > 0 and validation.validation_fraction == 0:
        raise ConfigError(
            "--early-stopping-patience needs held-out prompts: give --validation-fraction too."
        )
    tracker_modules = load_trackers(list(config.report_to))
    device = choose_device(config.device)
    return tracker_modules, device, compute_dtype(device, config.dtype)


def prepare(config: TrainConfig, student: ModelFiles, teacher: ModelFiles | None) -> Prepared:
    """Checks everything that can be checked without weights. Raises ConfigError or DataError."""
    tracker_modules, device, dtype = check_settings(config)
    shards = ShardSet(config.shards)
    vocab_size = int(shards.metadata["vocab_size"])
    for files in (student, teacher):
        if files is not None:
            require_whole(files)
            if files.vocab_size < vocab_size:
                raise ConfigError(
                    f"{files.name}: has {files.vocab_size} embedding rows, the shards are scored"
                    f" over {vocab_size}. Use the models that the shards were made with."
                )
            tokenizer = load_tokenizer(files, config.trust_remote_code)
            require_same_tokenizer(
                shards.metadata["tokenizer"], tokenizer, str(config.shards[0]), files.name
            )
    identity = {
        "config": config.model_dump(mode="json", exclude=_NOT_IDENTITY),
        "shards": shards.identity(),
        "student": student.identity(),
        "teacher": None if teacher is None else teacher.identity(),
    }
    return Prepared(device, dtype, shards, vocab_size, tracker_modules, identity)


def _train(config: TrainConfig, overwrite: bool) -> Path:
    code = config.trust_remote_code
    student_files = resolve_model(config.student, config.revision, code)
    teacher_files = None
    if config.teacher is not None:
        teacher_files = resolve_model(config.teacher, config.teacher_revision, code)
    prepared = prepare(config, student_files, teacher_files)
    device, dtype, shards = prepared.device, prepared.dtype, prepared.shards
    vocab_size, validation = prepared.vocab_size, config.validation
    packs, held_out = split_packs(
        shards, config.pack_length, config.seed, config.epochs, validation.validation_fraction
    )
    model_folder = config.out / "model"
    _claim(
        config.out,
        prepared.identity,
        config,
        "cpu" if device.type == "cpu" else device_name(),
        overwrite,
    )
    if model_folder.is_dir():
        print(f"{model_folder}: this run has finished; nothing to do.", file=sys.stderr)
        return model_folder

    student = CausalLM(student_files, device, torch.float32, config.trust_remote_code)
    adapted = None
    if config.lora.lora_r > 0:
        adapted = lora.attach(
            student.model, student_files.name, config.lora, config.revision, config.seed
        )
    student.model.train()
    if config.gradient_checkpointing:
        student.model.gradient_checkpointing_enable({"use_reentrant": False})
    teacher = None
    if teacher_files is not None:
        teacher = CausalLM(teacher_files, device, dtype, config.trust_remote_code)
        teacher.model.requires_grad_(False)
    optimizer = make_optimizer(student.model, config.optimizer)

    size = config.gradient_accumulation_steps
    steps = [packs[i : i + size] for i in range(0, len(packs), size)]
    checkpoint_folder = config.out / "checkpoints"
    done, progress = 0, checkpoint.Progress()
    if found := checkpoint.checkpoints(checkpoint_folder):
        done = checkpoint.load(found[-1], student.model, optimizer)
        progress = checkpoint.progress_of(found[-1])
        print(f"resuming after step {done} of {len(steps)}", file=sys.stderr)
    metrics = _open_metrics(config.out / "metrics.jsonl", done)
    fill = sum(p.num_tokens for p in packs) / (len(packs) * config.pack_length)
    print(
        f"{shards.num_rows} rows, {config.epochs} epochs, {len(packs)} packs ({fill:.1%} filled),"
        f" {len(steps)} steps on {device}",
        file=sys.stderr,
    )

    trackers = Trackers(prepared.tracker_modules, config.out, config.model_dump(mode="json"), done)
    last_line = time.monotonic()
    with (
        metrics,
        closing(trackers),
        tqdm(
            total=len(steps),
            initial=done,
            desc="train",
            unit="step",
            disable=not sys.stderr.isatty(),
        ) as bar,
    ):
        for step in range(done, len(steps)):
            if 0 < validation.early_stopping_patience <= progress.misses:
                print(f"stopped early, after step {step}", file=sys.stderr)
                break
            begun = time.perf_counter()
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config.optimizer, step, len(steps))
            # Dropout, where a model has any, is the same after a restart.
            torch.manual_seed(config.seed * 1_000_003 + step)
            loss, waited, sums = 0.0, 0.0, Sums(config.loss)
            # One mean over all loss tokens of the optimiser step, however they are packed.
            normalizer = float(sum(pack.num_loss_tokens for pack in steps[step]))
            for pack in steps[step]:
                before = time.perf_counter()
                batch = load_pack(shards, pack).to(device)
                waited += time.perf_counter() - before
                with autocast(device, dtype):
                    output = pack_loss(student, teacher, batch, vocab_size, config.loss, normalizer)
                output.loss.backward()  # type: ignore[no-untyped-call]
                loss += output.loss.item()
                sums.add(output)
            norm = torch.nn.utils.clip_grad_norm_(
                student.model.parameters(), config.optimizer.max_grad_norm
            )
            if not (math.isfinite(loss) and torch.isfinite(norm)):
                raise MPDError(
                    f"step {step + 1}: loss {loss}, gradient norm {float(norm)}. The rows of that"
                    f" step: {_rows_of(shards, steps[step])}. The last checkpoint is from before"
                    " it. Check the round with mpd-gen validate; for a lower --learning-rate give"
                    " another --out or --overwrite."
                )
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

            seconds = time.perf_counter() - begun
            tokens = sum(pack.num_tokens for pack in steps[step])
            record = {
                "step": step + 1,
                "loss": loss,
                **sums.per_token(int(normalizer)),
                "grad_norm": float(norm),
                "learning_rate": optimizer.param_groups[0]["lr"],
                "loss_tokens": int(normalizer),
                "tokens": tokens,
                "seconds": round(seconds, 4),
                "data_seconds": round(waited, 4),
                "tokens_per_second": round(tokens / seconds, 1),
            }
            metrics.write(json.dumps(record) + "\n")
            trackers.log(record)
            last = step + 1 == len(steps)
            if held_out and (last or (step + 1) % validation.eval_steps == 0):
                value, count = validate(
                    student, teacher, shards, held_out, config.loss, device, dtype
                )
                if not math.isfinite(value):
                    raise MPDError(
                        f"step {step + 1}: validation loss {value}; the last checkpoint is from"
                        " before it. Check the round with mpd-gen validate."
                    )
                line = {"step": step + 1, "validation_loss": value, "validation_tokens": count}
                metrics.write(json.dumps(line) + "\n")
                trackers.log(line)
                if progress.best is None or value < progress.best:
                    progress = checkpoint.Progress(value)
                    if validation.early_stopping_patience > 0:
                        checkpoint.save_best(checkpoint_folder, student.model)
                else:
                    progress.misses += 1
            metrics.flush()
            bar.update(1)
            bar.set_postfix_str(f"loss {loss:.4f}, {tokens / seconds:,.0f} tok/s", refresh=False)
            if bar.disable and time.monotonic() - last_line >= _SECONDS_PER_LINE:
                last_line = time.monotonic()
                print(
                    f"train: step {step + 1}/{len(steps)}, loss {loss:.4f},"
                    f" {tokens / seconds:,.0f} tok/s",
                    file=sys.stderr,
                )
            if (step + 1) % config.save_steps == 0 and step + 1 < len(steps):
                checkpoint.save(checkpoint_folder, step + 1, student.model, optimizer, progress)
    if validation.early_stopping_patience > 0:
        checkpoint.load_best(checkpoint_folder, student.model)
    if adapted is not None:
        lora.save_and_merge(adapted, config.out / "adapter")
    export(student, model_folder)
    # Weights and moments of the way there: three times the model's size each.
    if checkpoint_folder.exists():
        shutil.rmtree(checkpoint_folder)
    return model_folder


def make_optimizer(model: torch.nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW; weight decay on matrices, not on norms and biases."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(
        [
            {
                "params": [p for p in parameters if p.dim() >= 2],
                "weight_decay": config.weight_decay,
            },
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
        ],
        lr=config.learning_rate,
        betas=(0.9, config.adam_beta2),
        fused=True,
    )


def learning_rate(config: OptimizerConfig, step: int, total: int) -> float:
    """Rate of step `step` (from 0) of `total`: linear warm-up, then the schedule towards 0."""
    warmup = math.ceil(config.warmup_ratio * total)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(total - warmup, 1)
    if config.lr_schedule == "cosine":
        return config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
    if config.lr_schedule == "linear":
        return config.learning_rate * (1 - progress)
    return config.learning_rate


def check_claim(out: Path, saved: dict[str, Any], identity: dict[str, Any]) -> None:
    """Raises ConfigError where the run in `out` began with other settings."""
    if saved != identity:
        listing = "\n  ".join(differences(saved, identity))
        raise ConfigError(
            f"{out}: this run was started with other settings:\n  {listing}\nGive the saved"
            " settings to resume, another --out, or --overwrite to start anew."
        )


def _claim(
    out: Path, identity: dict[str, Any], config: TrainConfig, device: str, overwrite: bool
) -> None:
    """Records the run's settings and device, or refuses to go on with other settings than it
    began with."""
    path = out / "run.json"
    doomed = out / ".discarded"
    if doomed.exists():
        shutil.rmtree(doomed)
    if overwrite and path.exists():
        doomed.mkdir()
        # Away at once under their names, the model first: a kill leaves no half of it behind.
        for name in ("model", "adapter", "tensorboard", "checkpoints", "metrics.jsonl", "run.json"):
            if (out / name).exists():
                (out / name).replace(doomed / name)
        shutil.rmtree(doomed)
    if path.exists():
        check_claim(out, json.loads(path.read_text(encoding="utf-8"))["identity"], identity)
        return
    out.mkdir(parents=True, exist_ok=True)
    details = {"config": config.model_dump(mode="json"), "device": device, **provenance()}
    write_json_atomic(path, {"identity": identity, "details": details})


def _open_metrics(path: Path, done: int) -> Any:
    """metrics.jsonl for appending, cut back to the steps that the checkpoint holds."""
    kept = []
    if path.exists():
        # The last line may be torn by a kill; steps after the checkpoint are done again.
        for line in path.read_text(encoding="utf-8").split("\n")[:-1]:
            if json.loads(line)["step"] <= done:
                kept.append(line + "\n")
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept), encoding="utf-8")
    temporary.replace(path)
    return path.open("a", encoding="utf-8")


def _rows_of(shards: ShardSet, packs: list[Pack]) -> str:
    places = [(shards.groups[g], r) for pack in packs for g, r in pack.rows]
    return ", ".join(f"{group.path.name}:{group.index}:{row}" for group, row in places[:20])
