"""`mpd-export`: a model of a training that has not finished."""

from pathlib import Path

import click

from mpd_data.common.command import run_command


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.argument("checkpoint", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    required=True,
    help="Folder to make: model/, and adapter/ where adapters are trained, as a finished run's.",
)
@click.option(
    "--student",
    help="Folder or hub id of the student that the run began with, where it lies elsewhere now.",
)
@click.version_option(package_name="mixed-policy-distillation")
def cli(checkpoint: Path, out: Path, student: str | None) -> None:
    """Export CHECKPOINT as a Hugging Face model (safetensors), whether its training runs or not.

    CHECKPOINT is a folder of a run as RUN/checkpoints/step-000050 or best-000040, or RUN itself,
    the --out of mpd-train, which means its newest. A run that finishes exports itself.
    """
    from mpd_train.export import export_checkpoint

    chosen = export_checkpoint(checkpoint, out, student)
    click.echo(f"wrote {out / 'model'} from {chosen}", err=True)


def main() -> None:
    run_command(cli)


if __name__ == "__main__":
    main()
