"""`mpd-train`: stage two, the student learns from the shards."""

from typing import Any

import click

from mpd_data.cli import run_command
from mpd_data.options import build, config_options
from mpd_train.config import TrainConfig


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@config_options(TrainConfig)
@click.option("--overwrite", is_flag=True, help="Delete this run's results, then start anew.")
@click.version_option(package_name="mixed-policy-distillation")
def cli(overwrite: bool, **options: Any) -> None:
    """Train STUDENT on a round's kept rewrites by KL divergence. Run again to resume."""
    config = build(TrainConfig, options)
    from mpd_train.loop import train

    folder = train(config, overwrite)
    click.echo(f"wrote {folder}", err=True)


def main() -> None:
    run_command(cli)


if __name__ == "__main__":
    main()
