"""`mpd-train`: stage two, the student learns from the shards."""

from typing import Any

import click

from mpd_data.cli import DRY_RUN, PLAN_JSON, run_command, show_plan
from mpd_data.options import build, config_options
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
        from mpd_train.plan import plan_train

        plan = plan_train(config, overwrite)
        show_plan(plan, as_json)
        if plan.failing:
            # As the run would: a script must not take the plan for a yes.
            raise click.exceptions.Exit(1)
        return
    from mpd_train.loop import train

    folder = train(config, overwrite)
    click.echo(f"wrote {folder}", err=True)


def main() -> None:
    run_command(cli)


if __name__ == "__main__":
    main()
