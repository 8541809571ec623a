"""The loss in transformers' own Trainer: train a student on the kept rewrites of a round.

    mpd-gen rollouts … && mpd-gen rewrite …          # make the round: see docs/tutorial.md
    python examples/transformers_trainer.py --student pipelines/pocket/models/student \\
        --round data/round1 --out runs/trainer

For those who have a Trainer already. mpd-train does the same faster: it packs rows instead of
padding them, and does not hold the round in memory. The loss of a step is one mean over all its
tokens, as there. trl_trainer.py does the same in TRL's SFTTrainer, with the parts from here.
"""

import argparse
from typing import Any

import polars as pl
import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from mpd_data.inspect.stats import scan_round
from mpd_train.kl import Divergence, sparse_kl

COLUMNS = ["input_ids", "loss_start", "topk_ids", "topk_logprobs", "tail_logprobs"]
NO_TOKEN = -100


def rewrites(path: str) -> Dataset:
    """Return the kept rewrites of a round, with the teacher's log-probabilities of their tokens."""
    kept = scan_round(path, "distill").filter(pl.col("status") == "ok").select(COLUMNS)
    return Dataset.from_polars(kept.collect())


def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Pad the ids of B rows to T tokens; lay the teacher's records of all n loss tokens one after
    another. `labels` has the ids of the loss tokens, by which the Trainer counts them."""
    longest = max(len(row["input_ids"]) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, NO_TOKEN)
    for i, row in enumerate(rows):
        tokens, start = torch.tensor(row["input_ids"]), row["loss_start"]
        ids[i, : len(tokens)], mask[i, : len(tokens)] = tokens, 1
        labels[i, start : len(tokens)] = tokens[start:]
    n = sum(len(row["tail_logprobs"]) for row in rows)
    k = len(rows[0]["topk_ids"]) // len(rows[0]["tail_logprobs"])
    flat = {name: [x for row in rows for x in row[name]] for name in COLUMNS[2:]}
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": labels,
        "topk_ids": torch.tensor(flat["topk_ids"]).view(n, k),
        "topk_logprobs": torch.tensor(flat["topk_logprobs"], dtype=torch.float32).view(n, k),
        "tail_logprobs": torch.tensor(flat["tail_logprobs"], dtype=torch.float32),
    }


class TeacherLoss:
    """Beside a Trainer in the bases of a class: its loss is the divergence from the teacher."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Count the tokens of the whole step, by which the loss is divided.
        self.model_accepts_loss_kwargs = True

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:  # fmt: skip
        """Return the loss in nats per token of the step: the sum over this batch's tokens, divided
        by the number of tokens in all batches of the step, those of other processes included."""
        is_loss_token = inputs["labels"][:, 1:] != NO_TOKEN
        # Through the model, since wrappers for several processes act there; it makes the logits of
        # the last token alone.
        states = model(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            output_hidden_states=True,
            logits_to_keep=1,
            use_cache=False,
        )
        hidden = states.hidden_states[-1][:, :-1][is_loss_token]  # [n, H]: they predict the tokens
        out = sparse_kl(
            hidden,
            self.accelerator.unwrap_model(model).get_output_embeddings().weight,
            inputs["topk_ids"],
            inputs["topk_logprobs"],
            inputs["tail_logprobs"],
            normalizer=len(hidden) if num_items_in_batch is None else num_items_in_batch,
            divergence=Divergence("forward_kl"),
        )
        # Gradients are averaged over the processes.
        loss = out.loss if num_items_in_batch is None else out.loss * self.args.world_size
        return (loss, states) if return_outputs else loss


class MPDTrainer(TeacherLoss, Trainer):
    """Transformers' Trainer with this loss."""


def read_command(about: str) -> tuple[argparse.Namespace, dict[str, Any]]:
    """Return the command's options, and the settings that follow for transformers' or TRL's
    trainer."""
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("--student", required=True)
    parser.add_argument("--round", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--batch-size", type=int, default=4, help="rows on each device")
    parser.add_argument("--accumulation", type=int, default=4, help="batches per step")
    args = parser.parse_args()
    return args, {
        "output_dir": args.out,
        "max_steps": args.steps,
        "learning_rate": args.learning_rate,
        "per_device_train_batch_size": args.batch_size,
        "gradient_accumulation_steps": args.accumulation,
        "logging_steps": 1,
        "remove_unused_columns": False,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": not torch.cuda.is_available(),
        "bf16": torch.cuda.is_available(),
        "disable_tqdm": True,
    }


def finish(trainer: Trainer, out: str) -> None:
    """Train, save the model in `out` and print the losses."""
    trainer.train()
    trainer.save_model(out)
    if trainer.is_world_process_zero():
        for record in trainer.state.log_history:
            if "loss" in record:
                print(f"step {record['step']}: loss {record['loss']:.6f} nats per token")


def main() -> None:
    args, settings = read_command(__doc__)
    student = AutoModelForCausalLM.from_pretrained(args.student, dtype=torch.float32)
    data = rewrites(args.round)
    finish(MPDTrainer(student, TrainingArguments(**settings), collate, data), args.out)


if __name__ == "__main__":
    main()
