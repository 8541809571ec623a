"""The loss in TRL's SFTTrainer: train a student on the kept rewrites of a round.

    python examples/trl_trainer.py --student pipelines/pocket/models/student \\
        --round data/round1 --out runs/trl

For those who use TRL (`pip install trl`): its settings and `peft_config` work as usual. Those that
change rows (packing, max_length) do not act: rows come as token ids, with a record for each.
"""

import torch
from transformers import AutoModelForCausalLM
from transformers_trainer import TeacherLoss, collate, finish, read_command, rewrites
from trl import SFTConfig, SFTTrainer


class MPDTrainer(TeacherLoss, SFTTrainer):
    """TRL's trainer with the divergence from the teacher for its loss."""


def main() -> None:
    args, settings = read_command(__doc__)
    trainer = MPDTrainer(
        AutoModelForCausalLM.from_pretrained(args.student, dtype=torch.float32),
        # The rows are token ids already.
        SFTConfig(**settings, dataset_kwargs={"skip_prepare_dataset": True}),
        collate,
        rewrites(args.round),
    )
    finish(trainer, args.out)


if __name__ == "__main__":
    main()
