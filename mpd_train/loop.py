"""The training loop: plan, load, loss, step, record. Reads from top to bottom."""

import functools
import math
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import closing, nullcontext
from pathlib import Path

import torch
from safetensors.torch import save_file

from mpd_data.common import signals
from mpd_data.common.errors import ConfigError, MPDError
from mpd_data.common.machine import device_name
from mpd_data.store.locks import exclusive
from mpd_train import checkpoint
from mpd_train.config import TrainConfig
from mpd_train.data.batches import Batch, Loader
from mpd_train.data.packing import split_packs
from mpd_train.data.shard_set import Pack, ShardSet
from mpd_train.distributed import Ranks, ranks
from mpd_train.export import export
from mpd_train.flops import peak_flops, step_flops
from mpd_train.loss import Sums, pack_loss, validate
from mpd_train.metrics import Recorder
from mpd_train.model import liger
from mpd_train.model.causal_lm import CausalLM
from mpd_train.model.device import autocast
from mpd_train.model.loading import compile_layers, load_student
from mpd_train.model.sharding import clip_grad_norm, gather, load_sharded
from mpd_train.optimizer import learning_rate, make_optimizer
from mpd_train.setup import claim, setup


def train(config: TrainConfig, overwrite: bool = False) -> Path:
    """Trains the student on the shards and returns the exported model's folder.

    Resumes from the newest checkpoint in `config.out`, and returns at once where the run has
    finished. Started by torchrun, all its processes train together. Raises ConfigError or DataError
    for input that cannot be trained on, MPDError where the loss, the memory or the disk gives out.
    """
    with (
        ranks(sharded=config.teacher_offload) as joined,
        exclusive(config.out) if joined.first else nullcontext(),
    ):
        try:
            return _train(config, overwrite, joined)
        except torch.OutOfMemoryError as error:
            raise MPDError(
                f"out of memory on the device ({error}). Lower --pack-length (and raise"
                " --gradient-accumulation-steps), or give --gradient-checkpointing; other settings"
                " need another --out or --overwrite."
            ) from error
        except RuntimeError as error:
            if not config.compile:
                raise
            from torch._dynamo.exc import TorchDynamoException

            if not isinstance(error, TorchDynamoException):
                raise
            raise MPDError(
                f"--compile: {type(error).__name__}: {error}\nGo on without it: the same command"
                " resumes. (On a CPU it needs a C++ compiler, on CUDA Triton.)"
            ) from error
        except OSError as error:
            raise MPDError(
                f"{config.out}: {error}. Steps up to the last checkpoint are safe: mend it (space,"
                " permissions), then run the same command again."
            ) from error


