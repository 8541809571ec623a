"""`mpd-train`: train the student on the rewrites of one or several rounds."""

import os
import sys
from typing import Any

import click

from mpd_data.common.command import (
    CONTEXT,
    DRY_RUN,
    PLAN_JSON,
    VERSION,
    Command,
    example,
    run_command,
)
from mpd_data.common.options import build, config_options
from mpd_train.config import TrainConfig

_BATCHES = (
    "a batch is a pack of --pack-length tokens, not a number of rows, so that no padding is"
    " computed. Set --pack-length and --gradient-accumulation-steps"
)
_INSTEAD = {
    "--per-device-train-batch-size": _BATCHES,
    "--per-device-eval-batch-size": _BATCHES,
    "--max-length": "no row is cut off. Set --pack-length to at least the longest row's tokens",
    "--bf16": "use --dtype bfloat16",
    "--push-to-hub": "run mpd-gen push OUT/model OWNER/NAME afterwards",
    "--fp16": "float16 gradients underflow without a scaler. Use --dtype bfloat16",
    "--warmup-steps": "use --warmup-ratio",
}


@click.command(
    cls=Command,
    instead=_INSTEAD,
    context_settings=CONTEXT,
    epilog=example(
        "mpd-train --shards data/round1 data/round2 --student Qwen/Qwen3-1.7B \\",
        "    --out runs/round1 --learning-rate 1e-5 --dry-run",
    ),
)
@config_options(
    TrainConfig,
    # The names that transformers and TRL have for the same.
    also={
        "out": "--output-dir",
        "student": "--model-name-or-path",
        "epochs": "--num-train-epochs",
        "lr_schedule": "--lr-scheduler-type",
    },
    common=("epochs", "max_steps", "pack_length", "learning_rate"),
    paths=("shards",),
)
@click.option(
    "--overwrite", is_flag=True, help="Delete the results of this training, then start again."
)
@DRY_RUN
@PLAN_JSON
@VERSION
def cli(overwrite: bool, dry_run: bool, as_json: bool, **options: Any) -> None:
    """Train STUDENT on the kept rewrites in SHARDS. Run the command again to resume."""
    config = build(TrainConfig, options)
    if dry_run:
        from mpd_data.dryrun.show import print_plan
        from mpd_train.dryrun.plan import plan_train
        from mpd_train.setup import setup

        plan = plan_train(setup(config, weights=False, overwrite=overwrite), overwrite)
        print_plan(plan, as_json)
        return
    from mpd_train.loop import train

    folder = train(config, overwrite)
    click.echo(f"wrote {folder}", err=True)


def main() -> None:
    try:
        run_command(cli, needs="train")
    except SystemExit as end:
        if end.code:
            raise
        # Everything is written and closed. Threads of gloo outlive `destroy_process_group`, because
        # DTensor's caches hold the group; one that takes Python's lock while the interpreter ends
        # aborts the process, and torchrun would report a finished training as failed.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


if __name__ == "__main__":
    main()
