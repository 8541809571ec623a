"""Settings of `mpd-train`, checked by pydantic."""

from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from mpd_data.config import Strict

# The draft makes a token 2.7 times as probable. On one pair of models the mean was 1.3 nats at new
# results and 0.4 elsewhere.
DEFAULT_LEAK_NATS = 1.0


class LossConfig(Strict):
    """The loss."""

    heading = "Loss"

    divergence: Literal["forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl"] = (
        "forward_kl"
    )
    """Divergence between teacher and student at each token."""
    beta: float = Field(0.5, gt=0, lt=1)
    """Weight of the teacher in the mixture of jsd."""
    alpha: float = Field(0.1, gt=0, lt=1)
    """Fraction of the other model that skew_kl and skew_reverse_kl mix in."""
    ce_weight: float = Field(0.0, ge=0, le=1)
    """Weight of the rewrite's cross-entropy in the loss. 1: plain fine-tuning."""
    kl_temperature: float = Field(1.0, gt=0)
    """Temperature that divides the logits of both models; its square multiplies the divergence.
    Values other than 1 need --teacher: shards hold log-probabilities at 1."""
    tail: bool = True
    """Count the probability outside the stored top K as one more outcome. Without it the top K are
    renormalised, and reverse_kl cannot be used."""
    divergence_clip: float | None = Field(None, gt=0)
    """Largest divergence of a token, in nats. Tokens above it get no gradient from the divergence;
    the metrics hold their fraction."""
    entry_clip: float | None = Field(None, gt=0)
    """Instead of --divergence-clip: largest term of a vocabulary entry in a token's divergence, in
    nats. Larger terms get no gradient. The sum of the clipped terms may be negative."""
    targets: Literal["problem", "rewrite", "mixed", "masked"] | None = None
    """Which of the teacher's distributions to learn, of rewrites that were scored in both contexts:
    that under the problem or the rewrite prompt; mixed: that under the problem where the draft gave
    a number away, elsewhere that under the rewrite prompt; masked: that under the rewrite prompt,
    without the numbers given away. Required with both contexts; with one it is that one."""
    leak_nats: float | None = Field(None, gt=0)
    """The draft gave a number away if it raises the log-probability of one of its tokens by more
    than this, in nats, where the teacher expects a number without the draft, too. For mixed and
    masked targets. Default: 1."""

    @property
    def by_token(self) -> bool:
        """Whether the targets depend on what the draft gave away."""
        return self.targets in ("mixed", "masked")


class LoraConfig(Strict):
    """Low-rank adapters instead of full training."""

    heading = "LoRA adapters"

    lora_r: int = Field(0, ge=0)
    """Rank of the adapters. 0: train all weights."""
    lora_alpha: float | None = Field(None, gt=0)
    """Adapters are scaled by alpha / r. Default: 2 r."""
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout rate before the adapters."""
    lora_target_modules: list[str] = Field(["all-linear"], min_length=1)
    """Layers that get an adapter, by the last part of their names, as q_proj."""

    @field_validator("lora_target_modules")
    @classmethod
    def _one_name_each(cls, names: list[str]) -> list[str]:
        for name in names:
            if "," in name:
                raise ValueError(f"{name!r} is one name; separate names, as q_proj v_proj")
        return names


class ValidationConfig(Strict):
    """Held-out rows and early stopping."""

    heading = "Validation"

    validation_fraction: float = Field(0.0, ge=0, lt=1)
    """Fraction of prompts to hold out, chosen by hash of their id."""
    eval_steps: int = Field(50, ge=1)
    """Number of optimiser steps between validations."""
    early_stopping_patience: int = Field(0, ge=0)
    """Stop after this many validations without a lower loss, and export the best weights. 0: never
    stop early."""


class OptimizerConfig(Strict):
    """AdamW, its schedule and clipping."""

    heading = "Optimizer"

    learning_rate: float = Field(1e-5, gt=0)
    """Peak learning rate."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """How the learning rate changes after the warm-up."""
    warmup_ratio: float = Field(0.05, ge=0, lt=1)
    """Fraction of the steps that warm up."""
    weight_decay: float = Field(0.0, ge=0)
    """Weight decay, of matrices only."""
    adam_beta2: float = Field(0.95, gt=0, lt=1)
    """Decay rate of the second moment (beta2)."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Largest norm of the gradient; a larger one is clipped."""


class TrainConfig(Strict):
    """Settings of `train` and `mpd-train`."""

    heading = "Training"

    shards: list[Path] = Field(min_length=1)
    """Folders of rounds, or the distill/ folders in them."""
    student: str
    """Model to train: a folder or a hub id, of a model or of a peft adapter."""
    revision: str | None = None
    """Revision of the student on the hub."""
    out: Path
    """Folder of the training. It will hold model/, metrics.jsonl and checkpoints/."""
    teacher: str | None = None
    """Teacher to run during training: its whole distribution is used instead of the top K in the
    shards."""
    teacher_revision: str | None = None
    """Revision of the teacher on the hub."""
    teacher_offload: bool = False
    """Keep the teacher in the CPU's memory and move its layers to the device one by one."""
    epochs: float = Field(1, gt=0, allow_inf_nan=False)
    """Number of passes over the kept rows; 0.5 stops after half of a pass."""
    max_steps: int | None = Field(None, ge=1)
    """Number of optimiser steps to train, instead of --epochs."""
    pack_length: int = Field(4096, ge=2)
    """Number of tokens packed into one sequence."""
    gradient_accumulation_steps: int = Field(1, ge=1)
    """Number of packs per optimiser step, of all processes together."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the computation; weights and optimiser stay float32. auto: bfloat16 on CUDA,
    float32 on a CPU."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to train on."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    compile: bool = False
    """Compile the models' layers with torch.compile. The first step takes longer, later steps take
    less."""
    liger_kernel: bool = False
    """Use Liger's Triton kernels for norms, gated activations and rotary embeddings (CUDA)."""
    activation_offload: bool = False
    """Keep activations in the CPU's memory until the backward pass."""
    attn_implementation: str | None = None
    """Attention: sdpa, flash_attention_2 or another of transformers, or varlen, torch's own for
    packed sequences. Default: eager if the attention has a soft cap; in bfloat16 flash attention if
    installed (CUDA), else varlen; otherwise transformers' default."""
    max_loss: float = Field(100.0, gt=0)
    """Stop if the loss of a step is larger, in nats per token."""
    seed: int = Field(0, ge=0)
    """Seed of the order of the rows."""
    report_to: list[Literal["tensorboard", "wandb", "trackio", "mlflow"]] = Field(
        default_factory=list
    )
    """Trackers to send the metrics to."""
    save_steps: int = Field(50, ge=1)
    """Number of optimiser steps between checkpoints."""
    trust_remote_code: bool = False
    """Allow Python code that comes with the models to run."""
    loss: LossConfig = LossConfig()
    lora: LoraConfig = LoraConfig()
    validation: ValidationConfig = ValidationConfig()
    optimizer: OptimizerConfig = OptimizerConfig()

    @field_validator("epochs")
    @classmethod
    def _whole(cls, epochs: float) -> float:
        """Write 2 as 2, in records and commands."""
        return int(epochs) if epochs == int(epochs) else epochs