def _train(config: TrainConfig, overwrite: bool, ranks: Ranks) -> Path:
    prepared = setup(config)
    student_files, teacher_files = prepared.student, prepared.teacher
    device, dtype, shards = prepared.device, prepared.dtype, prepared.shards
    vocab_size, validation = prepared.vocab_size, config.validation
    attn_implementation = prepared.attn_implementation
    size = config.gradient_accumulation_steps
    if size < ranks.size:
        raise ConfigError(
            f"--gradient-accumulation-steps {size} is the number of packs in an optimiser step, of"
            f" all processes together; with {ranks.size} of them some would have nothing to do."
            f" Give {ranks.size} or a multiple of it."
        )
    packs, held_out = split_packs(shards, config)
    model_folder = config.out / "model"
    if ranks.first:
        name = "cpu" if device.type == "cpu" else device_name()
        claim(config.out, prepared.identity, config, name, overwrite)
    checkpoint_folder = config.out / "checkpoints"
    done = -1 if model_folder.is_dir() else checkpoint.newest(checkpoint_folder)
    # One process looks for all: folders are not seen alike everywhere at once.
    done = int(ranks.sum([float(done) if ranks.first else 0.0])[0])
    if done < 0:
        if ranks.first:
            # A kill may have come between the export and this.
            _clear_away(checkpoint_folder)
            print(f"{model_folder}: this run has finished; nothing to do.", file=sys.stderr)
        return model_folder

    def load(
        load_model: Callable[[torch.device, str | None], CausalLM], offload: bool = False
    ) -> CausalLM:
        """Onto the device, or in parts onto all devices."""

        def made(place: torch.device, attn: str | None) -> CausalLM:
            model = load_model(place, attn)
            if config.compile:
                compile_layers(model.model)
            return model

        if ranks.size == 1 and not offload:
            return made(device, attn_implementation)
        loaded = load_sharded(lambda place: made(place, None), device, ranks, offload)
        if attn_implementation is not None:
            loaded.model.set_attn_implementation(attn_implementation)
        return loaded

    student = load(lambda place, attn: load_student(config, student_files, place, attn))
    student.model.train()
    if config.activation_offload:
        student.kept = functools.partial(
            torch.autograd.graph.save_on_cpu, pin_memory=device.type == "cuda"
        )
    if config.gradient_checkpointing:
        student.model.gradient_checkpointing_enable({"use_reentrant": False})
    teacher = None
    if teacher_files is not None:
        files = teacher_files
        teacher = load(
            lambda place, attn: CausalLM(files, place, dtype, config.trust_remote_code, attn),
            config.teacher_offload,
        )
        teacher.model.requires_grad_(False)
    if config.liger_kernel:
        # Not before all are loaded: what is read on a CPU is tried out there.
        for model in (student, teacher):
            if model is not None:
                liger.apply(model.model, model.files.name)
    optimizer = make_optimizer(student.model, config.optimizer)
    peak = peak_flops(device, dtype)
    flops = None if peak is None else step_flops(student, teacher)

    steps = [packs[i : i + size] for i in range(0, len(packs), size)]
    progress = checkpoint.Progress()
    if done > 0:
        progress = checkpoint.load(checkpoint_folder, done, student.model, optimizer)
    recorder = None
    if ranks.first:
        recorder = Recorder(config, prepared.tracker_modules, done, len(steps))
        fill = sum(p.num_tokens for p in packs) / (len(packs) * config.pack_length)
        on = f"{device}" if ranks.size == 1 else f"{ranks.size} x {device.type}"
        print(
            f"{shards.num_rows} rows, {len(packs)} packs ({fill:.1%} filled), {len(steps)} steps on"
            f" {on}",
            file=sys.stderr,
        )

    with closing(Loader(shards, device)) as loader, recorder or nullcontext():
        batches = loader.batches(steps[done:], ranks)
        for step in range(done, len(steps)):
            signals.check()
            if 0 < validation.early_stopping_patience <= progress.misses:
                if ranks.first:
                    print(f"stopped early, after step {step}", file=sys.stderr)
                break
            begun = time.perf_counter()
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config.optimizer, step, len(steps))
            # Dropout, where a model has any, is the same after a restart.
            torch.manual_seed((config.seed * 1_000_003 + step) * ranks.size + ranks.rank)
            waited, sums, seen = 0.0, Sums(config.loss), []
            # One mean over all loss tokens of the optimiser step, however they are packed.
            loss_tokens = sum(pack.num_loss_tokens for pack in steps[step])
            for _ in ranks.share(steps[step]):
                before = time.perf_counter()
                batch = next(batches)
                waited += time.perf_counter() - before
                with autocast(device, dtype):
                    output = pack_loss(
                        student, teacher, batch, vocab_size, config.loss,
                        # Gradients are averaged over the processes: each adds its share as often
                        # as there are processes.
                        loss_tokens / ranks.size,
                    )  # fmt: skip
                output.loss.backward()  # type: ignore[no-untyped-call]
                sums.add(output, batch)
                seen.append(batch)
            norm = clip_grad_norm(student.model, config.optimizer.max_grad_norm)
            record = sums.per_token(loss_tokens, ranks)
            record["loss"] /= ranks.size
            if not (record["loss"] <= config.max_loss and math.isfinite(norm)):
                folder = _save_batches(config.out, step + 1, seen, ranks)
                # Who ends first takes the others along.
                ranks.wait()
                raise MPDError(
                    f"step {step + 1}: loss {record['loss']}, gradient norm {norm}; expected at"
                    f" most --max-loss {config.max_loss:g} and finite gradients. Its batches are in"
                    f" {folder}, from these rows: {_rows_of(shards, steps[step])}. The last"
                    " checkpoint is from before it. Check the round with mpd-gen validate; for a"
                    " lower --learning-rate give another --out or --overwrite."
                )
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if recorder is not None:
                seconds = time.perf_counter() - begun
                record |= {
                    "grad_norm": norm,
                    "learning_rate": optimizer.param_groups[0]["lr"],
                    "loss_tokens": loss_tokens,
                    "tokens": sum(pack.num_tokens for pack in steps[step]),
                }
                if flops is not None and peak is not None:
                    done_flops = flops.of(loss_tokens, shards.lengths_of(steps[step]))
                    record["mfu"] = done_flops / (seconds * peak * ranks.size)
                recorder.step(step + 1, record, seconds, waited)

            last = step + 1 == len(steps)
            if held_out and (last or (step + 1) % validation.eval_steps == 0):
                value, count = validate(
                    student, teacher, loader, held_out, vocab_size, config.loss, dtype, ranks
                )
                if not math.isfinite(value):
                    raise MPDError(
                        f"step {step + 1}: validation loss {value}; the last checkpoint is from"
                        " before it. Check the round with mpd-gen validate."
                    )
                if recorder is not None:
                    recorder.write(
                        {"step": step + 1, "validation_loss": value, "validation_tokens": count}
                    )
                if progress.best is None or value < progress.best:
                    progress = checkpoint.Progress(value, step + 1)
                    if validation.early_stopping_patience > 0:
                        checkpoint.save_best(checkpoint_folder, step + 1, student.model, ranks)
                else:
                    progress.misses += 1
            if (step + 1) % config.save_steps == 0 and not last:
                checkpoint.save(
                    checkpoint_folder, step + 1, student.model, optimizer, progress, ranks
                )
    if validation.early_stopping_patience > 0:
        checkpoint.load_best(checkpoint_folder, progress, student.model)
    del optimizer
    _export(config, student, ranks)
    return model_folder


