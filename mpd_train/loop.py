"""The training loop: set up, load, then for each step: loss, optimiser, validation, checkpoint."""

import math
import shutil
import sys
import time
from contextlib import closing, nullcontext
from pathlib import Path

import torch

from mpd_data.common import signals
from mpd_data.common.errors import ConfigError, MPDError
from mpd_data.common.machine import device_name, free_gpu_memory
from mpd_data.store.locks import folder_lock
from mpd_data.store.run_record import require_kind
from mpd_train import checkpoint
from mpd_train.card import Trained
from mpd_train.config import TrainConfig
from mpd_train.data.batches import Loader
from mpd_train.data.packing import split_packs
from mpd_train.data.shard_set import Pack
from mpd_train.distributed import Ranks, ranks
from mpd_train.diverged import diverged
from mpd_train.export import export, rehearse
from mpd_train.flops import peak_flops, step_flops
from mpd_train.loss import Sums, pack_loss, validate
from mpd_train.metrics import Recorder
from mpd_train.model.causal_lm import CausalLM
from mpd_train.model.device import autocast
from mpd_train.model.loading import load_models, load_student
from mpd_train.model.sharding import clip_grad_norm, gather
from mpd_train.optimizer import learning_rate, make_optimizer
from mpd_train.row_log import RowLog
from mpd_train.self_check import require_one_model
from mpd_train.setup import TrainSetup, claim, setup


def train(config: TrainConfig, overwrite: bool = False) -> Path:
    """Train the student on the shards and return the exported model's folder.

    Resume from the newest checkpoint in `config.out`; return at once if the run has finished.
    Started by torchrun, all its processes train together. Raise ConfigError or DataError for input
    that cannot be trained on, MPDError when the loss diverges or memory or disk space runs out.
    """
    require_kind(config.out, "training")
    with (
        ranks(sharded=config.teacher_offload) as joined,
        folder_lock(config.out) if joined.first else nullcontext(),
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
                f"--compile: {type(error).__name__}: {error}\nRun the same command without it to"
                " resume. (On a CPU it needs a C++ compiler, on CUDA Triton.)"
            ) from error
        except OSError as error:
            raise checkpoint.stopped_by(error, config.out) from error
        finally:
            free_gpu_memory()


