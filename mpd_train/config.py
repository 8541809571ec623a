"""Settings of the trainer, checked by pydantic."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from mpd_data.config import Strict


class LossConfig(Strict):
    """What is minimised."""

    divergence: Literal["forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl"] = Field(
        "forward_kl", description="Between teacher and student, per token."
    )
    beta: float = Field(0.5, gt=0, lt=1, description="Weight of the teacher in jsd's mixture.")
    alpha: float = Field(0.1, gt=0, lt=1, description="Share mixed in by the skewed divergences.")
    ce_weight: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Share of the rewrite's own cross-entropy in the loss; 1: plain fine-tuning.",
    )
    kl_temperature: float = Field(
        1.0,
        gt=0,
        description="Both models' logits are divided by it, and the divergence is multiplied by its"
        " square. Other than 1 only with --teacher: cached records are at temperature 1.",
    )
    tail: bool = Field(
        True,
        description="Count the mass outside the cached top K as one outcome more. Without, the top"
        " K are renormalised, as in records that have no tail; reverse_kl is infinite then.",
    )
    divergence_clip: float | None = Field(
        None,
        gt=0,
        description="Clamp each token's divergence, in nats. Tokens above it get no gradient from"
        " it; their share is in the metrics.",
    )


class LoraConfig(Strict):
    """Low-rank adapters instead of full training."""

    lora_r: int = Field(0, ge=0, description="Rank of the adapters; 0: train all weights.")
    lora_alpha: float | None = Field(
        None, gt=0, description="Adapters are scaled by alpha / r; default: 2 r."
    )
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="Dropout before the adapters.")
    lora_target_modules: list[str] = Field(
        ["all-linear"], min_length=1, description="Names of the layers that get an adapter."
    )


class ValidationConfig(Strict):
    """Held-out rows and early stopping."""

    validation_fraction: float = Field(
        0.0, ge=0, lt=1, description="Share of the prompts held out, chosen by hash of their id."
    )
    eval_steps: int = Field(50, ge=1, description="Optimiser steps between validations.")
    early_stopping_patience: int = Field(
        0,
        ge=0,
        description="Stop after this many validations without a better loss and export the"
        " best weights; 0: never.",
    )


class OptimizerConfig(Strict):
    """AdamW, its schedule and clipping."""

    learning_rate: float = Field(1e-5, gt=0, description="Peak learning rate.")
    lr_schedule: Literal["constant", "linear", "cosine"] = Field(
        "cosine", description="Course of the learning rate after warm-up."
    )
    warmup_ratio: float = Field(0.05, ge=0, lt=1, description="Share of steps to warm up over.")
    weight_decay: float = Field(0.0, ge=0, description="On matrices only.")
    adam_beta2: float = Field(0.95, gt=0, lt=1, description="Decay of the second moment.")
    max_grad_norm: float = Field(1.0, gt=0, description="Gradients are clipped to this norm.")


class TrainConfig(Strict):
    """Settings of `train` and `mpd-train`."""

    shards: list[Path] = Field(min_length=1, description="Folders of rounds, or their distill/.")
    student: str = Field(
        description="Model to train: a folder or hub id, of a whole model or of an adapter (peft)."
    )
    revision: str | None = Field(None, description="Hub revision of the student.")
    out: Path = Field(description="Folder of the run: model/, metrics.jsonl, checkpoints/.")
    teacher: str | None = Field(
        None,
        description="Run this teacher in the process and use its full vocabulary, instead of the"
        " shards' cached top K.",
    )
    teacher_revision: str | None = Field(None, description="Hub revision of the teacher.")
    teacher_offload: bool = Field(
        False,
        description="Keep the teacher in the CPU's memory; its layers come to the device one after"
        " another.",
    )
    epochs: int = Field(1, ge=1, description="Passes over the kept rows.")
    max_steps: int | None = Field(
        None,
        ge=1,
        description="Train for this many optimiser steps, whatever number of epochs that is.",
    )
    pack_length: int = Field(4096, ge=2, description="Tokens packed into one sequence.")
    gradient_accumulation_steps: int = Field(
        1, ge=1, description="Packs per optimiser step, of all processes together."
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="Compute precision; weights and optimiser stay float32. auto: bfloat16 on"
        " CUDA, float32 on a CPU.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Where to train.")
    gradient_checkpointing: bool = Field(
        False, description="Recompute activations in the backward pass: less memory, more time."
    )
    compile: bool = Field(
        False,
        description="Compile the models' layers (torch.compile): the first step takes longer, later"
        " ones less.",
    )
    liger_kernel: bool = Field(
        False,
        description="Liger's Triton kernels for norms, gated activations and rotary embeddings"
        " (CUDA).",
    )
    activation_offload: bool = Field(
        False, description="Keep activations in the CPU's memory until the backward pass."
    )
    attn_implementation: str | None = Field(
        None,
        description="Attention of transformers: sdpa, flash_attention_2, …, or varlen, torch's own"
        " for packs. Default in bfloat16 on CUDA: flash attention where it is installed, else"
        " varlen; elsewhere transformers' choice; eager where a model's attention has a soft cap.",
    )
    max_loss: float = Field(
        100.0, gt=0, description="Stop where a step's loss is above it, in nats per token."
    )
    seed: int = Field(0, ge=0, description="Order of the data.")
    report_to: list[Literal["tensorboard", "wandb", "trackio"]] = Field(
        default_factory=list, description="Trackers that get the metrics too."
    )
    save_steps: int = Field(50, ge=1, description="Optimiser steps between checkpoints.")
    trust_remote_code: bool = Field(False, description="Run code that ships with the models.")
    loss: LossConfig = LossConfig()
    lora: LoraConfig = LoraConfig()
    validation: ValidationConfig = ValidationConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