def _export(config: TrainConfig, student: CausalLM, ranks: Ranks) -> None:
    """Writes the model, and the adapter where there is one, and clears the way there away."""
    if ranks.size > 1:
        like = load_student(config, student.files, torch.device("meta"), None)
        gather(student.model, like.model, ranks)
        student = like
    if ranks.first:
        export(student, config.out)
        _clear_away(config.out / "checkpoints")
    ranks.wait()


def _clear_away(checkpoint_folder: Path) -> None:
    """Weights and moments of the way there: three times the model's size each."""
    if checkpoint_folder.exists():
        shutil.rmtree(checkpoint_folder)


def _save_batches(out: Path, step: int, batches: list[Batch], ranks: Ranks) -> Path:
    """What a step that went wrong was made of, a file for each pack."""
    folder = out / "failed" / f"step-{step:06d}"
    folder.mkdir(parents=True, exist_ok=True)
    for index, batch in enumerate(batches):
        tensors = {name: x.cpu().contiguous() for name, x in vars(batch).items()}
        save_file(tensors, folder / f"rank-{ranks.rank}-pack-{index}.safetensors")
    return folder


def _rows_of(shards: ShardSet, packs: list[Pack]) -> str:
    places = [(shards.groups[g], r) for pack in packs for g, r in pack.rows]
    return ", ".join(f"{group.path.name}:{group.index}:{row}" for group, row in places[:20])