def _train(config: TrainConfig, overwrite: bool, ranks: Ranks) -> Path:
    prepared = setup(config)
    device = prepared.device
    # The folder is claimed after all that may refuse the settings.
    size = config.gradient_accumulation_steps
    if size < ranks.size:
        raise ConfigError(
            f"--gradient-accumulation-steps {size} is the number of packs in an optimiser step, of"
            f" all processes together; with {ranks.size} processes some would have nothing to do."
            f" Give {ranks.size} or a multiple of it."
        )
    packs, held_out = split_packs(prepared.shards, config)
    if ranks.first:
        name = "cpu" if device.type == "cpu" else device_name()
        claim(config.out, prepared.identity, config, name, -(-len(packs) // size), overwrite)
    model_folder = config.out / "model"
    if (done := _steps_done(config.out, ranks)) is None:
        if ranks.first:
            # A kill may have come between the export and this.
            _delete_checkpoints(config.out)
            print(f"{model_folder}: this run has finished; nothing to do.", file=sys.stderr)
        return model_folder
    if ranks.first:
        rehearse(prepared.student, config.out)
    student, teacher = load_models(
        config, prepared.student, prepared.teacher, device, prepared.dtype,
        prepared.attn_implementation, ranks,
    )  # fmt: skip
    if done == 0:
        require_one_model(prepared, student, teacher, packs[0])
    trainer = Trainer(prepared, student, teacher, packs, held_out, done, ranks)
    trainer.run()
    step = planned = len(trainer.steps)
    if config.validation.early_stopping_patience > 0:
        step = checkpoint.load_best(config.out / "checkpoints", trainer.progress, student.model)
    # With the optimiser's moments, which the export has no use for.
    del trainer
    _export(Trained(config, config.out.resolve().name, step, planned), student, ranks)
    return model_folder


def _steps_done(out: Path, ranks: Ranks) -> int | None:
    """Return the steps in the newest checkpoint, None if the run has finished."""
    done = 0.0
    # One process looks and tells the others: a shared file system may not show all the same.
    if ranks.first:
        done = -1.0 if (out / "model").is_dir() else checkpoint.newest(out / "checkpoints")
    done = ranks.sum([done])[0]
    return None if done < 0 else int(done)


class Trainer:
    """The steps of a training, from the one after `done` on.

    A step is `gradient_accumulation_steps` packs; all state that the next one depends on is in the
    models, the optimiser and `progress`, and is what a checkpoint holds.
    """

    def __init__(
        self, prepared: TrainSetup, student: CausalLM, teacher: CausalLM | None, packs: list[Pack],
        held_out: list[Pack], done: int, ranks: Ranks,
    ) -> None:  # fmt: skip
        config = prepared.config
        self.config, self.student, self.teacher = config, student, teacher
        self.shards, self.vocab_size = prepared.shards, prepared.vocab_size
        self.device, self.dtype, self.ranks = prepared.device, prepared.dtype, ranks
        self.optimizer = make_optimizer(student.model, config.optimizer)
        self.peak = peak_flops(self.device, self.dtype)
        self.flops = None if self.peak is None else step_flops(student, teacher)
        size = config.gradient_accumulation_steps
        self.steps = [packs[i : i + size] for i in range(0, len(packs), size)]
        self.held_out, self.done = held_out, done
        self.checkpoints = config.out / "checkpoints"
        self.progress = checkpoint.Progress()
        if done > 0:
            self.progress = checkpoint.load(self.checkpoints, done, student.model, self.optimizer)
        self.recorder = None
        if ranks.first:
            self.recorder = Recorder(config, prepared.tracker_modules, done, len(self.steps))
            fill = sum(p.num_tokens for p in packs) / (len(packs) * config.pack_length)
            place = f"{self.device}" if ranks.size == 1 else f"{ranks.size} x {self.device.type}"
            print(
                f"{self.shards.num_rows} rows, {len(packs)} packs ({fill:.1%} filled),"
                f" {len(self.steps)} steps on {place}",
                file=sys.stderr,
            )

    def run(self) -> None:
        """Train to the last step, or until validation has not improved for long enough."""
        patience = self.config.validation.early_stopping_patience
        with (
            closing(Loader(self.shards, self.device)) as self.loader,
            closing(RowLog(self.config.out, self.shards, self.done, self.ranks)) as self.rows,
            self.recorder or nullcontext(),
        ):
            self.batches = self.loader.batches(self.steps[self.done :], self.ranks)
            for step in range(self.done, len(self.steps)):
                signals.check()
                if 0 < patience <= self.progress.misses:
                    if self.ranks.first:
                        print(f"stopped early, after step {step}", file=sys.stderr)
                    break
                self.train_step(step)
                self.maybe_validate(step + 1)
                self.maybe_save(step + 1)

    def train_step(self, step: int) -> None:
        """Do optimiser step `step`, from 0, and record it. Raise MPDError where it diverges."""
        config, ranks, packs = self.config, self.ranks, self.steps[step]
        begun = time.perf_counter()
        rate = learning_rate(config.optimizer, step, len(self.steps))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        # Dropout, where a model has any, is the same after a restart.
        torch.manual_seed((config.seed * 1_000_003 + step) * ranks.size + ranks.rank)
        # One mean over all loss tokens of the optimiser step, however they are packed. The sum of
        # their weights is known after the last pack.
        loss_tokens = sum(pack.num_loss_tokens for pack in packs)
        sums, waited, batches = Sums(config.loss), 0.0, []
        for pack in ranks.share(packs):
            before = time.perf_counter()
            batch = next(self.batches)
            waited += time.perf_counter() - before
            with autocast(self.device, self.dtype):
                output = pack_loss(
                    self.student, self.teacher, batch, self.vocab_size, config.loss,
                    # Gradients are averaged over the processes: each multiplies its share by
                    # their number.
                    loss_tokens / ranks.size,
                )  # fmt: skip
            output.loss.backward()  # type: ignore[no-untyped-call]
            sums.add(output, batch)
            self.rows.add(pack, output.per_token, batch)
            batches.append(batch)
        weight, record = sums.per_token(loss_tokens, ranks)
        scale = loss_tokens / max(weight, 1.0)
        if scale != 1:
            for parameter in self.student.model.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(scale)
        norm = clip_grad_norm(self.student.model, config.optimizer.max_grad_norm)
        record["loss"] *= scale / ranks.size
        if not (record["loss"] <= config.max_loss and math.isfinite(norm)):
            raise diverged(
                config, self.shards, step + 1, packs, batches, record["loss"], norm, ranks
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.rows.write(step + 1)
        if self.recorder is not None:
            seconds = time.perf_counter() - begun
            record |= {
                "grad_norm": norm, "learning_rate": rate, "loss_tokens": loss_tokens,
                "tokens": sum(pack.num_tokens for pack in packs),
            }  # fmt: skip
            if self.flops is not None and self.peak is not None:
                flops = self.flops.total(loss_tokens, self.shards.lengths_of(packs))
                record["mfu"] = flops / (seconds * self.peak * ranks.size)
            self.recorder.step(step + 1, record, seconds, waited)

    def maybe_validate(self, done: int) -> None:
        """Measure the loss on the held-out packs, after each `eval_steps` steps and the last."""
        last = done == len(self.steps)
        if not self.held_out or not (last or done % self.config.validation.eval_steps == 0):
            return
        value, tokens = validate(
            self.student, self.teacher, self.loader, self.held_out, self.vocab_size,
            self.config.loss, self.dtype, self.ranks,
        )  # fmt: skip
        if not math.isfinite(value):
            raise MPDError(
                f"step {done}: validation loss {value}; the last checkpoint is from before it."
                " Check the round with mpd-gen validate."
            )
        if self.recorder is not None:
            record = {"step": done, "validation_loss": value, "validation_tokens": tokens}
            self.recorder.write(record)
        if self.progress.best is None or value < self.progress.best:
            self.progress = checkpoint.Progress(value, done)
            if self.config.validation.early_stopping_patience > 0:
                checkpoint.save_best(self.checkpoints, done, self.student.model, self.ranks)
        else:
            self.progress.misses += 1

    def maybe_save(self, done: int) -> None:
        """Write a checkpoint, after each `save_steps` steps but the last."""
        if done % self.config.save_steps == 0 and done < len(self.steps):
            checkpoint.save(
                self.checkpoints, done, self.student.model, self.optimizer, self.progress,
                self.ranks,
            )  # fmt: skip


def _export(trained: Trained, student: CausalLM, ranks: Ranks) -> None:
    """Write the model, and the adapter if one was trained, then delete the checkpoints."""
    if ranks.size > 1:
        like = load_student(trained.config, student.files, torch.device("meta"), None)
        gather(student.model, like.model, ranks)
        student = like
    if ranks.first:
        export(student, trained.config.out, trained)
        _delete_checkpoints(trained.config.out)
    ranks.wait()


def _delete_checkpoints(out: Path) -> None:
    """Delete them all: weights and moments, three times the model's size each."""
    if (out / "checkpoints").exists():
        shutil.rmtree(out / "checkpoints")
