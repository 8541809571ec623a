"""The loss in transformers' own Trainer: train a student on the kept rewrites of a round.

    mpd-gen rollouts … && mpd-gen rewrite …          # make the round: see docs/tutorial.md
    python examples/transformers_trainer.py --student pipelines/pocket/models/student \\
        --round data/round1 --out runs/trainer

For those who have a Trainer already. mpd-train does the same faster: it packs rows instead of
padding them, and does not hold the round in memory. The loss of a step is one mean over all its
tokens, as there. TRL's trainers are subclasses of this Trainer and take the same method.
"""

import argparse
from typing import Any

import polars as pl
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from mpd_data.inspect.stats import scan_round
from mpd_train.kl import Divergence, sparse_kl

COLUMNS = ["input_ids", "loss_start", "topk_ids", "topk_logprobs", "tail_logprobs"]
NO_TOKEN = -100


class Rewrites(Dataset):
    """The kept rewrites of a round, with the teacher's log-probabilities of their tokens."""

    def __init__(self, path: str) -> None:
        kept = scan_round(path, "distill").filter(pl.col("status") == "ok").select(COLUMNS)
        self.rows = kept.collect().to_dicts()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return self.rows[i]


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


class MPDTrainer(Trainer):
    """A Trainer whose loss is the divergence from the teacher."""

    # The loss is divided by the tokens of the whole step, so the Trainer must not divide it again.
    model_accepts_loss_kwargs = True

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:  # fmt: skip
        """Return the loss in nats per token of the step: the sum over this batch's tokens, divided
        by the number of tokens in all batches of the step."""
        is_loss_token = inputs["labels"][:, 1:] != NO_TOKEN
        body = model.base_model
        states = body(inputs["input_ids"], attention_mask=inputs["attention_mask"])
        hidden = states.last_hidden_state[:, :-1][is_loss_token]  # [n, H]: they predict the tokens
        out = sparse_kl(
            hidden,
            model.get_output_embeddings().weight,
            inputs["topk_ids"],
            inputs["topk_logprobs"],
            inputs["tail_logprobs"],
            normalizer=len(hidden) if num_items_in_batch is None else num_items_in_batch,
            divergence=Divergence("forward_kl"),
        )
        return (out.loss, states) if return_outputs else out.loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--student", required=True)
    parser.add_argument("--round", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--batch-size", type=int, default=4, help="rows on each device")
    parser.add_argument("--accumulation", type=int, default=4, help="batches per step")
    args = parser.parse_args()
    settings = TrainingArguments(
        output_dir=args.out,
        max_steps=args.steps,
        learning_rate=args.learning_rate,
        per_device_train_batch_size=args.batch_size,
        gradient_accumulation_steps=args.accumulation,
        logging_steps=1,
        remove_unused_columns=False,
        report_to="none",
        save_strategy="no",
        use_cpu=not torch.cuda.is_available(),
        disable_tqdm=True,
    )
    student = AutoModelForCausalLM.from_pretrained(args.student, dtype=torch.float32)
    trainer = MPDTrainer(student, settings, collate, Rewrites(args.round))
    trainer.train()
    trainer.save_model(args.out)
    for record in trainer.state.log_history:
        if "loss" in record:
            print(f"step {record['step']}: loss {record['loss']:.6f} nats per token")


if __name__ == "__main__":
    main()
