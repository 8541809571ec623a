"""`mpd-train`: stage two, the student learns from the shards."""

import os
import sys
from typing import Any

import click

from mpd_data.common.command import DRY_RUN, PLAN_JSON, run_command
from mpd_data.common.options import build, config_options
from mpd_train.config import TrainConfig


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@config_options(TrainConfig)
@click.option("--overwrite", is_flag=True, help="Delete this run's results, then start anew.")
@DRY_RUN
@PLAN_JSON
@click.version_option(package_name="mixed-policy-distillation")
def cli(overwrite: bool, dry_run: bool, as_json: bool, **options: Any) -> None:
    """Train STUDENT on a round's kept rewrites by KL divergence. Run again to resume."""
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
        run_command(cli)
    except SystemExit as end:
        if end.code:
            raise
        # All is written and closed, and what may go wrong from here is the taking down alone: the
        # threads of gloo outlive `destroy_process_group` (DTensor's caches hold the group), and one
        # that wants Python's lock while the interpreter ends aborts the process. torchrun would
        # call a finished training failed.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


if __name__ == "__main__":
    main()
